package optcache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/pkg/nonwriter"
	"github.com/coredns/coredns/request"

	"github.com/optcache/optcache/plugin/pkg/wire"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// asked is what a question costs the upstream.
func asked(up *scripted, f func()) int {
	before := up.asked
	f()
	return up.asked - before
}

func TestKeyIsNameTypeClassDOAndCD(t *testing.T) {
	base := func() *dns.Msg { return asking("host.example.org.", dns.TypeA) }
	tests := []struct {
		name   string
		change func(*dns.Msg)
		same   bool
	}{
		{"same", func(*dns.Msg) {}, true},
		{"case", func(r *dns.Msg) { r.Question[0].Name = "hOsT.ExAmPlE.oRg." }, true},
		{"escaped letters", func(r *dns.Msg) { r.Question[0].Name = `\104ost.example.org.` }, true},
		{"ID", func(r *dns.Msg) { r.Id++ }, true},
		{"RD", func(r *dns.Msg) { r.RecursionDesired = false }, true},
		{"AD", func(r *dns.Msg) { r.AuthenticatedData = true }, true},
		{"AA", func(r *dns.Msg) { r.Authoritative = true }, true},
		{"EDNS", func(r *dns.Msg) { r.SetEdns0(1232, false) }, true},
		{"ECS", func(r *dns.Msg) {
			r.SetEdns0(1232, false)
			r.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 8, Address: net.IPv4(10, 0, 0, 0)}}
		}, true},
		{"DO", func(r *dns.Msg) { r.SetEdns0(1232, true) }, false},
		{"CD", func(r *dns.Msg) { r.CheckingDisabled = true }, false},
		{"DO and CD", func(r *dns.Msg) { r.SetEdns0(1232, true).CheckingDisabled = true }, false},
		{"type", func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeAAAA }, false},
		{"ANY", func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeANY }, false},
		{"type with the same low byte", func(r *dns.Msg) { r.Question[0].Qtype = 0x0101 }, false},
		{"class CH", func(r *dns.Msg) { r.Question[0].Qclass = dns.ClassCHAOS }, false},
		{"class ANY", func(r *dns.Msg) { r.Question[0].Qclass = dns.ClassANY }, false},
		{"parent", func(r *dns.Msg) { r.Question[0].Name = "example.org." }, false},
		{"escaped dot", func(r *dns.Msg) { r.Question[0].Name = `host\.example.org.` }, false},
		{"NUL", func(r *dns.Msg) { r.Question[0].Name = `host\000.example.org.` }, false},
		{"brackets are not letters", func(r *dns.Msg) { r.Question[0].Name = "{ost.example.org." }, false},
	}
	for i, first := range tests {
		for j, second := range tests {
			if i != 0 && j != 0 || first.name == "RD" {
				continue // what RD=0 brings has tests of its own: see recursion_test.go
			}
			inBubble(t, first.name+" then "+second.name, func(t *testing.T) {
				tr := newTrio(t, fmt.Sprintf("key/%d/%d", i, j), stockOptions())
				m := positive(aRecord)
				m.Rcode = dns.RcodeServerFailure // kept for whatever is asked
				tr.script(m, false)
				a, b := base(), base()
				first.change(a)
				second.change(b)
				for range 2 {
					if diff := tr.compare(a, tcp4Client); diff != "" {
						t.Fatal(diff)
					}
				}
				// The built-in cache takes names with needless escapes for another.
				stock := !strings.Contains(a.Question[0].Name+b.Question[0].Name, `\104`)
				misses := asked(tr.ups[0], func() {
					if !stock {
						ask(tr.ctx, tr.bytes(), b, tcp4Client)
					} else if diff := tr.compare(b, tcp4Client); diff != "" {
						t.Fatal(diff)
					}
				})
				same := first.same && second.same
				if hit := misses == 0; hit != same {
					t.Errorf("hit %v, want %v", hit, same)
				}
			})
		}
	}
}

