package optcache

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file makes messages that cost the most that a message can, and bounds what they cost. Their
// benchmarks, beside the built-in cache, are in bench_hostile_test.go.

// collidingBlocks are pairs of strings of letters and digits that take FNV-64, as the built-in cache
// uses it (h *= prime; h ^= octet), from one state to one and the same other: the state after the
// name's blocks before, the first one starting behind the octets of DO=0, CD=0, A and IN. Either of
// each pair, one after the other, makes 2^17 names of one hash (Joux, CRYPTO 2004).
//
// They were found in a second, by a program of a hundred lines. An XOR with an octet adds between
// -255 and 255 to the state; what it adds depends on the state's low octet only. Two blocks of ten
// collide if the differences d of what they add have sum(d[i]*prime^(9-i)) = 0 mod 2^64. Such d are a
// lattice of determinant 2^64, whose short vectors, with no element over 56, LLL gives. A search over
// the low octets of both states then gives the letters that make these differences.
var collidingBlocks = [...][2]string{
	{"ntt39o901n", "6ee257amhc"},
	{"ieq36q047u", "1zj281zijh"},
	{"yio67ywh43", "m9ll8mcreh"},
	{"j5l97yvvz9", "vmae8mbp5l"},
	{"47oehtrqcl", "z4gq5o0i3s"},
	{"vgoq5q6emm", "8j7ajlxqat"},
	{"umfm6mmj50", "i5557ymdze"},
	{"hbw36r573i", "0qd284mfdn"},
	{"9qm16szgjm", "abb483467h"},
	{"0dm46r506m", "h5l184mmij"},
	{"a6749991ks", "9gj15eqd4l"},
	{"4b5rjq0c8k", "zeal9rr7nb"},
	{"e09s8mfdff", "qpb35yjz53"},
	{"jub59hmc0e", "2do05618on"},
	{"abn15oyghe", "9sc497161h"},
	{"afl466907k", "9yo18pamjv"},
	{"9v04992f3j", "aak15el5ha"},
}

const (
	blocksPerLabel = 6
	hostileNames   = 100_000
)

// collidingName returns the i-th of the names that collide, i below 2^17.
func collidingName(i int) string { return blockName(i, true) }

// ordinaryName returns a name of the same form that does not collide.
func ordinaryName(i int) string { return blockName(i, false) }

func blockName(i int, colliding bool) string {
	b := make([]byte, 0, 256)
	for k, pair := range collidingBlocks {
		if k > 0 && k%blocksPerLabel == 0 {
			b = append(b, '.')
		}
		block := pair[i>>k&1]
		b = append(b, block...)
		if !colliding && i>>k&1 == 1 { // another order of octets is another hash
			b[len(b)-1], b[len(b)-2] = b[len(b)-2], b[len(b)-1]
		}
	}
	return string(append(b, ".example.org."...))
}

// stockHash is the hash of a question for an address, without DO and CD, in the built-in cache
// (plugin/cache/cache.go, hash).
func stockHash(name string) uint64 {
	h := fnv.New64()
	h.Write([]byte{0, 0})
	h.Write(binary.BigEndian.AppendUint16(nil, dns.TypeA))
	h.Write(binary.BigEndian.AppendUint16(nil, dns.ClassINET))
	h.Write([]byte(strings.ToLower(name)))
	return h.Sum64()
}

func TestCollidingNamesCollide(t *testing.T) {
	t.Parallel()
	for _, kind := range []struct {
		name   string
		of     func(int) string
		hashes int
	}{
		{"colliding", collidingName, 1},
		{"ordinary", ordinaryName, hostileNames},
	} {
		names, hashes := map[string]bool{}, map[uint64]bool{}
		for i := range hostileNames {
			name := kind.of(i)
			names[name], hashes[stockHash(name)] = true, true
			if labels, ok := dns.IsDomainName(name); !ok || labels != 5 || strings.ContainsAny(name, `\-_`) || name != strings.ToLower(name) {
				t.Fatalf("%q is no name of letters and digits", name)
			}
		}
		if len(names) != hostileNames || len(hashes) != kind.hashes {
			t.Errorf("%s: %d names with %d hashes", kind.name, len(names), len(hashes))
		}
	}
}

