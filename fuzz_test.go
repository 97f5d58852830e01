package optcache

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/pkg/edns"
	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
)

// This file fuzzes the handler: bytes of requests, and bytes of responses. FuzzHit (reply_test.go)
// compares both with the built-in cache; FuzzCorefile is in setup_test.go.

// bubbleStart is when the time of a synctest bubble begins.
var bubbleStart = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano()

const (
	// longAfter is later than the end of anything that reusable options let live.
	longAfter = 3 * time.Hour

	// wornOut is when an instance's clock, which counts seconds in 32 bits, is set back.
	wornOut = 1 << 31 * int64(time.Second)
)

// reused is an instance that serves one input after the other. By its clock, each comes so long
// after the last one that nothing is left of it.
type reused struct {
	*Optcache
	o    options
	up   plugin.Handler
	base int64
}

func newReused(tb testing.TB, o options, up plugin.Handler) *reused {
	u := &reused{o: o, up: up}
	u.start(tb)
	tb.Cleanup(func() { u.stop() })
	return u
}

func (u *reused) start(tb testing.TB) {
	u.base = 1e15
	u.Optcache = newOptcache(u.o)
	u.Next = u.up
	u.clock = func() int64 { return u.base + time.Now().UnixNano() - bubbleStart }
	if err := u.Optcache.start("fuzz", []plugin.Handler{u.Optcache}); err != nil {
		tb.Fatal(err)
	}
}

// forget makes all that is cached a thing of the past. The bubble is at its end.
func (u *reused) forget(tb testing.TB) {
	u.base = u.clock() + int64(longAfter)
	if u.base > wornOut {
		u.stop()
		u.start(tb)
	}
}

// received unpacks a request as the server does; nil when it would not reach a plugin.
func received(b []byte) *dns.Msg {
	if len(b) < 12 {
		return nil
	}
	word := func(i int) uint16 { return binary.BigEndian.Uint16(b[2*i:]) }
	h := dns.Header{Id: word(0), Bits: word(1), Qdcount: word(2), Ancount: word(3), Nscount: word(4), Arcount: word(5)}
	if dns.DefaultMsgAcceptFunc(h) != dns.MsgAccept {
		return nil
	}
	r := new(dns.Msg)
	if r.Unpack(b) != nil || len(r.Question) == 0 {
		return nil
	}
	if _, err := edns.Version(r); err != nil {
		return nil
	}
	return r
}

// shaped is an upstream that answers any question, in one of some ways.
type shaped struct {
	shape byte
	asked int
}

func (u *shaped) Name() string { return "shaped" }

func (u *shaped) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked++
	m := shapedReply(r, u.shape)
	if m == nil {
		return dns.RcodeServerFailure, errUpstream
	}
	return m.Rcode, w.WriteMsg(m)
}

// shapes is how many kinds of replies shapedReply knows.
const shapes = 9

func shapedReply(r *dns.Msg, shape byte) *dns.Msg {
	q := r.Question[0]
	record := func(owner string) dns.RR {
		var rr dns.RR = &dns.RFC3597{Rdata: "c00cc00c"}
		for _, template := range templates {
			if template.Header().Rrtype == q.Qtype {
				rr = dns.Copy(template)
				break
			}
		}
		*rr.Header() = dns.RR_Header{Name: owner, Rrtype: rr.Header().Rrtype, Class: q.Qclass, Ttl: 300}
		if rr, ok := rr.(*dns.RFC3597); ok {
			rr.Hdr.Rrtype = 65280
		}
		return rr
	}
	soa := dns.Copy(soaTemplate)
	m := new(dns.Msg).SetReply(r)
	switch shape % shapes {
	case 0:
		m.Answer = []dns.RR{record(q.Name)}
	case 1:
		m.Rcode, m.Ns = dns.RcodeNameError, []dns.RR{soa}
	case 2:
		m.Ns = []dns.RR{soa}
	case 3:
		m.Rcode = dns.RcodeServerFailure
	case 4:
		return nil
	case 5: // too large for UDP
		m.Answer = []dns.RR{record(q.Name)}
		for range 20 {
			m.Extra = append(m.Extra, &dns.RFC3597{
				Hdr:   dns.RR_Header{Name: q.Name, Rrtype: 65280, Class: q.Qclass, Ttl: 300},
				Rdata: strings.Repeat("c0", 200),
			})
		}
	case 6:
		alias := &dns.CNAME{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeCNAME, Class: q.Qclass, Ttl: 60}, Target: "Alias.example.org."}
		m.Answer = []dns.RR{alias, record("alias.Example.org.")}
	case 7: // authenticated, and with an OPT of its own
		m.Answer = []dns.RR{record(q.Name)}
		m.AuthenticatedData, m.Authoritative = true, true
		m.SetEdns0(4096, true)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("upstream")}}
	case 8: // between what goes over UDP as it is and what must be cut
		m.Answer = []dns.RR{record(q.Name)}
		for range 60 {
			m.Answer = append(m.Answer, record(q.Name))
		}
	}
	return m
}

