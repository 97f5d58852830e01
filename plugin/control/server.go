package control

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// The bounds of a listener.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second // of a whole request
	writeTimeout  = 30 * time.Second // of an answer, from when it is ready
	idleTimeout   = time.Minute

	maxHeader  = 16 << 10
	maxBody    = api.MaxRequest
	maxAtOnce  = 4           // requests that blocks work on
	maxLong    = 2           // requests besides these that may take long
	slotWait   = time.Second // how long another one waits for its turn
	maxConns   = 256         // beyond, the one that has waited longest is closed
	maxPending = 64 << 20    // bytes of answers that clients have not read yet

	endGrace = 5 * time.Second // for requests under way, at the end
)

// server is a listener and what serves it.
type server struct {
	listener net.Listener
	holds    []*hold // the last one serves; guarded by the registry's lock
	now      atomic.Pointer[hold]

	web     *http.Server
	routes  *http.ServeMux
	slots   chan struct{} // has as many as there are requests at work
	long    chan struct{} // likewise, of those that may take long
	conns   conns
	pending atomic.Int64  // bytes of answers that are on their way
	feed    feed          // for those who watch
	done    chan struct{} // closed when nothing is accepted any more
	grace   time.Duration

	history *history
	every   time.Duration      // from one sample of the history to the next; 0: none are taken
	forget  context.CancelFunc // ends the samples
	sampled chan struct{}      // closed when no more are taken
}

func newServer(h *hold) *server {
	s := &server{
		holds: []*hold{h},
		slots: make(chan struct{}, maxAtOnce),
		long:  make(chan struct{}, maxLong),
		conns: newConns(maxConns),
		done:  make(chan struct{}),
		grace: endGrace,

		history: newHistory(),
		forget:  func() {},
		sampled: make(chan struct{}),
	}
	s.now.Store(h)
	s.feed.look, s.feed.every, s.feed.patience = s.statusEvent, lookEvery, eventTimeout
	s.routes = newMux()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	s.web = &http.Server{
		Handler:                      s,
		Protocols:                    protocols,
		ReadHeaderTimeout:            headerTimeout,
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,
		ConnContext:                  s.conns.add,
		ConnState:                    s.conns.changed,
		ErrorLog:                     stdlog.New(io.Discard, "", 0), // clients' faults; those of handlers are logged here
	}
	return s
}

// held returns the place of a key's hold, or -1.
func (s *server) held(key any) int {
	return slices.IndexFunc(s.holds, func(h *hold) bool { return h.key == key })
}

// start serves a listener.
func (s *server) start(l net.Listener) {
	s.listener = l
	ctx, forget := context.WithCancel(context.Background())
	s.forget = forget
	go func() {
		defer close(s.sampled)
		if s.every > 0 {
			s.history.run(ctx, s.every, s.look)
		}
	}()
	go func() {
		defer close(s.done)
		if err := s.web.Serve(acceptor{l, s}); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			log.Errorf("control: %s: %v", l.Addr(), err)
		}
	}()
}

// end closes what the server has. It waits for requests at work, for a limited time.
func (s *server) end() {
	s.listener.Close()
	s.forget()
	patience, cancel := context.WithTimeout(context.Background(), s.grace)
	defer cancel()
	for _, over := range []<-chan struct{}{s.conns.close(), s.now.Load().gate.close(), s.sampled} {
		select {
		case <-over:
		case <-patience.Done():
			log.Warningf("control: %s: requests under way are cut off", s.listener.Addr())
		}
	}
	s.web.Close()
	<-s.done
}

// drain waits for the requests of a hold that does not serve any more, for a limited time.
func (s *server) drain(h *hold) {
	select {
	case <-h.gate.close():
	case <-time.After(s.grace):
		log.Warningf("control: %s: a request of before the reload is still under way", s.listener.Addr())
	}
}

// acceptor makes TLS connections of those that come while the Corefile asks for TLS.
type acceptor struct {
	net.Listener
	server *server
}

func (a acceptor) Accept() (net.Conn, error) {
	c, err := a.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if h := a.server.now.Load(); h.tls != nil {
		return tls.Server(c, h.tls), nil
	}
	return c, nil
}

// ServeHTTP answers a request, if it may be asked here at all.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a, err := s.answerTo(w, r)
	if err != nil {
		p := (*problem)(nil)
		if !errors.As(err, &p) {
			p = &problem{Status: http.StatusInternalServerError, Detail: strings.ReplaceAll(err.Error(), "\n", "; ")}
		}
		a = p.answer()
	}
	if a.events {
		s.watch(w, r, a)
		return
	}
	s.reply(w, r, a)
}

