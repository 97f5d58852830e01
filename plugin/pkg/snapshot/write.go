package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
)

// level is how hard the encoder tries. For BenchmarkWrite's records, the next one makes the file 4% smaller
// and takes 1.8 times as long.
const level = zstd.SpeedFastest

// window is the size in bytes of what the encoder looks back at; its memory is a small multiple of that.
const window = 1 << 20

// Frame Streams: a control frame is a zero in place of a length, then its length, type and fields.
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

// Stats says what was written or read.
type Stats struct {
	Records int
	Bytes   int64 // of the file, compressed
}

// Temporary is what is behind the path in the name of the file that is being written.
const Temporary = ".tmp"

// Write writes a file with the records, at the cost of at most one core and of a few MiB of memory. A record may
// be used again when the next one is asked for.
//
// It writes PATH.tmp, which it renames to path when all is on the disk. At every moment there is
// either the old file or the new one at path, whole, even if the process is killed or the power is lost.
// What a killed process has left at PATH.tmp is overwritten. A symbolic link at path is replaced.
//
// After an error, path is as it was and PATH.tmp is gone; only if the folder cannot be synced,
// the new file is there already. It is an error if another Write to path is under way, in any process, if there
// is something else than a regular file at PATH.tmp, or if the header or a record is not what its type allows.
func Write(path string, h Header, records iter.Seq[*Record]) (stats Stats, err error) {
	f, err := create(path + Temporary)
	if err != nil {
		return stats, named(path, err)
	}
	renamed := false
	defer func() {
		// The lock goes last, with the file: what is at PATH.tmp until then is ours.
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
	return stats, named(path, syncFolder(filepath.Dir(path)))
}

// create opens an empty file with the mode 0600, locked.
func create(path string) (*os.File, error) {
	// Another may rename or remove the file after it has been opened here and before it is locked. Then it is not
	// to be touched, and the name is free for a new one.
	for range 10 {
		f, err := os.OpenFile(path, writeFlags, 0o600)
		if err != nil {
			return nil, irregular(path, err)
		}
		ours, err := claim(f)
		if err == nil && ours {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, errBusy
}

var errBusy = errors.New("somebody else is writing it")

// irregular gives an error its reason if that is the kind of what is at the path.
func irregular(path string, err error) error {
	if info, e := os.Lstat(path); e == nil && !info.Mode().IsRegular() {
		return failure{notRegular, err}
	}
	return err
}

// claim locks and empties a file. It returns false if there is another one at its path by now.
func claim(f *os.File) (bool, error) {
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		return false, failure{notRegular, fmt.Errorf("%s is no regular file", f.Name())}
	}
	switch locked, err := lock(f); {
	case err != nil:
		return false, err
	case !locked:
		return false, errBusy
	}
	now, err := os.Lstat(f.Name())
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(info, now) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if hasOtherNames(now) {
		return false, failure{notRegular, fmt.Errorf("%s has hard links", f.Name())}
	}
	if err := f.Chmod(0o600); err != nil {
		return false, err
	}
	return true, f.Truncate(0)
}

// write writes all of a file.
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
