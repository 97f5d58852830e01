package optcache

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/flight"
)

// slowly is an upstream that takes a while, or forever.
type slowly struct {
	takes time.Duration
	asked atomic.Int32
	reply func(ctx context.Context, n int, w dns.ResponseWriter, r *dns.Msg) (int, error) // the n-th, from 1
}

func (u *slowly) Name() string { return "slowly" }

func (u *slowly) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	n := int(u.asked.Add(1))
	select {
	case <-time.After(u.takes):
	case <-ctx.Done():
		return dns.RcodeServerFailure, ctx.Err()
	}
	return u.reply(ctx, n, w, r)
}

// answers is a reply with one address.
func (u *slowly) answers() *slowly {
	u.reply = func(ctx context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		return addressUpstream(ctx, w, r)
	}
	return u
}

// crowd is many requests at once.
type crowd struct {
	wg      sync.WaitGroup
	members []*member
}

// member is a request and what became of it.
type member struct {
	*wireWriter
	rcode  int
	failed error
	took   time.Duration
}

// add sends a request off and returns its number.
func (c *crowd) add(ctx context.Context, h plugin.Handler, r *dns.Msg, w *wireWriter) int {
	m := &member{wireWriter: w, rcode: -1}
	c.members = append(c.members, m)
	start := time.Now()
	c.wg.Go(func() {
		defer func() {
			if recover() != nil {
				m.failed = errPanicked
			}
			m.took = time.Since(start)
		}()
		m.rcode, m.failed = h.ServeDNS(ctx, request.NewScrubWriter(r, w), r)
	})
	return len(c.members) - 1
}

var errPanicked = errors.New("panicked")

func coalescing(waiters int) options {
	o := stockOptions()
	o.coalesce = coalesceOptions{waiters: waiters, wait: 2 * time.Second}
	return o
}

func TestCoalescingMakesOneQueryOfConcurrentMisses(t *testing.T) {
	const clients = 10_000
	tests := []struct {
		name    string
		waiters int // 0: the built-in cache
		queries int32
	}{
		{"room for all", clients, 1},
		{"by default", 1000, clients/1001 + 1},
		{"cache", 0, clients},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			up := (&slowly{takes: 200 * time.Millisecond}).answers()
			var h plugin.Handler
			if tc.waiters > 0 {
				h = startNamed(t, "crowd/"+tc.name, coalescing(tc.waiters), up)
			} else {
				stock := cache.New()
				stock.Next = up
				h = stock
			}
			var c crowd
			for i := range clients {
				r := asking([]string{"www.example.org.", "WWW.example.ORG."}[i%2], dns.TypeA)
				r.Id = uint16(i)
				c.add(serverContext(t), h, r, &wireWriter{addr: plainClients[i%4]})
			}
			c.wg.Wait()
			if n := up.asked.Load(); n != tc.queries {
				t.Errorf("%d queries, want %d", n, tc.queries)
			}
			for i, w := range c.members {
				m := unpacked(t, w.only(t))
				name := []string{"www.example.org.", "WWW.example.ORG."}[i%2]
				if m.Id != uint16(i) || m.Question[0].Name != name || len(m.Answer) != 1 || m.Answer[0].Header().Ttl != 3600 {
					t.Fatalf("client %d got %v", i, m)
				}
				if c.members[i].took > 400*time.Millisecond || c.members[i].rcode != dns.RcodeSuccess || c.members[i].failed != nil {
					t.Fatalf("client %d: %v, rcode %d, %v", i, c.members[i].took, c.members[i].rcode, c.members[i].failed)
				}
			}
			if o, ours := h.(*Optcache); ours {
				if n := count(o, countMiss); n != clients {
					t.Errorf("%d misses, want %d", n, clients)
				}
				if n := count(o, countCoalesced); n != uint64(clients-tc.queries) {
					t.Errorf("%d coalesced, want %d", n, clients-tc.queries)
				}
				nobodyWaits(t, o)
			}
		})
	}
}

