package optcache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

// upstream is one that answers as it is told, after a while, and remembers what it was asked.
type upstream struct {
	mu    sync.Mutex // guards what follows
	takes time.Duration
	reply func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error)
	asked []*dns.Msg
}

func (u *upstream) Name() string { return "upstream" }

func (u *upstream) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.mu.Lock()
	u.asked = append(u.asked, r.Copy())
	takes, reply := u.takes, u.reply
	u.mu.Unlock()
	time.Sleep(takes)
	return reply(ctx, w, r)
}

// script sets how it answers from now on.
func (u *upstream) script(takes time.Duration, reply func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.takes, u.reply = takes, reply
}

// queries returns what was asked since the last call.
func (u *upstream) queries() []*dns.Msg {
	u.mu.Lock()
	defer u.mu.Unlock()
	asked := u.asked
	u.asked = nil
	return asked
}

func (u *upstream) answersWith(takes time.Duration, records ...string) {
	u.responds(takes, positive(records...))
}

func (u *upstream) responds(takes time.Duration, m *dns.Msg) {
	u.script(takes, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := m.Copy()
		m.Id, m.Question, m.RecursionDesired = r.Id, r.Question, r.RecursionDesired
		return m.Rcode, w.WriteMsg(m)
	})
}

func (u *upstream) fails(takes time.Duration) {
	u.script(takes, func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
		return dns.RcodeServerFailure, errUpstream
	})
}

// served is what a client got.
type served struct {
	*dns.Msg
	took time.Duration
}

// first returns the text of the first answer record's data.
func (s served) first() string {
	if len(s.Answer) == 0 {
		return dns.RcodeToString[s.Rcode]
	}
	if c, ok := s.Answer[0].(*dns.CNAME); ok {
		return dns.RcodeToString[s.Rcode] + " behind " + c.Target
	}
	return s.Answer[0].(*dns.A).A.String()
}

func (s served) ttl() uint32 { return s.Answer[0].Header().Ttl }

// client asks for host.example.org. A, with EDNS.
func client(t *testing.T, h plugin.Handler) served {
	t.Helper()
	start := time.Now()
	r := asking("host.example.org.", dns.TypeA)
	r.SetEdns0(1232, false)
	w, rcode, _ := ask(serverContext(t), h, r, udp4Client)
	if len(w.packets) == 0 { // the server makes one of it
		return served{new(dns.Msg).SetRcode(r, rcode), time.Since(start)}
	}
	return served{unpacked(t, w.only(t)), time.Since(start)}
}

const (
	oldRecord = "host.example.org. 60 IN A 192.0.2.1"
	newRecord = "host.example.org. 60 IN A 192.0.2.2"
	oldData   = "192.0.2.1"
	newData   = "192.0.2.2"
)

// aged returns an instance whose entry for host.example.org. has the given age.
func aged(t *testing.T, view string, o options, age time.Duration) (*Optcache, *upstream) {
	t.Helper()
	up := new(upstream)
	up.answersWith(0, oldRecord)
	h := startNamed(t, view, o, up)
	if got := client(t, h).first(); got != oldData {
		t.Fatalf("got %s", got)
	}
	up.queries()
	time.Sleep(age)
	return h, up
}

func prefetching(amount uint32) options {
	o := stockOptions()
	o.coalesce = coalesceOptions{waiters: 1000, wait: 2 * time.Second}
	o.prefetch = prefetchOptions{amount: amount, gap: time.Minute, percentage: 50}
	return o
}

func stale(set func(*staleOptions)) options {
	o := stockOptions()
	o.coalesce = coalesceOptions{waiters: 1000, wait: 2 * time.Second}
	o.explain = true
	o.stale.upTo = time.Hour
	set(&o.stale)
	return o
}