// Responses that do not fit the request go to the client as they are, and nowhere else.
func TestResponsesThatDoNotMatchAreDropped(t *testing.T) {
	fits := func() *dns.Msg {
		m := positive(aRecord)
		m.Question = []dns.Question{{Name: "host.example.org.", Qtype: dns.TypeA, Qclass: dns.ClassINET}}
		return m
	}
	tests := []struct {
		name   string
		change func(*dns.Msg)
		drops  uint64
	}{
		{"fits", func(*dns.Msg) {}, 0},
		{"another name", func(m *dns.Msg) { m.Question[0].Name = "other.example.org." }, 1},
		{"no name", func(m *dns.Msg) { m.Question[0].Name = "." }, 1},
		{"name that is none", func(m *dns.Msg) { m.Question[0].Name = "host..example.org." }, 1},
		{"relative name", func(m *dns.Msg) { m.Question[0].Name = "host.example.org" }, 1},
		{"another type", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX }, 1},
		{"another class", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, 1},
		{"QR=0", func(m *dns.Msg) { m.Response = false }, 1},
		{"two questions", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, 1},
		{"no question", func(m *dns.Msg) { m.Question = nil }, 1},
		{"opcode STATUS", func(m *dns.Msg) { m.Opcode = dns.OpcodeStatus }, 1},
		{"opcode IQUERY", func(m *dns.Msg) { m.Opcode = dns.OpcodeIQuery }, 1},
		{"opcode NOTIFY", func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, 1},
		{"opcode UPDATE", func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, 1},
		{"NXDOMAIN for another name", func(m *dns.Msg) {
			m.Rcode, m.Answer, m.Ns = dns.RcodeNameError, nil, parsed(soaRecord)
			m.Question[0].Name = "other.example.org."
		}, 1},
		{"SERVFAIL for another name", func(m *dns.Msg) {
			m.Rcode, m.Answer = dns.RcodeServerFailure, nil
			m.Question[0].Name = "other.example.org."
		}, 1},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			res := fits()
			tc.change(res)
			up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				m := res.Copy()
				m.Id = r.Id
				return dns.RcodeSuccess, w.WriteMsg(m)
			})
			h := startNamed(t, t.Name(), stockOptions(), up)
			r := asking("host.example.org.", dns.TypeA)
			keep := &messageKeeper{wireWriter: wireWriter{addr: tcp4Client}}
			h.ServeDNS(serverContext(t), keep, r)
			if keep.msgs != 1 {
				t.Fatalf("the client got %d messages", keep.msgs)
			}
			got := keep.msg
			if !slices.Equal(got.Question, res.Question) || got.Response != res.Response || got.Opcode != res.Opcode || got.Rcode != res.Rcode {
				t.Errorf("the client got %v, want %v", got, res)
			}
			if n := count(h, countDrop); n != tc.drops {
				t.Errorf("%d drops, want %d", n, tc.drops)
			}
			kept := h.store.len(record.Success) + h.store.len(record.Denial)
			if want := int64(1 - tc.drops); kept != want {
				t.Errorf("%d entries, want %d", kept, want)
			}
		})
	}
}

func TestNilResponseIsAnError(t *testing.T) {
	var got error
	up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, _ *dns.Msg) (int, error) {
		got = w.WriteMsg(nil)
		return dns.RcodeSuccess, nil
	})
	h := startNamed(t, t.Name(), stockOptions(), up)
	w, _, _ := ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
	if got == nil || len(w.packets) != 0 || h.store.len(record.Success)+h.store.len(record.Denial) != 0 {
		t.Errorf("error %v, %d packets, %d entries", got, len(w.packets), h.store.len(record.Success))
	}
}

func TestBytesOfAPluginGoToTheClientAndAreNotKept(t *testing.T) {
	n := 0
	up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		n++
		w.Write([]byte("bytes"))
		return dns.RcodeServerFailure, errUpstream
	})
	h := startNamed(t, t.Name(), stockOptions(), up)
	for range 2 {
		w, _, err := ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
		if string(w.only(t)) != "bytes" || !errors.Is(err, errUpstream) {
			t.Errorf("%q, %v", w.packets, err)
		}
	}
	if n != 2 {
		t.Errorf("asked %d times, want 2: what was answered is not a failure to keep", n)
	}
}

