package test

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/miekg/dns"
)

// A real upstream that answers by the client's subnet, behind a real server: hits have the right SCOPE, over a reload and a restart.
func TestClientSubnets(t *testing.T) {
	t.Parallel()
	l, pc := listen(t)
	asked := make(chan string, 1000)
	byPlace := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := answer(r)
		where := ""
		if opt := r.IsEdns0(); opt != nil {
			m.SetEdns0(1232, false)
			for _, o := range opt.Option {
				s, ok := o.(*dns.EDNS0_SUBNET)
				if !ok {
					continue
				}
				where = s.String()
				reply := *s
				reply.SourceScope = 16
				m.IsEdns0().Option = append(m.IsEdns0().Option, &reply)
				m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: s.Address}}
			}
		}
		asked <- where
		w.WriteMsg(m)
	})
	for _, s := range []*dns.Server{{Listener: l, Handler: byPlace}, {PacketConn: pc, Handler: byPlace}} {
		go s.ActivateAndServe()
		t.Cleanup(func() { s.Shutdown() })
	}
	path := filepath.Join(t.TempDir(), "answers")
	corefile := func(more string) string {
		return block("dns", l.Addr().String(), "optcache {\n\t\tecs scoped\n\t\tcache_file_path "+path+"\n\t\t"+more+"\n\t}")
	}
	s := start(t, corefile(""))
	ask := func(network, prefix string) (data, subnet string) {
		t.Helper()
		p := netip.MustParsePrefix(prefix)
		q := query("here.example.org.", dns.TypeA)
		q.SetEdns0(1232, false)
		q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: uint8(p.Bits()), Address: p.Addr().AsSlice()}}
		m, _, err := (&dns.Client{Net: network, Timeout: askTimeout}).Exchange(q, s.addr("dns"))
		if err != nil {
			t.Fatal(err)
		}
		opt := m.IsEdns0()
		if opt == nil || len(opt.Option) != 1 || len(m.Answer) != 1 {
			t.Fatalf("%s: %v", prefix, m)
		}
		return m.Answer[0].(*dns.A).A.String(), opt.Option[0].String()
	}
	check := func(when string, queries int) {
		t.Helper()
		for _, network := range []string{"udp", "tcp"} {
			for _, c := range [][3]string{{"10.1.7.0/24", "10.1.7.0", "10.1.7.0/24/16"}, {"10.1.9.0/24", "10.1.7.0", "10.1.9.0/24/16"}, {"10.2.1.0/24", "10.2.1.0", "10.2.1.0/24/16"}} {
				if data, subnet := ask(network, c[0]); data != c[1] || subnet != c[2] {
					t.Errorf("%s, %s: %s gets %s, %s", when, network, c[0], data, subnet)
				}
			}
		}
		var all []string
		for len(asked) > 0 {
			all = append(all, <-asked)
		}
		if len(all) != queries {
			t.Errorf("%s: the upstream was asked %q", when, all)
		}
	}
	check("first", 2)
	s.write(corefile("success 20000"))
	s.reload("Reloading complete")
	check("after a reload to another size", 0)
	s.stopped = true
	s.signal(syscall.SIGTERM)
	<-s.exited
	s = start(t, corefile(""))
	if !s.waitFor(fmt.Sprintf("Has read %d answers", 2)) {
		t.Fatal("the answers have not been read")
	}
	check("after a restart", 0)
}