// A hit that triggers a prefetch is answered at once; a thousand at a time make one query.
func TestPrefetchIsOneQueryAndNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, up := aged(t, "prefetch", prefetching(1), 40*time.Second)
		up.answersWith(time.Second, newRecord)
		var c crowd
		for range 1000 {
			c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
		}
		c.wg.Wait()
		for i, one := range c.members {
			took := one.took
			if m := unpacked(t, one.only(t)); took != 0 || m.Answer[0].Header().Ttl != 20 {
				t.Fatalf("client %d took %v and got %v", i, took, m)
			}
		}
		time.Sleep(2 * time.Second)
		if n := len(up.queries()); n != 1 {
			t.Errorf("%d queries, want 1", n)
		}
		if got := client(t, h); got.first() != newData || got.ttl() != 59 {
			t.Errorf("after the prefetch: %v", got)
		}
		if n := count(h, countPrefetch); n != 1 {
			t.Errorf("prefetch_total %d, want 1", n)
		}
		nobodyWaits(t, h)
	})
}

func TestPrefetchNeedsPopularityAndAge(t *testing.T) {
	tests := []struct {
		name    string
		amount  uint32
		ages    []time.Duration // of the hits
		queries int
	}{
		{"too early", 1, []time.Duration{29 * time.Second}, 0},
		{"in time", 1, []time.Duration{30 * time.Second}, 1},
		{"asked too seldom", 3, []time.Duration{1, 40 * time.Second}, 0},
		{"asked often", 3, []time.Duration{1, 2, 40 * time.Second}, 1},
		{"off", 0, []time.Duration{1, 2, 40 * time.Second}, 0},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			h, up := aged(t, "popular/"+tc.name, prefetching(tc.amount), 0)
			start := time.Now()
			for _, age := range tc.ages {
				time.Sleep(time.Until(start.Add(age)))
				client(t, h)
			}
			synctest.Wait()
			if n := len(up.queries()); n != tc.queries {
				t.Errorf("%d queries, want %d", n, tc.queries)
			}
		})
	}
	inBubble(t, "a gap starts the count anew", func(t *testing.T) {
		o := prefetching(2)
		o.prefetch.gap = 10 * time.Second
		h, up := aged(t, "gap", o, 0)
		client(t, h)
		time.Sleep(40 * time.Second)
		client(t, h)
		synctest.Wait()
		if n := len(up.queries()); n != 0 {
			t.Errorf("%d queries after a gap", n)
		}
		time.Sleep(10 * time.Second)
		client(t, h)
		synctest.Wait()
		if n := len(up.queries()); n != 1 {
			t.Errorf("%d queries, want 1", n)
		}
	})
}

// A new entry that came by a prefetch is as popular as the old one.
func TestPrefetchedEntryStaysPopular(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, up := aged(t, "stays", prefetching(5), 0)
		for range 5 {
			time.Sleep(7 * time.Second)
			client(t, h)
		}
		for round := range 5 {
			synctest.Wait()
			if n := len(up.queries()); n != 1 {
				t.Fatalf("round %d: %d queries, want 1", round, n)
			}
			time.Sleep(40 * time.Second)
			client(t, h)
		}
	})
}

// The refresh asks as the client did: with its DO, and without EDNS when that had none. It has a
// writer and metadata of its own.
func TestRefreshIsARequestOfItsOwn(t *testing.T) {
	tests := []struct {
		name   string
		change func(*dns.Msg)
	}{
		{"plain", func(*dns.Msg) {}},
		{"DO", func(r *dns.Msg) { r.SetEdns0(1232, true) }},
		{"EDNS", func(r *dns.Msg) { r.SetEdns0(1232, false) }},
		{"CD", func(r *dns.Msg) { r.CheckingDisabled = true }},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			up := new(upstream)
			up.answersWith(0, oldRecord)
			h := startNamed(t, "own request/"+tc.name, prefetching(1), up)
			r := asking("host.example.org.", dns.TypeA)
			tc.change(r)
			ask(serverContext(t), h, r, udp4Client)
			up.queries()
			time.Sleep(50 * time.Second)

			up.script(time.Second, func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				metadata.SetValueFunc(ctx, "test/refresh", func() string { return "set" })
				w.TsigTimersOnly(true)
				w.Hijack()
				if w.LocalAddr() == nil || w.RemoteAddr().Network() != "tcp" || w.TsigStatus() != nil || w.Close() != nil {
					t.Error("the writer of a refresh is not whole")
				}
				return addressUpstream(ctx, w, r)
			})
			ctx, cancel := context.WithCancel(metadata.ContextWithMetadata(serverContext(t)))
			client := r.Copy()
			w := &wireWriter{addr: udp4Client}
			h.ServeDNS(ctx, request.NewScrubWriter(client, w), client)
			cancel() // the client is gone
			*client = dns.Msg{}
			time.Sleep(2 * time.Second)
			if len(w.packets) != 1 {
				t.Errorf("%d packets went to the client", len(w.packets))
			}
			if metadata.ValueFunc(ctx, "test/refresh") != nil {
				t.Error("the refresh has written to the request's metadata")
			}
			queries := up.queries()
			if len(queries) != 1 {
				t.Fatalf("%d queries", len(queries))
			}
			q := queries[0]
			if q.Question[0] != r.Question[0] || (q.IsEdns0() != nil) != (r.IsEdns0() != nil) || q.CheckingDisabled != r.CheckingDisabled ||
				q.IsEdns0() != nil && q.IsEdns0().Do() != r.IsEdns0().Do() {
				t.Errorf("asked %v for %v", q, r)
			}
			if n := len(up.queries()); n != 0 {
				t.Errorf("%d more queries", n)
			}
			if m := answer(t, serverContext(t), h, r); m.Answer[0].Header().Ttl != 3599 {
				t.Errorf("after the refresh: %v", m)
			}
		})
	}
}

