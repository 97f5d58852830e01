package snapshot

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

// maxWindow is the size in bytes of the window that the decoder allocates at the most: what every
// decoder should support (RFC 8878, 3.1.1.1.2).
const maxWindow = 8 << 20

// readBuffer is the size in bytes of the buffers for packed and for unpacked bytes. A frame has to fit.
const readBuffer = 128 << 10

// magic begins a zstd frame.
const magic = "\x28\xb5\x2f\xfd"

// Limits says how much of a file is read at the most, before Read gives up.
type Limits struct {
	Records int   // 0: no limit
	Bytes   int64 // unpacked; 0: no limit
}

// Read reads a file. It calls header first, which may be nil, and then each for every record, in the order in which they
// were written. What they get is theirs only during the call. If one returns an error, Read ends with it.
//
// Whatever the bytes of the file, all records that each gets are what was written, from the first on. If then something
// is wrong, there is an error, and Stats says how many there were. Memory is bounded by
// the window of 8 MiB, whatever the file holds.
//
// The file may be a symbolic link. It is an error if it is not a regular file, or if everybody may write it. For all errors
// see Reason.
func Read(path string, l Limits, header func(*Header) error, each func(*Record) error) (Stats, error) {
	f, err := os.OpenFile(path, readFlags, 0)
	if err != nil {
		return Stats{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return Stats{}, err
	case !info.Mode().IsRegular():
		return Stats{}, named(path, failure{notRegular, errors.New("no regular file")})
	case othersMayWrite(info):
		return Stats{}, named(path, failure{permission, errors.New("everybody may write it")})
	}
	n, err := read(f, l, header, each)
	return Stats{n, info.Size()}, named(path, err)
}

// read reads all of a file, and returns the number of records that each has got.
func read(f io.Reader, l Limits, header func(*Header) error, each func(*Record) error) (int, error) {
	in := &source{r: f, left: -1}
	if l.Bytes > 0 {
		// Bytes that cannot be compressed get a little longer.
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

// start reads what comes before the records.
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
	used    int   // bytes of the last frame, which are still in r
	left    int64 // bytes that may be read
	limited bool
}

// take returns the next n bytes, at most readBuffer, valid until the next call.
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

// number returns the next four bytes as a number.
func (fr *frames) number() (uint32, error) {
	b, err := fr.take(4)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}

// control returns the type and the fields of a control frame, of which the zero in front has been read.
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

// next returns the next data frame, valid until the next call, or io.EOF if there is none and all is well.
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
	// The decoder compares its checksum when it comes to the end.
	fr.r.Discard(fr.used)
	fr.used = 0
	switch _, err := fr.r.Peek(1); err {
	case nil:
		return nil, errors.New("something follows the end")
	default:
		return nil, err
	}
}

// notYet is for an end where there must be none.
func notYet(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// source reads the file, and remembers an error of that.
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

// callerError is an error of a caller's function, which says nothing about the file.
type callerError struct{ error }

// explain returns what is wrong with the file if reading it has ended with an error.
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
