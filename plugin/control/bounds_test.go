package control

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// dial returns a connection on which a client has sent something.
func dial(t *testing.T, s *server, text string) net.Conn {
	t.Helper()
	at := s.listener.Addr()
	c, err := net.Dial(at.Network(), at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return c
}

// Of 100 clients at once each gets an answer: some what they ask for, and the others 503. No more than a few are
// worked on at once, and each client gets there by asking again.
func TestHundredClients(t *testing.T) {
	t.Parallel()
	var now, most atomic.Int64
	b := &fakeBlock{answers: answersOf(3), before: func() {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(time.Millisecond)
		now.Add(-1)
	}}
	_, c := started(t, nil, b)
	var served, busy atomic.Int64
	var clients sync.WaitGroup
	for range 100 {
		clients.Go(func() {
			for range 10_000 {
				r, err := c.Get("http://x/v1/lookup?name=www1.example.org")
				if err != nil {
					t.Error(err)
					return
				}
				text, _ := io.ReadAll(r.Body)
				r.Body.Close()
				if r.StatusCode == 200 {
					served.Add(1)
					return
				}
				busy.Add(1)
				wantProblem(t, r.StatusCode, r.Header, text, 503, "busy")
				if r.Header.Get("Retry-After") != "1" {
					t.Error("no Retry-After")
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	clients.Wait() // some may have waited for a second, and been told that the server is busy
	if served.Load() != 100 || most.Load() > maxAtOnce {
		t.Errorf("%d are served, %d times busy, %d at once", served.Load(), busy.Load(), most.Load())
	}
}

// While all slots are taken, the server says that it lives.
func TestHealthNeedsNoSlot(t *testing.T) {
	t.Parallel()
	begun, goOn := make(chan bool), make(chan bool)
	_, c := started(t, nil, &fakeBlock{before: func() { begun <- true; <-goOn }})
	var clients sync.WaitGroup
	for range maxAtOnce {
		clients.Go(func() { get(c, "http://x/v1/status") })
		<-begun
	}
	mustGet(t, c, "http://x/v1/status", 503)
	mustGet(t, c, "http://x/healthz", 204)
	mustGet(t, c, "http://x/v1/openapi.json", 200)
	close(goOn)
	clients.Wait()
	go func() { <-begun }()
	mustGet(t, c, "http://x/v1/status", 200)
}

// Clients that do not read their answers hold no slot: many of them leave the server as it was.
func TestSlowReadersHoldNothing(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{answers: answersOf(2000)}
	s, c := started(t, func(s *server) { s.grace = 10 * time.Millisecond }, b)
	for i := range 3 * maxAtOnce {
		dial(t, s, "GET /v1/list?limit=2000 HTTP/1.1\r\nHost: x\r\n\r\n")
		eventually(t, "the answer waits for its client", func() bool { return s.conns.in(writing) == i+1 })
	}
	if s.pending.Load() == 0 || len(s.slots) != 0 {
		t.Errorf("%d bytes are on their way, %d slots are held", s.pending.Load(), len(s.slots))
	}
	mustGet(t, c, "http://x/v1/lookup?name=www1.example.org", 200)
	s.end()
	eventually(t, "nothing is on its way", func() bool { return s.pending.Load() == 0 })
}

func TestSlowReadersAreCutOff(t *testing.T) {
	t.Parallel()
	s, _ := started(t, func(s *server) { s.web.WriteTimeout = 2 * time.Second }, &fakeBlock{answers: answersOf(2000)})
	dial(t, s, "GET /v1/list?limit=2000 HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "the answer waits for its client", func() bool { return s.conns.in(writing) == 1 })
	eventually(t, "the connection goes", func() bool { return s.conns.count() == 0 && s.pending.Load() == 0 })
}

// What waits for slow readers is bounded in bytes.
func TestAnswersOnTheirWayAreBounded(t *testing.T) {
	t.Parallel()
	s, c := started(t, nil, &fakeBlock{})
	s.pending.Add(maxPending)
	mustGet(t, c, "http://x/v1/status", 503)
	s.pending.Add(-maxPending)
	mustGet(t, c, "http://x/v1/status", 200)
	eventually(t, "none is counted", func() bool { return s.pending.Load() == 0 })
}

// Clients that do not get to the end of their requests hold no slot, and are cut off.
func TestSlowWritersHoldNothing(t *testing.T) {
	t.Parallel()
	s, c := started(t, func(s *server) {
		s.web.ReadHeaderTimeout, s.web.ReadTimeout = 2*time.Second, 2*time.Second
	}, &fakeBlock{})
	var slow []net.Conn
	for range maxAtOnce {
		slow = append(slow, dial(t, s, ""), dial(t, s, "GET /v1/status HTTP/1.1\r\nHo"),
			dial(t, s, "POST /v1/flush HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"all\""))
	}
	mustGet(t, c, "http://x/v1/status", 200)
	for _, c := range slow {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadAll(c); err != nil {
			t.Errorf("it is not cut off: %v", err)
		}
	}
}

func (cs *conns) in(p phase) (n int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.all {
		if c.phase == p {
			n++
		}
	}
	return n
}

// Connections are bounded. Those that wait make room for new ones, and those at work stay.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	begun, goOn := make(chan bool), make(chan bool)
	b := &fakeBlock{}
	s, c := started(t, func(s *server) { s.conns.max = 8 }, b)
	b.before = func() { begun <- true; <-goOn }
	answered := make(chan int)
	go func() {
		code, _, _ := get(c, "http://x/v1/status")
		answered <- code
	}()
	<-begun
	for range 50 {
		dial(t, s, "")
	}
	eventually(t, "all are accepted", func() bool { return s.conns.count() == 8 })
	other := clientOf(t, s.listener.Addr())
	mustGet(t, other, "http://x/healthz", 204)
	if n := s.conns.count(); n > 8 {
		t.Errorf("%d connections", n)
	}
	close(goOn)
	if code := <-answered; code != 200 {
		t.Errorf("the request at work: %d", code)
	}
}

// exchange sends text to a server, and returns its answer.
func exchange(t *testing.T, s *server, text string) *http.Response {
	t.Helper()
	c := dial(t, s, "")
	go io.WriteString(c, text)
	c.SetReadDeadline(time.Now().Add(time.Minute))
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSizesOfRequestsAreBounded(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{}
	s, _ := started(t, nil, b)
	for status, text := range map[int]string{
		431: "GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 2*maxHeader) + "\r\n\r\n",
		413: "POST /v1/flush HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" +
			strings.Repeat("8\r\n        \r\n", maxBody/8+1) + "0\r\n\r\n",
	} {
		if r := exchange(t, s, text); r.StatusCode != status {
			t.Errorf("%d, not %d", r.StatusCode, status)
		}
	}
	if b.flushed != nil {
		t.Error("something is flushed")
	}
}

// A block that panics costs one request its answer, and neither the server nor a slot.
func TestPanicsAreAnswered(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{before: func() { panic("no answers") }}
	s, c := started(t, nil, b)
	for range 2 * maxAtOnce {
		if text := mustGet(t, c, "http://x/v1/status", 500); strings.Contains(string(text), "no answers") {
			t.Errorf("%s", text)
		}
	}
	if len(s.slots) != 0 {
		t.Errorf("%d slots are held", len(s.slots))
	}
	w := request{target: "/v1/status"}.ask(t, newServer(newHold(Options{Address: "unix:///x"}, t, func() []Block { panic("no blocks") })))
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 500, "its log says more")
}

// A request that takes longer than reading may take has its answer nevertheless.
func TestWorkMayTakeLong(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{before: func() { time.Sleep(2500 * time.Millisecond) }}
	s, _ := started(t, func(s *server) {
		s.web.ReadHeaderTimeout, s.web.ReadTimeout, s.web.WriteTimeout = 2*time.Second, 2*time.Second, 2*time.Second
	}, b)
	body := `{"all":true}`
	r := exchange(t, s, fmt.Sprintf("POST /v1/flush HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	if r.StatusCode != 200 {
		t.Errorf("%d", r.StatusCode)
	}
}