// The server does not catch a panic in the background.
func TestRefreshThatPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, up := aged(t, "panic", prefetching(1), 50*time.Second)
		up.script(0, func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { panic("upstream") })
		client(t, h)
		synctest.Wait()
		nobodyWaits(t, h)
		up.answersWith(0, newRecord)
		client(t, h)
		synctest.Wait()
		if got := client(t, h).first(); got != newData {
			t.Errorf("got %s: no refresh after the one that panicked", got)
		}
	})
}

// A refresh that brings a positive answer for a denial that is still alive puts an end to it.
func TestPrefetchedAnswerEndsTheDenial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := new(upstream)
		up.responds(0, negative(dns.RcodeNameError, "example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 60"))
		h := startNamed(t, "denial ends", prefetching(1), up)
		client(t, h)
		time.Sleep(50 * time.Second)
		up.answersWith(0, newRecord)
		if got := client(t, h).first(); got != "NXDOMAIN" {
			t.Errorf("got %s", got)
		}
		synctest.Wait()
		if got := client(t, h).first(); got != newData {
			t.Errorf("after the refresh: %s", got)
		}
	})
}

func TestStaleImmediately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, up := aged(t, "immediate", stale(func(*staleOptions) {}), 61*time.Second)
		up.answersWith(time.Second, newRecord)
		if got := client(t, h); got.first() != oldData || got.ttl() != 0 || got.took != 0 {
			t.Errorf("got %v after %v", got, got.took)
		}
		if got := client(t, h); got.first() != oldData {
			t.Errorf("got %v", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := len(up.queries()); n != 1 {
			t.Errorf("%d queries, want 1", n)
		}
		if got := client(t, h); got.first() != newData || got.ttl() != 60 {
			t.Errorf("after the refresh: %v", got)
		}
		if n := count(h, countStale); n != 2 {
			t.Errorf("served_stale_total %d, want 2", n)
		}
	})
}

func TestStaleOnlyWithinItsWindow(t *testing.T) {
	tests := []struct {
		age   time.Duration
		stale bool
	}{
		{59 * time.Second, false}, {60 * time.Second, true}, {60*time.Second + 9999*time.Millisecond, true},
		{70 * time.Second, false}, {time.Hour, false},
	}
	for _, tc := range tests {
		inBubble(t, tc.age.String(), func(t *testing.T) {
			h, up := aged(t, "window/"+tc.age.String(), stale(func(s *staleOptions) { s.upTo = 10 * time.Second }), tc.age)
			up.answersWith(0, newRecord)
			got := client(t, h)
			if wasStale := count(h, countStale) == 1; wasStale != tc.stale {
				t.Errorf("stale %v, want %v: %v", wasStale, tc.stale, got)
			}
		})
	}
}

