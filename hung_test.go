package optcache

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/flight"
)

// This file is about upstream calls that hang for good, whatever becomes of the request: a name must not hang with them.

// hanging is an upstream that hangs as long as it is told to, and answers otherwise.
type hanging struct {
	upstream
	free chan struct{} // closed when those that hang go on
	hung int           // how many do; mu guards it
	hang bool
	late *dns.Msg // what those answer
}

func newHanging() *hanging { return &hanging{free: make(chan struct{}), hang: true} }

func (u *hanging) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.mu.Lock()
	hang := u.hang
	if hang {
		u.hung++
	}
	u.mu.Unlock()
	if !hang {
		return u.upstream.ServeDNS(ctx, w, r)
	}
	<-u.free
	if u.late == nil {
		return dns.RcodeServerFailure, errUpstream
	}
	m := u.late.Copy()
	m.Id, m.Question = r.Id, r.Question
	return m.Rcode, w.WriteMsg(m)
}

func (u *hanging) now(hang bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hang = hang
}

func (u *hanging) many() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.hung
}

// Two calls that hang keep a name from nobody that asks when they have had their time; what they bring late changes nothing.
func TestHungCallsDoNotKeepTheName(t *testing.T) {
	late := map[string]*dns.Msg{"nothing": nil, "an old answer": positive(oldRecord), "NXDOMAIN": negative(dns.RcodeNameError, soaRecord),
		"SERVFAIL": negative(dns.RcodeServerFailure)}
	for name, m := range late {
		inBubble(t, name, func(t *testing.T) {
			up := newHanging()
			up.late = m
			up.answersWith(0, newRecord)
			h := startNamed(t, "hung/"+name, coalescing(100), up)
			ctx := serverContext(t)
			var c crowd
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			time.Sleep(3500 * time.Millisecond)
			old := c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			time.Sleep(time.Second)
			if n := up.many(); n != 2 {
				t.Fatalf("%d calls hang", n)
			}
			up.now(false)
			if got := client(t, h); got.first() != newData || got.took != 0 {
				t.Errorf("got %v after %v", got, got.took)
			}
			synctest.Wait()
			if m := c.members[old]; len(m.packets) != 1 || m.took != time.Second {
				t.Errorf("one that waited for those that hang: %d packets after %v", len(m.packets), m.took)
			}
			close(up.free)
			c.wg.Wait()
			if got := client(t, h); got.first() != newData {
				t.Errorf("after the late ones: %v", got)
			}
			if n := h.flights.Away(); n != 0 {
				t.Errorf("%d leaders are taken as away", n)
			}
			nobodyWaits(t, h)
		})
	}
}

// However many ask for however long, few calls hang for a name; and when the upstream is well again, it is found out.
func TestHungCallsAreBounded(t *testing.T) {
	for name, flood := range map[string]int{"one at a time": 1, "flood": 500} {
		inBubble(t, name, func(t *testing.T) {
			up := newHanging()
			up.answersWith(0, newRecord)
			h := startNamed(t, "bounded/"+name, coalescing(20), up)
			ctx := serverContext(t)
			var c crowd
			for range 300 {
				for range flood {
					c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
				}
				time.Sleep(5 * time.Second)
			}
			if n := up.many(); n < flight.HungPerKey || n > 2*flight.HungPerKey+flood {
				t.Errorf("%d calls hang", n)
			}
			up.now(false)
			begun := time.Now()
			for client1(ctx, h) != dns.RcodeSuccess {
				if time.Since(begun) > time.Hour {
					t.Fatal("the name stays without an answer")
				}
				time.Sleep(time.Second)
			}
			close(up.free)
			c.wg.Wait()
			if !slices.ContainsFunc(c.members, func(m *member) bool { return m.rcode == dns.RcodeServerFailure && m.took == 0 }) {
				t.Error("nobody was told at once")
			}
			nobodyWaits(t, h)
		})
	}
}