// stockCache is the built-in cache with that block of a Corefile.
func stockCache(tb testing.TB, next plugin.Handler, lines ...string) plugin.Handler {
	tb.Helper()
	setup, err := caddy.DirectiveAction("dns", stockName)
	if err != nil {
		tb.Fatal(err)
	}
	c := caddy.NewTestController("dns", "cache . {\n"+strings.Join(lines, "\n")+"\n}")
	if err := setup(c); err != nil {
		tb.Fatal(err)
	}
	made := dnsserver.GetConfig(c).Plugin
	return made[len(made)-1](next)
}

// 100,000 names crafted to collide under FNV-64 neither slow a lookup nor evict each other.
func TestNamesThatCollideUnderFNV(t *testing.T) {
	names := hostileNames
	if raceEnabled || testing.Short() { // clearing memory takes its time
		names /= 20
	}
	o := benchOptions(2 * names)
	o.maxMemory = int64(names) * 1024 // a record of such a name takes half of that
	h := startNamed(t, t.Name(), o, addressUpstream)
	clocked(h)
	ctx := serverContext(t)
	ask := func(of func(int) string) {
		r, w := asking("", dns.TypeA), newUDPWriter()
		for i := range names {
			r.Question[0].Name = of(i)
			h.ServeDNS(ctx, w, r)
		}
	}
	ask(collidingName)
	if n := count(h, countMiss); n != uint64(names) {
		t.Fatalf("%d misses of %d names that are new", n, names)
	}
	h.Next = neverAsked(t)
	ask(collidingName)
	if n := count(h, countMiss); n != uint64(names) {
		t.Errorf("%d of %d names had been evicted", n-uint64(names), names)
	}

	// A lookup looks at its own record, and at others with the same 16 bits of the hash in the same
	// buckets: less than one in a thousand.
	hashes, looks := map[uint64]bool{}, 0
	s := newScratch()
	for i := range names {
		k, _ := h.scratchFor(asking(collidingName(i), dns.TypeA), udp4Client)
		s.Key = k.Key
		h.release(k)
		hashes[s.Key.Hash] = true
		sh := h.store.shard(s.Key.Hash)
		var c index.Cursor
		for {
			if _, _, ok := sh.index.Next(&c, s.Key.Hash); !ok {
				break
			}
			looks++
		}
	}
	if len(hashes) != names {
		t.Errorf("%d names have %d hashes", names, len(hashes))
	}
	if looks < names || looks > names+names/100 {
		t.Errorf("%d lookups look at %d records", names, looks)
	}
}

// hostile is a message that costs the most.
type hostile struct {
	name    string
	request *dns.Msg
	answer  []dns.RR // behind the first record, an alias of the question's name for the first of them
	alias   string
}

// hostileMessages are the requests and responses of the benchmarks.
func hostileMessages() []hostile {
	return []hostile{pointers(), nested(126), manyOptions(), longChain(chainLength), plainAnswer(chainLength)}
}

// pointers is an answer of 64 KB whose records, of 14 octets each, are names of 255 octets, twice,
// by compression pointers. In full it takes 2.4 MB, and four times that in presentation format.
func pointers() hostile {
	long := strings.Repeat(`\255.`, 127)
	var rrs []dns.RR
	for range 4600 {
		rrs = append(rrs, &dns.PTR{Hdr: dns.RR_Header{Name: long, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: 3600}, Ptr: long})
	}
	return hostile{name: "pointers", request: asking("", dns.TypePTR), answer: offTheWire(rrs), alias: long}
}

// nested is pointers with names that are packed as a label and a pointer to the next such name, up to
// most labels.
func nested(most int) hostile {
	name := func(labels int) string { return strings.Repeat(`\255.`, labels) }
	var rrs []dns.RR
	for i := range 4500 {
		owner, target := name(min(i+1, most)), name(min(i+2, most))
		rrs = append(rrs, &dns.PTR{Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: 3600}, Ptr: target})
	}
	return hostile{name: "nested", request: asking("", dns.TypePTR), answer: rrs, alias: name(1)}
}