func TestVerify(t *testing.T) {
	soa := "example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 60"
	tests := []struct {
		name    string
		timeout time.Duration
		script  func(*upstream)
		first   string
		took    time.Duration
		later   string // what a hit gives afterwards, when the upstream fails
	}{
		{"new answer", 0, func(u *upstream) { u.answersWith(time.Second, newRecord) }, newData, time.Second, newData},
		{"NXDOMAIN", 0, func(u *upstream) { u.responds(0, negative(dns.RcodeNameError, soa)) }, "NXDOMAIN", 0, "NXDOMAIN"},
		{"failure", 0, func(u *upstream) { u.fails(time.Second) }, oldData, time.Second, oldData},
		{"SERVFAIL", 0, func(u *upstream) { u.responds(0, negative(dns.RcodeServerFailure)) }, oldData, 0, oldData},
		{"REFUSED", 0, func(u *upstream) { u.responds(0, negative(dns.RcodeRefused)) }, oldData, 0, oldData},
		{"truncated", 0, func(u *upstream) {
			m := positive(newRecord)
			m.Truncated = true
			u.responds(0, m)
		}, newData, 0, oldData},
		{"another question", 0, func(u *upstream) {
			u.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				m := new(dns.Msg).SetReply(r)
				m.Question[0].Name = "other.example.org."
				m.Answer = parsed(newRecord)
				return 0, w.WriteMsg(m)
			})
		}, oldData, 0, oldData},
		{"in time", time.Second, func(u *upstream) { u.answersWith(500*time.Millisecond, newRecord) }, newData, 500 * time.Millisecond, newData},
		{"late", time.Second, func(u *upstream) { u.answersWith(1500*time.Millisecond, newRecord) }, oldData, time.Second, newData},
		{"fails late", time.Second, func(u *upstream) { u.fails(1500 * time.Millisecond) }, oldData, time.Second, oldData},
		{"fails in time", time.Second, func(u *upstream) { u.fails(500 * time.Millisecond) }, oldData, 500 * time.Millisecond, oldData},
		{"TTL 0", time.Second, func(u *upstream) { u.answersWith(0, "host.example.org. 0 IN A 192.0.2.2") }, newData, 0, "SERVFAIL"},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			o := stale(func(s *staleOptions) { s.verify, s.timeout = true, tc.timeout })
			o.success.minTTL = 0
			h, up := aged(t, "verify/"+tc.name, o, 70*time.Second)
			tc.script(up)
			got := client(t, h)
			if got.first() != tc.first || got.took != tc.took {
				t.Errorf("got %s after %v, want %s after %v", got.first(), got.took, tc.first, tc.took)
			}
			if n := count(h, countStale); (n == 1) != (tc.first == oldData) {
				t.Errorf("served_stale_total %d", n)
			}
			time.Sleep(2 * time.Second)
			up.fails(0)
			if got := client(t, h).first(); got != tc.later {
				t.Errorf("later: %s, want %s", got, tc.later)
			}
			nobodyWaits(t, h)
		})
	}
}

// Many clients of one stale entry make one query, whatever it brings.
func TestVerifyIsCoalesced(t *testing.T) {
	for _, works := range []bool{true, false} {
		inBubble(t, fmt.Sprint(works), func(t *testing.T) {
			h, up := aged(t, fmt.Sprint("verify together/", works), stale(func(s *staleOptions) { s.verify = true }), 70*time.Second)
			want := oldData
			if up.fails(time.Second); works {
				up.answersWith(time.Second, newRecord)
				want = newData
			}
			var c crowd
			for range 100 {
				c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			if n := len(up.queries()); n != 1 {
				t.Errorf("%d queries, want 1", n)
			}
			for i, w := range c.members {
				if got := (served{unpacked(t, w.only(t)), c.members[i].took}); got.first() != want || got.took != time.Second {
					t.Fatalf("client %d got %s after %v", i, got.first(), got.took)
				}
			}
			nobodyWaits(t, h)
		})
	}
}

// One refresh for each recheck window, and the entry stays whole.
func TestRecheckWindow(t *testing.T) {
	for _, verify := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("verify %v", verify), func(t *testing.T) {
			h, up := aged(t, fmt.Sprintf("recheck/%v", verify), stale(func(s *staleOptions) {
				s.verify, s.ttl, s.recheck = verify, 30*time.Second, 10*time.Second
			}), 70*time.Second)
			up.fails(0)
			for second := range 25 {
				if got := client(t, h); got.first() != oldData || got.ttl() != 30 {
					t.Fatalf("second %d: %v", second, got)
				}
				synctest.Wait()
				want := 0
				if second%10 == 0 {
					want = 1
				}
				if n := len(up.queries()); n != want {
					t.Errorf("second %d: %d queries, want %d", second, n, want)
				}
				time.Sleep(time.Second)
			}
			up.answersWith(0, newRecord)
			time.Sleep(10 * time.Second)
			client(t, h)
			synctest.Wait()
			if got := client(t, h); got.first() != newData || got.ttl() != 60 {
				t.Errorf("once it works: %v", got)
			}
		})
	}
}