// nobodyWaits fails the test if anything of a flight is left.
func nobodyWaits(t *testing.T, o *Optcache) {
	t.Helper()
	if n := o.flights.Waiting(); n != 0 {
		t.Errorf("%d requests wait", n)
	}
	if n := o.flights.UnderWay(); n != 0 {
		t.Errorf("%d flights are under way", n)
	}
}

func TestWaiterGetsAReplyOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &slowly{takes: time.Second, reply: func(_ context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := positive("host.example.org. 300 IN A 192.0.2.1")
			for i := range 60 {
				m.Answer = append(m.Answer, parsed(fmt.Sprintf("host.example.org. 300 IN A 192.0.2.%d", i+2))...)
			}
			m.Id, m.Question, m.AuthenticatedData = r.Id, r.Question, true
			return 0, w.WriteMsg(m)
		}}
		h := startNamed(t, "own", coalescing(100), up)
		plain := func() *dns.Msg { return asking("host.example.org.", dns.TypeA) }
		ad, edns, norec := plain(), plain(), plain()
		ad.AuthenticatedData = true
		edns.SetEdns0(4096, false)
		norec.RecursionDesired = false
		ctx := serverContext(t)
		var c crowd
		leader := c.add(ctx, h, plain(), &wireWriter{addr: udp4Client})
		synctest.Wait()
		waiters := map[string]int{
			"udp":  c.add(ctx, h, plain(), &wireWriter{addr: udp4Client}),
			"tcp":  c.add(ctx, h, plain(), &wireWriter{addr: tcp4Client}),
			"ad":   c.add(ctx, h, ad, &wireWriter{addr: tcp4Client}),
			"edns": c.add(ctx, h, edns, &wireWriter{addr: udp4Client}),
			"rd":   c.add(ctx, h, norec, &wireWriter{addr: tcp4Client}),
		}
		c.wg.Wait()
		if n := up.asked.Load(); n != 2 { // one without RD
			t.Fatalf("%d queries", n)
		}
		got := func(i int) *dns.Msg { return unpacked(t, c.members[i].only(t)) }
		if m := got(leader); !m.Truncated || m.AuthenticatedData {
			t.Errorf("leader: %v", m)
		}
		if m := got(waiters["udp"]); !m.Truncated || m.AuthenticatedData || m.IsEdns0() != nil || !m.RecursionDesired {
			t.Errorf("over UDP: %v", m)
		}
		if m := got(waiters["tcp"]); m.Truncated || len(m.Answer) != 61 || m.AuthenticatedData {
			t.Errorf("over TCP: %v", m)
		}
		if m := got(waiters["ad"]); !m.AuthenticatedData {
			t.Errorf("with AD: %v", m)
		}
		if m := got(waiters["edns"]); m.Truncated || len(m.Answer) != 61 || m.IsEdns0() == nil || m.IsEdns0().UDPSize() != 4096 {
			t.Errorf("with EDNS: %v", m)
		}
		if m := got(waiters["rd"]); m.RecursionDesired {
			t.Errorf("without RD: %v", m)
		}
	})
}

// Requests with other bits in their key do not wait for each other.
func TestOnlyTheSameKeyIsCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := (&slowly{takes: time.Second}).answers()
		h := startNamed(t, "keys", coalescing(100), up)
		plain := func() *dns.Msg { return asking("host.example.org.", dns.TypeA) }
		do, cd, aaaa := plain(), plain(), plain()
		do.SetEdns0(1232, true)
		cd.CheckingDisabled = true
		aaaa.Question[0].Qtype = dns.TypeAAAA
		var c crowd
		for _, r := range []*dns.Msg{plain(), do, cd, aaaa, asking("other.example.org.", dns.TypeA)} {
			c.add(serverContext(t), h, r, &wireWriter{addr: udp4Client})
		}
		c.wg.Wait()
		if n := up.asked.Load(); n != 5 {
			t.Errorf("%d queries, want 5", n)
		}
		nobodyWaits(t, h)
	})
}

