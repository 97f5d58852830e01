package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"
)

// answer is what a client gets. It is whole before the first byte is sent, so that blocks and slots do not wait for
// clients. An answer with events has no body: it goes on for as long as its client reads.
type answer struct {
	status int
	header http.Header
	body   []byte
	events bool
	stream func(io.Writer) error // in place of a body: writes it while it is made
}

func newAnswer(status int, contentType string, body []byte) *answer {
	a := &answer{status: status, header: make(http.Header), body: body}
	if contentType != "" {
		a.header.Set("Content-Type", contentType)
	}
	return a
}

// jsonAnswer is an answer with a value that can be encoded.
func jsonAnswer(value any) *answer {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		panic(err) // a number of a block that is none
	}
	return newAnswer(http.StatusOK, "application/json", b.Bytes())
}

// setHeader sets the headers of a response.
func (a *answer) setHeader(h http.Header) {
	for name, values := range a.header {
		h[name] = values
	}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	if h.Get("Content-Security-Policy") == "" {
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	}
	if a.status != http.StatusNoContent && !a.events && a.stream == nil {
		h.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
}

// writeTo sends an answer, and returns when the kernel has it. A client that has not read it in time is cut off.
func (a *answer) writeTo(w http.ResponseWriter, timeout time.Duration) {
	a.setHeader(w.Header())
	c := http.NewResponseController(w)
	c.SetWriteDeadline(time.Now().Add(timeout)) // the server's own deadline counts from the request on, and work may take long
	w.WriteHeader(a.status)
	w.Write(a.body)
	c.Flush()
}

// streamTo sends a stream. A client that takes nothing for the time timeout is cut off, and so is one that is not done after
// streamTime. If the stream fails, the client gets a problem where nothing is sent yet; or else the connection is closed, which
// tells it that the stream has no end.
func (a *answer) streamTo(w http.ResponseWriter, timeout time.Duration) {
	out := &streamWriter{a: a, w: w, c: http.NewResponseController(w), each: timeout, until: time.Now().Add(streamTime)}
	err := a.stream(out)
	if err == nil && !out.begun {
		_, err = out.Write(nil)
	}
	if err == nil {
		err = out.c.Flush()
	}
	switch {
	case err == nil:
	case out.begun:
		faults.Warningf("control: a stream is cut off: %v", err)
		panic(http.ErrAbortHandler)
	default:
		p := (*problem)(nil)
		if !errors.As(err, &p) {
			p = &problem{Status: http.StatusInternalServerError, Detail: err.Error()}
		}
		p.answer().writeTo(w, timeout)
	}
}

// streamTime is how long a stream may take, in or out.
const streamTime = 15 * time.Minute

// streamWriter bounds the time of each write, and of all.
type streamWriter struct {
	a     *answer
	w     http.ResponseWriter
	c     *http.ResponseController
	each  time.Duration
	until time.Time
	begun bool
}

func (s *streamWriter) Write(b []byte) (int, error) {
	deadline := time.Now().Add(s.each)
	if s.until.Before(deadline) {
		deadline = s.until
	}
	s.c.SetWriteDeadline(deadline)
	if !s.begun {
		s.begun = true
		s.a.setHeader(s.w.Header())
		s.w.WriteHeader(s.a.status)
	}
	return s.w.Write(b)
}