// client1 asks for host.example.org. and returns the rcode of what it gets.
func client1(ctx context.Context, h *Optcache) int {
	w, rcode, _ := ask(ctx, h, asking("host.example.org.", dns.TypeA), udp4Client)
	if len(w.packets) == 1 {
		return int(w.packets[0][3] & 0xf)
	}
	return rcode
}

// A refresh that hangs does not keep the next one from its turn.
func TestHungRefreshIsReplaced(t *testing.T) {
	for name, o := range map[string]options{
		"prefetch":            prefetching(1),
		"immediate":           stale(func(*staleOptions) {}),
		"verify":              stale(func(s *staleOptions) { s.verify = true }),
		"verify with timeout": stale(func(s *staleOptions) { s.verify, s.timeout = true, time.Second }),
		"coalesce off": func() options {
			o := stale(func(*staleOptions) {})
			o.coalesce = coalesceOptions{}
			return o
		}(),
	} {
		inBubble(t, name, func(t *testing.T) {
			up := newHanging()
			up.now(false)
			up.answersWith(0, oldRecord)
			h := startNamed(t, "hung refresh/"+name, o, up)
			client(t, h)
			time.Sleep(50 * time.Second)
			if name != "prefetch" {
				time.Sleep(20 * time.Second)
			}
			up.now(true)
			ctx := serverContext(t)
			var c crowd
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			time.Sleep(4500 * time.Millisecond)
			up.now(false)
			up.answersWith(0, newRecord)
			client(t, h)
			synctest.Wait()
			if got := client(t, h); got.first() != newData {
				t.Errorf("got %v", got)
			}
			close(up.free)
			c.wg.Wait()
			synctest.Wait()
			if got := client(t, h); got.first() != newData {
				t.Errorf("after the late one: %v", got)
			}
			nobodyWaits(t, h)
		})
	}
}

// A second leader whose client goes away is replaced by another waiter.
func TestSecondLeaderIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &slowly{takes: time.Hour}
		up.answers()
		calls := 0
		next := plugWith(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			calls++
			if calls <= 2 {
				return up.ServeDNS(ctx, w, r)
			}
			return addressUpstream(ctx, w, r)
		})
		h := startNamed(t, t.Name(), coalescing(100), next)
		var c crowd
		c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		synctest.Wait()
		ctx, cancel := context.WithCancel(serverContext(t))
		c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		time.Sleep(time.Second)
		third := c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		time.Sleep(1500 * time.Millisecond) // the second one leads
		cancel()
		synctest.Wait()
		if m := c.members[third]; len(m.packets) != 1 || calls != 3 {
			t.Errorf("%d packets, %d calls", len(m.packets), calls)
		}
		c.wg.Wait()
		nobodyWaits(t, h)
	})
}

type plugWith func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error)

func (plugWith) Name() string { return "upstream" }

func (f plugWith) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return f(ctx, w, r)
}

