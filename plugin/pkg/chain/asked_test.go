package chain

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/acl"
	_ "github.com/coredns/coredns/plugin/dnstap"
	"github.com/coredns/coredns/plugin/pkg/nonwriter"
	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/coredns/coredns/plugin/test"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// These tests hold what the fast path assumes of a plugin against the plugin itself, for random queries.

// block sets plugins up from lines of a Corefile, in front of a cache that notes what reaches it.
func block(t *testing.T, lines ...string) (*dnsserver.Config, *reached) {
	t.Helper()
	base := caddy.NewTestController("dns", "")
	base.ServerBlockKeys = []string{"dns://.:53"}
	cfg := dnsserver.GetConfig(base)
	cfg.Zone, cfg.Transport = ".", "dns"
	for _, line := range lines {
		word, _, _ := strings.Cut(line, " ")
		c := caddy.NewTestController("dns", line)
		action, err := caddy.DirectiveAction("dns", word)
		if err != nil {
			t.Fatal(err)
		}
		c.ServerBlockKeys = base.ServerBlockKeys
		if err := action(c); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		cfg.Plugin = append(cfg.Plugin, dnsserver.GetConfig(c).Plugin...)
	}
	cache := new(reached)
	cfg.Plugin = append(cfg.Plugin, func(plugin.Handler) plugin.Handler { return cache })
	if _, err := dnsserver.NewServer("dns://:53", []*dnsserver.Config{cfg}); err != nil {
		t.Fatal(err)
	}
	return cfg, cache
}

// reached is a cache that answers nothing.
type reached struct {
	asked *dns.Msg
	by    dns.ResponseWriter
}

func (*reached) Name() string { return "cache" }
func (r *reached) ServeDNS(_ context.Context, w dns.ResponseWriter, m *dns.Msg) (int, error) {
	r.asked, r.by = m.Copy(), w
	res := new(dns.Msg).SetRcode(m, dns.RcodeNameError)
	res.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}}}
	w.WriteMsg(res)
	return dns.RcodeSuccess, nil
}

// from is a writer for a client's address.
type from struct {
	test.ResponseWriter
	addr net.Addr
	got  *dns.Msg
}

func (w *from) RemoteAddr() net.Addr { return w.addr }
func (w *from) WriteMsg(m *dns.Msg) error {
	w.got = m
	return nil
}

var (
	askedNames = strings.Fields(`. org. example.org. www.example.org. wWw.Example.ORG. xexample.org. a.b.sub.example.org. alias.test. www.alias.test.
		notalias.test. a\.b.example.org. a\000b.test. localhost. long.name.with.many.labels.example.net.`)
	askedTypes   = []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeMX, dns.TypeHTTPS, 65280}
	askedClients = strings.Fields("192.0.2.1 192.0.2.200 192.0.3.1 10.1.2.3 127.0.0.1 255.255.255.255 0.0.0.0 2001:db8::1 2001:db8:ffff::1 fe80::1%2 ::1 ::ffff:192.0.2.1 ::")
)

// askAll asks random questions, by a plugin and by the effects of a block.
func askAll(t *testing.T, e *Effects, check func(a *Asked, r *dns.Msg, w *from)) {
	t.Helper()
	var a Asked
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		client := netip.MustParseAddr(askedClients[rng.IntN(len(askedClients))])
		r := new(dns.Msg).SetQuestion(askedNames[rng.IntN(len(askedNames))], askedTypes[rng.IntN(len(askedTypes))])
		var name [wire.MaxName]byte
		n, ok := wire.PackName(name[:], r.Question[0].Name)
		if !ok {
			t.Fatal(r.Question[0].Name)
		}
		wire.Lower(name[:n], name[:n])
		a.Set(Asked{Name: name[:n], Qtype: r.Question[0].Qtype, Client: netip.AddrPortFrom(client.WithZone("").Unmap(), 5353)})
		check(&a, r, &from{addr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(client, 5353))})
	}
}

