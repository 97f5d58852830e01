package fastpath

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"golang.org/x/sys/unix"
)

// wantsLooped fails unless n connections of the server are in a loop soon.
func (s *streamServer) wantsLooped(n int) {
	s.t.Helper()
	until(s.t, func() error {
		allStreams.mu.Lock()
		defer allStreams.mu.Unlock()
		got := 0
		if l := allStreams.m[s.Addr]; l != nil {
			for c := range l.conns {
				c.form.Lock()
				if c.looped {
					got++
				}
				c.form.Unlock()
			}
		}
		if got != n {
			return fmt.Errorf("%d connections are in a loop, want %d", got, n)
		}
		return nil
	})
}

// A connection that asks for hits goes to a loop. It stays there while a query is on the slow path, unless there are too many: then
// it is with a goroutine, and so on, again and again. No answer is lost on the way. The loop ends with the last connection, and
// takes its P of the scheduler with it.
func TestLoop(t *testing.T) {
	defer func(n int) { slowPerClient = n }(slowPerClient)
	slowPerClient = 2
	s := startStreams(t, transport.DNS, nil)
	c := s.dial()
	hits := make([]string, shortLived+1)
	for i := range hits {
		hits[i] = fmt.Sprintf("hit%d.", i)
	}
	for range 3 {
		c.send(hits...)
		c.wants(hits...)
		s.wantsLooped(1)
		c.send(hits...)
		c.wants(hits...)
		s.wantsLooped(1)
		c.send("hit1.", "slow1.", "hit2.", "miss.")
		c.wants("hit1.", "hit2.", "miss.")
		s.wantsWaiting(1)
		c.send(hits...)
		c.wants(hits...)
		s.wantsLooped(1)
		s.letGo <- struct{}{}
		c.wants("slow1.")
		s.wantsLooped(1)
		c.send("slow1.", "hit1.", "slow2.", "slow3.", "hit2.") // one more than it may have there
		c.wants("hit1.")
		s.wantsLooped(0)
		s.wantsWaiting(2)
		for range 3 {
			s.letGo <- struct{}{}
		}
		var got []string
		for range 4 {
			m, err := c.receive()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, m.Answer[0].Header().Name)
		}
		if slices.Sort(got); !slices.Equal(got, []string{"hit2.", "slow1.", "slow2.", "slow3."}) {
			t.Errorf("answers to %q", got)
		}
	}
	s.wantsLooped(1) // it has been idle
	if n := runningLoops.Load(); n < 1 || runtime.GOMAXPROCS(0) < OwnProcs()+int(n) {
		t.Errorf("%d loops with GOMAXPROCS %d of %d", n, runtime.GOMAXPROCS(0), OwnProcs())
	}
	c.tcp.CloseWrite()
	c.wantsEnd()
	until(t, func() error {
		if n := runningLoops.Load(); n != 0 {
			return fmt.Errorf("%d loops are left", n)
		}
		return nil
	})
}

// serveOne returns a connection that is served by a loop of its own, by calling serve, and its client's side.
func serveOne(t *testing.T, of Service) (l *loop, c *stream, client int) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	g := &streamGeneration{generation: generation{Service: of}, idle: time.Minute, write: time.Minute, maxQueries: -1}
	all := &streams{counts: new(counters), conns: make(map[*stream]struct{})}
	all.serves.Store(g)
	any := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
	l = &loop{epoll: -1, in: make([]byte, 2*readSize)}
	c = &stream{
		of: all, remote: any, local: any, from: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53),
		share: &share{conns: 1, slots: make(chan struct{}, 1)}, ended: make(chan struct{}), looped: true, looper: looper{in: l, fd: fds[0]},
	}
	l.conns = []*stream{c}
	all.running.Add(1)
	all.counts.streams.Add(1)
	allStreams.mu.Lock()
	allStreams.n++
	allStreams.mu.Unlock()
	t.Cleanup(func() { c.end(); all.running.Wait() })
	return l, c, fds[1]
}