// All clients of a stale entry wait for the new answer, each up to the timeout, whatever else is said.
func TestAllWaitForTheVerification(t *testing.T) {
	for name, set := range map[string]func(*options){
		"timeout":               func(o *options) { o.stale.timeout = time.Second },
		"timeout and recheck":   func(o *options) { o.stale.timeout, o.stale.recheck = time.Second, time.Minute },
		"recheck":               func(o *options) { o.stale.recheck = time.Minute },
		"timeout, coalesce off": func(o *options) { o.stale.timeout, o.coalesce = time.Second, coalesceOptions{} },
	} {
		for _, takes := range []time.Duration{50 * time.Millisecond, 1500 * time.Millisecond} {
			inBubble(t, fmt.Sprint(name, takes), func(t *testing.T) {
				o := stale(func(s *staleOptions) { s.verify = true })
				set(&o)
				h, up := aged(t, fmt.Sprint("all wait/", name, takes), o, 70*time.Second)
				up.answersWith(takes, newRecord)
				ctx := serverContext(t)
				var c crowd
				for range 20 {
					c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
				}
				time.Sleep(20 * time.Millisecond)
				c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
				c.wg.Wait()
				want, after := newData, takes
				if o.stale.timeout > 0 && takes > o.stale.timeout {
					want, after = oldData, o.stale.timeout
				}
				for i, m := range c.members {
					if got := (served{Msg: unpacked(t, m.only(t))}); got.first() != want || m.took > after || m.took < after-20*time.Millisecond {
						t.Errorf("client %d got %v after %v", i, got, m.took)
					}
				}
				if n := len(up.queries()); n != 1 {
					t.Errorf("%d queries", n)
				}
				if n := count(h, countCoalesced); n != 20 {
					t.Errorf("%d coalesced", n)
				}
				time.Sleep(2 * time.Second)
				if got := client(t, h); got.first() != newData {
					t.Errorf("later: %v", got)
				}
				nobodyWaits(t, h)
			})
		}
	}
}

// A verification whose client goes away has not failed.
func TestRecheckIsAfterFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, up := aged(t, t.Name(), stale(func(s *staleOptions) { s.verify, s.recheck = true, time.Minute }), 70*time.Second)
		up.script(0, func(ctx context.Context, _ dns.ResponseWriter, _ *dns.Msg) (int, error) {
			<-ctx.Done()
			return dns.RcodeServerFailure, ctx.Err()
		})
		ctx, cancel := context.WithTimeout(serverContext(t), time.Second)
		defer cancel()
		ask(ctx, h, asking("host.example.org.", dns.TypeA), udp4Client)
		up.answersWith(0, newRecord)
		if got := client(t, h); got.first() != newData {
			t.Errorf("got %v", got)
		}
	})
}

// An answer that a miss brings is news to those that verify.
func TestVerifierTakesWhatAMissBrings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := stale(func(s *staleOptions) { s.verify, s.timeout, s.upTo = true, 10*time.Second, 12*time.Second })
		up := newHanging()
		up.now(false)
		up.answersWith(0, oldRecord)
		h := startNamed(t, t.Name(), o, up)
		client(t, h)
		time.Sleep(71 * time.Second)
		up.now(true)
		var c crowd
		ctx := serverContext(t)
		c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client}) // verifies
		time.Sleep(1500 * time.Millisecond)                                                  // the stale answer is over
		up.now(false)
		up.answersWith(0, newRecord)
		c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client}) // a miss, which asks again
		time.Sleep(3 * time.Second)
		synctest.Wait()
		for i, m := range c.members {
			if len(m.packets) != 1 || (served{Msg: unpacked(t, m.packets[0])}).first() != newData {
				t.Errorf("client %d: %d packets, %v", i, len(m.packets), m.packets)
			}
		}
		close(up.free)
		c.wg.Wait()
	})
}

// When the next plugin answers again, calls that still hang keep no later question from it, however long it was away.
func TestNameRecoversBesideHungCalls(t *testing.T) {
	inBubble(t, "recovers", func(t *testing.T) {
		up := newHanging()
		up.answersWith(0, "host.example.org. 1 IN A 192.0.2.9")
		o := coalescing(20)
		o.success.minTTL = 0
		h := startNamed(t, t.Name(), o, up)
		ctx := serverContext(t)
		var c crowd
		for range 300 {
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			time.Sleep(5 * time.Second)
		}
		up.now(false)
		for client1(ctx, h) != dns.RcodeSuccess {
			time.Sleep(time.Second)
		}
		for range 20 { // each answer expires before the next question
			time.Sleep(2 * time.Second)
			if rcode := client1(ctx, h); rcode != dns.RcodeSuccess {
				t.Fatalf("rcode %d from an upstream that answers", rcode)
			}
		}
		close(up.free)
		c.wg.Wait()
		nobodyWaits(t, h)
	})
}
