package snapshot

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/klauspost/compress/zstd"
)

// This file reads snapshots: the checks before a file is trusted, Frame Streams, and the limits. The records in the
// frames are decoded in record.go.

// maxWindow bounds the window that the decoder allocates, in bytes. Every decoder should support that size (RFC 8878,
// 3.1.1.1.2).
const maxWindow = 8 << 20

// readBuffer is the size in bytes of each of the two buffers, for packed and for unpacked bytes. A frame must fit in
// it.
const readBuffer = 128 << 10

// magic is the first four bytes of a zstd frame.
const magic = "\x28\xb5\x2f\xfd"

// Limits bounds what Read reads from a file before it returns an error.
type Limits struct {
	Records int   // 0: no limit
	Bytes   int64 // unpacked; 0: no limit
}

// Read reads the file at path. It calls header first, which may be nil, and then each for every record in the order
// of writing. Their arguments are valid only during the call. If one returns an error, Read returns it.
//
// Whatever the bytes of the file, the records that each gets are those that were written, from the first on. If the
// rest is damaged, Read returns an error, and Stats has the number of records up to there. Memory is bounded by the
// window of 8 MiB.
//
// The file must be a regular one without other hard links. It must belong to the process's user or to root, and not
// every user may write it. Group members may write it: Kubernetes' fsGroup makes files so. Read follows a symbolic
// link of the process's user or of root. Otherwise, and for anything wrong with the file, Read returns an error with
// a Reason.
func Read(path string, l Limits, header func(*Header) error, each func(*Record) error) (Stats, error) {
	f, info, err := open(path)
	if err != nil {
		return Stats{}, named(path, err)
	}
	defer f.Close()
	n, err := read(f, l, header, each)
	return Stats{n, info.Size()}, named(path, err)
}

// ReadFrom is Read for the content of a file, which the caller trusts, and returns the number of records.
func ReadFrom(f io.Reader, l Limits, header func(*Header) error, each func(*Record) error) (int, error) {
	return read(f, l, header, each)
}

// open opens a file that can be trusted, as Read defines it.
func open(path string) (*os.File, fs.FileInfo, error) {
	// The file's type is checked before opening: for some devices, opening alone has an effect.
	flags := openFlags
	link, err := os.Lstat(path)
	if err != nil {
		return nil, nil, err
	}
	info, linked := link, link.Mode()&fs.ModeSymlink != 0
	if linked {
		if err := distrustOwner(link); err != nil {
			return nil, nil, err
		}
		flags &^= noFollow
		if info, err = os.Stat(path); err != nil {
			return nil, nil, err
		}
	}
	if err := distrust(info); err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|flags, 0)
	if err != nil {
		return nil, nil, irregular(path, err)
	}
	// Another file may be at the path since. What counts is the open file.
	if info, err = f.Stat(); err == nil {
		err = distrust(info)
	}
	if now, e := os.Lstat(path); err == nil && linked && (e != nil || !os.SameFile(link, now)) {
		err = failure{permission, errors.New("its symbolic link was exchanged when it was opened")}
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// distrust returns an error if a file cannot be trusted, or nil.
func distrust(info fs.FileInfo) error {
	switch {
	case !info.Mode().IsRegular():
		return failure{notRegular, errors.New("no regular file")}
	case othersMayWrite(info):
		return failure{permission, errors.New("everybody may write it")}
	case hasOtherNames(info):
		return failure{notRegular, errors.New("it has other hard links")}
	}
	return distrustOwner(info)
}

// distrustOwner returns an error if a file belongs neither to the process's user nor to root. Root can do everything
// anyway.
func distrustOwner(info fs.FileInfo) error {
	if uid, ok := owner(info); ok && uid != 0 && int(uid) != os.Geteuid() {
		return failure{permission, fmt.Errorf("it belongs to another user, with the ID %d", uid)}
	}
	return nil
}

// isOwn reports whether a file belongs to the process's user.
func isOwn(info fs.FileInfo) bool {
	uid, ok := owner(info)
	return !ok || int(uid) == os.Geteuid()
}

// read reads a whole file, and returns the number of records that it has passed to each.
func read(f io.Reader, l Limits, header func(*Header) error, each func(*Record) error) (int, error) {
	in := &source{r: f, left: -1}
	if l.Bytes > 0 {
		// Bytes that cannot be compressed get a little longer when they are packed.
		in.left = l.Bytes + l.Bytes/64 + 4096
	}
	packed := bufio.NewReaderSize(in, readBuffer)
	switch begin, err := packed.Peek(len(magic)); {
	case string(begin) != magic[:len(begin)]:
		return 0, failure{foreign, errors.New("not compressed with zstd")}
	case err != nil:
		return 0, in.explain(err)
	}
	z, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return 0, in.explain(err)
	}
	defer z.Close()
	fr := &frames{r: bufio.NewReaderSize(z, readBuffer), left: l.Bytes, limited: l.Bytes > 0}
	var d decoder
	if err := start(fr, &d, header); err != nil {
		return 0, in.explain(err)
	}
	for n := 0; ; n++ {
		b, err := fr.next()
		if err == io.EOF {
			return n, nil
		}
		if err == nil && l.Records > 0 && n == l.Records {
			err = failure{tooLarge, fmt.Errorf("more than %d records", l.Records)}
		}
		if err != nil {
			return n, in.explain(err)
		}
		r, err := d.next(b)
		if err != nil {
			return n, in.explain(err)
		}
		if err := each(r); err != nil {
			return n, err
		}
	}
}

