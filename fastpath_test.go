package optcache

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/bufsize"
	"github.com/coredns/coredns/plugin/metrics"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// The workers of a fast path that nobody has asked for leave room for the rest, under limits of CPU time and with many addresses.
func TestAutoWorkers(t *testing.T) {
	for _, tc := range []struct{ procs, cpus, addresses, want int }{
		{1, 1, 1, 1},     // a virtual machine
		{2, 2, 1, 2},     // a laptop
		{8, 8, 1, 8},     //
		{64, 64, 1, 16},  // a large machine
		{1, 16, 1, 1},    // a limit of 100m to 1
		{2, 16, 1, 1},    // 2
		{4, 16, 1, 2},    // 4
		{16, 64, 1, 8},   // 16
		{8, 8, 2, 4},     // NodeLocal DNSCache listens on two addresses
		{2, 2, 16, 1},    // many addresses
		{64, 64, 2, 16},  //
		{64, 128, 4, 8},  //
		{4, 4, 0, 4},     // none: no key of the block serves plain DNS
		{16, 256, 16, 1}, //
	} {
		if n := autoWorkers(tc.procs, tc.cpus, tc.addresses); n != tc.want {
			t.Errorf("%d of %d CPUs, %d addresses: %d workers, want %d", tc.procs, tc.cpus, tc.addresses, n, tc.want)
		}
	}
}

// fast is a fast path without sockets, beside the chain of the same instance. It implements fastpath.Batch.
type fast struct {
	routes
	a fastpath.Answerer

	packet []byte
	client netip.AddrPort
	local  net.Addr // that of the client, as wireWriter has it
	stream bool
	reply  []byte
	why    fastpath.Reason
}

func newFast(tb testing.TB, h *Optcache, addr string, effects chain.Effects, report ...*chain.Report) *fast {
	tb.Helper()
	f := new(fast)
	f.server = contextOf(tb, addr).Value(dnsserver.Key{}).(*dnsserver.Server)
	r := route{o: h, server: h.serverOf(f.server), effects: effects}
	if len(report) > 0 {
		r.report = report[0]
	}
	f.add([]byte{0}, r)
	return f
}

// add adds the route of a zone.
func (f *fast) add(zone []byte, r route) {
	r.index = len(f.all)
	f.all = append(f.all, &r)
	f.zones.Add(zone, &r)
}

// ask gives a packet to the fast path.
func (f *fast) ask(p []byte, client net.Addr) (reply []byte, why fastpath.Reason) {
	if f.a == nil {
		f.a = f.NewAnswerer()
	}
	var from netip.AddrPort
	switch a := client.(type) {
	case *net.UDPAddr:
		from, f.stream = a.AddrPort(), false
	case *net.TCPAddr:
		from, f.stream = a.AddrPort(), true
	}
	f.packet, f.local, f.client = p, client, netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	f.a.Answer(f)
	f.a.Sent()
	return f.reply, f.why
}

func (f *fast) Len() int                        { return 1 }
func (f *fast) Packet(int) []byte               { return f.packet }
func (f *fast) Client(int) netip.AddrPort       { return f.client }
func (f *fast) Local() net.Addr                 { return f.local }
func (f *fast) Lost(int) bool                   { return false }
func (f *fast) Stream() bool                    { return f.stream }
func (f *fast) Reply(_ int, b []byte)           { f.reply, f.why = b, fastpath.Answered }
func (f *fast) Pass(_ int, why fastpath.Reason) { f.reply, f.why = nil, why }