// What reaches the cache with its question unchanged is what no plugin acts on.
func TestActsAsThePluginsDo(t *testing.T) {
	t.Parallel()
	for _, lines := range [][]string{
		{"acl {\n\tallow\n}"},
		{"acl {\n\tblock\n}"},
		{"acl {\n\tblock type A net 192.0.2.0/24\n}"},
		{"acl {\n\tallow net 192.0.2.0/25\n\tblock net 192.0.2.0/24\n\tfilter type TXT MX net 2001:db8::/48 10.0.0.0/8\n\tdrop net fe80::/10 ::1\n}"},
		{"acl example.org {\n\tblock net 192.0.2.1 192.0.2.200\n}\nacl test {\n\tfilter type * net *\n}"},
		{"acl sub.example.org {\n\tallow\n}\nacl example.org {\n\tblock net ::/0\n}\nacl {\n\tdrop type AAAA net 0.0.0.0/0\n}"},
		{"acl {\n\tblock net ::ffff:192.0.2.0/120\n}"},
		{"acl {\n\tblock net 192.0.2.0/24 192.0.2.0/25 192.0.2.128/32 192.0.3.0/24 0.0.0.0/32 255.255.255.255/32\n}"},
		{"tsig {\n\tsecret key.example.org. c2VjcmV0\n}"},
		{"tsig {\n\tsecret key.example.org. c2VjcmV0\n\trequire all\n}"},
		{"tsig example.org {\n\tsecret key.example.org. c2VjcmV0\n\trequire TXT AAAA\n}"},
		{"tsig {\n\tsecret key.example.org. c2VjcmV0\n\trequire_opcode QUERY\n}"},
		{"tsig test {\n\tsecret key.example.org. c2VjcmV0\n\trequire_opcode UPDATE\n}"},
		{"rewrite name example.org www.example.org"},
		{"rewrite name exact www.Example.org example.org answer auto"},
		{"rewrite name prefix www. ftp."},
		{"rewrite name suffix .alias.test .example.org answer auto"},
		{"rewrite stop name suffix alias.test example.org"},
		{"rewrite name substring example exim"},
		{`rewrite name regex (.*)\.alias\.test {1}.example.org`},
		{`rewrite name regex ^a[\\]\. b`},
		{"rewrite type AAAA A"},
		{"rewrite class CH HS"},
		{"rewrite class IN CH"},
		{"rewrite continue type TXT MX\nrewrite name exact alias.test example.org"},
		{"rewrite name exact www.alias.test other.test", "acl {\n\tblock net 10.0.0.0/8\n}"},
	} {
		cfg, cache := block(t, lines...)
		e, _, err := EffectsOf(cfg, "cache")
		if err != nil {
			t.Errorf("%q: %v", lines, err)
			continue
		}
		first := cfg.Handlers()[0]
		met := 0
		askAll(t, &e, func(a *Asked, r *dns.Msg, w *from) {
			cache.asked = nil
			before := r.Question[0]
			first.ServeDNS(t.Context(), w, r)
			acts := cache.asked == nil || cache.asked.Question[0] != before
			if got := e.Acts(a); got != acts {
				t.Fatalf("%q acts on %v from %v: %v, want %v", lines, before, w.addr, got, acts)
			}
			if acts {
				met++
			}
		})
		t.Logf("%q acts on %d queries", lines, met)
	}
}

// Rules that change the reply, and not the question, are met by the same queries.
func TestRewritesOfRepliesAreMet(t *testing.T) {
	t.Parallel()
	for _, line := range []string{
		"rewrite ttl exact www.example.org 7", "rewrite ttl prefix www 7", "rewrite ttl suffix alias.test 7-9", "rewrite ttl substring alias 7",
		"rewrite ttl regex (.*)example(.*) 7", "rewrite rcode exact www.example.org NXDOMAIN NOERROR", "rewrite rcode prefix www NXDOMAIN NOERROR",
		"rewrite rcode suffix .test NXDOMAIN NOERROR", "rewrite rcode substring example NXDOMAIN NOERROR", "rewrite rcode regex ^a NXDOMAIN NOERROR",
	} {
		cfg, _ := block(t, line)
		e, _, err := EffectsOf(cfg, "cache")
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		met := 0
		askAll(t, &e, func(a *Asked, r *dns.Msg, w *from) {
			cfg.Handlers()[0].ServeDNS(t.Context(), w, r)
			acts := w.got.Rcode != dns.RcodeNameError || w.got.Answer[0].Header().Ttl != 300
			if got := e.Acts(a); got != acts {
				t.Fatalf("%s meets %v: %v, want %v", line, r.Question[0], got, acts)
			}
			if acts {
				met++
			}
		})
		if met == 0 || met == 3000 {
			t.Errorf("%s is met by %d queries", line, met)
		}
	}
}

// A dns64 puts a writer of its own in front of the cache for the queries that it acts on.
func TestDns64Acts(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"", "\n\tallow_ipv4", "\n\ttranslate_all"} {
		cfg, cache := block(t, "dns64 {\n\tprefix 64:ff9b::/96"+options+"\n}")
		e, _, err := EffectsOf(cfg, "cache")
		if err != nil {
			t.Fatal(err)
		}
		askAll(t, &e, func(a *Asked, r *dns.Msg, w *from) {
			cfg.Handlers()[0].ServeDNS(t.Context(), w, r)
			_, acts := cache.by.(*nonwriter.Writer)
			if got := e.Acts(a); got != acts {
				t.Fatalf("dns64%s acts on %v from %v: %v, want %v", options, r.Question[0], w.addr, got, acts)
			}
		})
	}
}