// A truncated answer is good for those only that have no more room than who asked for it.
func TestTruncatedAnswerIsNotSharedWithTCP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &slowly{takes: time.Second, reply: func(_ context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := new(dns.Msg).SetReply(r)
			if w.RemoteAddr().Network() == "udp" {
				m.Truncated = true
			} else {
				m.Answer = parsed("host.example.org. 300 IN A 192.0.2.1")
			}
			return 0, w.WriteMsg(m)
		}}
		h := startNamed(t, "tc", coalescing(100), up)
		var c crowd
		ctx := serverContext(t)
		c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		synctest.Wait()
		for range 10 {
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: tcp4Client})
		}
		c.wg.Wait()
		if n := up.asked.Load(); n != 2 {
			t.Errorf("%d queries, want one over UDP and one over TCP", n)
		}
		for i, w := range c.members {
			if m := unpacked(t, w.only(t)); m.Truncated != (w.addr == udp4Client) {
				t.Errorf("client %d over %s: %v", i, w.addr.Network(), m)
			}
		}
		nobodyWaits(t, h)
	})
}

func TestFailureIsSharedOnce(t *testing.T) {
	failures := map[string]func(ctx context.Context, n int, w dns.ResponseWriter, r *dns.Msg) (int, error){
		"no message": func(context.Context, int, dns.ResponseWriter, *dns.Msg) (int, error) {
			return dns.RcodeServerFailure, errUpstream
		},
		"SERVFAIL": func(_ context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			return 0, w.WriteMsg(new(dns.Msg).SetRcode(r, dns.RcodeServerFailure))
		},
		"another question": func(_ context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := new(dns.Msg).SetReply(r)
			m.Question[0].Name = "other.example.org."
			return 0, w.WriteMsg(m)
		},
	}
	for name, reply := range failures {
		inBubble(t, name, func(t *testing.T) {
			up := &slowly{takes: time.Second, reply: reply}
			o := coalescing(100)
			o.servfail = 0 // nothing is kept: it is the flight that shares it
			h := startNamed(t, "failure/"+name, o, up)
			var c crowd
			for range 100 {
				c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			if n := up.asked.Load(); n != 1 {
				t.Errorf("%d queries, want 1", n)
			}
			failed := 0
			for i, w := range c.members {
				if c.members[i].rcode == dns.RcodeServerFailure || len(w.packets) == 1 && unpacked(t, w.packets[0]).Rcode == dns.RcodeServerFailure {
					failed++
				}
			}
			if name == "another question" {
				failed++ // who asked gets the response as it is
			}
			if failed != 100 {
				t.Errorf("%d clients of 100 were told", failed)
			}
			nobodyWaits(t, h)
		})
	}
}

// Whatever happens to the one who asks, the others get their answer.
func TestLeadIsPassedOn(t *testing.T) {
	for _, how := range []string{"cancelled", "panic"} {
		inBubble(t, how, func(t *testing.T) {
			up := &slowly{takes: time.Second, reply: func(ctx context.Context, n int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				if n == 1 && how == "panic" {
					panic("the first one")
				}
				return addressUpstream(ctx, w, r)
			}}
			h := startNamed(t, "lead/"+how, coalescing(100), up)
			var c crowd
			ctx, cancel := context.WithCancel(serverContext(t))
			defer cancel()
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			synctest.Wait()
			for range 50 {
				c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			}
			synctest.Wait()
			if how == "cancelled" {
				cancel()
			}
			c.wg.Wait()
			if n := up.asked.Load(); n != 2 {
				t.Errorf("%d queries, want 2", n)
			}
			for i, w := range c.members[1:] {
				if m := unpacked(t, w.only(t)); len(m.Answer) != 1 {
					t.Errorf("client %d got %v", i, m)
				}
			}
			if c.members[0].failed == nil {
				t.Error("the first one was not cancelled")
			}
			nobodyWaits(t, h)
		})
	}
}

func TestWaiterThatGoesAwayLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := (&slowly{takes: time.Second}).answers()
		h := startNamed(t, "away", coalescing(100), up)
		var c crowd
		c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		synctest.Wait()
		ctx, cancel := context.WithCancel(serverContext(t))
		c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		synctest.Wait()
		cancel()
		synctest.Wait()
		if n := h.flights.Waiting(); n != 0 {
			t.Errorf("%d requests wait", n)
		}
		c.wg.Wait()
		if !errors.Is(c.members[1].failed, context.Canceled) || len(c.members[1].packets) != 0 {
			t.Errorf("%v, %d packets", c.members[1].failed, len(c.members[1].packets))
		}
	})
}