// The reply is that of the chain, byte for byte, whatever is asked, over UDP, TCP and TLS; and each hit counts there too.
func TestFastRepliesAreThoseOfTheChain(t *testing.T) {
	for i := range 6 {
		keep, over := i%2 == 1, []string{"UDP", "TCP", "TLS"}[i/2]
		clients, server := []net.Addr{udp4Client, udp6Client}, "dns://"
		if over != "UDP" {
			clients = []net.Addr{tcp4Client, tcp6Client}
		}
		if over == "TLS" {
			server = "tls://"
		}
		inBubble(t, fmt.Sprintf("%s, keepttl %v", over, keep), func(t *testing.T) {
			o := roomyOptions()
			o.keepTTL, o.explain = keep, true
			o.prefetch = prefetchOptions{amount: 3, gap: time.Minute, percentage: 10}
			o.stale.upTo = time.Hour
			up := new(scripted)
			h := startNamed(t, t.Name(), o, up)
			f := newFast(t, h, server+t.Name()+":53", chain.Effects{})
			ctx := contextOf(t, server+"127.0.0.1:53")
			g := newTraffic(17)
			passed := make(map[fastpath.Reason]int)
			for range 3000 {
				q := g.question()
				up.response = g.response(q)
				for range 4 {
					r, client := g.request(q), clients[g.IntN(2)]
					p, err := r.Pack()
					if err != nil {
						continue
					}
					// The server reads what was packed.
					if r = new(dns.Msg); r.Unpack(p) != nil {
						continue
					}
					got, why := f.ask(p, client)
					got = bytes.Clone(got)
					passed[why]++
					w, _, _ := ask(ctx, h, r, client)
					synctest.Wait()
					if why == fastpath.Answered {
						if len(w.packets) != 1 || !bytes.Equal(got, w.packets[0]) {
							t.Fatalf("reply %x\nwant %x\nto %v", got, w.packets, r)
						}
					}
					time.Sleep(time.Duration(g.IntN(3)) * time.Second)
				}
			}
			for _, why := range []fastpath.Reason{fastpath.NotPlain, fastpath.Miss, fastpath.Stale, fastpath.Prefetch, fastpath.Size} {
				if passed[why] == 0 && (why != fastpath.Size || over == "UDP") {
					t.Errorf("nothing passed as %q", why)
				}
			}
			if passed[fastpath.Answered] < 1000 {
				t.Errorf("%d hits", passed[fastpath.Answered])
			}
		})
	}
}

// Of what is no message, or one that the server treats in a way of its own, the fast path makes nothing.
func FuzzFastQuery(f *testing.F) {
	g := newTraffic(23)
	for range 200 {
		if p, err := g.request(g.question()).Pack(); err == nil {
			f.Add(p)
		}
	}
	plain, _ := asking("host.example.org.", dns.TypeA).Pack()
	for i := range plain {
		p := bytes.Clone(plain)
		p[i] ^= 0x81
		f.Add(p)
		f.Add(plain[:i])
	}
	f.Add(append(bytes.Clone(plain), 0))
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x00\x00\x01\x00\x01\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x0c\x00\x0a\x00\x08\x01\x02\x03\x04\x05\x06\x07\x08"))
	h := startNamed(f, f.Name(), roomyOptions(), encodingUpstream{})
	path := newFast(f, h, "dns://"+f.Name()+":53", chain.Effects{})
	ctx := serverContext(f)
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 512 {
			p = p[:512]
		}
		for i, client := range []net.Addr{udp4Client, udp6Client, udp4Client, tcp4Client} {
			got, why := path.ask(p, client)
			got = bytes.Clone(got)
			r := new(dns.Msg)
			if err := r.Unpack(p); err != nil {
				if why != fastpath.NotPlain {
					t.Fatalf("%v, and the fast path says %q", err, why)
				}
				return
			}
			if len(r.Question) == 0 {
				return
			}
			w, _, _ := ask(ctx, h, r, client)
			if why != fastpath.Answered {
				continue
			}
			if len(w.packets) != 1 || !bytes.Equal(got, w.packets[0]) {
				t.Fatalf("request %d: reply %x\nwant %x\nto %v", i, got, w.packets, r)
			}
		}
	})
}

