//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package snapshot

import (
	"io/fs"
	"os"
)

// This file has the file operations that differ by system, for Windows and other systems without flock(2).

// Flags for opening an existing file.
const noFollow, openFlags = 0, 0

// closeFirst says whether a file must be closed before it is renamed or removed. Windows requires that.
const closeFirst = true

// Without flock, another writer may remove a writer's temporary file as abandoned. Windows does not let it;
// elsewhere, the writer whose file is gone returns an error.
func lock(*os.File) (bool, error) { return true, nil }

// On these systems, the mode tells neither who may write the file nor who owns it.
func owner(fs.FileInfo) (uid uint32, ok bool) { return 0, false }
func othersMayWrite(fs.FileInfo) bool         { return false }
func hasOtherNames(fs.FileInfo) bool          { return false }

func syncFolder(string) error { return nil }

func isDisk(error) bool { return false }