// What goes by more than name, type, class and client is refused, and named.
func TestEffectsThatCannotBeAsked(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"rewrite edns0 local set 0xffee abcd":                  "rewrite",
		"rewrite cname exact a.example.org. b.example.org.":    "rewrite",
		`rewrite name regex (.*)\.test {1}.{a/b}.org metadata`: "rewrite",
		`acl a\046b.example.org {` + "\n\tblock\n}":            "backslash",
		`log a\046b.example.org {` + "\n\tclass error\n}":      "backslash",
		`tsig a\046.org {` + "\n\tsecret k. c2VjcmV0\n}":       "backslash",
		"loadbalance {\n\tprefer 192.0.2.0/24\n}":              "loadbalance",
		"dnstap /tmp/no.sock {\n\textra {/optcache/status}\n}": "metadata",
	} {
		cfg, _ := block(t, line)
		if _, _, err := EffectsOf(cfg, "cache"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want a word of %s", line, err, want)
		}
	}
}

// The classes that are logged for a name are those of log's own rule, and the classes that a response may have include the one
// that log finds.
func TestClassesAreThoseOfLog(t *testing.T) {
	t.Parallel()
	cfg, _ := block(t, "log sub.example.org {\n\tclass denial error\n}\nlog Example.org {\n\tclass error\n}\nlog www.example.org\nlog test {\n\tclass success denial\n}")
	e, _, err := EffectsOf(cfg, "cache")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]Classes{
		"a.sub.example.org.": ClassDenial | ClassError, "example.org.": ClassError, "www.example.org.": ClassError, // the first rule counts
		"test.": ClassSuccess | ClassDenial, "other.": 0, ".": 0, "xexample.org.": 0,
	} {
		var wireName [wire.MaxName]byte
		n, _ := wire.PackName(wireName[:], name)
		if got := e.Logged(wireName[:n]); got != want {
			t.Errorf("%s: %b, want %b", name, got, want)
		}
	}
	bits := map[response.Class]Classes{response.Success: ClassSuccess, response.Denial: ClassDenial, response.Error: ClassError}
	rr := func(s string) dns.RR {
		r, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	a, soa, ns := rr("example.org. 300 IN A 192.0.2.1"), rr("example.org. 300 IN SOA a. b. 1 2 3 4 5"), rr("example.org. 300 IN NS a.")
	for rcode := range 16 {
		for _, answer := range [][]dns.RR{nil, {a}} {
			for _, authority := range [][]dns.RR{nil, {soa}, {ns}, {ns, soa}} {
				m := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
				m.Response, m.Rcode, m.Answer, m.Ns = true, rcode, answer, authority
				kind, _ := response.Typify(m, time.Now())
				if got := ClassesOf(rcode, len(answer), false); got&bits[response.Classify(kind)] == 0 {
					t.Errorf("%v may be %b", m, got)
				}
			}
		}
	}
	signed := rr("example.org. 300 IN RRSIG A 8 2 300 20000101000000 19990101000000 1 example.org. AAAA")
	m := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	m.SetEdns0(1232, true)
	m.Response, m.Answer = true, []dns.RR{a, signed}
	if kind, _ := response.Typify(m, time.Now()); ClassesOf(dns.RcodeSuccess, 2, true)&bits[response.Classify(kind)] == 0 {
		t.Error("an expired signature")
	}
}

// Asking allocates nothing.
func TestAskingAllocatesNothing(t *testing.T) {
	cfg, _ := block(t, "rewrite name suffix .alias.test .example.org answer auto", "rewrite name regex (.*)\\.zone\\.test {1}.example.org", "acl {\n\tblock net 10.0.0.0/8 2001:db8::/32\n}")
	e, _, err := EffectsOf(cfg, "cache")
	if err != nil {
		t.Fatal(err)
	}
	var a Asked
	name, client := []byte("\x03www\x07example\x03org\x00"), netip.MustParseAddrPort("192.0.2.1:5353")
	if n := testing.AllocsPerRun(100, func() {
		if a.Set(Asked{Name: name, Qtype: dns.TypeA, Client: client}); e.Acts(&a) {
			t.Fatal("acts")
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// The type of a rule is read as it is in memory.
func TestAclRulesAreAlike(t *testing.T) {
	cfg, _ := block(t, "acl example.org {\n\tblock type A net 192.0.2.0/24\n}")
	h := cfg.Handlers()[0].(acl.ACL)
	rules, ok := unexported[[]aclRule](&h, "Rules")
	if !ok || len(rules) != 1 || fmt.Sprint(rules[0].zones) != "[example.org.]" || len(rules[0].policies) != 1 || rules[0].policies[0].action == aclAllow {
		t.Errorf("%+v, %v", rules, ok)
	}
	if _, ok := unexported[[]struct{ zones []string }](&h, "Rules"); ok {
		t.Error("a type with fewer fields is taken")
	}
}
