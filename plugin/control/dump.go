package control

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// ErrBadDump is what a Block's Load wraps where the fault is the dump's. Nothing is changed then.
var ErrBadDump = errors.New("bad dump")

// The forms of a dump, by their media types. No form of a web page can send either.
const (
	snapshotForm = api.SnapshotForm
	zoneForm     = api.ZoneForm
)

// Instance names this process, when it asks other servers.
var Instance = rand.Text()

const (
	maxLoad = api.MaxLoad

	// spoolMemory is how much of a dump is kept in memory until it is whole. What is beyond goes to a file.
	spoolMemory = 8 << 20
)

// dump streams what a block holds.
func dump(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	if r.Header.Get(api.InstanceHeader) == Instance {
		return nil, &problem{Status: http.StatusConflict, Detail: "it is this very server that asks for its dump"}
	}
	b, err := theBlock(r, blocks)
	if err != nil {
		return nil, err
	}
	form := snapshotForm
	for _, accept := range r.Header.Values("Accept") {
		for _, one := range strings.Split(accept, ",") {
			if t, params, err := mime.ParseMediaType(one); err == nil && params["q"] != "0" && (t == "text/plain" || t == zoneForm) {
				form = t
			}
		}
	}
	return func() (*answer, error) {
		contentType := form
		if form != snapshotForm {
			contentType += "; charset=us-ascii"
		}
		a := newAnswer(http.StatusOK, contentType, nil)
		a.stream = func(w io.Writer) error {
			n, err := b.Dump(w, form != snapshotForm)
			did(r, fmt.Sprintf("dump blocks=[%d]", b.id), fmt.Sprintf("%d answers", n), failedBy(err))
			return err
		}
		return a, nil
	}, nil
}

func failedBy(err error) []error {
	if err == nil {
		return nil
	}
	return []error{err}
}

// theBlock returns the block that the request names, or the only one. A dump is of one block.
func theBlock(r *http.Request, blocks []Block) (b numbered, err error) {
	values, err := parameters(r, nil, []string{"block"})
	if err != nil {
		return b, err
	}
	all, err := chosenParameters(blocks, values)
	switch {
	case err != nil:
		return b, err
	case len(all) != 1:
		return b, badRequest("block", "a dump is of one block: name one of the %d", len(all))
	}
	return all[0], nil
}

// load takes a dump in. Its body is whole by now.
func load(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	b, err := theBlock(r, blocks)
	if err != nil {
		return nil, err
	}
	form, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return nil, badRequest("Content-Type", "%v", err)
	}
	in := r.Body.(*spool)
	return func() (*answer, error) {
		done, err := b.Load(in, form == zoneForm)
		did(r, fmt.Sprintf("load blocks=[%d]", b.id), fmt.Sprintf("%d answers", done.Loaded), failedBy(err))
		if errors.Is(err, ErrBadDump) {
			return nil, badRequest("body", "%s; nothing is changed", strings.TrimPrefix(err.Error(), ErrBadDump.Error()+": "))
		}
		if err != nil {
			return nil, fmt.Errorf("%w; %d answers are loaded", err, done.Loaded)
		}
		if done.Refused == nil {
			done.Refused = map[string]int{}
		}
		return jsonAnswer(done), nil
	}, nil
}

// spool keeps the body of a request until it is whole: the first bytes in memory, the rest in a file without a name.
type spool struct {
	memory bytes.Buffer
	file   *os.File // nil: all is in memory
	size   int64
	at     int64 // the next byte to be read
}

// spoolBody reads a body of one of these media types. A client that sends nothing for a while is cut off, and so is one that is
// not done after streamTime.
func spoolBody(w http.ResponseWriter, r *http.Request, media []string) (_ *spool, err error) {
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || !slices.Contains(media, t) {
		return nil, &problem{Status: http.StatusUnsupportedMediaType, Detail: "Content-Type: " + strings.Join(media, " or ") + " is expected"}
	}
	c := http.NewResponseController(w)
	body := http.MaxBytesReader(w, r.Body, maxLoad)
	s := new(spool)
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	until, chunk := time.Now().Add(streamTime), make([]byte, 64<<10)
	for {
		deadline := time.Now().Add(readTimeout)
		if until.Before(deadline) {
			deadline = until
		}
		c.SetReadDeadline(deadline)
		n, err := body.Read(chunk)
		if n > 0 {
			if err := s.write(chunk[:n]); err != nil {
				return nil, fmt.Errorf("the dump cannot be kept until it is whole: %w", err)
			}
		}
		if err == io.EOF {
			c.SetReadDeadline(time.Time{})
			return s, nil
		}
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			return nil, &problem{Status: http.StatusRequestEntityTooLarge, Detail: "body: more than " + strconv.Itoa(maxLoad) + " bytes; nothing is changed"}
		}
		if err != nil {
			return nil, badRequest("body", "it is cut off after %d bytes; nothing is changed", s.size)
		}
	}
}

func (s *spool) write(b []byte) error {
	s.size += int64(len(b))
	if s.file == nil && s.memory.Len()+len(b) <= spoolMemory {
		s.memory.Write(b)
		return nil
	}
	if s.file == nil {
		f, err := os.CreateTemp("", "optcache-load-*")
		if err != nil {
			return err
		}
		os.Remove(f.Name()) // where an open file can be removed, nothing is left of it in any case
		s.file = f
	}
	_, err := s.file.Write(b)
	return err
}

// Read implements io.Reader.
func (s *spool) Read(b []byte) (n int, err error) {
	switch inMemory := int64(s.memory.Len()); {
	case s.at >= s.size:
		return 0, io.EOF
	case s.at < inMemory:
		n = copy(b, s.memory.Bytes()[s.at:])
	default:
		n, err = s.file.ReadAt(b, s.at-inMemory)
		if n > 0 {
			err = nil
		}
	}
	s.at += int64(n)
	return n, err
}

// Rewind makes Read begin anew.
func (s *spool) Rewind() { s.at = 0 }

// Close implements io.Closer.
func (s *spool) Close() error {
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	return errors.Join(f.Close(), ignoreGone(os.Remove(f.Name())))
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
