package optcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file holds what the tests of the handler share.

func init() { clog.Discard() }

var (
	udp4Client = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 40212}
	udp6Client = &net.UDPAddr{IP: net.ParseIP("2001:db8::7"), Port: 40212}
	tcp4Client = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 40212}
	tcp6Client = &net.TCPAddr{IP: net.ParseIP("2001:db8::7"), Port: 40212}

	plainClients = []net.Addr{udp4Client, udp6Client, tcp4Client, tcp6Client}
)

// wireWriter is the client's end of a chain. It packs messages, as the server does, and keeps
// copies of what goes on the wire.
type wireWriter struct {
	addr    net.Addr
	packets [][]byte
	msgs    int   // how many of them came by WriteMsg
	err     error // of the last message that could not be packed
}

func (w *wireWriter) LocalAddr() net.Addr  { return w.addr }
func (w *wireWriter) RemoteAddr() net.Addr { return w.addr }
func (w *wireWriter) Close() error         { return nil }
func (w *wireWriter) TsigStatus() error    { return nil }
func (w *wireWriter) TsigTimersOnly(bool)  {}
func (w *wireWriter) Hijack()              {}

func (w *wireWriter) Write(b []byte) (int, error) {
	w.packets = append(w.packets, bytes.Clone(b))
	return len(b), nil
}

func (w *wireWriter) WriteMsg(m *dns.Msg) error {
	w.msgs++
	b, err := m.Pack()
	if err != nil {
		w.err = err
		return err
	}
	w.packets = append(w.packets, b)
	return nil
}

// only returns the single packet that was written.
func (w *wireWriter) only(tb testing.TB) []byte {
	tb.Helper()
	if len(w.packets) != 1 {
		tb.Fatalf("%d packets were written, want 1 (last error: %v)", len(w.packets), w.err)
	}
	return w.packets[0]
}

// ask sends a copy of r through a chain, behind the writer that the server puts in front.
func ask(ctx context.Context, h plugin.Handler, r *dns.Msg, client net.Addr) (*wireWriter, int, error) {
	w := &wireWriter{addr: client}
	r = r.Copy()
	rcode, err := h.ServeDNS(ctx, request.NewScrubWriter(r, w), r)
	return w, rcode, err
}

// answer is ask for a question that has one answer, unpacked.
func answer(tb testing.TB, ctx context.Context, h plugin.Handler, r *dns.Msg) *dns.Msg {
	tb.Helper()
	w, _, _ := ask(ctx, h, r, tcp4Client)
	return unpacked(tb, w.only(tb))
}

func unpacked(tb testing.TB, b []byte) *dns.Msg {
	tb.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		tb.Fatalf("%x: %v", b, err)
	}
	return m
}

// scripted is an upstream that answers what it is told to.
type scripted struct {
	response *dns.Msg // nil: fails without a message
	verbatim bool     // the question stays that of response
	asked    int
	last     *dns.Msg // the last request
}

var errUpstream = errors.New("no answer from upstream")

func (u *scripted) Name() string { return "scripted" }

func (u *scripted) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked++
	u.last = r
	if u.response == nil {
		return dns.RcodeServerFailure, errUpstream
	}
	m := u.response.Copy()
	m.Id = r.Id
	m.RecursionDesired, m.CheckingDisabled = r.RecursionDesired, r.CheckingDisabled
	if !u.verbatim {
		m.Question = r.Copy().Question
	}
	return m.Rcode, w.WriteMsg(m)
}