// What is no question for the cache reaches the next plugin as it is, every time.
func TestWhatPassesThroughUntouched(t *testing.T) {
	tests := []struct {
		name string
		r    *dns.Msg
	}{
		{"AXFR", new(dns.Msg).SetAxfr("example.org.")},
		{"IXFR", new(dns.Msg).SetIxfr("example.org.", 1, "ns.example.org.", "h.example.org.")},
		{"UPDATE", new(dns.Msg).SetUpdate("example.org.")},
		{"NOTIFY", new(dns.Msg).SetNotify("example.org.")},
		{"STATUS", with(asking("host.example.org.", dns.TypeA), func(r *dns.Msg) { r.Opcode = dns.OpcodeStatus })},
		{"no question", new(dns.Msg)},
		{"name too long", asking(strings.Repeat("abcdefg.", 40), dns.TypeA)},
		{"label too long", asking(strings.Repeat("a", 64)+".", dns.TypeA)},
		{"empty label", asking("a..b.", dns.TypeA)},
		{"relative name", asking("host.example.org", dns.TypeA)},
		{"empty name", asking("", dns.TypeA)},
		{"zone that is not cached", asking("host.example.com.", dns.TypeA)},
		{"zone that is bypassed", asking("a.mutable.example.org.", dns.TypeA)},
		{"zone that is bypassed, in another case", asking("A.MUTABLE.example.ORG.", dns.TypeA)},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			up := &scripted{response: positive(aRecord)}
			o := stockOptions()
			o.zones = []string{"example.org.", "a.b."}
			h := startNamed(t, t.Name(), o, up, bypasser{named{name: "errors"}})
			want, err := tc.r.Pack()
			for i := range 3 {
				r := tc.r.Copy()
				r.Id = tc.r.Id
				h.ServeDNS(serverContext(t), &wireWriter{addr: tcp4Client}, r)
				if up.asked != i+1 {
					t.Fatalf("the next plugin was asked %d times of %d", up.asked, i+1)
				}
				if got, err2 := up.last.Pack(); string(got) != string(want) || (err == nil) != (err2 == nil) {
					t.Errorf("the next plugin got %v, want %v", up.last, tc.r)
				}
			}
			if n := h.store.len(record.Success) + h.store.len(record.Denial); n != 0 {
				t.Errorf("%d entries", n)
			}
			if n := count(h, countDrop) + count(h, countMiss); n != 0 {
				t.Errorf("counted as %d misses and %d drops", count(h, countMiss), count(h, countDrop))
			}
		})
	}
}

// bypasser is a plugin with a zone that changes behind the cache's back.
type bypasser struct{ named }

func (bypasser) CacheBypassZones() []string { return []string{"Mutable.example.org"} }

func TestZonesAreMatchedByLabel(t *testing.T) {
	tests := []struct {
		zones  []string
		name   string
		cached bool
	}{
		{[]string{"example.org."}, "example.org.", true},
		{[]string{"example.org."}, "a.EXAMPLE.org.", true},
		{[]string{"example.org."}, "anexample.org.", false},
		{[]string{"example.org."}, `a\.example.org.`, false},
		{[]string{"example.org."}, "org.", false},
		{[]string{"example.org.", "example.net."}, "a.example.net.", true},
		{[]string{"."}, ".", true},
		{nil, "example.org.", false},
	}
	for i, tc := range tests {
		o := stockOptions()
		o.zones = tc.zones
		up := &scripted{response: positive()}
		h := startNamed(t, fmt.Sprintf("zones/%d", i), o, up)
		for range 2 {
			ask(serverContext(t), h, asking(tc.name, dns.TypeA), udp4Client)
		}
		if cached := up.asked == 1; cached != tc.cached {
			t.Errorf("%s in %v: cached %v", tc.name, tc.zones, cached)
		}
	}
}

func TestDisabledZonesAreNotKept(t *testing.T) {
	o := stockOptions()
	o.success.except = []string{"nopos.example.org."}
	o.denial.except = []string{"noneg.example.org."}
	soa := negative(dns.RcodeNameError, soaRecord)
	tests := []struct {
		name string
		res  *dns.Msg
		kept bool
	}{
		{"host.nopos.example.org.", nil, false},
		{"host.NOPOS.example.org.", nil, false},
		{"host.noneg.example.org.", nil, true},
		{"host.nopos.example.org.", soa, true},
		{"host.noneg.example.org.", soa, false},
		{"host.noneg.example.org.", negative(dns.RcodeServerFailure), false},
		{"notnopos.example.org.", nil, true},
	}
	for i, tc := range tests {
		res := tc.res
		if res == nil {
			res = positive(tc.name + " 300 IN A 192.0.2.1")
		}
		up := &scripted{response: res}
		h := startNamed(t, fmt.Sprintf("disabled/%d", i), o, up)
		for range 2 {
			ask(serverContext(t), h, asking(tc.name, dns.TypeA), udp4Client)
		}
		if kept := up.asked == 1; kept != tc.kept {
			t.Errorf("%s, %s: kept %v", tc.name, dns.RcodeToString[res.Rcode], kept)
		}
		if n := count(h, countDrop); n != 0 {
			t.Errorf("%s: %d drops", tc.name, n)
		}
	}
}