// When the upstream takes longer than a waiter's time, one of them asks again for all; when that
// takes as long, they are let go. What the first query brings late is still good.
func TestWaitersAreLetGo(t *testing.T) {
	tests := []struct {
		name    string
		takes   time.Duration
		queries int32
		letGo   uint64
		within  time.Duration
	}{
		{"in time", 1900 * time.Millisecond, 1, 0, 1900 * time.Millisecond},
		{"late", 2500 * time.Millisecond, 2, 0, 2500 * time.Millisecond},
		{"too late", 10 * time.Second, 2, 98, 4 * time.Second},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			up := (&slowly{takes: tc.takes}).answers()
			h := startNamed(t, "wait/"+tc.name, coalescing(100), up)
			var c crowd
			for range 100 {
				c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			if n := up.asked.Load(); n != tc.queries {
				t.Errorf("%d queries, want %d", n, tc.queries)
			}
			if n := count(h, countLetGo); n != tc.letGo {
				t.Errorf("%d let go, want %d", n, tc.letGo)
			}
			failed, late := uint64(0), 0
			for i := range c.members {
				if c.members[i].rcode == dns.RcodeServerFailure {
					failed++
				}
				if c.members[i].took > tc.within {
					late++
				}
			}
			if failed != tc.letGo {
				t.Errorf("%d clients failed, want %d", failed, tc.letGo)
			}
			if leaders := int(tc.queries); late > leaders {
				t.Errorf("%d clients took longer than %v", late, tc.within)
			}
			nobodyWaits(t, h)
		})
	}
}

func TestWaitersAreBoundedInAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := (&slowly{takes: time.Second}).answers()
		h := startNamed(t, "all", coalescing(1), up)
		var c crowd
		const names = flight.WaitersInAll + 50
		for i := range 2 * names {
			c.add(serverContext(t), h, asking(fmt.Sprintf("host-%d.example.org.", i%names), dns.TypeA), &wireWriter{addr: udp4Client})
		}
		synctest.Wait()
		if n := h.flights.Waiting(); n != flight.WaitersInAll {
			t.Errorf("%d requests wait, want %d", n, flight.WaitersInAll)
		}
		c.wg.Wait()
		if n := up.asked.Load(); n != names+50 {
			t.Errorf("%d queries, want %d", n, names+50)
		}
		nobodyWaits(t, h)
	})
}

func TestCoalesceOff(t *testing.T) { everybodyAsks(t, "off", coalescing(0), dns.TypeA) }

// The plugin loop sees its own queries come back, each of them.
func TestQueriesOfTheLoopPluginDoNotWait(t *testing.T) {
	everybodyAsks(t, "loop", coalescing(100), dns.TypeHINFO)
}

// everybodyAsks fails the test if one of many requests with the same key makes no query.
func everybodyAsks(t *testing.T, view string, o options, qtype uint16) {
	synctest.Test(t, func(t *testing.T) {
		up := (&slowly{takes: time.Second}).answers()
		h := startNamed(t, view, o, up)
		var c crowd
		for range 10 {
			c.add(serverContext(t), h, asking("host.example.org.", qtype), &wireWriter{addr: udp4Client})
		}
		c.wg.Wait()
		if n := up.asked.Load(); n != 10 {
			t.Errorf("%d queries, want 10", n)
		}
	})
}