// checkReply checks what any reply to r must be like, and returns it; nil when there is none.
func checkReply(t *testing.T, r *dns.Msg, w *wireWriter) *dns.Msg {
	t.Helper()
	if len(w.packets) > 1 {
		t.Fatalf("%d packets in reply to %v", len(w.packets), r)
	}
	if len(w.packets) == 0 {
		return nil
	}
	b, m := w.packets[0], new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("reply %x to %v: %v", b, r, err)
	}
	if m.Id != r.Id || !m.Response || m.Opcode != r.Opcode || !reflect.DeepEqual(m.Question, r.Question) {
		t.Fatalf("reply %v\nto %v", m, r)
	}
	state := request.Request{W: w, Req: r.Copy()}
	if size := state.Size(); len(b) > size {
		t.Fatalf("reply of %d bytes to a client that takes %d: %v\nto %v", len(b), size, m, r)
	}
	return m
}

// fuzzOptions are options of a reused instance: nothing that it keeps outlives longAfter.
func fuzzOptions(change func(*options)) options {
	o := stockOptions()
	change(&o)
	return o
}

// everything turns on the options that are off by default.
func everything(o *options) {
	o.explain = true
	o.coalesce = coalesceOptions{waiters: 10, wait: time.Second}
	o.prefetch = prefetchOptions{amount: 1, gap: time.Minute, percentage: 90}
	o.stale = staleOptions{upTo: time.Hour, recheck: time.Second}
}

// FuzzRequest asks with any bytes, over UDP and TCP, for what is not cached and what is. The
// replies are those of the built-in cache; those of an instance with all options fit the request.
func FuzzRequest(f *testing.F) {
	g := newTraffic(4)
	for i := range 100 {
		if b, err := g.request(g.question()).Pack(); err == nil {
			f.Add(b, byte(i))
		}
	}
	for i, r := range oddRequests() {
		if b, err := r.Pack(); err == nil {
			f.Add(b, byte(i))
		}
	}
	ctx := serverContext(f)
	up, theirs := new(shaped), new(shaped)
	plain := newReused(f, fuzzOptions(func(*options) {}), up)
	rich := newReused(f, fuzzOptions(everything), new(shaped))

	f.Fuzz(func(t *testing.T, b []byte, shape byte) {
		r := received(b)
		if r == nil {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			stock := cache.New()
			stock.Next = theirs
			up.shape, theirs.shape = shape, shape
			up.asked, theirs.asked = 0, 0
			rich.up.(*shaped).shape = shape
			clients := []net.Addr{udp4Client, tcp4Client}
			for _, order := range [][]int{{0, 0, 1}, {1, 1, 0}} { // a miss, and two hits
				for _, i := range order {
					r := asCache(plain.Optcache, r)
					ours, rcode, err := ask(ctx, plain, r, clients[i])
					checkReply(t, r, ours)
					w, _, _ := ask(ctx, rich, r, clients[i])
					checkReply(t, r, w)
					synctest.Wait()
					if qtype := r.Question[0].Qtype; qtype == dns.TypeAXFR || qtype == dns.TypeIXFR {
						continue // cached by the built-in cache
					}
					w, wantRcode, wantErr := ask(ctx, spelling{stock}, r, clients[i])
					if !samePackets(ours.packets, w.packets) || rcode != wantRcode || (err == nil) != (wantErr == nil) {
						t.Fatalf("rcode %d, error %v, %s\ncache: rcode %d, error %v, %s\nrequest over %s: %v",
							rcode, err, describe(ours), wantRcode, wantErr, describe(w), clients[i].Network(), r)
					}
					if up.asked != theirs.asked {
						t.Fatalf("upstream asked %d times, cache: %d times\nrequest: %v", up.asked, theirs.asked, r)
					}
				}
				time.Sleep(longAfter)
			}
			plain.forget(t)
			rich.forget(t)
		})
	})
}