func TestTTLCountsDownByWholeSeconds(t *testing.T) {
	for _, keep := range []bool{false, true} {
		o := stockOptions()
		o.keepTTL = keep
		up := &scripted{response: positive(aRecord)}
		h := startNamed(t, fmt.Sprintf("down/%v", keep), o, up)
		clock := clocked(h)
		age := time.Duration(0)
		for _, step := range []time.Duration{0, 0, 999e6, 1e6, 999999999, 1, 10e9, 286999e6, 999e6, 1e6, 0} {
			clock.advance(step)
			age += step
			want, misses := uint32(300-age/time.Second), 0
			if keep {
				want = 300
			}
			if age >= 300*time.Second {
				want, misses = 300, 1
				clock.now, age = clock.now+0, 0
			}
			if step == 0 && up.asked == 0 {
				misses = 1
			}
			var m *dns.Msg
			if n := asked(up, func() { m = answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA)) }); n != misses {
				t.Errorf("keepttl %v, age %v: asked %d times, want %d", keep, age, n, misses)
			}
			if got := m.Answer[0].Header().Ttl; got != want {
				t.Errorf("keepttl %v, age %v: TTL %d, want %d", keep, age, got, want)
			}
		}
	}
}

func TestFailureWithoutMessageIsKeptAsSERVFAIL(t *testing.T) {
	cancelled, cancel := context.WithCancel(serverContext(t))
	cancel()
	never := stockOptions()
	never.servfail = 0
	long := stockOptions()
	long.servfail = 300 * time.Second
	tests := []struct {
		name  string
		ctx   context.Context
		o     options
		rcode int
		err   error
		kept  time.Duration
	}{
		{"failure", nil, stockOptions(), dns.RcodeServerFailure, errUpstream, 5 * time.Second},
		{"long", nil, long, dns.RcodeServerFailure, errUpstream, 300 * time.Second},
		{"servfail 0", nil, never, dns.RcodeServerFailure, errUpstream, 0},
		{"cancelled", cancelled, stockOptions(), dns.RcodeServerFailure, errUpstream, 0},
		{"without error", nil, stockOptions(), dns.RcodeServerFailure, nil, 0},
		{"refused", nil, stockOptions(), dns.RcodeRefused, errUpstream, 0},
	}
	for i, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			n := 0
			up := plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { n++; return tc.rcode, tc.err })
			h := startNamed(t, fmt.Sprintf("failure/%d", i), tc.o, up)
			clock := clocked(h)
			ctx := tc.ctx
			if ctx == nil {
				ctx = serverContext(t)
			}
			r := asking("host.example.org.", dns.TypeA)
			w, rcode, err := ask(ctx, h, r, udp4Client)
			if len(w.packets) != 0 || rcode != tc.rcode || !errors.Is(err, tc.err) {
				t.Errorf("%d packets, %d, %v", len(w.packets), rcode, err)
			}
			ask(ctx, h, r, udp4Client)
			if kept := n == 1; kept != (tc.kept > 0) {
				t.Errorf("kept %v", kept)
			}
			if tc.kept == 0 {
				return
			}
			// The reply is a plain SERVFAIL to this request, which says that it was written.
			r.AuthenticatedData, r.RecursionDesired = true, false
			w, rcode, err = ask(ctx, h, r, udp4Client)
			m := unpacked(t, w.only(t))
			if rcode != dns.RcodeSuccess || err != nil || m.Rcode != dns.RcodeServerFailure || m.Id != r.Id || m.RecursionDesired {
				t.Errorf("%d, %v, %v", rcode, err, m)
			}
			clock.advance(tc.kept - 1)
			ask(ctx, h, r, udp4Client)
			if n != 1 {
				t.Error("forgotten too early")
			}
			clock.advance(1)
			ask(ctx, h, r, udp4Client)
			if n != 2 {
				t.Error("not forgotten in time")
			}
		})
	}
}