// What is not kept is shared all the same, except for bytes, which nobody has looked into.
func TestWhatIsNotKeptIsShared(t *testing.T) {
	tests := []struct {
		name    string
		reply   func(w dns.ResponseWriter, r *dns.Msg) error
		queries int32
	}{
		{"TTL 0", func(w dns.ResponseWriter, r *dns.Msg) error {
			m := new(dns.Msg).SetReply(r)
			m.Answer = parsed("host.example.org. 0 IN A 192.0.2.1")
			return w.WriteMsg(m)
		}, 1},
		{"REFUSED", func(w dns.ResponseWriter, r *dns.Msg) error {
			return w.WriteMsg(new(dns.Msg).SetRcode(r, dns.RcodeRefused))
		}, 1},
		{"bytes", func(w dns.ResponseWriter, r *dns.Msg) error {
			b, err := new(dns.Msg).SetReply(r).Pack()
			if err == nil {
				_, err = w.Write(b)
			}
			return err
		}, 20},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			up := &slowly{takes: time.Second, reply: func(_ context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				return 0, tc.reply(w, r)
			}}
			o := coalescing(100)
			o.success.minTTL = 0
			h := startNamed(t, "unkept/"+tc.name, o, up)
			var c crowd
			for i := range 20 {
				r := asking("host.example.org.", dns.TypeA)
				r.Id = uint16(i)
				c.add(serverContext(t), h, r, &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			if n := up.asked.Load(); n != tc.queries {
				t.Errorf("%d queries, want %d", n, tc.queries)
			}
			for i, w := range c.members {
				if m := unpacked(t, w.only(t)); m.Id != uint16(i) {
					t.Errorf("client %d got %v", i, m)
				}
			}
			nobodyWaits(t, h)
		})
	}
}

// Each request has metadata of its own; what the answer was made from is set in all of them.
func TestWaitersKeepTheirMetadata(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &slowly{takes: time.Second, reply: func(ctx context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			metadata.SetValueFunc(ctx, "zone/wildcard", func() string { return "*.example.org." })
			metadata.SetValueFunc(ctx, "upstream/own", func() string { return "the leader's" })
			return addressUpstream(ctx, w, r)
		}}
		h := startNamed(t, "metadata", coalescing(100), up)
		var c crowd
		var ctxs []context.Context
		for i := range 10 {
			ctx := metadata.ContextWithMetadata(serverContext(t))
			metadata.SetValueFunc(ctx, "test/number", func() string { return fmt.Sprint(i) })
			ctxs = append(ctxs, ctx)
			c.add(ctx, h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		}
		c.wg.Wait()
		leaders := 0
		for i, ctx := range ctxs {
			if got := metadata.ValueFunc(ctx, "zone/wildcard")(); got != "*.example.org." {
				t.Errorf("request %d: wildcard %q", i, got)
			}
			if got := metadata.ValueFunc(ctx, "test/number")(); got != fmt.Sprint(i) {
				t.Errorf("request %d: number %q", i, got)
			}
			if metadata.ValueFunc(ctx, "upstream/own") != nil {
				leaders++
			}
		}
		if leaders != 1 {
			t.Errorf("%d requests have the leader's metadata", leaders)
		}
	})
}

// Requests of all kinds at once, for the race detector.
func TestCoalescingUnderStress(t *testing.T) {
	var n atomic.Int32
	up := plugin.HandlerFunc(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		switch n.Add(1) % 5 {
		case 0:
			return dns.RcodeServerFailure, errUpstream
		case 1:
			panic("now and then")
		}
		return addressUpstream(ctx, w, r)
	})
	o := coalescing(3)
	o.coalesce.wait = time.Millisecond
	o.servfail = 0
	o.success.minTTL, o.success.maxTTL = 0, 0
	h := startNamed(t, "stress", o, up)
	var c crowd
	ctx := serverContext(t)
	for i := range 2000 {
		ctx, cancel := context.WithCancel(ctx)
		c.add(ctx, h, asking(fmt.Sprintf("host-%d.example.org.", i/3%7), dns.TypeA), &wireWriter{addr: udp4Client})
		if i%3 == 0 {
			cancel()
		}
		defer cancel()
	}
	c.wg.Wait()
	nobodyWaits(t, h)
}