// Nothing that does not answer the question takes the place of what did.
func TestPreferPositiveKeepsTheLastKnownGood(t *testing.T) {
	soa := "example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 60"
	worse := map[string]*dns.Msg{
		"NXDOMAIN":   negative(dns.RcodeNameError, soa),
		"NODATA":     negative(dns.RcodeSuccess, soa),
		"SERVFAIL":   negative(dns.RcodeServerFailure),
		"delegation": negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."),
		"empty":      negative(dns.RcodeSuccess),
		"CNAME":      positive("host.example.org. 60 IN CNAME other.example.org."),
	}
	for name, m := range worse {
		for _, verify := range []bool{false, true} {
			inBubble(t, fmt.Sprintf("%s, verify %v", name, verify), func(t *testing.T) {
				h, up := aged(t, fmt.Sprintf("prefer/%s/%v", name, verify), stale(func(s *staleOptions) {
					s.verify, s.preferPositive = verify, true
				}), 70*time.Second)
				up.responds(0, m)
				for range 5 {
					if got := client(t, h).first(); got != oldData {
						t.Fatalf("got %s", got)
					}
					time.Sleep(time.Second)
				}
				up.answersWith(0, newRecord)
				client(t, h)
				synctest.Wait()
				if got := client(t, h); got.first() != newData || got.ttl() != 60 {
					t.Errorf("after a good answer: %v", got)
				}
				up.fails(0)
				time.Sleep(2 * time.Hour)
				r := asking("host.example.org.", dns.TypeA)
				if w, rcode, _ := ask(serverContext(t), h, r, udp4Client); len(w.packets) != 0 || rcode != dns.RcodeServerFailure {
					t.Errorf("after the stale window: %d packets, rcode %d", len(w.packets), rcode)
				}
			})
		}
	}
}

// prefer_positive protects answers: a stale denial gives way to a newer one, or to what tells to ask by TCP for it.
func TestPreferPositiveServesTheNewerDenial(t *testing.T) {
	soa := func(minimum int) string {
		return fmt.Sprintf("example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 %d", minimum)
	}
	for _, cut := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("cut off %v", cut), func(t *testing.T) {
			up := new(upstream)
			up.responds(0, negative(dns.RcodeSuccess, soa(60)))
			h := startNamed(t, t.Name(), stale(func(s *staleOptions) { s.verify, s.preferPositive = true, true }), up)
			client(t, h)
			time.Sleep(70 * time.Second)
			news := negative(dns.RcodeNameError, soa(60))
			news.Truncated = cut
			up.responds(0, news)
			if got := client(t, h); got.Rcode != dns.RcodeNameError || got.Truncated != cut {
				t.Errorf("got %v", got)
			}
		})
	}
}

// A denial that a prefetch brings is news for those that verify a stale denial.
func TestVerifierTakesTheDenialOfAPrefetch(t *testing.T) {
	for _, prefer := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("prefer_positive %v", prefer), func(t *testing.T) {
			soa := "example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 60"
			up := new(upstream)
			up.responds(0, negative(dns.RcodeSuccess, soa))
			o := stale(func(s *staleOptions) { s.verify, s.preferPositive = true, prefer })
			o.prefetch = prefetchOptions{amount: 1, gap: time.Minute, percentage: 90}
			h := startNamed(t, t.Name(), o, up)
			client(t, h)
			time.Sleep(59 * time.Second)
			up.responds(1500*time.Millisecond, negative(dns.RcodeNameError, soa))
			client(t, h)
			time.Sleep(1100 * time.Millisecond)
			if got := client(t, h); got.Rcode != dns.RcodeNameError {
				t.Errorf("got %v", got)
			}
		})
	}
}

