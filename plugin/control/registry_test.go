package control

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/optcache/optcache/test/freeport"
)

// views are the blocks that a client sees.
func views(t *testing.T, c *http.Client) (all string) {
	t.Helper()
	for _, b := range decoded[statusAnswer](t, mustGet(t, c, "http://localhost/v1/status", 200)).Blocks {
		all += b.View
	}
	return all
}

func viewBlock(name string) Block { return &fakeBlock{status: Status{View: name}} }

// Generations take a listener over from each other while clients ask all the time, on connections that they keep and on
// new ones. Nothing is refused.
func TestTakeoverRefusesNothing(t *testing.T) {
	t.Parallel()
	for _, o := range []Options{atSocket(t), {Address: freeport.Address(t, "127.0.0.1")}} {
		key := func(generation int) string { return fmt.Sprint(o.Address, generation) }
		if err := Listen(o, key(0), blocksOf(viewBlock("0"))); err != nil {
			t.Fatal(err)
		}
		at := Addrs(key(0))[0]
		var generation, asked atomic.Int64
		ctx, stop := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		for i := range maxAtOnce - 1 { // more at once get 503
			c := clientOf(t, at)
			c.Transport.(*http.Transport).DisableKeepAlives = i == 0
			clients.Go(func() {
				for ctx.Err() == nil {
					before := generation.Load()
					code, b, err := get(c, "http://localhost/v1/status")
					if err != nil || code != 200 {
						t.Errorf("%s: %d %v %s", at, code, err, b)
						return
					}
					// The generation that answers is none that has gone, and none to come.
					var seen int64
					fmt.Sscan(decoded[statusAnswer](t, b).Blocks[0].View, &seen)
					if seen < before || seen > generation.Load()+1 {
						t.Errorf("%s: generation %d answers, in the time of %d", at, seen, before)
					}
					asked.Add(1)
				}
			})
		}
		for g := 1; g <= 50; g++ {
			if err := Listen(o, key(g), blocksOf(viewBlock(fmt.Sprint(g)))); err != nil {
				t.Fatal(err)
			}
			generation.Store(int64(g))
			Release(key(g - 1))
			had := asked.Load()
			eventually(t, "requests", func() bool { return asked.Load() > had || t.Failed() })
		}
		stop()
		clients.Wait()
		Release(key(50))
		if c, err := net.Dial(at.Network(), at.String()); err == nil {
			c.Close()
			t.Errorf("%s: something listens at the end", at)
		}
	}
}

func TestEachUseOfAKeyIsCounted(t *testing.T) {
	t.Parallel()
	o, other := atSocket(t), atSocket(t)
	one := "one " + t.Name()
	for _, o := range []Options{o, o, other} {
		if err := Listen(o, one, blocksOf(viewBlock("a"), viewBlock("b"))); err != nil {
			t.Fatal(err)
		}
	}
	at := Addrs(one)
	if len(at) != 2 {
		t.Fatalf("%v", at)
	}
	Release(one)
	Release(one)
	for _, at := range at {
		if got := views(t, clientOf(t, at)); got != "ab" {
			t.Errorf("%s: %q", at, got)
		}
	}
	Release(one)
	if Addrs(one) != nil {
		t.Error("it listens after the last release")
	}
	Release(one) // and once too often
	listening(t, o, one, viewBlock("c"))
	if got := views(t, clientOf(t, Addrs(one)[0])); got != "c" {
		t.Errorf("%q", got)
	}
}

// A reload that fails gives the listener back.
func TestPreviousGenerationComesBack(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	one, two := "one "+t.Name(), "two "+t.Name()
	listening(t, o, one, viewBlock("a"))
	c := clientOf(t, Addrs(one)[0])
	if err := Listen(o, two, blocksOf(viewBlock("b"))); err != nil {
		t.Fatal(err)
	}
	if got := views(t, c); got != "b" {
		t.Errorf("%q", got)
	}
	Release(two)
	if got := views(t, c); got != "a" {
		t.Errorf("%q", got)
	}
}

// The next generation may have another token, which counts at once; lines of one generation may not differ.
func TestOptionsOfGenerations(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	withToken := o
	withToken.TokenFile = filepath.Join(t.TempDir(), "token")
	writeFile(t, withToken.TokenFile, "secret", 0o600)
	one, two := "one "+t.Name(), "two "+t.Name()
	listening(t, o, one, viewBlock("a"))
	c := clientOf(t, Addrs(one)[0])
	if err := Listen(withToken, one, blocksOf()); err == nil || !strings.Contains(err.Error(), "two lines") {
		t.Error(err)
	}
	if got := views(t, c); got != "a" {
		t.Errorf("%q", got)
	}
	listening(t, withToken, two, viewBlock("b"))
	mustGet(t, c, "http://x/v1/status", 401)
}

// The end waits for a request under way, and lets it have its answer.
func TestEndWaitsForRequests(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	path, _ := o.socket()
	begun, goOn := make(chan bool), make(chan bool)
	b := &fakeBlock{answers: answersOf(3), before: func() { begun <- true; <-goOn }}
	if err := Listen(o, t, blocksOf(b)); err != nil {
		t.Fatal(err)
	}
	c := clientOf(t, Addrs(t)[0])
	idle := clientOf(t, Addrs(t)[0])
	mustGet(t, idle, "http://x/healthz", 204)
	answered := make(chan error)
	go func() {
		code, body, err := get(c, "http://x/v1/lookup?name=www1.example.org")
		if err == nil && (code != 200 || !bytes.Contains(body, []byte("www1"))) {
			err = fmt.Errorf("%d %s", code, body)
		}
		answered <- err
	}()
	<-begun
	released := make(chan bool)
	go func() { Release(t); close(released) }()
	eventually(t, "the socket goes", func() bool { _, err := os.Lstat(path); return err != nil })
	if code, _, err := get(idle, "http://x/healthz"); err == nil {
		t.Errorf("a new request is answered: %d", code)
	}
	select {
	case <-released:
		t.Error("the end has not waited")
	default:
	}
	// The address is free for another generation already.
	two := "two " + t.Name()
	listening(t, o, two, viewBlock("b"))
	if got := views(t, clientOf(t, Addrs(two)[0])); got != "b" {
		t.Errorf("%q", got)
	}
	goOn <- true
	if err := <-answered; err != nil {
		t.Error(err)
	}
	<-released
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the end has removed the next generation's socket: %v", err)
	}
}