// start reads the control frame at the beginning and the header.
func start(fr *frames, d *decoder, header func(*Header) error) error {
	if err := fr.start(); err != nil {
		return err
	}
	b, err := fr.next()
	if err == io.EOF {
		return failure{foreign, errors.New("no header")}
	}
	if err != nil {
		return err
	}
	h, err := d.header(b)
	if err != nil || header == nil {
		return err
	}
	if err := header(h); err != nil {
		return callerError{err}
	}
	return nil
}

// frames reads Frame Streams.
type frames struct {
	r       *bufio.Reader
	used    int   // bytes of the last frame, which r has not discarded yet
	left    int64 // bytes that may be read, if limited
	limited bool
}

// take returns the next n bytes, at most readBuffer. They are valid until the next call.
func (fr *frames) take(n int) ([]byte, error) {
	fr.r.Discard(fr.used)
	fr.used = 0
	if fr.limited && int64(n) > fr.left {
		return nil, failure{tooLarge, errors.New("more bytes than allowed when unpacked")}
	}
	b, err := fr.r.Peek(n)
	if err != nil {
		return nil, err
	}
	fr.used = n
	fr.left -= int64(n)
	return b, nil
}

func (fr *frames) number() (uint32, error) {
	b, err := fr.take(4)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}

// control returns the type and the fields of a control frame. The zero in front of it has been read.
func (fr *frames) control() (kind uint32, fields []byte, err error) {
	n, err := fr.number()
	if err != nil {
		return 0, nil, err
	}
	if n < 4 || n > maxControl {
		return 0, nil, errors.New("a control frame is malformed")
	}
	b, err := fr.take(int(n))
	if err != nil {
		return 0, nil, err
	}
	return binary.BigEndian.Uint32(b), b[4:], nil
}

// start reads the control frame at the beginning.
func (fr *frames) start() error {
	notOurs := failure{foreign, errors.New("no dnstap in it")}
	n, err := fr.number()
	if err != nil {
		return err
	}
	if n != 0 {
		return notOurs
	}
	want := startFrame[8:]
	if n, err = fr.number(); err != nil {
		return err
	}
	if int(n) != len(want) {
		return notOurs
	}
	b, err := fr.take(len(want))
	if err != nil {
		return err
	}
	if !bytes.Equal(b, want) {
		return notOurs
	}
	return nil
}

// next returns the next data frame, which is valid until the next call. It returns io.EOF at the end of an undamaged
// file.
func (fr *frames) next() ([]byte, error) {
	n, err := fr.number()
	if err != nil {
		return nil, notYet(err)
	}
	if n > maxFrame {
		return nil, fmt.Errorf("a frame has %d bytes", n)
	}
	if n > 0 {
		b, err := fr.take(int(n))
		return b, notYet(err)
	}
	kind, _, err := fr.control()
	if err != nil {
		return nil, notYet(err)
	}
	if kind != controlStop {
		return nil, fmt.Errorf("a control frame of type %d among the records", kind)
	}
	// The decoder compares zstd's checksum only when it is read to its end.
	fr.r.Discard(fr.used)
	fr.used = 0
	switch _, err := fr.r.Peek(1); err {
	case nil:
		return nil, errors.New("something follows the end")
	default:
		return nil, err
	}
}

// notYet turns the end of the file in a place where it must not end into an error.
func notYet(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// source reads the file. It remembers an error, because the decoder may wrap or replace it.
type source struct {
	r    io.Reader
	left int64 // bytes that may be read; negative: all
	err  error
}

func (s *source) Read(b []byte) (int, error) {
	if s.left == 0 {
		s.err = failure{tooLarge, errors.New("the file is larger than allowed")}
		return 0, s.err
	}
	if s.left > 0 {
		b = b[:min(int64(len(b)), s.left)]
	}
	n, err := s.r.Read(b)
	if s.left > 0 {
		s.left -= int64(n)
	}
	if err != nil && err != io.EOF {
		s.err = err
		if Reason(err) == other {
			s.err = failure{disk, err}
		}
	}
	return n, err
}

// callerError is an error of the header function, which says nothing about the file.
type callerError struct{ error }

// explain returns the error, with its reason, for a reading that has ended with err.
func (s *source) explain(err error) error {
	var f failure
	var c callerError
	switch {
	case errors.As(err, &c):
		return c.error
	case s.err != nil:
		return s.err
	case errors.As(err, &f):
		return err
	case err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF):
		return failure{cutOff, errors.New("cut off")}
	case errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return failure{tooLarge, err}
	}
	return failure{corrupt, fmt.Errorf("corrupt: %w", err)}
}
