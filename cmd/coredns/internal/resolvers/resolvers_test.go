package resolvers

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestUsable(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		text  string
		alive []string // local resolvers that answer
		want  []string
	}{
		{name: "empty"},
		{name: "only comments", text: "# nameserver 192.0.2.1\n; nameserver 192.0.2.2\n#nameserver 192.0.2.3\n"},
		{name: "no nameserver", text: "search example.org\noptions ndots:5\n"},
		{name: "garbage", text: "\x00\xff\xfenameserver\nnameserver\nnameserver \nnameserver resolver.example\nnameserver 1.2.3\nnameserver 999.0.0.1\nnameserver 192.0.2.1:53\n"},
		{name: "one", text: "nameserver 192.0.2.1\n", want: []string{"192.0.2.1"}},
		{name: "no newline at the end", text: "nameserver 192.0.2.1", want: []string{"192.0.2.1"}},
		{name: "tabs, CRLF and a trailing comment", text: "nameserver\t192.0.2.1 # the router\r\nnameserver 192.0.2.2\r\n", want: []string{"192.0.2.1", "192.0.2.2"}},
		{name: "order is kept, garbage between is skipped", text: "nameserver 192.0.2.2\nnameserver nonsense\nnameserver 192.0.2.1\n", want: []string{"192.0.2.2", "192.0.2.1"}},
		{name: "twice the same", text: "nameserver 192.0.2.1\nnameserver ::ffff:192.0.2.1\nnameserver 192.0.2.1\n", want: []string{"192.0.2.1"}},
		{name: "four", text: "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n", want: []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"}},
		{name: "IPv6", text: "nameserver 2001:DB8::53\n", want: []string{"2001:db8::53"}},
		{name: "IPv6 with scope", text: "nameserver fe80::1%eth0\nnameserver 192.0.2.1\n", want: []string{"192.0.2.1"}},
		{name: "dead loopback", text: "nameserver 127.0.0.1\n"},
		{name: "dead loopback, mapped and IPv6", text: "nameserver ::1\nnameserver ::ffff:127.0.0.1\nnameserver 0.0.0.0\nnameserver ::\n"},
		{name: "live loopback", text: "nameserver 127.0.0.53\n", alive: []string{"127.0.0.53:53"}, want: []string{"127.0.0.53"}},
		{name: "live loopback IPv6", text: "nameserver ::1\n", alive: []string{"[::1]:53"}, want: []string{"::1"}},
		{name: "dead interface address", text: "nameserver 198.51.100.7\nnameserver 192.0.2.1\n", want: []string{"192.0.2.1"}},
		{name: "live interface address", text: "nameserver 198.51.100.7\n", alive: []string{"198.51.100.7:53"}, want: []string{"198.51.100.7"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			local := func(a netip.Addr) bool {
				return a.IsLoopback() || a.IsUnspecified() || a.String() == "198.51.100.7"
			}
			answers := func(addr string) bool { return slices.Contains(test.alive, addr) }
			if got := usable([]byte(test.text), local, answers); !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestRemoteResolversAreNotProbed(t *testing.T) {
	t.Parallel()
	usable([]byte("nameserver 203.0.113.1\n"), ofThisMachine, func(addr string) bool {
		t.Errorf("probed %s", addr)
		return true
	})
}

func TestOfThisMachine(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]bool{
		"127.0.0.1": true, "127.0.0.53": true, "::1": true, "0.0.0.0": true, "::": true,
		"203.0.113.1": false, "2001:db8::53": false,
	} {
		if got := ofThisMachine(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: got %v, want %v", addr, got, want)
		}
	}
	nets, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nets {
		if addr := netip.MustParsePrefix(n.String()).Addr(); !ofThisMachine(addr) {
			t.Errorf("%s is an interface's address", addr)
		}
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		rcode int
		want  bool
	}{
		{"NOERROR", dns.RcodeSuccess, true},
		{"NXDOMAIN", dns.RcodeNameError, true},
		{"SERVFAIL", dns.RcodeServerFailure, false},
		{"REFUSED", dns.RcodeRefused, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			addr := serve(t, func(w dns.ResponseWriter, r *dns.Msg) {
				if q := r.Question[0]; q.Name != "." || q.Qtype != dns.TypeNS {
					t.Errorf("asked %s %s, want . NS", q.Name, dns.Type(q.Qtype))
				}
				w.WriteMsg(new(dns.Msg).SetRcode(r, test.rcode))
			})
			if got := answers(addr); got != test.want {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
	t.Run("silence", func(t *testing.T) {
		t.Parallel()
		if answers(serve(t, func(dns.ResponseWriter, *dns.Msg) {})) {
			t.Error("a resolver that says nothing was taken")
		}
	})
}

func TestExport(t *testing.T) {
	tests := []struct {
		name      string
		upstreams string // OPTCACHE_UPSTREAMS as the user has it
		conf      string // resolv.conf; "-": missing
		want      string // the three slots
	}{
		{"resolv.conf", "", "nameserver 203.0.113.1\nnameserver 203.0.113.2\n", "203.0.113.1 203.0.113.2 203.0.113.1"},
		{"missing resolv.conf", "", "-", "127.0.0.1:1054 127.0.0.1:1054 127.0.0.1:1054"},
		{"empty resolv.conf", "", "", "127.0.0.1:1054 127.0.0.1:1054 127.0.0.1:1054"},
		{"the user's", " 203.0.113.7:5353  tls://203.0.113.8", "nameserver 203.0.113.1\n", "203.0.113.7:5353 tls://203.0.113.8 203.0.113.7:5353"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "resolv.conf")
			if test.conf != "-" {
				if err := os.WriteFile(path, []byte(test.conf), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv(resolvConfVar, path)
			t.Setenv(upstreamsVar, test.upstreams)
			for range 2 { // the second call is a reload's
				exported(t, test.want)
				os.Remove(path)
			}
		})
	}
}

func TestExportRefusesWhatHasNoSlot(t *testing.T) {
	t.Setenv(upstreamsVar, "203.0.113.1 203.0.113.2 203.0.113.3 203.0.113.4")
	if err := Export(); err == nil || !strings.Contains(err.Error(), upstreamsVar) {
		t.Errorf("got %v, want an error that names %s", err, upstreamsVar)
	}
}

// exported calls Export and compares the slots with want. It restores the environment after the test.
func exported(t *testing.T, want string) {
	t.Helper()
	names := []string{slotVar + "1", slotVar + "2", slotVar + "3"}
	for _, name := range names {
		t.Setenv(name, "")
	}
	if err := Export(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, name := range names {
		got = append(got, os.Getenv(name))
	}
	if got := strings.Join(got, " "); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// serve runs a DNS server on a port of the kernel's choice until the test ends.
func serve(t *testing.T, handler dns.HandlerFunc) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	server := &dns.Server{PacketConn: conn, Handler: handler, NotifyStartedFunc: func() { close(started) }}
	go server.ActivateAndServe()
	<-started
	t.Cleanup(func() { server.Shutdown() })
	return conn.LocalAddr().String()
}
