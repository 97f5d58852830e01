package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// What Reason returns.
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

// Reason returns a word for an error of this package, for a metric's label:
//
//   - missing: there is no file, or no folder to write it to
//   - permission: the file may not be read or written, or others may write it
//   - not_regular: it is a folder, a FIFO or another thing that is no regular file
//   - foreign: it is no snapshot
//   - version: it is one, of a version that is not known here
//   - cut_off: it ends too early
//   - corrupt: it has changed since it was written
//   - too_large: it holds more than Limits
//   - disk: the disk is full, or fails
//   - other: anything else, and errors of the caller's functions
//
// For nil it is "".
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

// named returns the error with the file's path, if it has none yet.
func named(path string, err error) error {
	var p *fs.PathError
	var l *os.LinkError
	if err == nil || errors.As(err, &p) || errors.As(err, &l) {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}
