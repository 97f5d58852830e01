//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// This file has the file operations that differ by system, for systems with flock(2).

// Flags for opening an existing file. O_NONBLOCK: opening a FIFO without a writer must not block the process.
const (
	noFollow  = unix.O_NOFOLLOW
	openFlags = noFollow | unix.O_NONBLOCK
)

// closeFirst says whether a file must be closed before it is renamed or removed. Here it need not, and keeps its
// lock.
const closeFirst = false

// lock takes the exclusive lock of a file that is open for writing. It returns false if another open file has the
// lock. The lock ends when the file is closed, or the process dies.
func lock(f *os.File) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, &fs.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
	}
}

// othersMayWrite reports whether every user may write the file.
func othersMayWrite(info fs.FileInfo) bool { return info.Mode()&0o002 != 0 }

// hasOtherNames reports whether the file has more than one hard link.
func hasOtherNames(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Nlink > 1
}

// owner returns the user ID of a file's owner. ok is false if the system does not tell.
func owner(info fs.FileInfo) (uid uint32, ok bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return stat.Uid, true
}

// syncFolder makes a rename in a folder durable. It ignores that some file systems cannot do so.
func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return nil
}

func isDisk(err error) bool {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT, unix.EFBIG, unix.EIO, unix.EROFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
