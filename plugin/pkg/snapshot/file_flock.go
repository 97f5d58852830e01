//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Flags of open. O_NONBLOCK: a FIFO that nobody else has open must not stop the process.
const (
	readFlags  = os.O_RDONLY | unix.O_NONBLOCK
	writeFlags = os.O_CREATE | os.O_WRONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK
)

// An open file may be renamed and removed, and keeps its lock.
const closeFirst = false

// lock takes the lock of a file that has been opened for writing, and returns false if another has it. Closing
// the file gives it back; so does the death of the process.
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

// othersMayWrite says whether anybody may write the file.
func othersMayWrite(info fs.FileInfo) bool { return info.Mode()&0o002 != 0 }

// hasOtherNames says whether the file has hard links.
func hasOtherNames(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Nlink > 1
}

// syncFolder makes a rename in a folder survive a loss of power. There are file systems that cannot.
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
