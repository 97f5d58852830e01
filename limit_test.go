package optcache

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// limited returns options with a limit of one question per second.
func limited(burst int, wait time.Duration) options {
	o := stockOptions()
	o.explain, o.coalesce = true, defaultCoalesce
	o.upstream = upstreamOptions{perSecond: 1, burst: burst, wait: wait}
	return o
}

func TestUpstreamLimit(t *testing.T) {
	inBubble(t, "misses wait for their turn, or fail at once", func(t *testing.T) {
		u := new(census)
		h := startNamed(t, t.Name(), limited(2, 3*time.Second), u)
		ctx := contextOf(t, "dns://:53")
		begun := time.Now()
		replies := make(chan *dns.Msg)
		for i := range 8 {
			go func() {
				replies <- answer(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA).SetEdns0(1232, false))
			}()
		}
		good, failed := 0, 0
		for range 8 {
			m := <-replies
			switch m.Rcode {
			case dns.RcodeSuccess:
				good++
			case dns.RcodeServerFailure:
				failed++
				if d := time.Since(begun); d > 0 {
					t.Errorf("a failure has taken %v", d)
				}
				if opt := m.IsEdns0(); len(opt.Option) != 1 || opt.Option[0].(*dns.EDNS0_EDE).ExtraText != "upstream_limit" {
					t.Errorf("it does not say why: %v", m)
				}
			}
		}
		if d := time.Since(begun); good != 5 || failed != 3 || d != 3*time.Second {
			t.Errorf("%d good after %v, %d failed; want 5 after 3s, 3", good, d, failed)
		}
		if w, r := count(h, countLimitWaited), count(h, countLimitRefused); w != 3 || r != 3 {
			t.Errorf("waited %d, refused %d", w, r)
		}
		time.Sleep(10 * time.Second)
		for i := range 8 { // the failures have not been kept, and hits need no token
			if m := answer(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA)); m.Rcode != dns.RcodeSuccess {
				t.Errorf("%d: %v", i, m)
			}
		}
	})
	inBubble(t, "requests for one name need one token", func(t *testing.T) {
		h := startNamed(t, t.Name(), limited(1, 0), new(census))
		ctx := contextOf(t, "dns://:53")
		replies := make(chan *dns.Msg)
		for range 20 {
			go func() { replies <- answer(t, ctx, h, asking("host.example.org.", dns.TypeA)) }()
		}
		for range 20 {
			if m := <-replies; m.Rcode != dns.RcodeSuccess {
				t.Fatalf("%v", m)
			}
		}
	})
	inBubble(t, "a client that goes away waits no longer", func(t *testing.T) {
		h := startNamed(t, t.Name(), limited(1, 30*time.Second), new(census))
		ctx, cancel := context.WithCancel(contextOf(t, "dns://:53"))
		answer(t, ctx, h, asking("a.example.org.", dns.TypeA))
		begun := time.Now()
		time.AfterFunc(100*time.Millisecond, cancel)
		ask(ctx, h, asking("b.example.org.", dns.TypeA), udp4Client)
		if d := time.Since(begun); d != 100*time.Millisecond {
			t.Errorf("it has waited for %v", d)
		}
	})
	for _, verify := range []bool{false, true} {
		inBubble(t, fmt.Sprint("stale answers go without, verify ", verify), func(t *testing.T) {
			u := new(census)
			o := limited(1, time.Minute)
			o.stale = staleOptions{upTo: time.Hour, verify: verify}
			h := startNamed(t, t.Name(), o, u)
			ctx := contextOf(t, "dns://:53")
			answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
			time.Sleep(90 * time.Minute)
			answer(t, ctx, h, asking("other.example.org.", dns.TypeA)) // takes the token
			asked, begun := u.asked.Load(), time.Now()
			if m := answer(t, ctx, h, asking("host.example.org.", dns.TypeA)); m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0 || m.Answer[0].Header().Ttl != 0 {
				t.Errorf("%v", m)
			}
			if u.asked.Load() != asked || time.Since(begun) != 0 {
				t.Errorf("the upstream was asked, after %v", time.Since(begun))
			}
			if d, s := count(h, countLimitDeferred), count(h, countLimitStale); verify && (d != 0 || s != 1) || !verify && (d != 1 || s != 0) {
				t.Errorf("deferred %d, stale %d", d, s)
			}
			time.Sleep(2 * time.Second)
			answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
			time.Sleep(time.Millisecond)
			if u.asked.Load() != asked+1 {
				t.Error("with a token, the upstream is not asked")
			}
		})
	}
}

// What is cut off is asked for again over TCP, in the background, with a token of its own.
func TestUpstreamLimitAndTruncation(t *testing.T) {
	for _, tokens := range []int{1, 3} {
		inBubble(t, fmt.Sprint(tokens), func(t *testing.T) {
			o := stale(func(s *staleOptions) { s.verify, s.timeout, s.recheck = true, time.Second, time.Minute })
			o.upstream = upstreamOptions{perSecond: 1, burst: tokens, wait: time.Second}
			h, up := aged(t, t.Name(), o, 70*time.Second)
			up.byTransport(0, newRecord)
			for h.limit.Take(h.clock()) { // nothing but the tokens of the next seconds
			}
			time.Sleep(time.Duration(tokens) * time.Second)
			before := count(h, countLimitDeferred) // of another run
			client(t, h)
			synctest.Wait()
			if n := len(up.queries()); n != min(tokens, 2) {
				t.Errorf("%d queries with %d tokens", n, tokens)
			}
			if n := count(h, countLimitDeferred) - before; (n == 1) != (tokens == 1) {
				t.Errorf("%d are deferred", n)
			}
		})
	}
}

// A reload brings no new tokens, as long as the option is the same.
func TestUpstreamLimitAndReload(t *testing.T) {
	for _, c := range []struct {
		change func(*options)
		tokens bool
	}{
		{func(*options) {}, false},
		{func(o *options) { o.success.capacity *= 2 }, false},
		{func(o *options) { o.upstream.burst++ }, true},
	} {
		o := roomFor(limited(10, 0))
		u := new(census)
		h := firstOf(t, o, u)
		for h.limit.Take(h.clock()) {
		}
		at := h.clock()
		c.change(&o)
		next := nextOf(t, h, o)
		h.stop()
		settled(next)
		if next.limit.Take(at) != c.tokens {
			t.Errorf("tokens after a reload: %v", !c.tokens)
		}
	}
}
