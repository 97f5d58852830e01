// Package regular reads the small files that a Corefile names: secrets, passwords, tokens, certificates, lists. It reads regular
// files only. Opening a FIFO or a device may block for ever, have an effect of its own, or bring bytes without an end.
package regular

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// Open opens a file for reading if it is a regular one. Symbolic links are followed: files of mounted Secrets are links. It does
// not block. Errors name the file.
func Open(path string) (*os.File, fs.FileInfo, error) {
	// The file's type is checked before opening: for some devices, opening alone has an effect. What counts is the open file.
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if err := check(path, info); err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	if info, err = f.Stat(); err == nil {
		err = check(path, info)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

func check(path string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", path)
	}
	return nil
}

// Read returns what is in a regular file. One with more than most bytes is an error, and is not read further.
func Read(path string, most int64) ([]byte, error) {
	f, _, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return b, nil
}

// Check returns an error if one of the files cannot be opened by Open. Words that are "" are passed over.
func Check(paths ...string) error {
	for _, path := range paths {
		if path == "" {
			continue
		}
		f, _, err := Open(path)
		if err != nil {
			return err
		}
		f.Close()
	}
	return nil
}