func TestFastPathPassesOn(t *testing.T) {
	opt := func(p []byte) []byte { // a query with an OPT
		p = bytes.Clone(p)
		p[11] = 1
		return append(p, 0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0)
	}
	with := func(p []byte, at int, to ...byte) []byte {
		p = bytes.Clone(p)
		if at < 0 {
			at += len(p)
		}
		copy(p[at:], to)
		return p
	}
	options := func(p []byte, options ...byte) []byte {
		p = append(opt(p), options...)
		binary.BigEndian.PutUint16(p[len(p)-len(options)-2:], uint16(len(options)))
		return p
	}
	plain, err := asking("host.example.org.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	tail := len(plain) - wire.QuestionTail
	ofType := func(qtype uint16) []byte { return with(plain, tail, byte(qtype>>8), byte(qtype)) }
	long := strings.Repeat(strings.Repeat("l", 61)+".", 4)
	longQuery, err := asking(long, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		packet []byte
		want   fastpath.Reason
	}{
		{"plain", plain, fastpath.Answered},
		{"EDNS", opt(plain), fastpath.Answered},
		{"EDNS, DO", with(opt(plain), -4, 0x80), fastpath.Miss},
		{"CD", with(plain, 3, 0x10), fastpath.Miss},
		{"cookie", options(plain, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8), fastpath.Answered},
		{"padding", options(plain, 0, 12, 0, 2, 0, 0), fastpath.Answered},
		{"two options", options(plain, 0, 12, 0, 0, 0, 10, 0, 1, 9), fastpath.Answered},
		{"letters", with(plain, 13, 'H', 'O', 's', 'T'), fastpath.Answered},
		{"empty", nil, fastpath.NotPlain},
		{"header only", plain[:12], fastpath.NotPlain},
		{"cut name", plain[:tail-1], fastpath.NotPlain},
		{"cut question", plain[:len(plain)-1], fastpath.NotPlain},
		{"trailing byte", append(bytes.Clone(plain), 0), fastpath.NotPlain},
		{"trailing byte behind OPT", append(opt(plain), 0), fastpath.NotPlain},
		{"response", with(plain, 2, 0x81), fastpath.NotPlain},
		{"opcode", with(plain, 2, 0x21), fastpath.NotPlain},
		{"TC", with(plain, 2, 0x03), fastpath.NotPlain},
		{"two questions", with(plain, 5, 2), fastpath.NotPlain},
		{"no question", with(plain, 5, 0), fastpath.NotPlain},
		{"answer", with(plain, 7, 1), fastpath.NotPlain},
		{"authority", with(plain, 9, 1), fastpath.NotPlain},
		{"two additional", with(opt(plain), 11, 2), fastpath.NotPlain},
		{"additional missing", with(plain, 11, 1), fastpath.NotPlain},
		{"class CH", with(plain, -1, 3), fastpath.NotPlain},
		{"class ANY", with(plain, -1, 255), fastpath.NotPlain},
		{"compressed name", with(plain, 12, 0xc0, 0x0c), fastpath.NotPlain},
		{"reserved label", with(plain, 12, 0x44), fastpath.NotPlain},
		{"DS", ofType(dns.TypeDS), fastpath.NotPlain},
		{"ANY", ofType(dns.TypeANY), fastpath.NotPlain},
		{"AXFR", ofType(dns.TypeAXFR), fastpath.NotPlain},
		{"IXFR", ofType(dns.TypeIXFR), fastpath.NotPlain},
		{"TSIG", ofType(dns.TypeTSIG), fastpath.NotPlain},
		{"other type", ofType(dns.TypeMX), fastpath.Miss},
		{"EDNS version 1", with(opt(plain), -5, 1), fastpath.NotPlain},
		{"extended rcode", with(opt(plain), -6, 1), fastpath.NotPlain},
		{"TSIG for OPT", with(opt(plain), -9, 250), fastpath.NotPlain},
		{"OPT with an owner", with(opt(plain), -11, 1), fastpath.NotPlain},
		{"cut OPT", opt(plain)[:len(plain)+10], fastpath.NotPlain},
		{"NSID", options(plain, 0, 3, 0, 0), fastpath.NotPlain},
		{"ECS", options(plain, 0, 8, 0, 4, 0, 1, 0, 0), fastpath.NotPlain},
		{"option too long", options(plain, 0, 10, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8), fastpath.NotPlain},
		{"option cut", options(plain, 0, 10, 0), fastpath.NotPlain},
		{"name of 253 octets", longQuery, fastpath.Miss},
		{"local", mustPack(t, "x.localhost."), fastpath.Zone},
		{"local, reverse", mustPack(t, "1.0.0.127.in-addr.arpa."), fastpath.Zone},
		{"local, by prefix", mustPack(t, "localhost.example.org."), fastpath.Zone},
		{"not local", mustPack(t, "127.in-addr.arpa.example.org."), fastpath.Miss},
		{"other zone", mustPack(t, "www.example.net."), fastpath.Zone},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := startNamed(t, t.Name(), stockOptions(), addressUpstream)
			f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Local: true, LocalPrefix: true})
			f.add([]byte("\x07example\x03net\x00"), route{})
			ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
			if _, why := f.ask(tc.packet, udp4Client); why != tc.want {
				t.Errorf("passed as %q, want %q", why, tc.want)
			}
		})
	}
}