// oddRequests are requests that clients do not send by mistake.
func oddRequests() (rs []*dns.Msg) {
	odd := func(change func(*dns.Msg)) {
		r := question("www.example.org.")
		change(r)
		rs = append(rs, r)
	}
	odd(func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeOPT })
	odd(func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeAXFR })
	odd(func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeTSIG })
	odd(func(r *dns.Msg) { r.Question[0].Qclass = dns.ClassANY })
	odd(func(r *dns.Msg) { r.Opcode = dns.OpcodeNotify })
	odd(func(r *dns.Msg) { r.Extra = append(r.Extra, dns.Copy(r.Extra[0])) })                  // two OPT
	odd(func(r *dns.Msg) { r.Answer, r.Extra = r.Extra, nil })                                 // OPT elsewhere
	odd(func(r *dns.Msg) { r.Extra[0].Header().Name = "www.example.org." })                    // no root
	odd(func(r *dns.Msg) { r.Rcode = 0xfff; r.IsEdns0().Hdr.Ttl |= 0xff000000 })               // extended rcode
	odd(func(r *dns.Msg) { r.Ns = parsed("www.example.org. 0 IN SOA a. b. 1 2 3 4 5") })       // as in IXFR
	odd(func(r *dns.Msg) { r.Question[0].Name = `\000\255\.\\.` + strings.Repeat("x.", 100) }) // any octets
	odd(func(r *dns.Msg) { r.SetTsig("key.example.org.", dns.HmacSHA256, 300, 0); r.Compress = true })
	odd(func(r *dns.Msg) {
		for i := range 400 {
			r.IsEdns0().Option = append(r.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: uint16(i), Data: []byte{1}})
		}
	})
	return rs
}

// The ways in which FuzzResponse has responses served and kept.
var responseOptions = []struct {
	name   string
	change func(*options)
}{
	{"plain", func(*options) {}},
	{"keepttl", func(o *options) { o.keepTTL, o.explain = true, true }},
	{"no floor", func(o *options) { o.success.minTTL, o.denial.minTTL, o.servfail = 0, 0, 0 }},
	{"disabled", func(o *options) { o.success.except, o.denial.except = []string{"org."}, []string{"."} }},
	{"stale", func(o *options) {
		o.explain = true
		o.stale = staleOptions{upTo: time.Hour}
	}},
	{"verify", func(o *options) {
		o.coalesce = coalesceOptions{waiters: 10, wait: time.Second}
		o.stale = staleOptions{upTo: time.Hour, verify: true, timeout: 100 * time.Millisecond, ttl: 30 * time.Second, recheck: 10 * time.Second, preferPositive: true}
	}},
	{"everything", everything},
}

// FuzzResponse has the upstream answer with any bytes. What is served at once, from memory, to
// another client and after it has expired says the same; what must not be kept is not.
func FuzzResponse(f *testing.F) {
	g := newTraffic(5)
	for i := range 200 {
		if b, err := g.response(g.question()).Pack(); err == nil {
			f.Add(b, uint16(i)*257)
		}
	}
	for i, m := range oddResponses() {
		if b, err := m.Pack(); err == nil {
			for j := range responseOptions {
				f.Add(b, uint16(j<<8|i))
			}
		}
	}
	ctx := serverContext(f)
	up := new(scripted)
	var instances []*reused
	for _, o := range responseOptions {
		instances = append(instances, newReused(f, fuzzOptions(o.change), up))
	}

	f.Fuzz(func(t *testing.T, b []byte, shape uint16) {
		res := new(dns.Msg)
		if res.Unpack(b) != nil {
			return
		}
		up.response, up.verbatim = res, true
		h := instances[int(shape>>8)%len(instances)]
		synctest.Test(t, func(t *testing.T) {
			lifeOf(t, ctx, h, up, requestFor(res, shape))
			h.forget(t)
		})
	})
}

// requestFor returns a request for what res answers, or for something else.
func requestFor(res *dns.Msg, shape uint16) *dns.Msg {
	r := asking("www.example.org.", dns.TypeA)
	if len(res.Question) > 0 {
		r.Question[0] = res.Question[0]
		if shape&1 != 0 {
			r.Question[0].Name = strings.ToUpper(r.Question[0].Name)
		}
	}
	switch shape >> 6 & 3 {
	case 2:
		r.Question[0].Qtype++
	case 3:
		r.Question[0].Name = "other.example.org."
	}
	r.Id = 0xbeef
	if shape&2 != 0 {
		r.SetEdns0(1232, shape&4 != 0)
	}
	r.AuthenticatedData, r.CheckingDisabled, r.RecursionDesired = shape&8 != 0, shape&16 != 0, shape&32 != 0
	return r
}

