package chain

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/local"
	"github.com/coredns/coredns/plugin/test"

	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

// These tests check each field of CoreDNS that unexported.go reads. With a CoreDNS that has changed a field, its test fails.

func newServer(t *testing.T, cfg *dnsserver.Config) *dnsserver.Server {
	t.Helper()
	s, err := dnsserver.NewServer("dns://127.0.0.1:53", []*dnsserver.Config{cfg})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestServersZones(t *testing.T) {
	cfg := &dnsserver.Config{Zone: "example.org."}
	if zones, ok := Zones(newServer(t, cfg)); !ok || len(zones["example.org."]) != 1 || zones["example.org."][0] != cfg {
		t.Errorf("%v, %v", zones, ok)
	}
}

// closedConn is a closed socket. A server that reads from it ends at once.
type closedConn struct{ net.PacketConn }

func (closedConn) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, net.ErrClosed }
func (closedConn) LocalAddr() net.Addr                    { return new(net.UDPAddr) }
func (closedConn) SetReadDeadline(time.Time) error        { return nil }
func (closedConn) Close() error                           { return nil }

func TestServersListeners(t *testing.T) {
	s := newServer(t, &dnsserver.Config{Zone: "."})
	s.ServePacket(closedConn{})
	if both, ok := Listeners(s); !ok || both[1] == nil || both[1].Net != "udp" {
		t.Errorf("%v, %v", both, ok)
	}
}

func TestServersOpcodes(t *testing.T) {
	for _, opcodes := range [][]int{nil, {dns.OpcodeUpdate}} {
		cfg := &dnsserver.Config{Zone: "."}
		for _, o := range opcodes {
			cfg.AllowOpcode(o)
		}
		accept, ok := AcceptFunc(newServer(t, cfg))
		if !ok || (accept != nil) != (opcodes != nil) {
			t.Fatalf("opcodes %v: %v, %v", opcodes, accept != nil, ok)
		}
		update := dns.Header{Bits: dns.OpcodeUpdate << 11, Qdcount: 1, Nscount: 3}
		if opcodes != nil && accept(update) != dns.MsgAccept {
			t.Error("an UPDATE is not accepted")
		}
	}
}

func TestCorefilesConfigs(t *testing.T) {
	inst, err := caddy.Start(caddy.CaddyfileInput{Contents: []byte("example.org:0 {\n\tlocal\n}\n"), ServerTypeName: "dns"})
	if err != nil {
		t.Fatal(err)
	}
	defer inst.Stop()
	corefile, ok := ContextOf(inst)
	if !ok {
		t.Fatal("an instance has no context")
	}
	all, ok := Configs(corefile)
	if !ok || len(all) != 1 || all[0].Zone != "example.org." {
		t.Fatalf("%v, %v", all, ok)
	}
	local := all[0].Handler("local")
	if local == nil || !localPrefix(local) {
		t.Error("local does not take names that begin with localhost.")
	}
}

func TestShufflesOnly(t *testing.T) {
	for corefile, want := range map[string]bool{"loadbalance": true, "loadbalance round_robin": true, "loadbalance weighted /dev/null": false} {
		c := caddy.NewTestController("dns", corefile)
		action, err := caddy.DirectiveAction("dns", "loadbalance")
		if err != nil {
			t.Fatal(err)
		}
		if err := action(c); err != nil {
			t.Fatalf("%s: %v", corefile, err)
		}
		var h plugin.Handler = test.ErrorHandler()
		for _, p := range dnsserver.GetConfig(c).Plugin {
			h = p(h)
		}
		l, ok := h.(loadbalance.LoadBalance)
		if !ok || shufflesOnly(l) != want {
			t.Errorf("%s: %v", corefile, !want)
		}
	}
}

// The writer that plugin.NextOrFailure puts around each plugin's is known.
func TestTracker(t *testing.T) {
	inner := &test.ResponseWriter{}
	next := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, _ *dns.Msg) (int, error) {
		if got, ok := inTracker(w); !ok || got != inner {
			t.Errorf("%T: %v, %v", w, got, ok)
		}
		return 0, nil
	})
	plugin.NextOrFailure("", next, context.Background(), inner, nil)
	for _, w := range []dns.ResponseWriter{nil, inner, &struct{ dns.ResponseWriter }{inner}} {
		if _, ok := inTracker(w); ok {
			t.Errorf("%T is taken for one", w)
		}
	}
}

func TestTapsFields(t *testing.T) {
	if !canTap {
		t.Error("the writer of dnstap is not as it was")
	}
}

// The connection of a request by TCP is found, and there is none behind other writers.
func TestConn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	found := make(chan string, 1)
	cfg := &dnsserver.Config{Zone: ".", Plugin: []plugin.Plugin{func(plugin.Handler) plugin.Handler {
		return plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			if conn, ok := Conn(w); ok {
				found <- conn.RemoteAddr().String()
			}
			return 0, w.WriteMsg(new(dns.Msg).SetReply(r))
		})
	}}}
	s := newServer(t, cfg)
	go s.Serve(l)
	defer s.Stop()
	conn, err := dns.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := new(dns.Client).ExchangeWithConn(new(dns.Msg).SetQuestion("host.example.org.", dns.TypeA), conn); err != nil {
		t.Fatal(err)
	}
	select {
	case from := <-found:
		if from != conn.LocalAddr().String() {
			t.Errorf("the connection from %s, want %s", from, conn.LocalAddr())
		}
	default:
		t.Error("no connection")
	}
	for _, w := range []dns.ResponseWriter{&test.ResponseWriter{}, request.NewScrubWriter(new(dns.Msg), &test.ResponseWriter{})} {
		if _, ok := Conn(w); ok {
			t.Errorf("%T has a connection", w)
		}
	}
}