func mustPack(t *testing.T, name string) []byte {
	t.Helper()
	p, err := asking(name, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Prefetch triggers, stale entries, zones that are bypassed or not cached go the slow path.
func TestFastPathLeavesTheRestToTheChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := prefetching(3)
		o.stale.upTo = time.Hour
		o.zones = []string{"example.org."}
		up := &scripted{response: positive(aRecord)}
		h := startNamed(t, t.Name(), o, up, bypasser{named{name: "errors"}})
		f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{})
		p := mustPack(t, "host.example.org.")
		step := func(want fastpath.Reason) {
			t.Helper()
			if _, why := f.ask(p, udp4Client); why != want {
				t.Errorf("passed as %q, want %q", why, want)
			}
		}
		step(fastpath.Miss)
		ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
		step(fastpath.Answered)
		time.Sleep(200 * time.Second) // more than the gap between requests
		step(fastpath.Answered)
		step(fastpath.Answered)
		step(fastpath.Prefetch)
		step(fastpath.Prefetch)
		time.Sleep(200 * time.Second)
		step(fastpath.Stale)
		for name, why := range map[string]fastpath.Reason{"host.example.com.": fastpath.Zone, "a.mutable.example.org.": fastpath.Zone} {
			p = mustPack(t, name)
			step(why)
		}
	})
}

// When a rewrite, anywhere, has made known an option that is ignored otherwise, replies have it, and the server makes them.
func TestFastPathLeavesKnownOptionsToTheChain(t *testing.T) {
	h := startNamed(t, t.Name(), roomyOptions(), addressUpstream)
	r := asking("www.example.org.", dns.TypeA).SetEdns0(1232, false)
	ask(serverContext(t), h, r, udp4Client)
	for _, known := range []bool{false, true} {
		f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Options: known})
		for _, option := range []bool{false, true} {
			r := r.Copy()
			if option {
				r.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}}
			}
			p, err := r.Pack()
			if err != nil {
				t.Fatal(err)
			}
			want := fastpath.Answered
			if known && option {
				want = fastpath.NotPlain
			}
			if _, why := f.ask(p, udp4Client); why != want {
				t.Errorf("known %v, option %v: passed as %q, want %q", known, option, why, want)
			}
		}
	}
}