// manyOptions is a request with as many EDNS options as 64 KB hold.
func manyOptions() hostile {
	r := asking("", dns.TypeA)
	r.SetEdns0(1232, false)
	opt := r.IsEdns0()
	for i := range 16_300 {
		opt.Option = append(opt.Option, &dns.EDNS0_LOCAL{Code: dns.EDNS0LOCALSTART + uint16(i%500)})
	}
	const target = "target.example.org."
	return hostile{name: "options", request: r, answer: parsed(target + " 3600 IN A 192.0.2.1"), alias: target}
}

// chainLength is how many aliases of longChain's fit in 64 KB.
const chainLength = 3000

// longChain is an answer that ends a chain of n aliases.
func longChain(n int) hostile {
	name := func(i int) string { return fmt.Sprintf("%x.c.example.org.", i) }
	var rrs []dns.RR
	for i := range n {
		rrs = append(rrs, &dns.CNAME{Hdr: dns.RR_Header{Name: name(i), Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 3600}, Target: name(i + 1)})
	}
	rrs = append(rrs, &dns.A{Hdr: dns.RR_Header{Name: name(n), Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: net.IPv4(192, 0, 2, 1)})
	return hostile{name: "chain", request: asking("", dns.TypeA), answer: offTheWire(rrs), alias: name(0)}
}

// plainAnswer is an answer of as many records as a long chain has, and no more than that.
func plainAnswer(n int) hostile {
	var rrs []dns.RR
	const name = "target.example.org."
	for i := range n + 1 {
		rrs = append(rrs, &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: net.IPv4(192, 0, byte(i>>8), byte(i))})
	}
	return hostile{name: "plain", request: asking("", dns.TypeA), answer: offTheWire(rrs), alias: name}
}

// offTheWire returns the records as they come off the wire: no two share a string.
func offTheWire(rrs []dns.RR) []dns.RR {
	m := &dns.Msg{Answer: rrs, Compress: true}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	m = new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		panic(err)
	}
	return m.Answer
}

// hostileName is the i-th of the names that a hostile message is asked for; all have one length.
func hostileName(i int) string { return fmt.Sprintf("%08x.example.org.", i) }

// upstream gives the message as the answer to any question. It is for one goroutine.
func (m *hostile) upstream() plugin.Handler {
	first := &dns.CNAME{Hdr: dns.RR_Header{Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 3600}, Target: m.alias}
	answer := append([]dns.RR{first}, m.answer...)
	return plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		first.Hdr.Name = r.Question[0].Name
		res := new(dns.Msg).SetReply(r)
		res.Answer = answer
		return dns.RcodeSuccess, w.WriteMsg(res)
	})
}

// asker returns a function that asks a chain for the i-th name over TCP, with m's request.
func (m *hostile) asker(ctx context.Context, h plugin.Handler) func(i int) *packWriter {
	r := m.request.Copy()
	w := newUDPWriter()
	w.addr = tcp4Client
	sw := request.NewScrubWriter(r, w)
	var options []dns.EDNS0
	if opt := r.IsEdns0(); opt != nil {
		options = opt.Option
	}
	return func(i int) *packWriter {
		r.Question[0].Name = hostileName(i)
		if options != nil {
			r.IsEdns0().Option = options // the server has taken them away
		}
		w.last = nil
		h.ServeDNS(ctx, sw, r)
		return w
	}
}

// hostileOptions have room for some answers of 64 KB.
func hostileOptions() options {
	o := benchOptions(1024)
	o.maxMemory = 2 << 20
	return o
}

func TestHostileMessagesAreWhatTheySay(t *testing.T) {
	ctx := serverContext(t)
	for _, m := range hostileMessages() {
		req := m.request.Copy()
		req.Question[0].Name = hostileName(0)
		b, err := req.Pack()
		if err != nil || len(b) > record.MaxMessage || m.name == "options" && len(b) < record.MaxMessage-500 {
			t.Errorf("%s: a request of %d octets, %v", m.name, len(b), err)
		}
		h := newStarted(t, hostileOptions(), m.upstream())
		ask := m.asker(ctx, h)
		miss := ask(0).last
		h.Next = neverAsked(t)
		hit := ask(0).last
		for _, b := range [][]byte{miss, hit} {
			res := unpacked(t, b)
			if res.Truncated || len(res.Answer) != len(m.answer)+1 {
				t.Errorf("%s: %d records of %d, TC=%v", m.name, len(res.Answer), len(m.answer)+1, res.Truncated)
			}
			if res.Compress = false; m.name == "pointers" && (len(b) < record.MaxMessage-2000 || res.Len() < 2_300_000) {
				t.Errorf("%s: %d octets, %d in full", m.name, len(b), res.Len())
			}
		}
	}
}