func TestFailureHidesNoAnswerThatMayBeServed(t *testing.T) {
	up := &scripted{response: positive("host.example.org. 3 IN A 192.0.2.1")}
	o := stockOptions()
	o.success.minTTL = 0
	o.servfail = 60 * time.Second
	h := startNamed(t, t.Name(), o, up)
	clock := clocked(h)
	ctx := serverContext(t)
	r := asking("host.example.org.", dns.TypeA)
	ask(ctx, h, r, udp4Client)
	// A failure gets in beside an answer that is alive when both were under way.
	s := h.pool.Get().(*scratch)
	fail := &writer{ResponseWriter: &wireWriter{addr: udp4Client}, o: h, ctx: ctx, server: h.server(ctx), qname: r.Question[0].Name}
	name := []byte("\x04host\x07example\x03org\x00")
	fail.key.Set(h.store.seed, name, dns.TypeA, dns.ClassINET, false, false)
	h.release(s)
	fail.WriteMsg(new(dns.Msg).SetRcode(r, dns.RcodeServerFailure))
	if h.store.len(record.Success) != 1 || h.store.len(record.Denial) != 1 {
		t.Fatalf("%d and %d entries, want one of each class", h.store.len(record.Success), h.store.len(record.Denial))
	}
	for range 5 { // in every tier
		if m := answer(t, ctx, h, r); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
			t.Errorf("a failure hides the answer: %v", m)
		}
	}
	clock.advance(3 * time.Second)
	for range 5 {
		if m := answer(t, ctx, h, r); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("want the failure once the answer has expired: %v", m)
		}
	}
	if up.asked != 1 {
		t.Errorf("asked %d times", up.asked)
	}
}

// A denial that is asked for all the time does not block the answer that comes after it, nor
// the other way round.
func TestNewerAnswerOfTheOtherClassIsServed(t *testing.T) {
	answers := []*dns.Msg{
		positive("host.example.org. 10 IN A 192.0.2.1"),
		negative(dns.RcodeNameError, strings.Replace(soaRecord, " 300 IN", " 10 IN", 1)),
		negative(dns.RcodeServerFailure),
	}
	up := new(scripted)
	h := startNamed(t, t.Name(), stockOptions(), up)
	clock := clocked(h)
	g := rand.New(rand.NewPCG(1, 1))
	for range 500 {
		up.response = answers[g.IntN(len(answers))]
		want := up.response.Rcode
		for range g.IntN(8) + 1 {
			if m := answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA)); m.Rcode != want {
				t.Fatalf("got %s, want %s", dns.RcodeToString[m.Rcode], dns.RcodeToString[want])
			}
		}
		clock.advance(time.Duration(10+g.IntN(2)) * time.Second)
	}
}

// What others do with a message before or after it came by here changes no entry.
func TestEntriesAreCopies(t *testing.T) {
	for _, tc := range []struct {
		name  string
		front []plugin.Handler
	}{{"bytes", nil}, {"message", []plugin.Handler{named{name: "rewrite"}}}} {
		t.Run(tc.name, func(t *testing.T) {
			spoil := func(m *dns.Msg) {
				m.Rcode, m.Authoritative, m.AuthenticatedData = dns.RcodeRefused, true, true
				m.Question[0].Name = "spoiled."
				for _, rr := range m.Answer {
					rr.Header().Name, rr.Header().Ttl = "spoiled.", 77
					switch rr := rr.(type) {
					case *dns.A:
						copy(rr.A, net.IPv4bcast)
					case *dns.TXT:
						rr.Txt[0] = "spoiled"
					}
				}
				m.Extra = append(m.Extra, m.Answer...)
				slices.Reverse(m.Answer)
			}
			up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				m := new(dns.Msg).SetReply(r)
				m.Answer = parsed(aRecord, "host.example.org. 300 IN A 192.0.2.2", `host.example.org. 300 IN TXT "text"`)
				err := w.WriteMsg(m)
				spoil(m)
				r.Question[0].Name = "spoiled."
				return dns.RcodeSuccess, err
			})
			h := startNamed(t, t.Name(), stockOptions(), up, tc.front...)
			var first []byte
			for i := range 8 {
				r := asking("host.example.org.", dns.TypeA)
				r.Id = 1
				keep := &messageKeeper{wireWriter: wireWriter{addr: tcp4Client}}
				h.ServeDNS(serverContext(t), request.NewScrubWriter(r, keep), r)
				got := keep.only(t)
				if first == nil {
					first = got
				}
				if string(got) != string(first) {
					t.Fatalf("reply %d: %v, first %v", i, unpacked(t, got), unpacked(t, first))
				}
				if r.Question[0].Name != "host.example.org." {
					t.Errorf("a later plugin changed the request to %v", r)
				}
				if keep.msg != nil {
					spoil(keep.msg)
				}
			}
		})
	}
}