// lifeOf asks for what the upstream has been told to answer, through all of its life.
func lifeOf(t *testing.T, ctx context.Context, h *reused, up *scripted, r *dns.Msg) {
	up.asked = 0
	refreshes := h.prefetch.amount > 0 || h.stale.verify
	ours := len(up.response.Question) == 1 && up.response.Question[0] == r.Question[0] && up.response.Response && up.response.Opcode == dns.OpcodeQuery
	ask := func(r *dns.Msg, client net.Addr) *dns.Msg {
		t.Helper()
		w, _, _ := ask(ctx, h, r, client)
		synctest.Wait()
		// What is passed on as it is may be anything. And some records that the library unpacks, such as
		// an SOA that is cut short, it packs to what it does not unpack.
		if len(w.packets) == 1 && (!ours || new(dns.Msg).Unpack(w.packets[0]) != nil) {
			return nil
		}
		return checkReply(t, r, w)
	}

	first := ask(r, tcp4Client)
	if up.asked != 1 && cacheable(r) {
		t.Fatalf("upstream asked %d times for what is not cached: %v", up.asked, r)
	}
	again := ask(r, tcp4Client)
	kept := up.asked == 1
	if kept {
		if why := mayNotKeep(up.response, r, &h.o); why != "" {
			t.Fatalf("kept, in spite of %s: %v\nrequest: %v", why, up.response, r)
		}
	}
	if !kept || first == nil {
		return
	}
	if again == nil {
		t.Fatalf("%v\nwas served once and not again", first)
	}
	sameAnswer(t, first, again, 0)
	ttl, ok := commonTTL(t, first)
	if !ok {
		return
	}

	// Another client, over UDP, who may ask for DO alike, but else for other things.
	const later = 2
	time.Sleep(later * time.Second)
	other := asking(r.Question[0].Name, r.Question[0].Qtype)
	other.Question[0].Qclass = r.Question[0].Qclass
	other.CheckingDisabled, other.RecursionDesired = r.CheckingDisabled, r.RecursionDesired
	if opt := r.IsEdns0(); opt != nil && opt.Do() {
		other.SetEdns0(600, true)
	}
	left, asked := ttl, up.asked
	if !h.keepTTL {
		left = ttl - later
	}
	if m := ask(other, udp4Client); ttl > later && !refreshes {
		if up.asked != asked || m == nil {
			t.Fatalf("upstream asked again within the TTL of %d s: %v", ttl, up.response)
		}
		if m.AuthenticatedData && other.IsEdns0() == nil {
			t.Fatalf("AD for a client that did not ask: %v", m)
		}
		if shown, ok := commonTTL(t, m); ok && shown != left {
			t.Fatalf("TTL %d after %d s, want %d: %v", shown, later, left, m)
		}
		if !m.Truncated {
			sameAnswer(t, first, m, ttl-left)
		}
	}

	time.Sleep(time.Duration(ttl) * time.Second)
	asked = up.asked
	last := ask(r, tcp4Client)
	switch {
	case h.stale.upTo == 0 && up.asked != asked+1:
		t.Fatalf("upstream asked %d times after the TTL of %d s: %v", up.asked-asked, ttl, up.response)
	case h.o.stale == staleOptions{upTo: time.Hour} && ttl > later && admit.Classify(up.response, time.Now()) != response.Delegation:
		if last == nil {
			t.Fatal("nothing was served stale")
		}
		sameAnswer(t, first, last, ttl)
	}
}

// mayNotKeep says why a response to r must not be kept, or "".
func mayNotKeep(res, r *dns.Msg, o *options) string {
	soa := false
	for _, rr := range res.Ns {
		soa = soa || rr.Header().Rrtype == dns.TypeSOA
	}
	switch {
	case !cacheable(r):
		return "its type"
	case !res.Response:
		return "QR=0"
	case res.Opcode != dns.OpcodeQuery:
		return "its opcode"
	case res.Truncated:
		return "TC"
	case len(res.Question) != 1:
		return "its question count"
	case !strings.EqualFold(res.Question[0].Name, r.Question[0].Name),
		res.Question[0].Qtype != r.Question[0].Qtype, res.Question[0].Qclass != r.Question[0].Qclass:
		return "another question"
	case !slices.Contains([]int{dns.RcodeSuccess, dns.RcodeNameError, dns.RcodeServerFailure, dns.RcodeNotImplemented}, res.Rcode):
		return "its rcode"
	case res.Rcode == dns.RcodeNameError && !soa:
		return "no SOA"
	case (res.Rcode == dns.RcodeServerFailure || res.Rcode == dns.RcodeNotImplemented) && o.servfail == 0:
		return "servfail 0"
	case res.Rcode == dns.RcodeNameError && o.denial.except != nil:
		return "disable denial"
	}
	if o.success.minTTL == 0 && res.Rcode == dns.RcodeSuccess && len(res.Answer) > 0 {
		for _, rrs := range [][]dns.RR{res.Answer, res.Ns, res.Extra} {
			for _, rr := range rrs {
				if ttl := rr.Header().Ttl; rr.Header().Rrtype != dns.TypeOPT && (ttl == 0 || ttl > 1<<31-1) {
					return "TTL 0"
				}
			}
		}
	}
	return ""
}

