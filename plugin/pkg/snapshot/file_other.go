//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package snapshot

import (
	"io/fs"
	"os"
)

// Where there is no flock, two processes that write one file at the same time may destroy it; a reader notices.
const (
	readFlags  = os.O_RDONLY
	writeFlags = os.O_CREATE | os.O_WRONLY
)

// An open file may not be renamed or removed on Windows.
const closeFirst = true

func lock(*os.File) (bool, error) { return true, nil }

// The mode does not say there who may write.
func othersMayWrite(fs.FileInfo) bool { return false }
func hasOtherNames(fs.FileInfo) bool  { return false }

func syncFolder(string) error { return nil }

func isDisk(error) bool { return false }