// A plugin that looks a name up in the server, as kubernetes does for an ExternalName, gets the hit as a message. The client of the
// request that it does so for gets nothing.
func TestInnerLookupsAreForThePlugin(t *testing.T) {
	h := startNamed(t, t.Name(), stockOptions(), addressUpstream)
	for i := range 3 {
		outer := &wireWriter{addr: udp4Client}
		inner := nonwriter.New(outer)
		r := asking("host.example.org.", dns.TypeA)
		h.ServeDNS(serverContext(t), request.NewScrubWriter(r, inner), r)
		if inner.Msg == nil || len(inner.Msg.Answer) == 0 || len(outer.packets) > 0 {
			t.Errorf("lookup %d: the plugin gets %v, and the client %d packets", i, inner.Msg, len(outer.packets))
		}
	}
}

func TestWildcardMetadataIsSetAgainOnHits(t *testing.T) {
	const wildcard = "*.example.org."
	up := plugin.HandlerFunc(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		if strings.HasPrefix(r.Question[0].Name, "w") {
			metadata.SetValueFunc(ctx, "zone/wildcard", func() string { return wildcard })
		}
		return addressUpstream.ServeDNS(ctx, w, r)
	})
	h := startNamed(t, t.Name(), stockOptions(), up)
	for _, tc := range []struct{ name, want string }{{"w.example.org.", wildcard}, {"n.example.org.", ""}, {"w.example.org.", wildcard}, {"n.example.org.", ""}} {
		for range 6 {
			ctx := metadata.ContextWithMetadata(serverContext(t))
			ask(ctx, h, asking(tc.name, dns.TypeA), udp4Client)
			got := ""
			if f := metadata.ValueFunc(ctx, "zone/wildcard"); f != nil {
				got = f()
			}
			if got != tc.want {
				t.Errorf("%s: zone/wildcard is %q, want %q", tc.name, got, tc.want)
			}
		}
	}
	if ws := sentWays(h); ws[wayBytes] != 22 {
		t.Errorf("hits went %v", ws)
	}
}

func TestNextPluginSeesACopyWithADSet(t *testing.T) {
	g := newTraffic(3)
	up := &scripted{response: with(positive(), func(m *dns.Msg) { m.Truncated = true })} // never kept
	h := startNamed(t, t.Name(), stockOptions(), up)
	ctx := serverContext(t)
	for i := range 300 {
		r := g.request(g.question())
		before, err := r.Pack()
		if err != nil {
			continue
		}
		want := r.Copy()
		want.AuthenticatedData = true
		up.last = nil
		h.ServeDNS(ctx, &wireWriter{addr: tcp4Client}, r)
		if up.last == nil || up.last == r {
			t.Fatalf("request %d: the next plugin got %v", i, up.last)
		}
		if after, _ := r.Pack(); string(after) != string(before) {
			t.Errorf("the request was changed to %v", r)
		}
		if up.last.String() != want.String() {
			t.Errorf("the next plugin got %v, want %v", up.last, want)
		}
	}
}