func TestFastPathMirrorsBufsize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &scripted{response: positive(aRecord)}
		h := newOptcache(roomyOptions())
		h.clock = systemNow
		h.Next = up
		front := bufsize.Bufsize{Next: h, Size: 700}
		if err := h.start(t.Name(), []plugin.Handler{front, h}); err != nil {
			t.Fatal(err)
		}
		stopsWith(t, h)
		f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Space: 700})
		for i, size := range []uint16{0, 511, 512, 699, 700, 701, 1232, 65535} {
			space := max(512, min(int(size), 700))
			for n := range 60 {
				q := dns.Question{Name: fmt.Sprintf("h%d-%d.example.org.", i, n), Qtype: 65280, Qclass: dns.ClassINET}
				up.response = filler(q, 400+n*6)
				r := asking(q.Name, q.Qtype)
				r.SetEdns0(size, n%2 == 0)
				r.Id = 1
				ask(serverContext(t), front, r, udp4Client)
				p, err := r.Pack()
				if err != nil {
					t.Fatal(err)
				}
				got, why := f.ask(p, udp4Client)
				got = bytes.Clone(got)
				w, _, _ := ask(serverContext(t), front, r, udp4Client)
				if why == fastpath.Answered && !bytes.Equal(got, w.only(t)) {
					t.Fatalf("buffer %d: %x, want %x", size, got, w.packets)
				}
				whole := up.response.Len() + 11 // with OPT
				if want := map[bool]fastpath.Reason{true: fastpath.Answered, false: fastpath.Size}[whole <= space]; why != want {
					t.Errorf("buffer %d, reply of %d bytes: %q", size, whole, why)
				}
			}
		}
	})
}

// rotated are the records of a section in the order of a fast reply.
func rotated(t *testing.T, f *fast, p []byte) *dns.Msg {
	t.Helper()
	b, why := f.ask(p, udp4Client)
	if why != fastpath.Answered {
		t.Fatalf("passed as %q", why)
	}
	return unpacked(t, b)
}

// Rotation gives the records in each of the orders that loadbalance gives, as often.
func TestFastPathMirrorsLoadbalance(t *testing.T) {
	h := startNamed(t, t.Name(), stockOptions(), &scripted{response: positive(
		"host.example.org. 300 IN MX 10 a.example.org.",
		"host.example.org. 300 IN A 192.0.2.1",
		"host.example.org. 300 IN TXT text",
		"host.example.org. 300 IN A 192.0.2.2",
		"host.example.org. 300 IN MX 20 b.example.org.",
		"alias.example.org. 300 IN CNAME host.example.org.",
		"host.example.org. 300 IN AAAA 2001:db8::3",
		"host.example.org. 300 IN HINFO a b",
	)})
	r := asking("host.example.org.", dns.TypeANY)
	r.Question[0].Qtype = dns.TypeA
	ask(serverContext(t), h, r, udp4Client)
	f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Rotate: true})
	p, err := r.Pack()
	if err != nil {
		t.Fatal(err)
	}
	const times = 6000
	orders := make(map[string]int)
	for range times {
		m := rotated(t, f, p)
		var b strings.Builder
		for i, rr := range m.Answer {
			want := []uint16{dns.TypeCNAME, dns.TypeTXT, dns.TypeHINFO, 0, 0, 0, dns.TypeMX, dns.TypeMX}[i]
			if h := rr.Header(); want != 0 && h.Rrtype != want || h.Ttl > 300 {
				t.Fatalf("record %d of %v", i, m)
			}
			rr.Header().Ttl = 0 // it counts down
			b.WriteString(rr.String())
		}
		orders[b.String()]++
	}
	const all = 6 * 2 // of three addresses and two mail exchanges
	if len(orders) != all {
		t.Errorf("%d orders, want %d", len(orders), all)
	}
	for order, n := range orders {
		if n < times/all*7/10 || n > times/all*13/10 {
			t.Errorf("%d times of %d: %s", n, times, order)
		}
	}
}

// What is not answered with success is not shuffled, and one record stays where it is.
func TestFastPathRotatesOnlySuccess(t *testing.T) {
	soa := "example.org. 300 IN SOA ns.example.org. root.example.org. 1 2 3 4 300"
	res := negative(dns.RcodeNameError, soa, "b.example.org. 300 IN A 192.0.2.1", "b.example.org. 300 IN A 192.0.2.2", "b.example.org. 300 IN A 192.0.2.3")
	h := startNamed(t, t.Name(), stockOptions(), &scripted{response: res})
	r := asking("host.example.org.", dns.TypeA)
	want := answer(t, serverContext(t), h, r)
	f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Rotate: true})
	p, _ := r.Pack()
	for range 20 {
		if m := rotated(t, f, p); m.String() != want.String() {
			t.Fatalf("got %v, want %v", m, want)
		}
	}
}

