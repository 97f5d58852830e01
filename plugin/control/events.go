package control

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// This file is /v1/events: server-sent events (WHATWG HTML, section 9.2), by which a client sees how the blocks are, again and
// again. Blocks are asked once for all watchers together. No queue is kept: a watcher that reads slowly misses events, and one
// that does not read at all is cut off.

// The bounds of events.
const (
	lookEvery    = time.Second      // from one event to the next
	maxWatchers  = 32               // of one listener
	eventTimeout = 10 * time.Second // of writing one event
)

// event is what all watchers get at one moment. Nobody changes it.
type event struct {
	text []byte
	next chan struct{} // closed when a newer event is there
}

// feed makes events for as long as there is a watcher. It is safe for concurrent use.
type feed struct {
	look     func() []byte // returns the next event's text, or nil if there is none now
	every    time.Duration
	patience time.Duration // for a watcher that does not read

	mu       sync.Mutex // guards what follows
	watchers int
	latest   *event
	stop     chan struct{} // closed when the last watcher leaves
}

// join adds a watcher. It returns false if there are too many.
func (f *feed) join() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watchers >= maxWatchers {
		return false
	}
	if f.watchers++; f.watchers == 1 {
		f.latest, f.stop = &event{next: make(chan struct{})}, make(chan struct{})
		go f.run(f.stop)
	}
	return true
}

func (f *feed) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watchers--; f.watchers == 0 {
		close(f.stop)
	}
}

// run makes events until stop is closed.
func (f *feed) run(stop chan struct{}) {
	ticks := time.NewTicker(f.every)
	defer ticks.Stop()
	for {
		if text := f.look(); text != nil {
			f.publish(stop, text)
		}
		select {
		case <-ticks.C:
		case <-stop:
			return
		}
	}
}

// publish makes an event the latest one, unless the watchers that it is for have left and others have come.
func (f *feed) publish(stop chan struct{}, text []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stop != stop {
		return
	}
	last := f.latest
	f.latest = &event{text: text, next: make(chan struct{})}
	close(last.next)
}

func (f *feed) now() *event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.latest
}

// statusEvent returns how the blocks are now, as an event. It returns nil if nothing can be said now.
func (s *server) statusEvent() (text []byte) {
	s.inside("/v1/events", func(h *hold) {
		all, _ := chosen(h.blocks(), "block", nil) // all are there
		text = eventText("status", statusEvent{time.Now().UTC(), statusOf(s.history, all)})
	})
	return text
}

// statusEvent is the data of an event "status".
type statusEvent struct {
	Time time.Time `json:"time"`
	statusAnswer
}

// eventText returns an event in the form of text/event-stream.
func eventText(kind string, data any) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "event: %s\ndata: ", kind)
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(data); err != nil {
		panic(err) // a number of a block that is none
	}
	b.WriteByte('\n')
	return b.Bytes()
}

func events(r *http.Request, _ []byte, _ []Block) (func() (*answer, error), error) {
	_, err := parameters(r, nil, nil)
	return func() (*answer, error) {
		a := newAnswer(http.StatusOK, "text/event-stream", nil)
		a.events = r.Method == http.MethodGet
		return a, nil
	}, err
}

// watch sends events until the client leaves or does not read, the server ends, or the client may not watch any more: before each
// event it is admitted anew, because a reload or a change of the token's file may have changed who is. Meanwhile it is between
// requests for all others: it has no slot and is in no gate, and its connection is one that waits for its client.
func (s *server) watch(w http.ResponseWriter, r *http.Request, a *answer) {
	if !s.feed.join() {
		s.reply(w, r, (&problem{Status: http.StatusServiceUnavailable, Detail: fmt.Sprintf("%d clients watch already", maxWatchers)}).answer())
		return
	}
	defer s.feed.leave()
	a.setHeader(w.Header())
	c := http.NewResponseController(w)
	c.SetReadDeadline(time.Time{}) // it is for requests, and ends what waits for the client to leave
	for e := s.feed.now(); ; e = s.feed.now() {
		if s.now.Load().admit(r) != nil {
			return
		}
		c.SetWriteDeadline(time.Now().Add(s.feed.patience))
		if _, err := w.Write(e.text); err != nil {
			return
		}
		if c.Flush() != nil {
			return
		}
		s.conns.phase(connOf(r), waiting) // since now: connections that have waited longer make room first
		select {
		case <-e.next:
		case <-r.Context().Done():
			return
		}
	}
}