// An operator who looks while upstreams hang sees the misses.
func TestMissIsCountedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := new(upstream)
		up.fails(time.Minute)
		o := stockOptions()
		o.coalesce.waiters = 0
		h := startNamed(t, t.Name(), o, up)
		go ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
		synctest.Wait()
		if n := count(h, countMiss); n != 1 {
			t.Errorf("%d misses", n)
		}
		time.Sleep(2 * time.Minute)
	})
}

// A plugin that writes bytes brings one reply, whether or not it is better than the stale answer.
func TestVerifyTakesBytes(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Second} {
		for rcode, want := range map[int]string{dns.RcodeSuccess: newData, dns.RcodeServerFailure: oldData, -1: oldData} {
			inBubble(t, fmt.Sprintf("%v/%d", timeout, rcode), func(t *testing.T) {
				h, up := aged(t, t.Name(), stale(func(s *staleOptions) { s.verify, s.timeout = true, timeout }), 70*time.Second)
				up.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
					m := new(dns.Msg).SetReply(r)
					b := []byte("no message")
					if rcode >= 0 {
						m.Rcode, m.Answer = rcode, parsed(newRecord)
						b, _ = m.Pack()
					}
					_, err := w.Write(b)
					return dns.RcodeSuccess, err
				})
				if got := client(t, h).first(); got != want {
					t.Errorf("got %s, want %s", got, want)
				}
			})
		}
	}
}

// A failure is kept for as long as servfail says, and never served stale.
func TestFailuresAreNotServedStale(t *testing.T) {
	for mode, set := range staleModes {
		for _, rcode := range []int{dns.RcodeServerFailure, dns.RcodeNotImplemented} {
			inBubble(t, fmt.Sprintf("%s/%d", mode, rcode), func(t *testing.T) {
				up := new(upstream)
				up.responds(0, negative(rcode))
				h := startNamed(t, t.Name(), stale(set), up)
				client(t, h)
				time.Sleep(7 * time.Second)
				up.answersWith(0, newRecord)
				if got := client(t, h).first(); got != newData {
					t.Errorf("got %s", got)
				}
			})
		}
	}
}

// #3586, #3701, #3744: an NXDOMAIN that is asked for all the time must not outlive its end.
func TestExpiredDenialDoesNotBlockTheNewAnswer(t *testing.T) {
	modes := map[string]func(*staleOptions){
		"immediate":           func(*staleOptions) {},
		"verify":              func(s *staleOptions) { s.verify = true },
		"verify with timeout": func(s *staleOptions) { s.verify, s.timeout = true, time.Second },
		"prefer_positive":     func(s *staleOptions) { s.verify, s.preferPositive = true, true },
	}
	for name, mode := range modes {
		inBubble(t, name, func(t *testing.T) {
			up := new(upstream)
			up.responds(0, negative(dns.RcodeNameError, "example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 60"))
			h := startNamed(t, "denial/"+name, stale(mode), up)
			client(t, h)
			time.Sleep(70 * time.Second)
			up.answersWith(0, newRecord)
			client(t, h)
			synctest.Wait()
			queries := len(up.queries())
			for range 5 {
				if got := client(t, h); got.first() != newData || got.ttl() != 60 {
					t.Errorf("got %v", got)
				}
			}
			if n := len(up.queries()); n != 0 || queries != 2 {
				t.Errorf("%d and %d queries, want 2 and 0", queries, n)
			}
		})
	}
}

