package optcache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
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
)

// fast is a fast path without sockets, beside the chain of the same instance.
type fast struct {
	h      *Optcache
	server *dnsserver.Server
	routes []route
	q      fastQuery
}

func newFast(tb testing.TB, h *Optcache, addr string, front mirror) *fast {
	tb.Helper()
	f := &fast{h: h, server: contextOf(tb, addr).Value(dnsserver.Key{}).(*dnsserver.Server)}
	f.routes = []route{{zone: []byte{0}, o: h, server: h.serverOf(f.server), front: front}}
	f.q.s = newScratch()
	return f
}

// ask gives a packet to the fast path.
func (f *fast) ask(p []byte, client net.Addr) (reply []byte, why pass) {
	if why = f.q.prepare(p, f.routes); why != passNot {
		return nil, why
	}
	f.q.ipv4 = client.(*net.UDPAddr).IP.To4() != nil
	if why = f.q.answer(f.h.clock()); why != passNot {
		return nil, why
	}
	return f.q.reply, passNot
}

// The reply is that of the chain, byte for byte, whatever is asked; and each hit counts there too.
func TestFastRepliesAreThoseOfTheChain(t *testing.T) {
	for _, keep := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("keepttl %v", keep), func(t *testing.T) {
			o := roomyOptions()
			o.keepTTL, o.explain = keep, true
			o.prefetch = prefetchOptions{amount: 3, gap: time.Minute, percentage: 10}
			o.stale.upTo = time.Hour
			up := new(scripted)
			h := startNamed(t, t.Name(), o, up)
			f := newFast(t, h, "dns://"+t.Name()+":53", mirror{})
			ctx := serverContext(t)
			g := newTraffic(17)
			var passed [passes]int
			for range 3000 {
				q := g.question()
				up.response = g.response(q)
				for range 4 {
					r, client := g.request(q), []net.Addr{udp4Client, udp6Client}[g.IntN(2)]
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
					if why == passNot {
						if len(w.packets) != 1 || !bytes.Equal(got, w.packets[0]) {
							t.Fatalf("reply %x\nwant %x\nto %v", got, w.packets, r)
						}
					}
					time.Sleep(time.Duration(g.IntN(3)) * time.Second)
				}
			}
			for why, n := range passed {
				if n == 0 && pass(why) != passZone && pass(why) != passAnswer {
					t.Errorf("nothing passed as %q", passNames[why])
				}
			}
			if passed[passNot] < 1000 {
				t.Errorf("%d hits", passed[passNot])
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
	path := newFast(f, h, "dns://"+f.Name()+":53", mirror{})
	ctx := serverContext(f)
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 512 {
			p = p[:512]
		}
		for i, client := range []net.Addr{udp4Client, udp6Client, udp4Client} {
			got, why := path.ask(p, client)
			got = bytes.Clone(got)
			r := new(dns.Msg)
			if err := r.Unpack(p); err != nil {
				if why != passPacket {
					t.Fatalf("%v, and the fast path says %q", err, passNames[why])
				}
				return
			}
			if len(r.Question) == 0 {
				return
			}
			w, _, _ := ask(ctx, h, r, client)
			if why != passNot {
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
	tail := len(plain) - questionTail
	ofType := func(qtype uint16) []byte { return with(plain, tail, byte(qtype>>8), byte(qtype)) }
	long := strings.Repeat(strings.Repeat("l", 61)+".", 4)
	longQuery, err := asking(long, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		packet []byte
		want   pass
	}{
		{"plain", plain, passNot},
		{"EDNS", opt(plain), passNot},
		{"EDNS, DO", with(opt(plain), -4, 0x80), passMiss},
		{"CD", with(plain, 3, 0x10), passMiss},
		{"cookie", options(plain, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8), passNot},
		{"padding", options(plain, 0, 12, 0, 2, 0, 0), passNot},
		{"two options", options(plain, 0, 12, 0, 0, 0, 10, 0, 1, 9), passNot},
		{"letters", with(plain, 13, 'H', 'O', 's', 'T'), passNot},
		{"empty", nil, passPacket},
		{"header only", plain[:12], passPacket},
		{"cut name", plain[:tail-1], passPacket},
		{"cut question", plain[:len(plain)-1], passPacket},
		{"trailing byte", append(bytes.Clone(plain), 0), passPacket},
		{"trailing byte behind OPT", append(opt(plain), 0), passPacket},
		{"response", with(plain, 2, 0x81), passPacket},
		{"opcode", with(plain, 2, 0x21), passPacket},
		{"TC", with(plain, 2, 0x03), passPacket},
		{"two questions", with(plain, 5, 2), passPacket},
		{"no question", with(plain, 5, 0), passPacket},
		{"answer", with(plain, 7, 1), passPacket},
		{"authority", with(plain, 9, 1), passPacket},
		{"two additional", with(opt(plain), 11, 2), passPacket},
		{"additional missing", with(plain, 11, 1), passPacket},
		{"class CH", with(plain, -1, 3), passPacket},
		{"class ANY", with(plain, -1, 255), passPacket},
		{"compressed name", with(plain, 12, 0xc0, 0x0c), passPacket},
		{"reserved label", with(plain, 12, 0x44), passPacket},
		{"DS", ofType(dns.TypeDS), passPacket},
		{"ANY", ofType(dns.TypeANY), passPacket},
		{"AXFR", ofType(dns.TypeAXFR), passPacket},
		{"IXFR", ofType(dns.TypeIXFR), passPacket},
		{"TSIG", ofType(dns.TypeTSIG), passPacket},
		{"other type", ofType(dns.TypeMX), passMiss},
		{"EDNS version 1", with(opt(plain), -5, 1), passPacket},
		{"extended rcode", with(opt(plain), -6, 1), passPacket},
		{"TSIG for OPT", with(opt(plain), -9, 250), passPacket},
		{"OPT with an owner", with(opt(plain), -11, 1), passPacket},
		{"cut OPT", opt(plain)[:len(plain)+10], passPacket},
		{"NSID", options(plain, 0, 3, 0, 0), passPacket},
		{"ECS", options(plain, 0, 8, 0, 4, 0, 1, 0, 0), passPacket},
		{"option too long", options(plain, 0, 10, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8), passPacket},
		{"option cut", options(plain, 0, 10, 0), passPacket},
		{"name of 253 octets", longQuery, passMiss},
		{"local", mustPack(t, "x.localhost."), passZone},
		{"local, reverse", mustPack(t, "1.0.0.127.in-addr.arpa."), passZone},
		{"local, by prefix", mustPack(t, "localhost.example.org."), passZone},
		{"not local", mustPack(t, "127.in-addr.arpa.example.org."), passMiss},
		{"other zone", mustPack(t, "www.example.net."), passZone},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := startNamed(t, t.Name(), stockOptions(), addressUpstream)
			f := newFast(t, h, "dns://"+t.Name()+":53", mirror{local: true, localPrefix: true})
			f.routes = append([]route{{zone: []byte("\x07example\x03net\x00")}}, f.routes...)
			ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
			if _, why := f.ask(tc.packet, udp4Client); why != tc.want {
				t.Errorf("passed as %q, want %q", passNames[why], passNames[tc.want])
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

// Prefetch triggers, stale entries, zones that are bypassed or not cached go the long way.
func TestFastPathLeavesTheRestToTheChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := prefetching(3)
		o.stale.upTo = time.Hour
		o.zones = []string{"example.org."}
		up := &scripted{response: positive(aRecord)}
		h := startNamed(t, t.Name(), o, up, bypasser{named{name: "errors"}})
		f := newFast(t, h, "dns://"+t.Name()+":53", mirror{})
		p := mustPack(t, "host.example.org.")
		step := func(want pass) {
			t.Helper()
			if _, why := f.ask(p, udp4Client); why != want {
				t.Errorf("passed as %q, want %q", passNames[why], passNames[want])
			}
		}
		step(passMiss)
		ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
		step(passNot)
		time.Sleep(200 * time.Second) // more than the gap between requests
		step(passNot)
		step(passNot)
		step(passPrefetch)
		step(passPrefetch)
		time.Sleep(200 * time.Second)
		step(passStale)
		for name, why := range map[string]pass{"host.example.com.": passZone, "a.mutable.example.org.": passZone} {
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
		f := newFast(t, h, "dns://"+t.Name()+":53", mirror{options: known})
		for _, option := range []bool{false, true} {
			r := r.Copy()
			if option {
				r.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}}
			}
			p, err := r.Pack()
			if err != nil {
				t.Fatal(err)
			}
			want := passNot
			if known && option {
				want = passPacket
			}
			if _, why := f.ask(p, udp4Client); why != want {
				t.Errorf("known %v, option %v: passed as %q, want %q", known, option, passNames[why], passNames[want])
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
		defer h.stop()
		f := newFast(t, h, "dns://"+t.Name()+":53", mirror{space: 700})
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
				if why == passNot && !bytes.Equal(got, w.only(t)) {
					t.Fatalf("buffer %d: %x, want %x", size, got, w.packets)
				}
				whole := up.response.Len() + 11 // with OPT
				if want := map[bool]pass{true: passNot, false: passSize}[whole <= space]; why != want {
					t.Errorf("buffer %d, reply of %d bytes: %q", size, whole, passNames[why])
				}
			}
		}
	})
}

// rotated are the records of a section in the order of a fast reply.
func rotated(t *testing.T, f *fast, p []byte) *dns.Msg {
	t.Helper()
	b, why := f.ask(p, udp4Client)
	if why != passNot {
		t.Fatalf("passed as %q", passNames[why])
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
	f := newFast(t, h, "dns://"+t.Name()+":53", mirror{rotate: true})
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
	f := newFast(t, h, "dns://"+t.Name()+":53", mirror{rotate: true})
	p, _ := r.Pack()
	for range 20 {
		if m := rotated(t, f, p); m.String() != want.String() {
			t.Fatalf("got %v, want %v", m, want)
		}
	}
}

func TestFastHitAllocatesNothing(t *testing.T) {
	h := startNamed(t, t.Name(), stockOptions(), &scripted{response: positive(
		"host.example.org. 300 IN A 192.0.2.1", "host.example.org. 300 IN A 192.0.2.2", "host.example.org. 300 IN A 192.0.2.3")})
	p := mustPack(t, "host.example.org.")
	f := newFast(t, h, "dns://"+t.Name()+":53", mirror{rotate: true})
	report := newReporter("dns://"+t.Name()+":53", &reportOptions{zones: func() []string { return []string{"."} }, plugin: pluginName})
	ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
	if n := testing.AllocsPerRun(200, func() {
		if _, why := f.ask(p, udp4Client); why != passNot {
			t.Fatalf("passed as %q", passNames[why])
		}
		report.report(&f.q, time.Microsecond)
	}); n != 0 {
		t.Errorf("%v allocations", n)
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
			defer h.stop()
			f := newFast(t, h, fasts, mirror{})
			report := newReporter(fasts, &reportOptions{zones: front.ZoneNames, plugin: handlers[1].Name()})
			ctx := contextOf(t, chained)
			g := newTraffic(29)
			fastHits := 0
			for range 1500 {
				q := g.question()
				up.response = g.response(q)
				ask(serverContext(t), h, g.request(q), udp4Client)
				for range 4 {
					r, client := g.request(q), []net.Addr{udp4Client, udp6Client}[g.IntN(2)]
					p, err := r.Pack()
					if err != nil || r.Unpack(p) != nil {
						continue
					}
					if _, why := f.ask(p, client); why == passNot {
						fastHits++
						report.report(&f.q, 0)
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

// The types that have a label of their own are those of the plugin prometheus.
func TestTypeLabels(t *testing.T) {
	chained := "dns://types:53"
	front := metrics.New("")
	front.Next = plugin.HandlerFunc(addressUpstream)
	for qtype := range uint16(300) {
		ask(contextOf(t, chained), front, asking("host.example.org.", qtype), udp4Client)
	}
	want := make(map[string]bool)
	for k := range series(t, prometheus.DefaultGatherer, "coredns_dns_requests_total", chained) {
		_, rest, _ := strings.Cut(k, "type=")
		label, _, _ := strings.Cut(rest, " ")
		want[label] = true
	}
	for qtype := range uint16(300) {
		if label := typeLabel(qtype); !want[label] {
			t.Errorf("type %d: %s", qtype, label)
		}
	}
	for label := range want {
		if label != otherTypes && !slices.Contains(typeLabels, label) {
			t.Errorf("%s is missing", label)
		}
	}
}

func BenchmarkFastHit(b *testing.B) {
	h := startNamed(b, b.Name(), benchOptions(1000), addressUpstream)
	f := newFast(b, h, "dns://"+b.Name()+":53", mirror{})
	report := newReporter("dns://"+b.Name()+":53", &reportOptions{zones: func() []string { return []string{"."} }, plugin: pluginName})
	p, err := asking("host.example.org.", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	for range 8 {
		ask(serverContext(b), h, asking("host.example.org.", dns.TypeA), udp4Client)
	}
	for _, reports := range []bool{false, true} {
		b.Run(fmt.Sprintf("prometheus=%v", reports), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, why := f.ask(p, udp4Client); why != passNot {
					b.Fatal(passNames[why])
				}
				if reports {
					report.report(&f.q, time.Microsecond)
				}
			}
		})
	}
}
