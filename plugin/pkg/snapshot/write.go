package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// This file writes snapshots, and replaces the previous one at a single moment. The frames are encoded in record.go.

// level is the encoder's level. With the records of BenchmarkWrite, the next level makes the file 4 % smaller and
// takes 1.8 times as long.
const level = zstd.SpeedFastest

// window is how far the encoder looks back, in bytes. Its memory is a small multiple of that.
const window = 1 << 20

// Frame Streams: a control frame is a zero in place of the length, and then its length, type and fields.
const (
	contentType = "protobuf:dnstap.Dnstap"

	controlStart = 2
	controlStop  = 3

	fieldContentType = 1

	maxControl = 512 // bytes
)

var startFrame, stopFrame = control(controlStart, contentType), control(controlStop, "")

func control(kind uint32, content string) []byte {
	var body []byte
	body = binary.BigEndian.AppendUint32(body, kind)
	if content != "" {
		body = binary.BigEndian.AppendUint32(body, fieldContentType)
		body = binary.BigEndian.AppendUint32(body, uint32(len(content)))
		body = append(body, content...)
	}
	b := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 0}, uint32(len(body)))
	return append(b, body...)
}

// Stats says how much was written or read.
type Stats struct {
	Records int
	Bytes   int64 // of the file, compressed
}

// Temporary follows the path in the name of a file that is being written. Digits follow it: PATH.tmp123.
const Temporary = ".tmp"

// IsBeside reports whether name is one of the files that belong to a snapshot at path: a temporary file, or that of its marks.
func IsBeside(name, path string) bool {
	marks := path + marksSuffix
	return isTemporary(name, path) || name == marks || isTemporary(name, marks)
}

// isTemporary reports whether Write to path may use name for its temporary file. Write removes files with such names
// that are abandoned.
func isTemporary(name, path string) bool {
	digits, ok := strings.CutPrefix(name, path+Temporary)
	return ok && strings.Trim(digits, "0123456789") == ""
}

// Write writes a file with the header and the records. It uses at most one core and a few MiB of memory. It is done
// with a record when it asks for the next one.
//
// Write writes to a new file PATH.tmpDIGITS, and renames it to path when all of it is on the disk. At every moment
// the old file or the new file is at path, whole, even if the process is killed or power is lost. Of several writers,
// the one that ends last wins. Write removes temporary files that killed processes of the same user have left. It
// writes to no other file: not to one of another user, and not to the target of a symbolic link. It replaces a
// symbolic link at path.
//
// After an error, path is unchanged and the temporary file is removed. There are two exceptions. If the folder cannot
// be synced, the new file is at path already. If another user who may write to the folder exchanges the file before
// the rename, that file is at path, and the error says so. It is an error if the header or a record is not what its
// type allows.
func Write(path string, h Header, records iter.Seq[*Record]) (stats Stats, err error) {
	sweep(path)
	sweep(path + marksSuffix)
	f, err := create(path)
	if err != nil {
		return stats, named(path, err)
	}
	renamed := false
	defer func() {
		// The lock is released after the file is removed, so that no other writer takes the file for abandoned
		// before.
		if closeFirst {
			f.Close()
		}
		if !renamed {
			os.Remove(f.Name())
		}
		f.Close()
	}()
	if stats, err = write(f, h, records); err != nil {
		return Stats{}, named(path, err)
	}
	if err := f.Sync(); err != nil {
		return Stats{}, err
	}
	if closeFirst {
		f.Close()
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return Stats{}, irregular(path, err)
	}
	renamed = true
	info, err := os.Lstat(path)
	if err == nil {
		err = distrust(info)
	}
	if err != nil {
		return Stats{}, named(path, fmt.Errorf("it was exchanged when it was written: %w", err))
	}
	return stats, named(path, syncFolder(filepath.Dir(path)))
}

// create makes the temporary file for path: new, empty, with the mode 0600, and locked.
func create(path string) (*os.File, error) {
	for range 10 {
		f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+Temporary+"*") // O_EXCL
		if err != nil {
			return nil, err
		}
		locked, err := lock(f)
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			return nil, err
		}
		if locked && isAt(f, f.Name()) {
			return f, nil
		}
		f.Close() // another writer has removed the file before it was locked
	}
	return nil, errSwept
}

var errSwept = errors.New("its temporary files disappear")

// sweep removes temporary files for path that killed writers of this user have left. It ignores errors: a file that
// stays takes up room but does no harm.
func sweep(path string) {
	dir := filepath.Dir(path)
	folder, err := os.Open(dir)
	if err != nil {
		return
	}
	defer folder.Close()
	path = filepath.Join(dir, filepath.Base(path))
	for {
		names, err := folder.Readdirnames(1024) // in parts: it may be a large folder of many users
		for _, name := range names {
			if name = filepath.Join(dir, name); isTemporary(name, path) {
				removeAbandoned(name)
			}
		}
		if err != nil {
			return
		}
	}
}

// removeAbandoned removes a file that belongs to this user, if no writer holds its lock.
func removeAbandoned(name string) {
	info, err := os.Lstat(name)
	if err != nil || distrust(info) != nil || !isOwn(info) {
		return
	}
	f, err := os.OpenFile(name, os.O_WRONLY|openFlags, 0)
	if err != nil {
		return
	}
	if locked, err := lock(f); err == nil && locked && isAt(f, name) {
		if closeFirst {
			f.Close()
		}
		os.Remove(name)
	}
	f.Close()
}

// isAt reports whether the open file f is the file at name.
func isAt(f *os.File, name string) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	at, err := os.Lstat(name)
	return err == nil && os.SameFile(info, at)
}

// irregular adds a reason to err if the file at path is not a regular one.
func irregular(path string, err error) error {
	if info, e := os.Lstat(path); e == nil && !info.Mode().IsRegular() {
		return failure{notRegular, err}
	}
	return err
}

// WriteTo writes the content of a file to f. It uses as much of a core and of memory as Write does.
func WriteTo(f io.Writer, h Header, records iter.Seq[*Record]) (Stats, error) {
	return write(f, h, records)
}

// write writes the content of a file.
func write(f io.Writer, h Header, records iter.Seq[*Record]) (stats Stats, err error) {
	out := &counter{w: f}
	z, err := zstd.NewWriter(out, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level),
		zstd.WithWindowSize(window), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(true))
	if err != nil {
		return stats, err
	}
	defer z.Close()
	var e encoder
	head, err := e.header(&h)
	if err != nil {
		return stats, err
	}
	if _, err := z.Write(startFrame); err != nil {
		return stats, err
	}
	if _, err := z.Write(head); err != nil {
		return stats, err
	}
	for r := range records {
		frame, err := e.record(r)
		if err != nil {
			return stats, err
		}
		if _, err := z.Write(frame); err != nil {
			return stats, err
		}
		stats.Records++
	}
	if _, err := z.Write(stopFrame); err != nil {
		return stats, err
	}
	err = z.Close()
	stats.Bytes = out.n
	return stats, err
}

// counter counts the bytes that are written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
