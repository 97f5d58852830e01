package test

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"testing"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/freeport"
)

// startPowerDNS starts PowerDNS, whose backend geoip answers by the client's subnet, and returns its address. here.example.org has
// one address for 10.1.2.0/24, one for the rest of 10.1.0.0/16, and one for all others; its SCOPE is 24. wide.example.org has one for
// 10.1.0.0/16 and one for all others, with SCOPE 16. all.example.org is the same everywhere, and nx.example.org is not there.
func startPowerDNS(t *testing.T) string {
	t.Helper()
	path, dir, port := program(t, "pdns_server"), t.TempDir(), freeport.Port(t)
	zones := fileOf(t, "zones.yaml", `domains:
- domain: example.org
  ttl: 300
  records:
    example.org:
      - soa: ns.example.org hostmaster.example.org 1 7200 3600 86400 60
      - ns: ns.example.org
    narrow.geo.example.org:
      - a: 198.51.100.24
    wide.geo.example.org:
      - a: 198.51.100.16
    other.geo.example.org:
      - a: 198.51.100.1
    all.example.org:
      - a: 198.51.100.99
  services:
    here.example.org:
      default: other.geo.example.org
      10.1.0.0/16: wide.geo.example.org
      10.1.2.0/24: narrow.geo.example.org
    wide.example.org:
      default: other.geo.example.org
      10.1.0.0/16: wide.geo.example.org
`)
	var args []string
	for _, line := range []string{
		"config-dir=" + dir, "socket-dir=" + dir, "launch=geoip", "geoip-zones-file=" + zones, "geoip-database-files=", "edns-subnet-processing=yes",
		"local-address=127.0.0.1", fmt.Sprint("local-port=", port), "daemon=no", "guardian=no", "disable-syslog=yes", "write-pid=no", "setuid=", "setgid=",
		"cache-ttl=0", "query-cache-ttl=0", "negquery-cache-ttl=0", "receiver-threads=1", "distributor-threads=1",
	} {
		args = append(args, "--"+line)
	}
	runProgram(t, exec.Command(path, args...))
	addr := net.JoinHostPort("127.0.0.1", fmt.Sprint(port))
	eventually(t, func() error {
		m, _, err := (&dns.Client{Timeout: askTimeout}).Exchange(query("all.example.org.", dns.TypeA), addr)
		if err == nil && len(m.Answer) != 1 {
			err = fmt.Errorf("%v", m)
		}
		return err
	})
	return addr
}

// An upstream that is not ours. Each row asks, in its order, and says whether the upstream is asked. The replies are as those of the
// upstream itself, but for the SCOPE where it says more than it may.
func TestClientSubnetsOfPowerDNS(t *testing.T) {
	t.Parallel()
	upstream := startPowerDNS(t)
	type row struct {
		name, subnet string
		addr, scope  string // of the reply
		scoped       bool   // with scoped, the upstream is asked
		strict       bool   // with strict
	}
	const narrow, wide, other, all = "198.51.100.24", "198.51.100.16", "198.51.100.1", "198.51.100.99"
	rows := []row{
		{"here", "10.1.2.0/24", narrow, "10.1.2.0/24/24", true, true},
		{"here", "10.1.2.0/24", narrow, "10.1.2.0/24/24", false, true},
		{"here", "10.1.2.7/32", narrow, "10.1.2.7/32/24", false, true},
		{"here", "10.1.3.0/24", wide, "10.1.3.0/24/24", true, true},
		{"here", "10.9.9.0/24", other, "10.9.9.0/24/24", true, true},
		{"here", "10.1.0.0/16", wide, "10.1.0.0/16/24", true, true}, // it may get a better answer
		{"here", "10.1.0.0/16", wide, "10.1.0.0/16/24", false, true},
		{"here", "", other, "", true, true}, // as the server itself
		{"here", "", other, "", false, false},
		{"wide", "10.1.2.0/24", wide, "10.1.2.0/24/16", true, true},
		{"wide", "10.1.3.0/24", wide, "10.1.3.0/24/16", false, true},
		{"wide", "10.2.3.0/24", other, "10.2.3.0/24/16", true, true},
		{"wide", "0.0.0.0/0", other, "0.0.0.0/0/0", true, true}, // PowerDNS says 16 here, though SOURCE is 0
		{"wide", "0.0.0.0/0", other, "0.0.0.0/0/0", false, true},
		{"all", "10.1.2.0/24", all, "10.1.2.0/24/0", true, true},
		{"all", "10.7.7.0/24", all, "10.7.7.0/24/0", false, false},
		{"all", "", all, "", false, false},
		{"nx", "10.1.2.0/24", "", "10.1.2.0/24/0", true, true},
		{"nx", "10.7.7.0/24", "", "10.7.7.0/24/0", false, false},
	}
	for _, mode := range []string{"scoped", "strict"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := start(t, block("dns", upstream, "prometheus 127.0.0.1:${metrics}", "optcache {\n\t\tecs "+mode+"\n\t}"))
			asked := func() float64 { return sum(t, s.addr("metrics"), "coredns_proxy_request_duration_seconds_count") }
			last := row{"here", "10.1.2.0/24", narrow, "10.1.2.0/24/24", false, false}
			if mode == "strict" { // what a query without a subnet has brought is for all
				last.addr = other
			}
			for i, r := range append(slices.Clip(rows), last) {
				q := query(r.name+".example.org.", dns.TypeA)
				if r.subnet != "" {
					p := netip.MustParsePrefix(r.subnet)
					q.SetEdns0(1232, false)
					q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: uint8(p.Bits()), Address: p.Addr().AsSlice()}}
				}
				before := asked()
				m, _, err := (&dns.Client{Timeout: askTimeout}).Exchange(q, s.addr("dns"))
				if err != nil {
					t.Fatal(err)
				}
				var addr, scope string
				if len(m.Answer) > 0 {
					addr = m.Answer[0].(*dns.A).A.String()
				}
				if opt := m.IsEdns0(); opt != nil && len(opt.Option) > 0 {
					scope = opt.Option[0].String()
				}
				if addr != r.addr || mode == "scoped" && scope != r.scope || (addr == "") != (m.Rcode == dns.RcodeNameError) {
					t.Errorf("row %d, %s from %q: %s, %s, want %s, %s: %v", i, r.name, r.subnet, addr, scope, r.addr, r.scope, m)
				}
				if want := map[string]bool{"scoped": r.scoped, "strict": r.strict}[mode]; (asked()-before == 1) != want {
					t.Errorf("row %d, %s from %q: the upstream was asked %v times, want %v", i, r.name, r.subnet, asked()-before, want)
				}
			}
			answers, names := sum(t, s.addr("metrics"), "coredns_optcache_subnet_answers"), sum(t, s.addr("metrics"), "coredns_optcache_subnet_names")
			if want := map[string][2]float64{"scoped": {7, 2}, "strict": {}}[mode]; answers != want[0] || names != want[1] {
				t.Errorf("%v answers for a subnet, of %v names, want %v", answers, names, want)
			}
		})
	}
}
