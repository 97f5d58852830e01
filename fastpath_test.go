package optcache

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/core/dnsserver"

	"github.com/miekg/dns"
)

// A server that is replaced does not wait for requests that never end.
func TestLongWayEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counts := new(laneCounters)
		l := newLongWay(new(dnsserver.Server), counts)
		l.local = udp4Client
		working, release := make(chan struct{}), make(chan struct{})
		l.server.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
			close(working)
			<-release
			w.WriteMsg(new(dns.Msg).SetReply(r))
		})
		go l.serve()
		packet, err := asking("www.example.org.", dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		late := make(chan error, 1)
		if !l.put(&letter{from: *udp4Client, packet: packet, reply: func([]byte) error {
			late <- net.ErrClosed
			return net.ErrClosed
		}}) {
			t.Fatal("it takes no letters")
		}
		<-working
		begun := time.Now()
		l.shutdown()
		<-l.over
		if took := time.Since(begun); took < longWayGrace || took > longWayGrace+time.Second {
			t.Errorf("it took %v", took)
		}
		if l.put(new(letter)) {
			t.Error("it takes letters after the end")
		}
		close(release)
		<-late
		<-l.done
		if n := counts.sendErrors.Load(); n != 1 {
			t.Errorf("%d failed replies are counted", n)
		}
	})
}