func TestReplyGoesToThisClient(t *testing.T) {
	for _, front := range [][]plugin.Handler{nil, {named{name: "rewrite"}}} {
		up := &scripted{response: with(positive(aRecord), func(m *dns.Msg) { m.AuthenticatedData = true })}
		h := startNamed(t, fmt.Sprintf("client/%d", len(front)), stockOptions(), up, front...)
		g := newTraffic(11)
		for range 200 {
			q := dns.Question{Name: "host.example.org.", Qtype: dns.TypeA, Qclass: dns.ClassINET}
			r := g.request(q)
			do := r.IsEdns0() != nil && r.IsEdns0().Do()
			w, _, _ := ask(serverContext(t), h, r, udp4Client)
			m := unpacked(t, w.only(t))
			switch {
			case m.Id != r.Id, m.Question[0] != r.Question[0], m.RecursionDesired != r.RecursionDesired, m.CheckingDisabled != r.CheckingDisabled:
				t.Fatalf("reply %v to %v", m, r)
			case m.AuthenticatedData != (do || r.AuthenticatedData):
				t.Fatalf("AD is %v in the reply to %v", m.AuthenticatedData, r)
			case (m.IsEdns0() != nil) != (r.IsEdns0() != nil):
				t.Fatalf("OPT in reply %v to %v", m, r)
			case m.IsEdns0() != nil && len(m.IsEdns0().Option) > 0:
				t.Fatalf("options in the reply %v", m)
			case m.Zero, m.Authoritative:
				t.Fatalf("made up flags in %v", m)
			}
		}
		if up.asked > 4 {
			t.Errorf("asked %d times", up.asked)
		}
	}
}

func TestRequestsAfterStopFindNothing(t *testing.T) {
	up := &scripted{response: positive(aRecord)}
	h := startNamed(t, t.Name(), stockOptions(), up)
	ctx := serverContext(t)
	for range 6 {
		answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
	}
	for range 2 {
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			if n := asked(up, func() {
				if m := answer(t, ctx, h, asking("host.example.org.", dns.TypeA)); len(m.Answer) != 1 {
					t.Errorf("%v", m)
				}
			}); n != 1 {
				t.Errorf("request %d after stop: asked %d times", i, n)
			}
		}
	}
}

func TestStopWhileServing(t *testing.T) {
	h := startNamed(t, t.Name(), benchOptions(2000), encodingUpstream{})
	ctx := serverContext(t)
	var wg sync.WaitGroup
	var stopped atomic.Bool
	for id := range 4 {
		wg.Go(func() {
			g := rand.New(rand.NewPCG(uint64(id), 1))
			for after := 0; after < 200; {
				if stopped.Load() {
					after++
				}
				checkEncoded(t, ctx, h, g)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	h.stop()
	stopped.Store(true)
	wg.Wait()
}

// Names whose keys have the same hash are kept apart, in every tier.
func TestNamesWithTheSameHashNeverMix(t *testing.T) {
	h := startNamed(t, t.Name(), benchOptions(4096), addressUpstream)
	const names = 64
	keyOf := func(i int) (s *scratch) {
		s = newScratch()
		name := fmt.Sprintf("\x04n%03d\x00", i)
		s.Key.Set(h.store.seed, []byte(name), dns.TypeA, dns.ClassINET, false, false)
		s.Key.Hash = record.WithoutOwner(0xdeadbeefdeadbeef) // of the only store
		s.Body = 12 + len(name) + wire.QuestionTail
		return s
	}
	for round := range 4 {
		for i := range names {
			s := keyOf(i)
			m := new(dns.Msg).SetReply(asking(fmt.Sprintf("n%03d.", i), dns.TypeA))
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}, A: net.IPv4(10, 0, byte(round), byte(i))}}
			e := record.Entry{Stored: 0, TTL: 300}
			body, ok := admit.Pack(&s.Buffer, m, &e)
			if !ok {
				t.Fatal("not packed")
			}
			h.store.insert(s, &e, body, "", 0)
		}
		found := 0
		for range 5 {
			for i := range names {
				s := keyOf(i)
				if !h.store.lookup(s, 0) {
					continue
				}
				found++
				m, err := s.Message(asking(fmt.Sprintf("n%03d.", i), dns.TypeA), 300)
				if err != nil {
					t.Fatal(err)
				}
				a := m.Answer[0].(*dns.A)
				if a.Hdr.Name != fmt.Sprintf("n%03d.", i) || !a.A.Equal(net.IPv4(10, 0, byte(round), byte(i))) {
					t.Fatalf("n%03d got %v", i, a)
				}
			}
		}
		if found < names {
			t.Errorf("only %d lookups of %d found something", found, 5*names)
		}
	}
}

// encodingUpstream answers with what was asked: the answer's data is a sum over the question.
type encodingUpstream struct{}

func (encodingUpstream) Name() string { return "encoding" }

func (encodingUpstream) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	m := new(dns.Msg).SetReply(r)
	q := r.Question[0]
	text := encoded(r)
	switch kindOf(q.Name) {
	case 0:
		m.Rcode = dns.RcodeNameError
		m.Ns = parsed(soaRecord)
		m.Ns[0].(*dns.SOA).Mbox = "x" + text + "."
	case 1:
		m.Rcode = dns.RcodeServerFailure
	default:
		m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: q.Qclass, Ttl: 300},
			Txt: []string{text, strings.Repeat("l", len(q.Name)%7*30)}}}
	}
	return m.Rcode, w.WriteMsg(m)
}

