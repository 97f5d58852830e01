package optcache

import (
	"net"
	"testing"

	"github.com/coredns/coredns/plugin/pkg/reuseport"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/udp"
)

// A panic in a worker is counted, and the worker goes on.
func TestWorkerSurvivesAPanic(t *testing.T) {
	t.Parallel()
	if err := udp.Supported(); err != nil {
		t.Skip(err)
	}
	server, err := reuseport.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	addr := server.LocalAddr().String()
	g := udp.NewGroup(addr)
	s, err := g.Add()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Steer(1, udp.ByQuery); err != nil {
		t.Fatal(err)
	}
	l := &lane{addr: "dns://" + addr, counts: new(laneCounters)}
	w := newWorker(l, s)
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	packet, err := asking("host.example.org.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	const panics = 3
	for n := range uint64(panics) {
		c.Write(packet)
		if w.run() { // there are no routes, and a worker needs some
			t.Fatal("the worker has ended")
		}
		if got := l.counts.panics.Load(); got != n+1 {
			t.Fatalf("%d panics are counted, want %d", got, n+1)
		}
	}
	if err := g.Drain(); err != nil {
		t.Fatal(err)
	}
	if !w.run() {
		t.Error("the worker goes on after the end")
	}
	g.Close()
}
