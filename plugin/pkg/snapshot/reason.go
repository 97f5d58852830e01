package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// This file classifies errors by their reason.

// The words that Reason returns.
const (
	missing      = "missing"
	permission   = "permission"
	notRegular   = "not_regular"
	foreign      = "foreign"
	otherVersion = "version"
	cutOff       = "cut_off"
	corrupt      = "corrupt"
	tooLarge     = "too_large"
	disk         = "disk"
	other        = "other"
)

// failure is an error with its reason.
type failure struct {
	reason string
	cause  error
}

func (f failure) Error() string { return f.cause.Error() }
func (f failure) Unwrap() error { return f.cause }

// Reason returns a word for an error of this package, for use as a metric's label:
//
//   - missing: there is no file, or no folder to write it to
//   - permission: the process may not read or write the file, the file belongs to another user, or every user may
//     write it
//   - not_regular: the file is a folder, a FIFO or another file that is not regular, or has other hard links
//   - foreign: the file is not a snapshot
//   - version: the snapshot has an unknown version of the format
//   - cut_off: the file ends too early
//   - corrupt: the file has changed since it was written
//   - too_large: the file holds more than Limits
//   - disk: the disk is full, or fails
//   - other: all other errors, and errors of the caller's functions
//
// For nil it returns "".
func Reason(err error) string {
	var f failure
	switch {
	case err == nil:
		return ""
	case errors.As(err, &f):
		return f.reason
	case errors.Is(err, fs.ErrNotExist):
		return missing
	case errors.Is(err, fs.ErrPermission):
		return permission
	case isDisk(err):
		return disk
	}
	return other
}

// named adds the file's path to an error that has none.
func named(path string, err error) error {
	var p *fs.PathError
	var l *os.LinkError
	if err == nil || errors.As(err, &p) || errors.As(err, &l) {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}
