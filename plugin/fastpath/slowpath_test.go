package fastpath

import (
	"net"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/core/dnsserver"

	"github.com/optcache/optcache/plugin/pkg/chain"

	"github.com/miekg/dns"
)

var client = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 40212}

// A slow path that a reload has replaced does not wait longer than slowGrace for requests that never end.
func TestSlowPathEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counts := new(counters)
		l := newSlowPath(new(dnsserver.Server), nil, counts)
		l.local = client
		working, release := make(chan struct{}), make(chan struct{})
		l.server.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
			close(working)
			<-release
			w.WriteMsg(new(dns.Msg).SetReply(r))
		})
		go l.serve()
		packet, err := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		late := make(chan error, 1)
		if !l.put(&slowQuery{from: client, local: client, packet: packet, reply: func([]byte) error {
			late <- net.ErrClosed
			return net.ErrClosed
		}}, nil) {
			t.Fatal("it takes no queries")
		}
		<-working
		begun := time.Now()
		l.shutdown()
		<-l.over
		if took := time.Since(begun); took < slowGrace || took > slowGrace+time.Second {
			t.Errorf("it took %v", took)
		}
		if l.put(new(slowQuery), nil) {
			t.Error("it takes queries after the end")
		}
		close(release)
		<-late
		<-l.done
		if n := counts.sendErrors.Load(); n != 1 {
			t.Errorf("%d failed replies are counted", n)
		}
	})
}

// A query that a reload has not waited for does not look like one whose connection a plugin has closed.
func TestSlowPathThatHasEndedClosesNothing(t *testing.T) {
	for _, ended := range []bool{false, true} {
		l := newSlowPath(new(dnsserver.Server), nil, new(counters))
		var closed bool
		q := &slowQuery{path: l, ended: func(c bool) { closed = c }}
		q.message()
		if ended {
			l.Close()
		}
		if q.Close(); closed == ended {
			t.Errorf("ended %v: closed %v", ended, closed)
		}
	}
}

// closedListener is a closed socket. A server that accepts from it ends at once.
type closedListener struct{ net.Listener }

func (closedListener) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (closedListener) Close() error              { return nil }

// The server of the slow path accepts the same messages as CoreDNS's own: an UPDATE reaches the plugin dynupdate, for instance.
// All its other settings are the same, too.
func TestSlowPathIsTheServersOwn(t *testing.T) {
	for _, opcodes := range [][]int{nil, {dns.OpcodeUpdate}, {dns.OpcodeStatus, dns.OpcodeUpdate}} {
		cfg := &dnsserver.Config{Zone: "."}
		for _, opcode := range opcodes {
			cfg.AllowOpcode(opcode)
		}
		s, err := dnsserver.NewServer("dns://127.0.0.1:53", []*dnsserver.Config{cfg})
		if err != nil {
			t.Fatal(err)
		}
		s.TsigSecret = map[string]string{"key.": "c2VjcmV0"}
		s.Serve(closedListener{})
		servers, ok := chain.Listeners(s)
		if !ok {
			t.Fatal("CoreDNS keeps its servers elsewhere")
		}
		theirs := servers[0]
		f, ok := chain.AcceptFunc(s)
		if !ok {
			t.Fatal("CoreDNS keeps the opcodes elsewhere")
		}
		slow := newSlowPath(s, f, new(counters))
		ours := slow.server
		slow.Close()
		slow.serve() // it ends at once; dns.Server has set its defaults in both servers now

		accept := func(f dns.MsgAcceptFunc, h dns.Header) dns.MsgAcceptAction {
			if f == nil {
				f = dns.DefaultMsgAcceptFunc
			}
			return f(h)
		}
		for bits := range 1 << 16 {
			for n := range uint16(3) {
				for _, h := range []dns.Header{
					{Bits: uint16(bits), Qdcount: n}, {Bits: uint16(bits), Qdcount: 1, Ancount: n, Nscount: 2 * n, Arcount: 3 * n},
				} {
					if got, want := accept(ours.MsgAcceptFunc, h), accept(theirs.MsgAcceptFunc, h); got != want {
						t.Fatalf("with opcodes %v, %+v: %v, want %v", opcodes, h, got, want)
					}
				}
			}
		}
		// All other settings are the same. Functions cannot be compared, but are set in both or in neither. These fields are
		// each server's own: connections are read in stream_linux.go, and chain.Roomy is in each.
		own := []string{"Listener", "Handler", "DecorateReader", "DecorateWriter", "MsgAcceptFunc", "ReadTimeout", "WriteTimeout", "IdleTimeout"}
		a, b := reflect.ValueOf(ours).Elem(), reflect.ValueOf(theirs).Elem()
		for i := range a.NumField() {
			f := a.Type().Field(i)
			if !f.IsExported() || slices.Contains(own, f.Name) {
				continue
			}
			same := reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface())
			if f.Type.Kind() == reflect.Func {
				same = a.Field(i).IsNil() == b.Field(i).IsNil()
			}
			if !same {
				t.Errorf("%s is %v, and CoreDNS's is %v", f.Name, a.Field(i), b.Field(i))
			}
		}
	}
}