// A request that hangs does not keep the server from its end.
func TestEndCutsOff(t *testing.T) {
	t.Parallel()
	begun, hang := make(chan bool), make(chan bool)
	defer close(hang)
	s, c := started(t, func(s *server) { s.grace = 50 * time.Millisecond }, &fakeBlock{before: func() { begun <- true; <-hang }})
	answered := make(chan error)
	go func() {
		_, _, err := get(c, "http://x/v1/status")
		answered <- err
	}()
	<-begun
	start := time.Now()
	s.end()
	if took := time.Since(start); took < s.grace || took > 5*time.Second {
		t.Errorf("the end took %v", took)
	}
	if err := <-answered; err == nil {
		t.Error("the request has an answer")
	}
}

// Connections that say nothing, or half of something, do not delay the end.
func TestEndDoesNotWaitForSilence(t *testing.T) {
	t.Parallel()
	s, _ := started(t, nil)
	for _, text := range []string{"", "GET /healthz HTTP/1.1\r\nHost", "POST /v1/flush HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"} {
		c, err := net.Dial("unix", s.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, text)
	}
	eventually(t, "three connections", func() bool { return s.conns.count() == 3 })
	start := time.Now()
	s.end()
	if took := time.Since(start); took > s.grace/2 {
		t.Errorf("the end took %v", took)
	}
}

func (cs *conns) count() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return len(cs.all)
}

// When a generation lets go, no request calls its blocks any more: they may be taken apart.
func TestReleaseWaitsForItsRequests(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	one, two := "one "+t.Name(), "two "+t.Name()
	begun, goOn := make(chan bool), make(chan bool)
	if err := Listen(o, one, blocksOf(&fakeBlock{status: Status{View: "a"}, before: func() { begun <- true; <-goOn }})); err != nil {
		t.Fatal(err)
	}
	at := Addrs(one)[0]
	answered := make(chan string)
	go func() {
		_, b, _ := get(clientOf(t, at), "http://x/v1/status")
		answered <- string(b)
	}()
	<-begun
	listening(t, o, two, viewBlock("b"))
	released := make(chan bool)
	go func() { Release(one); close(released) }()
	eventually(t, "the next generation is alone", func() bool { return Addrs(one) == nil })
	if got := views(t, clientOf(t, at)); got != "b" {
		t.Errorf("%q", got)
	}
	select {
	case <-released:
		t.Error("it has not waited")
	default:
	}
	close(goOn)
	if got := <-answered; !strings.Contains(got, `"view":"a"`) {
		t.Errorf("%s", got)
	}
	<-released
}

// A request whose body comes slowly does not keep a generation from its end, and reaches the next one.
func TestBodyThatComesDuringTakeover(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	withToken := o
	withToken.TokenFile = filepath.Join(t.TempDir(), "token")
	writeFile(t, withToken.TokenFile, "secret", 0o600)
	one, two, three := "one "+t.Name(), "two "+t.Name(), "three "+t.Name()
	old, next, last := &fakeBlock{}, &fakeBlock{}, &fakeBlock{}
	if err := Listen(o, one, blocksOf(old)); err != nil {
		t.Fatal(err)
	}
	at := Addrs(one)[0]
	servers.mu.Lock()
	s := servers.byAddress[o.id()]
	servers.mu.Unlock()
	slow := func() (io.WriteCloser, <-chan int) {
		eventually(t, "no connection", func() bool { return s.conns.count() == 0 })
		r, w := io.Pipe()
		c := clientOf(t, at)
		c.Transport.(*http.Transport).DisableKeepAlives = true
		code := make(chan int, 1)
		go func() {
			a, err := c.Post("http://x/v1/flush", "application/json", r)
			if err != nil {
				t.Error(err)
				code <- 0
				return
			}
			a.Body.Close()
			code <- a.StatusCode
		}()
		io.WriteString(w, `{"all"`)
		eventually(t, "the request", func() bool { return s.conns.count() > 0 })
		return w, code
	}
	w, code := slow()
	listening(t, o, two, next)
	Release(one)
	io.WriteString(w, `:true}`)
	w.Close()
	if got := <-code; got != 200 || len(old.flushed) != 0 || len(next.flushed) != 1 {
		t.Errorf("%d, %d and %d flushes", got, len(old.flushed), len(next.flushed))
	}
	admitted := s.now.Load()
	w, code = slow()
	listening(t, withToken, three, last)
	if h, err := s.enter(admitted, httptest.NewRequest("POST", "/v1/flush", nil)); h != nil || err == nil {
		t.Error("what the generation of before has admitted is let in without the token")
	}
	io.WriteString(w, `:true}`)
	w.Close()
	if got := <-code; got != 401 || len(next.flushed) != 1 || len(last.flushed) != 0 {
		t.Errorf("%d, %d and %d flushes", got, len(next.flushed), len(last.flushed))
	}
}