func TestFastHitAllocatesNothing(t *testing.T) {
	for _, n := range []int{3, 25, 100} { // plain, compressed, cut
		t.Run(fmt.Sprintf("%d addresses", n), func(t *testing.T) { fastHitAllocatesNothing(t, n) })
	}
}

func fastHitAllocatesNothing(t *testing.T, n int) {
	h := startNamed(t, t.Name(), stockOptions(), &scripted{response: addresses("host.example.org.", n)})
	p := mustPack(t, "host.example.org.")
	f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Rotate: true}, reports)
	ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
	if n := testing.AllocsPerRun(200, func() {
		if _, why := f.ask(p, udp4Client); why != fastpath.Answered {
			t.Fatalf("passed as %q", why)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Plugins whose rules are asked cost a hit no allocation, and acl's counter counts it as one of the chain.
func TestFastHitBehindRules(t *testing.T) {
	diffDirectives()
	addr := "dns://" + t.Name() + ":53"
	s, err := newDiffSide(pluginName, &diffScenario{fast: true, plugins: []string{
		"log . {\n\tclass error\n}", "dns64 {\n\tprefix 64:ff9b::/96\n}", "rewrite name suffix .alias.test .example.org answer auto",
		"rewrite ttl regex (.*)\\.other\\.test 7", "tsig {\n\tsecret key.example.org. c2VjcmV0\n\trequire TXT\n}",
		"acl {\n\tblock type A net 10.0.0.0/8 2001:db8:1::/48\n\tfilter type MX\n}",
	}}, addr, new(logged))
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	if s.fast == nil {
		t.Fatal("there is no fast path")
	}
	fill := func(qtype uint16) []byte {
		r := asking("host.example.org.", qtype)
		record := aRecord
		if qtype == dns.TypeAAAA {
			record = "host.example.org. 300 IN AAAA 2001:db8::1"
		}
		s.step = &diffStep{query: r, response: positive(record)}
		s.server.ServeDNS(s.ctx, &wireWriter{addr: tcp4Client}, r.Copy())
		p, err := r.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := fill(dns.TypeA)
	allowed := func() (n float64) {
		for _, v := range series(t, prometheus.DefaultGatherer, "coredns_acl_allowed_", addr) {
			n += v
		}
		return n
	}
	before := allowed()
	const hits = 200
	if n := testing.AllocsPerRun(hits-1, func() { // which makes one run more
		if _, why := s.fast.ask(p, udp4Client); why != fastpath.Answered {
			t.Fatalf("passed as %q", why)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if n := allowed() - before; n != hits {
		t.Errorf("acl has allowed %v of %d hits", n, hits)
	}
	blocked := &net.UDPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 40212}
	for _, tc := range []struct {
		what   string
		packet []byte
		client net.Addr
		want   fastpath.Reason
	}{
		{"a client that acl blocks", p, blocked, fastpath.Outer},
		{"a type that acl filters", fill(dns.TypeMX), udp4Client, fastpath.Outer},
		{"a type that tsig wants to be signed", fill(dns.TypeTXT), udp4Client, fastpath.Outer},
		{"AAAA for dns64", fill(dns.TypeAAAA), udp6Client, fastpath.Outer},
		{"AAAA over IPv4", fill(dns.TypeAAAA), udp4Client, fastpath.Answered},
		{"a name that is rewritten", mustPack(t, "host.alias.test."), udp4Client, fastpath.Outer},
		{"a name whose TTL is rewritten", mustPack(t, "a.other.test."), udp4Client, fastpath.Outer},
	} {
		if _, why := s.fast.ask(tc.packet, tc.client); why != tc.want {
			t.Errorf("%s: passed as %q, want %q", tc.what, why, tc.want)
		}
	}
}

// The series of the plugin prometheus count a fast hit as they count one of the chain.
func TestFastPathMirrorsMetrics(t *testing.T) {
	for _, between := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("plugin between %v", between), func(t *testing.T) {
			chained, fasts := fmt.Sprintf("dns://chain-%v:53", between), fmt.Sprintf("dns://fast-%v:53", between)
			up := new(scripted)
			h := newOptcache(roomyOptions())
			h.clock = systemNow
			h.Next = up
			front := metrics.New("")
			front.AddZone("sub.example.org.")
			front.AddZone("example.org.")
			front.Next = h
			handlers := []plugin.Handler{front, h}
			if between {
				p := passing{name: "errors", next: h}
				front.Next, handlers = p, []plugin.Handler{front, p, h}
			}
			if err := h.start(t.Name(), handlers); err != nil {
				t.Fatal(err)
			}
			stopsWith(t, h)
			f := newFast(t, h, fasts, chain.Effects{}, &chain.Report{Zones: front.ZoneNames, Plugin: handlers[1].Name()})
			ctx := contextOf(t, chained)
			g := newTraffic(29)
			fastHits := 0
			for range 1500 {
				q := g.question()
				up.response = g.response(q)
				ask(serverContext(t), h, g.request(q), udp4Client)
				for range 4 {
					r, client := g.request(q), []net.Addr{udp4Client, udp6Client, tcp4Client, tcp6Client}[g.IntN(4)]
					p, err := r.Pack()
					if err != nil || r.Unpack(p) != nil {
						continue
					}
					if _, why := f.ask(p, client); why == fastpath.Answered {
						fastHits++
						ask(ctx, front, r, client)
					}
				}
			}
			if fastHits < 500 {
				t.Errorf("%d hits", fastHits)
			}
			got := series(t, prometheus.DefaultGatherer, "coredns_dns_", fasts)
			want := series(t, prometheus.DefaultGatherer, "coredns_dns_", chained)
			for _, all := range []map[string]float64{got, want} {
				for k := range all {
					if strings.HasPrefix(k, "request_duration") && !strings.HasSuffix(k, "count") {
						delete(all, k)
					}
				}
			}
			diffSeries(t, got, want)
		})
	}
}

// The fast path finds the same server block as the server, among views, and zones in one another.
func TestFastPathInViews(t *testing.T) {
	diffDirectives()
	blocks := []struct{ zone, expression string }{
		{"sub.example.org.", "incidr(client_ip(), '2001:db8::/32') && type() == 'A'"},
		{"example.org.", "type() == 'AAAA'"},
		{"example.org.", "incidr(client_ip(), '192.0.2.0/24') && name() startsWith 'h'"},
		{"example.org.", "metadata('a/b') == 'c' || proto() == 'tcp'"},
		{".", "do()"},
		{".", "incidr(client_ip(), '2001:db8::/32')"},
		{"test.", ""},
		{"plain.test.", "name() == 'h1.plain.test.'"},
		{".", ""},
	}
	var configs []*dnsserver.Config
	var caches []*Optcache
	for i, b := range blocks {
		cfg := &dnsserver.Config{Zone: b.zone, Transport: "dns", Port: "53", ListenHosts: []string{""}}
		h := newOptcache(roomyOptions())
		h.clock = systemNow
		h.Next = plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := new(dns.Msg).SetReply(r)
			rdata := map[uint16]string{dns.TypeA: "A 192.0.2.%d", dns.TypeAAAA: "AAAA 2001:db8::%d", dns.TypeTXT: "TXT %d", dns.TypeDS: "DS %d 8 2 ab"}
			m.Answer = parsed(r.Question[0].Name + " 300 IN " + fmt.Sprintf(rdata[r.Question[0].Qtype], i))
			return 0, w.WriteMsg(m)
		})
		cfg.AddPlugin(func(plugin.Handler) plugin.Handler { return h })
		if b.expression != "" {
			v := pluginOf(t, "view v {\n\texpr "+b.expression+"\n}", nil)
			cfg.AddPlugin(func(plugin.Handler) plugin.Handler { return v })
			cfg.ViewName, cfg.FilterFuncs = fmt.Sprint("v", i), []dnsserver.FilterFunc{v.(dnsserver.Viewer).Filter}
		}
		configs, caches = append(configs, cfg), append(caches, h)
	}
	s, err := dnsserver.NewServer("dns://"+t.Name()+":53", configs)
	if err != nil {
		t.Fatal(err)
	}
	for i, h := range caches {
		if err := h.start(configs[i].ViewName, configs[i].Handlers()); err != nil {
			t.Fatal(err)
		}
		stopsWith(t, h)
		h.block = &fastBlock{o: h, workers: 1}
		h.block.effects, h.block.report, err = chain.EffectsOf(configs[i], pluginName)
		if unknown := strings.HasPrefix(blocks[i].expression, "metadata"); (err != nil) != unknown {
			t.Fatal(err)
		} else if unknown {
			h.block = nil
		}
	}
	r, err := newRoutes(s)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithValue(context.Background(), dnsserver.Key{}, s)
	f, rng := &fast{routes: *r}, rand.New(rand.NewPCG(1, 9))
	fasts, passed := make(map[string]int), make(map[fastpath.Reason]int)
	for range 6000 {
		name := []string{"h1.", "x2.", "h3.", ""}[rng.IntN(4)] + []string{"sub.example.org.", "Example.org.", "plain.test.", "test.", "other.", "xsub.example.org."}[rng.IntN(6)]
		q := asking(name, []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeDS}[rng.IntN(4)])
		if rng.IntN(3) == 0 {
			q.SetEdns0(1232, rng.IntN(2) == 0)
		}
		p, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		client := plainClients[rng.IntN(len(plainClients))]
		got, why := f.ask(p, client)
		got = bytes.Clone(got)
		w := &wireWriter{addr: client}
		s.ServeDNS(ctx, w, unpacked(t, p))
		if passed[why]++; why != fastpath.Answered {
			continue
		}
		// The reply may be a second older.
		a, b := unpacked(t, got), unpacked(t, w.only(t))
		a.Answer[0].Header().Ttl, b.Answer[0].Header().Ttl = 0, 0
		if a.String() != b.String() {
			t.Fatalf("%v from %v\nreply %v\nwant %v", q, client, a, b)
		}
		text := strings.Trim(a.Answer[0].String(), `"`)
		fasts[text[len(text)-1:]]++
	}
	for i := range blocks {
		if n, unknown := fasts[fmt.Sprint(i)], caches[i].block == nil; (n == 0) != unknown {
			t.Errorf("block %d, %v: %d fast hits", i, blocks[i], n)
		}
	}
	if passed[fastpath.View] == 0 || passed[fastpath.NotPlain] == 0 {
		t.Errorf("passed: %v", passed)
	}
	p := mustPack(t, "h1.plain.test.")
	s.ServeDNS(ctx, &wireWriter{addr: udp4Client}, unpacked(t, p))
	if n := testing.AllocsPerRun(100, func() {
		if _, why := f.ask(p, udp4Client); why != fastpath.Answered {
			t.Fatalf("passed as %q", why)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// reports is what a plugin prometheus of all zones counts by.
var reports = &chain.Report{Zones: func() []string { return []string{"."} }, Plugin: pluginName}

func BenchmarkFastHit(b *testing.B) {
	h := startNamed(b, b.Name(), benchOptions(1000), addressUpstream)
	p, err := asking("host.example.org.", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	for range 8 {
		ask(serverContext(b), h, asking("host.example.org.", dns.TypeA), udp4Client)
	}
	for _, with := range []bool{false, true} {
		b.Run(fmt.Sprintf("prometheus=%v", with), func(b *testing.B) {
			f := newFast(b, h, "dns://"+b.Name()+":53", chain.Effects{})
			if with {
				f = newFast(b, h, "dns://"+b.Name()+":53", chain.Effects{}, reports)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, why := f.ask(p, udp4Client); why != fastpath.Answered {
					b.Fatal(why)
				}
			}
		})
	}
}