// inBubble runs a subtest whose clock moves only when it sleeps.
func inBubble(t *testing.T, name string, f func(*testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// positive is a response with these records in its answer section.
func positive(records ...string) *dns.Msg {
	m := new(dns.Msg)
	m.Response = true
	m.RecursionAvailable = true
	m.Answer = parsed(records...)
	return m
}

// negative is a response of that rcode with these records in its authority section.
func negative(rcode int, records ...string) *dns.Msg {
	m := new(dns.Msg)
	m.Response = true
	m.RecursionAvailable = true
	m.Rcode = rcode
	m.Ns = parsed(records...)
	return m
}

func parsed(records ...string) []dns.RR {
	var rrs []dns.RR
	for _, s := range records {
		rr, err := dns.NewRR(s)
		if err != nil || rr == nil {
			panic(fmt.Sprintf("%s: %v", s, err))
		}
		rrs = append(rrs, rr)
	}
	return rrs
}

// asking is a question of that type.
func asking(name string, qtype uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(name, qtype)
}

// stockOptions are what the built-in cache does by default, but for the capacity: memory is
// cleared for each instance when the race detector is on.
func stockOptions() options {
	o := sizedOptions(512)
	o.maxMemory = 1 << 20
	return o
}

// roomyOptions have room for all that a test asks for, so that nothing is evicted.
func roomyOptions() options { return sizedOptions(8192) }

func sizedOptions(capacity int) options {
	o := benchOptions(capacity)
	o.denial.capacity = capacity
	return o
}

// systemNow is a precise clock that goes by the bubble's time in a bubble.
func systemNow() int64 { return time.Now().UnixNano() }

// startNamed returns a running instance with counters of its own.
func startNamed(tb testing.TB, view string, o options, next plugin.Handler, front ...plugin.Handler) *Optcache {
	tb.Helper()
	h := newOptcache(o)
	h.Next = next
	h.clock = systemNow
	if err := h.start(view, append(front, h)); err != nil {
		tb.Fatal(err)
	}
	stopsWith(tb, h)
	return h
}

// stopsWith has an instance stop when the test ends. What it has counted goes then, too: series outlive instances, and another run of
// the test in this process is to count from zero.
func stopsWith(tb testing.TB, h *Optcache) {
	tb.Cleanup(func() {
		h.stop()
		mine := countersOf(h)
		sharedCounts.Delete(h.labelsAt(""))
		allCounters.mu.Lock()
		defer allCounters.mu.Unlock()
		maps.DeleteFunc(allCounters.m, func(l labels, c *counters) bool {
			return slices.Contains(mine, c) || slices.ContainsFunc(h.addrs, func(addr string) bool { return l == h.labelsAt(addr) })
		})
	})
}

// fakeClock is a clock that stands until it is moved.
type fakeClock struct{ now int64 }

func (c *fakeClock) advance(d time.Duration) { c.now += int64(d) }

// clocked gives an instance a clock of its own.
func clocked(h *Optcache) *fakeClock {
	c := &fakeClock{now: 1e15}
	h.clock = func() int64 { return c.now }
	return c
}

// contextOf is the context of a request that came to a server at that address.
func contextOf(tb testing.TB, addr string, group ...*dnsserver.Config) context.Context {
	tb.Helper()
	srv, err := dnsserver.NewServer(addr, group)
	if err != nil {
		tb.Fatal(err)
	}
	ctx := context.WithValue(context.Background(), dnsserver.Key{}, srv)
	return context.WithValue(ctx, dnsserver.LoopKey{}, 0)
}

// countersOf returns the counters of an instance. Servers at the same address share them.
func countersOf(o *Optcache) (all []*counters) {
	if known := o.servers.Load(); known != nil {
		for _, s := range *known {
			if !slices.Contains(all, s.counters) {
				all = append(all, s.counters)
			}
		}
	}
	return all
}

// count returns a counter of an instance.
func count(o *Optcache, which counter) (n uint64) {
	for _, c := range countersOf(o) {
		n += c.sums()[which]
	}
	return n
}

// sentWays returns how many hits of an instance went which way.
func sentWays(o *Optcache) (n [ways]uint64) {
	for _, c := range countersOf(o) {
		all := c.sums()
		for w := range ways {
			n[w] += all.hits(func(_ record.Class, _ tier, k way) bool { return k == w })
		}
	}
	return n
}

// trio is three chains over upstreams that give the same answers: optcache sending bytes,
// optcache sending messages, and the built-in cache.
type trio struct {
	ctx    context.Context
	chains [3]plugin.Handler
	ups    [3]*scripted
}

var trioNames = [3]string{"bytes", "message", "cache"}

// newTrio returns the chains. They are for a synctest bubble, whose clock they share.
func newTrio(tb testing.TB, view string, o options) *trio {
	tr := &trio{ctx: serverContext(tb)}
	for i := range tr.ups {
		tr.ups[i] = new(scripted)
	}
	byBytes := startNamed(tb, view+"/bytes", o, tr.ups[0])
	byMessage := startNamed(tb, view+"/message", o, tr.ups[1], named{name: "rewrite"})
	stock := cache.New()
	stock.Next = tr.ups[2]
	tr.chains = [3]plugin.Handler{byBytes, byMessage, spelling{stock}}
	return tr
}

// spelling stands in front of CoreDNS's cache where that is held against optcache. It does what optcache does and
// cache does not: the names in a response that are the qname get the client's letters.
type spelling struct{ stock *cache.Cache }

func (spelling) Name() string { return stockName }

func (s spelling) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if r.Opcode == dns.OpcodeQuery && cacheable(r) && plugin.Zones(s.stock.Zones).Matches(r.Question[0].Name) != "" {
		w = spellingWriter{w, r.Question[0]}
	}
	return s.stock.ServeDNS(ctx, w, r)
}

type spellingWriter struct {
	dns.ResponseWriter
	asked dns.Question
}

func (w spellingWriter) WriteMsg(m *dns.Msg) error {
	if m == nil || !m.Response || m.Opcode != dns.OpcodeQuery || len(m.Question) != 1 {
		return w.ResponseWriter.WriteMsg(m)
	}
	q := m.Question[0]
	if q.Qtype != w.asked.Qtype || q.Qclass != w.asked.Qclass || !strings.EqualFold(q.Name, w.asked.Name) {
		return w.ResponseWriter.WriteMsg(m)
	}
	m = m.Copy()
	m.Question[0].Name = w.asked.Name
	for _, rr := range slices.Concat(m.Answer, m.Ns, m.Extra) {
		if strings.EqualFold(rr.Header().Name, w.asked.Name) {
			rr.Header().Name = w.asked.Name
		}
	}
	return w.ResponseWriter.WriteMsg(m)
}

func (tr *trio) bytes() *Optcache   { return tr.chains[0].(*Optcache) }
func (tr *trio) message() *Optcache { return tr.chains[1].(*Optcache) }

// script makes all upstreams answer m from now on.
func (tr *trio) script(m *dns.Msg, verbatim bool) {
	for _, u := range tr.ups {
		u.response, u.verbatim = m, verbatim
	}
}

// asCache returns r, or a copy with RD where h would make a difference that cache does not: where there is nothing for RD=0
// that RD=1 has brought.
func asCache(h *Optcache, r *dns.Msg) *dns.Msg {
	if r.RecursionDesired || len(r.Question) == 0 {
		return r
	}
	if s, ok := h.scratchFor(r, udp4Client); ok && h.store.find(s, h.clock()) {
		return r
	}
	r = r.Copy()
	r.RecursionDesired = true
	return r
}

// compare asks all three chains and returns what differs, or "".
func (tr *trio) compare(r *dns.Msg, client net.Addr) string {
	r = asCache(tr.message(), r)
	var got [3]*wireWriter
	var codes [3]string
	for i, h := range tr.chains {
		w, rcode, err := ask(tr.ctx, h, r, client)
		got[i] = w
		codes[i] = fmt.Sprintf("rcode %d, error %v", rcode, err != nil)
	}
	var b strings.Builder
	for i := range 2 {
		if tr.ups[i].asked != tr.ups[2].asked {
			fmt.Fprintf(&b, "%s: upstream asked %d times, %s: %d times\n", trioNames[i], tr.ups[i].asked, trioNames[2], tr.ups[2].asked)
		}
		if codes[i] != codes[2] {
			fmt.Fprintf(&b, "%s: returned %s, %s: %s\n", trioNames[i], codes[i], trioNames[2], codes[2])
		}
		if !samePackets(got[i].packets, got[2].packets) {
			fmt.Fprintf(&b, "%s: %s\n%s: %s\n", trioNames[i], describe(got[i]), trioNames[2], describe(got[2]))
		}
	}
	if b.Len() > 0 {
		fmt.Fprintf(&b, "request from %s %v: %v\nresponse from upstream: %.3000s", client.Network(), client, r, tr.ups[0].response)
	}
	return b.String()
}

func samePackets(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

func describe(w *wireWriter) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d packets, %d by message, error %v", len(w.packets), w.msgs, w.err)
	for _, p := range w.packets {
		m := new(dns.Msg)
		err := m.Unpack(p)
		text := m.String()
		if len(text) > 3000 {
			text = text[:3000] + "..."
		}
		fmt.Fprintf(&b, "\n%d bytes %.80x\n%v %s", len(p), p, err, text)
	}
	return b.String()
}