// answerTo reads a request, and does what it asks for.
func (s *server) answerTo(w http.ResponseWriter, r *http.Request) (a *answer, err error) {
	defer func() {
		if p := recover(); p != nil {
			panicked(r.Method+" "+r.URL.Path, p)
			a, err = nil, errors.New("the server has a fault; its log says more")
		}
	}()
	h := s.now.Load()
	if err := admit(h, r); err != nil {
		return nil, err
	}
	to, err := s.route(r)
	if err != nil {
		return nil, err
	}
	if to.long {
		if err := wait(r, s.long); err != nil {
			return nil, err
		}
		defer func() {
			if a == nil || a.stream == nil { // reply gives it back
				<-s.long
			}
		}()
	}
	// The body is read before anything else is taken, because a client may send it slowly.
	var body []byte
	switch {
	case to.media != nil:
		kept, err := spoolBody(w, r, to.media)
		if err != nil {
			return nil, err
		}
		defer kept.Close()
		r.Body = kept
	case to.method == http.MethodPost:
		if body, err = readBody(w, r); err != nil {
			return nil, err
		}
	}
	h, err = s.enter(h, r)
	if err != nil {
		return nil, err
	}
	defer h.gate.leave()
	r = r.WithContext(context.WithValue(r.Context(), historyKey{}, s.history))
	job, err := to.parse(r, body, h.blocks())
	if err != nil {
		return nil, err
	}
	if to.free {
		return job()
	}
	return s.work(r, to.long, job)
}

// panicked logs a panic. what was done when it happened.
func panicked(what string, p any) {
	log.Errorf("control: %s: panic: %v\n%s", what, p, debug.Stack())
}

// inside calls do with the hold that serves, in its gate, for what is no request. It does nothing if the server ends, or between two
// Corefiles. A panic of do is logged.
func (s *server) inside(what string, do func(*hold)) {
	defer func() {
		if p := recover(); p != nil {
			panicked(what, p)
		}
	}()
	if h := s.now.Load(); h.gate.enter() {
		defer h.gate.leave()
		do(h)
	}
}

func admit(h *hold, r *http.Request) error {
	if refused := h.admit(r); refused != nil {
		refusals.Warningf("control: %s is refused: %s", peer(r), refused.Detail)
		return refused
	}
	return nil
}

// enter returns the hold that serves, and lets a request into its gate. If that is another hold than the one that has
// admitted the request, it admits it anew.
func (s *server) enter(admitted *hold, r *http.Request) (*hold, error) {
	for {
		h := s.now.Load()
		if h != admitted {
			if err := admit(h, r); err != nil {
				return nil, err
			}
			admitted = h
		}
		if h.gate.enter() {
			return h, nil
		}
		if s.now.Load() == h {
			return nil, errEnds()
		}
	}
}

func errEnds() error {
	return &problem{Status: http.StatusServiceUnavailable, Detail: "the server ends"}
}

// work calls a job, which calls blocks. There are a few at once; a long one has its slot already.
func (s *server) work(r *http.Request, long bool, job func() (*answer, error)) (*answer, error) {
	if !long {
		if err := wait(r, s.slots); err != nil {
			return nil, err
		}
		defer func() { <-s.slots }()
	}
	if !s.conns.phase(connOf(r), working) {
		return nil, errEnds()
	}
	return job()
}

// wait takes a slot. If there is none within a short time, the server is busy.
func wait(r *http.Request, slots chan struct{}) error {
	patience := time.NewTimer(slotWait)
	defer patience.Stop()
	select {
	case slots <- struct{}{}:
		return nil
	case <-r.Context().Done():
		return errEnds()
	case <-patience.C:
		return &problem{Status: http.StatusServiceUnavailable, Detail: "the server is busy with other requests"}
	}
}

// reply sends an answer. Nothing waits for that but the connection itself, and the slot of a stream.
func (s *server) reply(w http.ResponseWriter, r *http.Request, a *answer) {
	if a.stream != nil {
		defer func() { <-s.long }()
		s.conns.phase(connOf(r), writing)
		defer s.conns.phase(connOf(r), waiting)
		a.streamTo(w, s.web.WriteTimeout)
		return
	}
	size := int64(len(a.body))
	all := s.pending.Add(size)
	defer s.pending.Add(-size)
	if all > maxPending {
		a = (&problem{Status: http.StatusServiceUnavailable, Detail: "too many answers are being read"}).answer()
	}
	s.conns.phase(connOf(r), writing)
	defer s.conns.phase(connOf(r), waiting)
	a.writeTo(w, s.web.WriteTimeout)
}

// connOf returns the connection of a request. It is nil in tests without one.
func connOf(r *http.Request) *conn {
	c, _ := r.Context().Value(connKey{}).(*conn)
	return c
}

// peer says who asks.
func peer(r *http.Request) string {
	if c := connOf(r); c != nil {
		return c.peer
	}
	return r.RemoteAddr
}