// Extended DNS Errors are for clients with EDNS, and for answers that need explaining.
func TestExtendedErrors(t *testing.T) {
	soa := "example.org. 60 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 60"
	const (
		none      = -1
		otherFlag = 0x4000 // of EDNS
	)
	tests := []struct {
		name  string
		first *dns.Msg
		age   time.Duration
		code  int
	}{
		{"alive", positive(oldRecord), 0, none},
		{"stale", positive(oldRecord), 70 * time.Second, 3},
		{"stale NODATA", negative(dns.RcodeSuccess, soa), 70 * time.Second, 3},
		{"NXDOMAIN", negative(dns.RcodeNameError, soa), 0, none},
		{"stale NXDOMAIN", negative(dns.RcodeNameError, soa), 70 * time.Second, 19},
		{"failure", negative(dns.RcodeServerFailure), 0, 13},
	}
	for _, tc := range tests {
		for _, front := range []string{"", "rewrite"} { // as bytes, as a message
			for _, on := range []bool{true, false} {
				for _, edns := range []bool{true, false} {
					name := fmt.Sprintf("%s/%s/%v/%v", tc.name, front, on, edns)
					inBubble(t, name, func(t *testing.T) {
						up := new(upstream)
						up.responds(0, tc.first)
						o := stale(func(*staleOptions) {})
						o.explain = on
						var plugins []plugin.Handler
						if front != "" {
							plugins = append(plugins, named{name: front})
						}
						h := startNamed(t, "ede/"+name, o, up, plugins...)
						r := asking("host.example.org.", dns.TypeA)
						if edns {
							r.SetEdns0(1232, false)
							r.IsEdns0().Hdr.Ttl |= otherFlag
						}
						ask(serverContext(t), h, r, udp4Client)
						time.Sleep(tc.age)
						up.fails(time.Second)
						w, _, _ := ask(serverContext(t), h, r, udp4Client)
						m := unpacked(t, w.only(t))
						want := tc.code
						if !on || !edns {
							want = none
						}
						got := none
						if opt := m.IsEdns0(); (opt != nil) != edns {
							t.Errorf("OPT: %v", m)
						} else if opt != nil {
							for _, option := range opt.Option {
								if e, ok := option.(*dns.EDNS0_EDE); ok {
									got = int(e.InfoCode)
								}
							}
							// CoreDNS keeps it in a reply that has no OPT record of its own.
							if kept := opt.Hdr.Ttl&otherFlag != 0; kept == (got != none) {
								t.Errorf("flag next to DO kept: %v, %v", kept, m)
							}
						}
						if got != want {
							t.Errorf("EDE %d, want %d: %v", got, want, m)
						}
						if byBytes := w.msgs == 0; byBytes != (front == "") {
							t.Errorf("sent as bytes: %v", byBytes)
						}
						synctest.Wait()
						time.Sleep(time.Minute)
					})
				}
			}
		}
	}
}

// An explanation is left out when it would cost the answer its room.
func TestExtendedErrorNeverTruncates(t *testing.T) {
	for size := 440; size < 540; size++ {
		inBubble(t, fmt.Sprint(size), func(t *testing.T) {
			m := positive(oldRecord)
			txt := &dns.TXT{Hdr: dns.RR_Header{Name: "host.example.org.", Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{"", ""}}
			m.Answer = []dns.RR{txt}
			m.Question = asking("host.example.org.", dns.TypeTXT).Question
			for i := range txt.Txt {
				left := size - m.Len()
				txt.Txt[i] = string(make([]byte, max(min(left, 255), 0)))
			}
			up := new(upstream)
			up.responds(0, m)
			h := startNamed(t, fmt.Sprint("room/", size), stale(func(*staleOptions) {}), up)
			r := asking("host.example.org.", dns.TypeTXT)
			r.SetEdns0(512, false)
			ask(serverContext(t), h, r, udp4Client)
			before, _, _ := ask(serverContext(t), h, r, udp4Client)
			time.Sleep(70 * time.Second)
			up.fails(0)
			after, _, _ := ask(serverContext(t), h, r, udp4Client)
			was, is := unpacked(t, before.only(t)), unpacked(t, after.only(t))
			if was.Truncated != is.Truncated || len(was.Answer) != len(is.Answer) {
				t.Errorf("%v became %v", was, is)
			}
			synctest.Wait()
		})
	}
}

// A verification that its client does not wait for.
func TestVerifyWhenTheClientIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, up := aged(t, "client gone", stale(func(s *staleOptions) { s.verify, s.timeout = true, 5*time.Second }), 70*time.Second)
		up.answersWith(time.Second, newRecord)
		ctx, cancel := context.WithTimeout(serverContext(t), 100*time.Millisecond)
		defer cancel()
		ask(ctx, h, asking("host.example.org.", dns.TypeA), udp4Client)
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Errorf("the client was there for all of it: %v", ctx.Err())
		}
		time.Sleep(2 * time.Second)
		if got := client(t, h).first(); got != newData {
			t.Errorf("got %s: the refresh has gone with the client", got)
		}
	})
}