// Names of 127 labels may be packed with more compression pointers than the library follows. What
// cannot be read back is asked for again.
func TestPointersTooDeepToFollow(t *testing.T) {
	m := nested(127)
	h := startNamed(t, t.Name(), hostileOptions(), m.upstream())
	ask := m.asker(serverContext(t), h)
	first := ask(0).last
	if err := new(dns.Msg).Unpack(first); err == nil {
		t.Fatal("the library follows them")
	}
	for range 3 {
		if again := ask(0).last; !bytes.Equal(first, again) {
			t.Fatalf("%d octets, then %d: %.40x", len(first), len(again), again)
		}
	}
	if n := count(h, countMiss); n != 4 {
		t.Errorf("%d misses, want 4", n)
	}
}

// A 64 KB answer of pathological names, and an OPT with thousands of options, cost bounded time:
// what is allocated grows with the number of records and options, and stays within three times what
// the built-in cache allocates. Buffers that such a message has made grow are not kept.
func TestHostileMessagesCostBoundedMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	ctx := serverContext(t)
	for _, m := range hostileMessages() {
		h := newStarted(t, hostileOptions(), m.upstream())
		missed, hit := costOf(m.asker(ctx, h))
		s := h.pool.Get().(*scratch)
		if n := max(cap(s.Out), cap(s.Packed), cap(s.Words)*record.WordBytes); n > record.PooledMax {
			t.Errorf("%s: a buffer of %d bytes stays", m.name, n)
		}
		stockMissed, stockHit := costOf(m.asker(ctx, stockCache(t, m.upstream())))
		t.Logf("%s: a miss takes %v, in cache %v; a hit takes %v, in cache %v", m.name, missed, stockMissed, hit, stockHit)

		records, options := len(m.answer), 0
		if opt := m.request.IsEdns0(); opt != nil {
			options = len(opt.Option)
		}
		if most := 8*records + 2*options + 200; missed.allocs > most {
			t.Errorf("%s: %v for a miss, want at most %d allocations", m.name, missed, most)
		}
		if most := 8*records + 200; hit.allocs > most {
			t.Errorf("%s: %v for a hit, want at most %d allocations", m.name, hit, most)
		}
		if missed.bytes > 3*stockMissed.bytes || hit.bytes > 3*stockHit.bytes {
			t.Errorf("%s: %v for a miss and %v for a hit, in cache %v and %v", m.name, missed, hit, stockMissed, stockHit)
		}
	}
}

// cost is what a request allocates.
type cost struct{ allocs, bytes int }

func (c cost) String() string { return fmt.Sprintf("%d bytes in %d allocations", c.bytes, c.allocs) }

// costOf returns what misses and hits allocate on average. ask asks for the i-th name.
func costOf(ask func(int) *packWriter) (missed, hit cost) {
	const runs = 5
	measure := func(ask func(i int)) cost {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range runs {
			ask(i)
		}
		runtime.ReadMemStats(&after)
		return cost{int(after.Mallocs-before.Mallocs) / runs, int(after.TotalAlloc-before.TotalAlloc) / runs}
	}
	ask(runs) // what is allocated once
	return measure(func(i int) { ask(i) }), measure(func(int) { ask(0) })
}

// A chain of thousands of aliases is followed in a time that grows with its length: it costs no
// more than a few times what as many records cost that are no chain.
func TestLongChainCostsBoundedTime(t *testing.T) {
	ctx := serverContext(t)
	miss := func(m hostile) time.Duration {
		ask, serial := m.asker(ctx, newStarted(t, hostileOptions(), m.upstream())), 0
		least := time.Hour
		for range 5 {
			serial++
			start := time.Now()
			ask(serial)
			least = min(least, time.Since(start))
		}
		return least
	}
	chain, plain := miss(longChain(chainLength)), miss(plainAnswer(chainLength))
	t.Logf("a chain takes %v, as many addresses %v", chain, plain)
	if chain > 20*plain { // following each alias by a search takes over 100 times as much
		t.Errorf("a chain takes %v, as many addresses %v", chain, plain)
	}
}