func kindOf(name string) int {
	n := 0
	for _, c := range strings.ToLower(name) {
		n += int(c)
	}
	return n % 6
}

func encoded(r *dns.Msg) string {
	q := r.Question[0]
	do := r.IsEdns0() != nil && r.IsEdns0().Do()
	return fmt.Sprintf("%s-%d-%d-%v-%v", strings.ReplaceAll(strings.ToLower(q.Name), ".", "_"), q.Qtype, q.Qclass, do, r.CheckingDisabled)
}

// checkEncoded asks something and verifies the reply.
func checkEncoded(t *testing.T, ctx context.Context, h plugin.Handler, g *rand.Rand) {
	r := asking(fmt.Sprintf("n%d.test.", int(float64(3000)*g.Float64()*g.Float64()*g.Float64())), dns.TypeTXT)
	if g.IntN(2) == 0 {
		r.Question[0].Name = strings.ToUpper(r.Question[0].Name)
	}
	if g.IntN(4) == 0 {
		r.Question[0].Qclass = dns.ClassCHAOS
	}
	r.CheckingDisabled = g.IntN(8) == 0
	if g.IntN(2) == 0 {
		r.SetEdns0(1232, g.IntN(2) == 0)
	}
	text := encoded(r)
	w, _, err := ask(ctx, h, r, plainClients[g.IntN(len(plainClients))])
	if err != nil || len(w.packets) != 1 {
		t.Errorf("%d packets, %v", len(w.packets), err)
		return
	}
	m := new(dns.Msg)
	if err := m.Unpack(w.packets[0]); err != nil {
		t.Error(err)
		return
	}
	good := m.Id == r.Id && m.Question[0] == r.Question[0]
	switch kindOf(r.Question[0].Name) {
	case 0:
		good = good && m.Rcode == dns.RcodeNameError && len(m.Ns) == 1 && m.Ns[0].(*dns.SOA).Mbox == "x"+text+"."
	case 1:
		good = good && m.Rcode == dns.RcodeServerFailure
	default:
		good = good && m.Rcode == dns.RcodeSuccess && len(m.Answer) == 1 && m.Answer[0].(*dns.TXT).Txt[0] == text &&
			strings.EqualFold(m.Answer[0].Header().Name, r.Question[0].Name) && m.Answer[0].Header().Class == r.Question[0].Qclass
	}
	if !good {
		t.Errorf("reply %v to %v", m, r)
	}
}

func TestConcurrentRequestsGetTheirOwnAnswers(t *testing.T) {
	for _, tc := range []struct {
		name  string
		front []plugin.Handler
	}{{"bytes", nil}, {"message", []plugin.Handler{named{name: "rewrite"}}}} {
		t.Run(tc.name, func(t *testing.T) {
			o := benchOptions(600) // far less than there are names: entries come and go
			o.denial.capacity = 100
			h := startNamed(t, t.Name(), o, encodingUpstream{}, tc.front...)
			var now atomic.Int64
			h.clock = func() int64 { return now.Load() }
			ctx := serverContext(t)
			var wg sync.WaitGroup
			for id := range 8 {
				wg.Go(func() {
					g := rand.New(rand.NewPCG(uint64(id), 2))
					for i := 0; i < 4000 && !t.Failed(); i++ {
						checkEncoded(t, ctx, h, g)
						if i%100 == 0 {
							now.Add(2e9)
						}
					}
				})
			}
			wg.Wait()
			hits := uint64(0)
			for _, n := range sentWays(h) {
				hits += n
			}
			if hits < 3000 || count(h, countEvicted)+count(h, countEvicted+1) == 0 {
				t.Errorf("%d hits, %d evictions", hits, count(h, countEvicted))
			}
		})
	}
}
