package optcache

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/chain"
)

// This file tests which answer replaces which while a reload moves answers from one store to another.

// A failure in the new store hides no answer that is still in the old one, or moves in later.
func TestFailureHidesNoAnswerThatMovesIn(t *testing.T) {
	t.Parallel()
	ctx := serverContext(t)
	for _, rcode := range []int{dns.RcodeServerFailure, dns.RcodeNotImplemented} {
		t.Run(dns.RcodeToString[rcode], func(t *testing.T) {
			h := firstOf(t, roomFor(sizedOptions(4096)), &scripted{response: positive("host.example.org. 300 IN A 192.0.2.1")})
			r := asking("host.example.org.", dns.TypeA)
			answer(t, ctx, h, r)
			o := roomFor(sizedOptions(5000))
			next := nextOf(t, h, o)
			s, _ := next.scratchFor(r, udp4Client)
			fail := next.newWriter(ctx, &wireWriter{addr: udp4Client}, r, s, next.server(ctx), forMiss)
			fail.WriteMsg(new(dns.Msg).SetRcode(r, rcode))
			f := newFast(t, next, "dns://"+t.Name()+":53", chain.Effects{})
			p, _ := r.Pack()
			check := func(when string) {
				t.Helper()
				for range 5 {
					if m := answer(t, ctx, next, r); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
						t.Errorf("%s, rcode %d hides the answer: %v", when, rcode, m)
					}
					if reply, why := f.ask(p, udp4Client); why == fastpath.Answered && unpacked(t, reply).Rcode != dns.RcodeSuccess {
						t.Errorf("%s, rcode %d hides the answer from the fast path", when, rcode)
					}
				}
			}
			check("before it moves")
			h.stop()
			settled(next)
			check("when it has moved")
			if _, why := f.ask(p, udp4Client); why != fastpath.Answered {
				t.Errorf("a hit passed as %q", why)
			}
		})
	}
}

// A response that cannot be kept ends a stale answer that is still in the old store.
func TestNewsEndTheStaleAnswerThatHasNotMoved(t *testing.T) {
	t.Parallel()
	ctx := serverContext(t)
	o := roomFor(sizedOptions(4096))
	o.success.minTTL = 0
	o.stale = staleOptions{upTo: time.Hour, verify: true}
	up := &scripted{response: positive("host.example.org. 5 IN A 192.0.2.1")}
	h := firstOf(t, o, up)
	r := asking("host.example.org.", dns.TypeA)
	answer(t, ctx, h, r)
	o.success.capacity = 5000
	next := nextOf(t, h, o)
	var now atomic.Int64
	now.Store(int64(time.Minute))
	h.clock, next.clock = now.Load, now.Load
	up.response = negative(dns.RcodeNameError) // without SOA
	if m := answer(t, ctx, next, r); m.Rcode != dns.RcodeNameError {
		t.Fatalf("got %v", m)
	}
	up.response = negative(dns.RcodeServerFailure)
	check := func(when string) {
		t.Helper()
		if m := answer(t, ctx, next, r); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s, the old answer is back: %v", when, m)
		}
	}
	check("before the answers move")
	h.stop()
	settled(next)
	check("when they have moved")
}