// commonTTL returns the TTL of all records of m; ok is false when there are none.
func commonTTL(t *testing.T, m *dns.Msg) (ttl uint32, ok bool) {
	t.Helper()
	for _, rrs := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range rrs {
			h := rr.Header()
			switch {
			case h.Rrtype == dns.TypeOPT:
				continue
			case ok && h.Ttl != ttl:
				t.Fatalf("records with TTLs %d and %d: %v", ttl, h.Ttl, m)
			}
			ttl, ok = h.Ttl, true
		}
	}
	return ttl, ok
}

// sameAnswer fails unless b says what a said when the TTL was higher by that much.
func sameAnswer(t *testing.T, a, b *dns.Msg, lowered uint32) {
	t.Helper()
	// The extended rcode is in the OPT, which is between two servers.
	if a.Rcode&0xf != b.Rcode&0xf || a.Authoritative != b.Authoritative || a.RecursionAvailable != b.RecursionAvailable || a.Truncated != b.Truncated {
		t.Fatalf("%v\nthen\n%v", a, b)
	}
	for i, rrs := range [][]dns.RR{a.Answer, a.Ns, a.Extra} {
		before, after := packRecords(t, rrs, lowered), packRecords(t, [][]dns.RR{b.Answer, b.Ns, b.Extra}[i], 0)
		if !bytes.Equal(before, after) {
			t.Fatalf("section %d differs:\n%v\nthen\n%v", i, a, b)
		}
	}
}

// packRecords puts the records in wire format, but for OPT, with TTLs lowered.
func packRecords(t *testing.T, rrs []dns.RR, lowered uint32) (all []byte) {
	for _, rr := range rrs {
		if rr.Header().Rrtype == dns.TypeOPT {
			continue
		}
		b := make([]byte, dns.Len(rr)+1024)
		rr = dns.Copy(rr)
		rr.Header().Ttl -= lowered
		n, err := dns.PackRR(rr, b, 0, nil, false)
		if err != nil {
			t.Fatalf("%v: %v", rr, err)
		}
		all = append(all, b[:n]...)
	}
	return all
}

// oddResponses are responses as no server sends them by mistake.
func oddResponses() (ms []*dns.Msg) {
	odd := func(change func(*dns.Msg)) {
		m := positive("www.example.org. 300 IN A 192.0.2.1", "www.example.org. 2 IN A 192.0.2.2")
		m.Question = question("www.example.org.").Question
		change(m)
		ms = append(ms, m)
	}
	odd(func(m *dns.Msg) { m.Question = nil })
	odd(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
	odd(func(m *dns.Msg) { m.Truncated = true })
	odd(func(m *dns.Msg) { m.Response = false })
	odd(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate })
	odd(func(m *dns.Msg) { m.Rcode = 0xfff; m.SetEdns0(0, false) })
	odd(func(m *dns.Msg) { m.Answer[0].Header().Ttl = 1 << 31 })
	odd(func(m *dns.Msg) { m.Answer[0].Header().Class = dns.ClassCHAOS })
	odd(func(m *dns.Msg) { m.Answer = parsed("www.example.org. 60 IN CNAME www.example.org.") })
	odd(func(m *dns.Msg) {
		m.Answer = parsed("www.example.org. 60 IN CNAME a.", "a. 60 IN CNAME www.example.org.")
	})
	odd(func(m *dns.Msg) { m.Answer = m.Answer[:1]; m.Answer = append(m.Answer, m.Answer[0], m.Answer[0]) })
	odd(func(m *dns.Msg) { m.Rcode, m.Answer = dns.RcodeNameError, nil })
	odd(func(m *dns.Msg) {
		m.Rcode, m.Answer, m.Ns = dns.RcodeNameError, nil, parsed("org. 9 IN SOA a. b. 1 2 3 4 5", "org. 0 IN NS c.")
	})
	odd(func(m *dns.Msg) { m.Answer, m.Ns, m.Extra = nil, nil, m.Answer })
	odd(func(m *dns.Msg) {
		m.SetTsig("key.example.org.", dns.HmacSHA256, 300, 0)
	})
	return ms
}