// A loop does not wait for a client that does not read, and such a client gets all its answers when it does.
func TestLoopSlowReader(t *testing.T) {
	l, c, client := serveOne(t, echoes{})
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4096); err != nil {
		t.Fatal(err)
	}
	var asks []byte
	for i := 0; len(asks) < readSize/2; i++ {
		asks = append(asks, (&streamClient{}).queries(fmt.Sprintf("hit%d.%s.", i, strings.Repeat("x", 60)))...)
	}
	var all []byte // of the queries
	for range 4 {
		if n, err := unix.Write(client, asks); n != len(asks) {
			t.Fatal(n, err)
		}
		all = append(all, asks...)
		l.serve(c) // which does nothing if the connection has left
	}
	c.form.Lock()
	if c.looped {
		t.Error("the connection is still in the loop")
	}
	c.form.Unlock()
	unix.SetNonblock(client, false)
	var got []byte
	for p := make([]byte, 1000); len(got) < len(all); {
		n, err := unix.Read(client, p)
		if n <= 0 {
			t.Fatal(n, err)
		}
		got = append(got, p[:n]...)
	}
	if !bytes.Equal(got, all) {
		t.Error("the answers are not the queries")
	}
}

// Answers of the slow path for which the socket has no room leave whole, and in turn, when the client reads. It is not idle meanwhile.
func TestLoopSlowAnswers(t *testing.T) {
	s := startStreams(t, transport.DNS, func(cfg *dnsserver.Config) { cfg.IdleTimeout = tick })
	c := s.dial()
	hits := make([]string, shortLived+1)
	for i := range hits {
		hits[i] = "hit."
	}
	c.send(hits...)
	c.wants(hits...)
	s.wantsLooped(1)
	c.send("slow.")
	s.wantsWaiting(1)
	time.Sleep(4 * tick)
	s.wantsLooped(1)
	allStreams.mu.Lock()
	for l := range allStreams.m[s.Addr].conns {
		l.form.Lock()
		if err := unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10); err != nil {
			t.Error(err)
		}
		l.form.Unlock()
	}
	allStreams.mu.Unlock()
	const n = 10 // of 50 KB: more than the sockets have room for, and less than unsentMax
	asked := make([]string, n)
	for i := range asked {
		asked[i] = fmt.Sprintf("large%d.", i)
	}
	c.send(asked...)
	s.wantsLooped(0)
	c.send(hits...)
	s.letGo <- struct{}{}
	got := make(map[string]int)
	for range n + len(hits) + 1 {
		m, err := c.receive()
		if err != nil {
			t.Fatal(err)
		}
		got[m.Answer[0].Header().Name]++
	}
	if got["slow."] != 1 || got["hit."] != len(hits) || len(got) != n+2 {
		t.Errorf("%v", got)
	}
}

// A hit in a loop needs no memory.
func TestLoopAllocations(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	l, _, client := serveOne(t, echoes{})
	ask := (&streamClient{}).queries("hit1.", "hit2.", "hit3.")
	var got [512]byte
	serve := func() {
		unix.Write(client, ask)
		l.serve(l.conns[0])
		if n, err := unix.Read(client, got[:]); err != nil || !bytes.Equal(got[:n], ask) {
			t.Fatal(n, err)
		}
	}
	if n := testing.AllocsPerRun(1000, serve); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// panics is a Service that panics when it is asked.
type panics struct{ echoes }

func (p panics) NewAnswerer() Answerer { return p }
func (panics) Answer(Batch)            { panic("of the test") }

// A panic ends the connection that it was for, and nothing else.
func TestLoopPanics(t *testing.T) {
	l, c, client := serveOne(t, panics{})
	unix.Write(client, (&streamClient{}).queries("hit."))
	l.serve(c)
	c.of.running.Wait()
	if n := c.of.counts.panics.Load(); n != 1 {
		t.Errorf("%d panics are counted", n)
	}
	unix.SetNonblock(client, false)
	if n, err := unix.Read(client, make([]byte, 1)); n > 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%d, %v, want the end", n, err)
	}
}

// What a connection that broke has not been sent stays with no worker, which would send it to another client.
func TestStreamWorkerForgets(t *testing.T) {
	_, c, _ := serveOne(t, echoes{})
	names := make([]string, 2*BatchSize)
	for i := range names {
		names[i] = "hit."
	}
	w := newStreamWorker(c)
	c.broken.Store(true)
	w.serve((&streamClient{}).queries(names...))
	if len(w.out) > 0 {
		t.Errorf("%d bytes", len(w.out))
	}
	w.free()
}
