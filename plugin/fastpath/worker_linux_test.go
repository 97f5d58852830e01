package fastpath

import (
	"net"
	"runtime"
	"strings"
	"testing"
	"time"
	"weak"

	"github.com/coredns/coredns/plugin/pkg/reuseport"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/udp"
	"github.com/optcache/optcache/test/freeport"
)

// oneSocket returns a listener without a generation, and the only socket of its group.
func oneSocket(t *testing.T) (*listener, *udp.Socket) {
	t.Helper()
	if err := udp.Supported(); err != nil {
		t.Skip(err)
	}
	server, err := reuseport.ListenPacket("udp", freeport.Address(t, "127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	addr := server.LocalAddr().String()
	l := &listener{addr: "dns://" + addr, counts: new(counters), group: udp.NewGroup(addr)}
	t.Cleanup(l.group.Close)
	s, err := l.group.Add()
	if err != nil {
		t.Fatal(err)
	}
	return l, s
}

// A panic in a worker is counted, and the worker goes on.
func TestWorkerSurvivesAPanic(t *testing.T) {
	t.Parallel()
	l, s := oneSocket(t)
	if err := l.group.Steer(1, udp.ByQuery); err != nil {
		t.Fatal(err)
	}
	w := newWorker(l, 0, s)
	c, err := net.Dial("udp", strings.TrimPrefix(l.addr, "dns://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	packet, err := new(dns.Msg).SetQuestion("host.example.org.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	const panics = 3
	for n := range uint64(panics) {
		c.Write(packet)
		if w.run() { // it panics: the listener has no generation, and so no answerer
			t.Fatal("the worker has ended")
		}
		if got := l.counts.panics.Load(); got != n+1 {
			t.Fatalf("%d panics are counted, want %d", got, n+1)
		}
	}
	if err := l.group.Drain(); err != nil {
		t.Fatal(err)
	}
	if !w.run() {
		t.Error("the worker goes on after the end")
	}
}

// panicking is a service that replies, and panics as long as it is told to.
type panicking struct{ still *bool }

func (p panicking) NewAnswerer() Answerer { return p }
func (panicking) Workers() int            { return 1 }
func (panicking) Asked() bool             { return true }
func (panicking) Generation() int         { return 0 }
func (panicking) Over() bool              { return false }
func (panicking) Sent()                   {}
func (p panicking) Answer(b Batch) {
	for i := range b.Len() {
		b.Reply(i, []byte("reply"))
	}
	if *p.still {
		panic("as told")
	}
}

// The replies of a batch that ended in a panic have not been sent, and are not counted with the next batch.
func TestRepliesLostInAPanicAreNotCounted(t *testing.T) {
	l, s := oneSocket(t)
	still := true
	l.serves.Store(&generation{Service: panicking{&still}, answerers: make([]Answerer, 1)})
	w := newWorker(l, 0, s)
	func() {
		defer func() { recover() }()
		w.serve(1)
	}()
	still = false
	w.serve(1)
	if hits, all := l.counts.passed[Answered].Load(), l.counts.packets.Load(); hits != 1 || all != 1 {
		t.Errorf("%d hits of %d packets are counted, want 1 of 1", hits, all)
	}
}

// A worker that waits for packets does not keep the memory of a generation that has been replaced.
func TestWaitingWorkerKeepsNoGeneration(t *testing.T) {
	l, s := oneSocket(t)
	w := newWorker(l, 0, s)
	for name, still := range map[string]bool{"after a batch": false, "after a panic": true} {
		l.serves.Store(&generation{Service: panicking{&still}, answerers: make([]Answerer, 1)})
		last := weak.Make(l.serves.Load())
		func() {
			defer w.recovered()
			w.serve(1)
		}()
		l.serves.Store(nil)
		for end := time.Now().Add(time.Minute); last.Value() != nil; runtime.GC() {
			if time.Now().After(end) {
				t.Fatalf("%s, the worker keeps the generation", name)
			}
		}
	}
	runtime.KeepAlive(w)
}