// What an upstream answers by how it is asked is for those who ask in the same way; the others get what they would
// get if they asked alone.
func TestAnswersToAMannerAreNotForOthers(t *testing.T) {
	plain := func() *dns.Msg { return asking("host.example.org.", dns.TypeA) }
	large := func() *dns.Msg { return plain().SetEdns0(65535, false) }
	const asWell = 10
	for name, tc := range map[string]struct {
		leader, other       func() *dns.Msg
		leaderAddr, address net.Addr
		rcode               int // of the leader's answer, and that of those who ask like it
		queries             int32
	}{
		"EDNS": {large, plain, udp4Client, udp4Client, dns.RcodeFormatError, 2},
		"options": {func() *dns.Msg {
			m := large()
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_LOCAL{Code: dns.EDNS0LOCALSTART}}
			return m
		}, large, udp4Client, udp4Client, dns.RcodeFormatError, 2 + asWell}, // nobody else has these options, as far as we know
		"TCP": {large, large, udp4Client, tcp4Client, dns.RcodeSuccess, 2},
	} {
		inBubble(t, name, func(t *testing.T) {
			up := &slowly{takes: time.Second, reply: func(_ context.Context, n int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				m := new(dns.Msg).SetRcode(r, tc.rcode)
				opt, other := r.IsEdns0(), tc.other().IsEdns0()
				alike := (opt == nil) == (other == nil) && (opt == nil || len(opt.Option) == 0)
				switch {
				case name == "TCP" && w.RemoteAddr().Network() == "udp":
					m.Truncated = true
				case name == "TCP" || alike:
					m.Rcode = dns.RcodeSuccess
					m.Answer = parsed("host.example.org. 300 IN A 192.0.2.1")
				}
				return 0, w.WriteMsg(m)
			}}
			h := startNamed(t, "manner/"+name, coalescing(100), up)
			var c crowd
			ctx := serverContext(t)
			c.add(ctx, h, tc.leader(), &wireWriter{addr: tc.leaderAddr})
			synctest.Wait()
			for range asWell {
				c.add(ctx, h, tc.leader(), &wireWriter{addr: tc.leaderAddr})
				c.add(ctx, h, tc.other(), &wireWriter{addr: tc.address})
			}
			c.wg.Wait()
			for i, w := range c.members {
				m := unpacked(t, w.only(t))
				if good := m.Rcode == dns.RcodeSuccess && !m.Truncated; good != (i > 0 && i%2 == 0) {
					t.Errorf("client %d: %v", i, m)
				}
			}
			if n := up.asked.Load(); n > tc.queries {
				t.Errorf("%d queries, want %d at most", n, tc.queries)
			}
			nobodyWaits(t, h)
		})
	}
}

// A plugin behind may ask the server again on behalf of a request. That must not wait for what the request itself is
// to bring.
func TestRequestsOfRequestsDoNotWait(t *testing.T) {
	for name, change := range map[string]func(*options){
		"miss": func(*options) {},
		"verify": func(o *options) {
			o.stale = staleOptions{upTo: time.Hour, verify: true}
		},
	} {
		inBubble(t, name, func(t *testing.T) {
			const deepest = 8
			var h *Optcache
			up := &slowly{}
			up.reply = func(ctx context.Context, n int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				if name == "verify" && n == 1 {
					return addressUpstream(ctx, w, r)
				}
				depth, _ := ctx.Value(dnsserver.LoopKey{}).(int)
				if depth == deepest {
					return dns.RcodeServerFailure, errUpstream
				}
				_, _, err := ask(context.WithValue(ctx, dnsserver.LoopKey{}, depth+1), h, r, tcp4Client)
				return dns.RcodeServerFailure, err
			}
			o := coalescing(100)
			change(&o)
			h = startNamed(t, "nested/"+name, o, up)
			ctx := serverContext(t)
			r := asking("www.example.org.", dns.TypeA)
			want := int32(1 + deepest)
			if name == "verify" {
				ask(ctx, h, r, udp4Client)
				time.Sleep(90 * time.Minute) // it has been dead for half an hour
				want++
			}
			start := time.Now()
			ask(ctx, h, r, udp4Client)
			if took := time.Since(start); took > 0 {
				t.Errorf("it took %v", took)
			}
			if n := up.asked.Load(); n != want {
				t.Errorf("%d queries, want %d", n, want)
			}
			nobodyWaits(t, h)
		})
	}
}
