package optcache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
)

// This file is about what a reload does to the answers: instances in the order in which CoreDNS starts and
// stops them. A whole server is reloaded in test/reload_test.go.

// firstOf returns a running instance of the first generation, in a place of its own.
func firstOf(tb testing.TB, o options, next plugin.Handler) *Optcache {
	tb.Helper()
	return inPlace(tb, place{keys: []string{"dns://.:53", "dns://example.org.:53"}, at: tb.Name()}, o, next)
}

// nextOf returns the instance that a reload starts in place of h, which is still running.
func nextOf(tb testing.TB, h *Optcache, o options) *Optcache {
	tb.Helper()
	instances.nextGeneration()
	return inPlace(tb, h.place, o, h.Next)
}

func inPlace(tb testing.TB, p place, o options, next plugin.Handler) *Optcache {
	tb.Helper()
	h := newOptcache(o)
	h.Next, h.place = next, p
	var now atomic.Int64
	h.clock = now.Load
	if err := h.start(p.at, []plugin.Handler{h}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { h.stop() })
	return h
}

// roomFor bounds the memory: under the race detector, all of it is cleared for each instance.
func roomFor(o options) options {
	o.maxMemory = 6 << 20
	if raceEnabled {
		o.maxMemory = 3 << 20
	}
	return o
}

// settled waits until everything has moved to h.
func settled(h *Optcache) *Optcache {
	for h.store.from.Load() != nil {
		runtime.Gosched()
	}
	h.store.moving.Lock()
	defer h.store.moving.Unlock()
	return h
}

// census answers like addressUpstream and counts.
type census struct {
	asked atomic.Int64
}

func (*census) Name() string { return "census" }

func (c *census) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	c.asked.Add(1)
	if r.Question[0].Name == "notimp.example.org." {
		return 0, w.WriteMsg(new(dns.Msg).SetRcode(r, dns.RcodeNotImplemented))
	}
	if len(r.Question[0].Name) > 2 && r.Question[0].Name[:2] == "no" {
		m := new(dns.Msg).SetRcode(r, dns.RcodeNameError)
		m.Ns = parsed("example.org. 600 IN SOA ns.example.org. host.example.org. 1 2 3 4 600")
		return dns.RcodeNameError, w.WriteMsg(m)
	}
	return addressUpstream(ctx, w, r)
}

// reloadNames returns the n names that a test asks for; every second one does not exist.
func reloadNames(n int) (names []string) {
	for i := range n {
		kind := "host"
		if i%2 == 1 {
			kind = "no"
		}
		names = append(names, fmt.Sprintf("%s-%d.example.org.", kind, i))
	}
	return names
}

// tierOf returns where an instance has the answer for a name.
func tierOf(h *Optcache, name string) (t tier, ok bool) {
	s, _ := h.scratchFor(asking(name, dns.TypeA), nil)
	ok = h.store.find(s, h.clock())
	return s.tier, ok
}

func TestReloadKeepsAnswersAndStanding(t *testing.T) {
	t.Parallel()
	base := roomFor(sizedOptions(4096))
	for name, change := range map[string]func(*options){
		"nothing":         func(o *options) {},
		"what is shown":   func(o *options) { o.keepTTL = true },
		"more entries":    func(o *options) { o.success.capacity = 9000 },
		"less memory":     func(o *options) { o.maxMemory = 3 << 20 },
		"hot percentage":  func(o *options) { o.hotPercentage = 25 },
		"lines":           func(o *options) { o.lineAligned = false },
		"refreshes":       func(o *options) { o.prefetch.amount = 3 },
		"stale":           func(o *options) { o.stale.upTo = 3600e9 },
		"prefer positive": func(o *options) { o.stale.upTo, o.stale.preferPositive = 3600e9, true },
		"longer TTLs":     func(o *options) { o.success.maxTTL = 7200e9 },
	} {
		if raceEnabled && name != "nothing" && name != "lines" {
			continue // they take a minute each, and differ in no lock
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up := new(census)
			h := firstOf(t, base, up)
			ctx := serverContext(t)
			names := reloadNames(400)
			for i, name := range names {
				for range 1 + i%8 { // some get into the hot tier
					answer(t, ctx, h, asking(name, dns.TypeA))
				}
			}
			asked := up.asked.Load()
			// Two reloads with the change, and one that takes it back.
			for i := range 3 {
				o := base
				if i < 2 {
					change(&o)
				}
				next := nextOf(t, h, o)
				for _, name := range names[:100] { // both serve
					answer(t, ctx, next, asking(name, dns.TypeA))
					answer(t, ctx, h, asking(name, dns.TypeA))
				}
				var hot []string
				for _, name := range names {
					if tier, _ := tierOf(h, name); tier == tierHot {
						hot = append(hot, name)
					}
				}
				h.stop()
				h = settled(next)
				stayed := 0
				for _, name := range hot {
					if tier, _ := tierOf(h, name); tier == tierHot {
						stayed++
					}
				}
				if len(hot) < 75 || stayed < len(hot)*3/4 { // looking for one may promote it, and displace another
					t.Errorf("reload %d: %d of %d are still in the hot tier", i, stayed, len(hot))
				}
				for _, name := range names[:200] {
					m := answer(t, ctx, h, asking(name, dns.TypeA))
					if (m.Rcode == dns.RcodeNameError) != (name[:2] == "no") {
						t.Fatalf("reload %d: %v", i, m)
					}
				}
			}
			if n := up.asked.Load() - asked; n != 0 {
				t.Errorf("%d upstream queries for names that were alive", n)
			}
			if n := h.store.total(); n != int64(len(names)) {
				t.Errorf("%d entries, want %d", n, len(names))
			}
		})
	}
}

func TestReloadSharesTheStoreWhenNothingChanges(t *testing.T) {
	t.Parallel()
	h := firstOf(t, roomFor(sizedOptions(4096)), new(census))
	same := nextOf(t, h, roomFor(sizedOptions(4096)))
	if same.store != h.store {
		t.Error("the same options have got another store")
	}
	h.stop()
	if same.store.shards[0].closed {
		t.Error("the store is closed")
	}
	same.stop()
	if !same.store.shards[0].closed {
		t.Error("nobody has closed the store")
	}
}

// Changed limits hold for what was there before: TTLs, zones that are not to be cached, or not served any more.
func TestReloadAppliesTheNewLimits(t *testing.T) {
	t.Parallel()
	up := new(census)
	h := firstOf(t, roomFor(sizedOptions(4096)), up)
	ctx := serverContext(t)
	ask := func(h *Optcache, names ...string) (asked int64) {
		before := up.asked.Load()
		for _, name := range names {
			answer(t, ctx, h, asking(name, dns.TypeA))
		}
		return up.asked.Load() - before
	}
	ask(h, "host.example.org.", "no.example.org.", "host.cluster.local.", "host.example.net.", "notimp.example.org.")
	o := roomFor(sizedOptions(4096))
	o.success.maxTTL, o.servfail = 60e9, 0
	o.success.except = []string{"cluster.local."}
	o.zones = []string{"example.org.", "cluster.local."}
	next := nextOf(t, h, o)
	for range 2 { // before and after the answers have moved
		m := answer(t, ctx, next, asking("host.example.org.", dns.TypeA))
		if ttl := m.Answer[0].Header().Ttl; ttl != 60 {
			t.Errorf("TTL %d", ttl)
		}
		if n := ask(next, "host.example.org.", "no.example.org."); n != 0 {
			t.Errorf("%d queries for what is good", n)
		}
		if n := ask(next, "host.cluster.local.", "host.example.net.", "notimp.example.org."); n != 3 {
			t.Errorf("%d queries for what is not cached any more", n)
		}
		h.stop()
		settled(next)
	}
	if n := next.store.total(); n != 2 {
		t.Errorf("%d entries, want 2", n)
	}
}

// Requests that the last generations still work on find what has moved on, twice here, and move on.
func TestOldGenerationsFindWhatHasMoved(t *testing.T) {
	t.Parallel()
	up := new(census)
	ctx := serverContext(t)
	generations := []*Optcache{firstOf(t, roomFor(sizedOptions(4096)), up)}
	names := reloadNames(100)
	for _, name := range names {
		answer(t, ctx, generations[0], asking(name, dns.TypeA))
	}
	asked := up.asked.Load()
	// The second reload comes before the first one's answers have moved.
	for _, capacity := range []int{5000, 6000} {
		generations = append(generations, nextOf(t, generations[len(generations)-1], roomFor(sizedOptions(capacity))))
	}
	generations[0].stop()
	generations[1].stop()
	for range 2 { // while they move and afterwards
		for _, h := range generations {
			for _, name := range names {
				answer(t, ctx, h, asking(name, dns.TypeA))
			}
		}
		settled(generations[2])
	}
	if n := up.asked.Load() - asked; n != 0 {
		t.Errorf("%d queries for what was in the cache", n)
	}
	if n := generations[2].store.total(); n != int64(len(names)) {
		t.Errorf("%d answers have arrived, want %d", n, len(names))
	}
}

// What has no room goes by standing.
func TestReloadToLessKeepsThePopular(t *testing.T) {
	t.Parallel()
	up := new(census)
	big := roomFor(benchOptions(6000))
	h := firstOf(t, big, up)
	ctx := serverContext(t)
	const names = 4_000
	popular, rare := 0, 0
	for i := range names {
		answer(t, ctx, h, asking(fmt.Sprintf("host-%d.example.org.", i), dns.TypeA))
	}
	for i := 0; i < names; i += 20 {
		for range 6 {
			answer(t, ctx, h, asking(fmt.Sprintf("host-%d.example.org.", i), dns.TypeA))
		}
	}
	small := nextOf(t, h, roomFor(benchOptions(1024)))
	bound := max(h.store.bound(), small.store.bound())
	h.stop()
	settled(small)
	for i := range names {
		if _, ok := tierOf(small, fmt.Sprintf("host-%d.example.org.", i)); ok {
			if i%20 == 0 {
				popular++
			} else {
				rare++
			}
		}
	}
	if popular < 195 || rare < 500 {
		t.Errorf("%d of 200 popular names, and %d others are there", popular, rare)
	}
	if n := small.store.bytes(); n > bound {
		t.Errorf("%d bytes, the larger bound is %d", n, bound)
	}
	if n := h.store.total(); n != 0 {
		t.Errorf("%d entries were left behind", n)
	}
}

// A reload that fails leaves the instance before as it was, and the next one takes over from that. It is not
// parallel: what has failed are all that are younger.
func TestFailedReloadLeavesTheOldAnswers(t *testing.T) {
	up := new(census)
	ctx := serverContext(t)
	for name, change := range map[string]func(*options){
		"same":    func(*options) {},
		"another": func(o *options) { o.success.capacity = 9000 },
	} {
		h := firstOf(t, roomFor(sizedOptions(4096)), up)
		names := reloadNames(200)
		for _, name := range names {
			answer(t, ctx, h, asking(name, dns.TypeA))
		}
		asked := up.asked.Load()
		for range 2 {
			o := roomFor(sizedOptions(4096))
			change(&o)
			failed := nextOf(t, h, o)
			answer(t, ctx, failed, asking(names[0], dns.TypeA))
			instances.forget(h)
			for _, name := range names {
				answer(t, ctx, h, asking(name, dns.TypeA))
			}
		}
		next := nextOf(t, h, roomFor(sizedOptions(5000)))
		h.stop()
		settled(next)
		for _, name := range names {
			answer(t, ctx, next, asking(name, dns.TypeA))
		}
		if n := up.asked.Load() - asked; n != 0 {
			t.Errorf("%s: %d upstream queries for names that were alive", name, n)
		}
		next.stop()
	}
}

// A reload that has failed when the old instance was to be stopped has taken effect: the new one serves, and goes on.
func TestReloadThatFailsLate(t *testing.T) {
	up := new(census)
	ctx := serverContext(t)
	h := firstOf(t, roomFor(sizedOptions(4096)), up)
	h.of = new(caddy.Instance) // which is not among those that run
	names := reloadNames(100)
	for _, name := range names {
		answer(t, ctx, h, asking(name, dns.TypeA))
	}
	asked := up.asked.Load()
	next := nextOf(t, h, roomFor(sizedOptions(5000)))
	instances.forget(h)
	if !h.stopped.Load() || next.stopped.Load() {
		t.Error("the wrong one has been stopped")
	}
	settled(next)
	for _, name := range names {
		answer(t, ctx, next, asking(name, dns.TypeA))
	}
	if n := up.asked.Load() - asked; n != 0 {
		t.Errorf("%d queries for what was in the cache", n)
	}
	// Whoever reloads may not know that it had an effect, and reload from the first one again.
	failed := nextOf(t, next, roomFor(sizedOptions(6000)))
	failed.of = new(caddy.Instance)
	instances.forget(h)
	if !failed.stopped.Load() || next.stopped.Load() || next.successor != nil || instances.reloading(next) {
		t.Error("what has failed then is still there")
	}
}

// What has come to the new instance before the old one's answers move is newer than those.
func TestReloadKeepsTheNews(t *testing.T) {
	t.Parallel()
	up := &scripted{response: negative(dns.RcodeNameError, "example.org. 60 IN SOA ns.example.org. host.example.org. 1 2 3 4 60")}
	ctx := serverContext(t)
	o := roomFor(sizedOptions(4096))
	o.stale.upTo = time.Hour
	r := asking("new.example.org.", dns.TypeA)
	h := firstOf(t, o, up)
	answer(t, ctx, h, r)
	o.success.capacity = 5000
	instances.nextGeneration()
	next := newOptcache(o)
	next.Next, next.place = up, h.place
	var now atomic.Int64
	now.Store(100e9) // the denial has expired
	next.clock = now.Load
	if err := next.start(h.place.at, []plugin.Handler{next}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.stop() })
	up.response = positive("new.example.org. 300 IN A 192.0.2.1")
	answer(t, ctx, next, r) // stale, and refreshed behind it
	for next.store.total() == 0 {
		runtime.Gosched()
	}
	now.Store(200e9)
	h.stop()
	settled(next)
	if m := answer(t, ctx, next, r); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
		t.Errorf("the old denial is back: %v", m)
	}
}

// Another place has nothing to do with it.
func TestReloadOfAnotherBlockStartsEmpty(t *testing.T) {
	t.Parallel()
	up := new(census)
	h := firstOf(t, roomFor(sizedOptions(4096)), up)
	for name, p := range map[string]place{
		"address": {keys: h.place.keys, at: "elsewhere"},
		"zone":    {keys: []string{"dns://example.net.:53"}, at: h.place.at},
	} {
		instances.nextGeneration()
		if other := inPlace(t, p, roomFor(sizedOptions(4096)), up); other.store == h.store || other.store.from.Load() != nil {
			t.Errorf("another %s has taken over", name)
		}
	}
}

// Requests to either generation get their own answers while these move, and writers write.
func TestReloadsUnderLoad(t *testing.T) {
	t.Parallel()
	h := firstOf(t, roomFor(benchOptions(4000)), encodingUpstream{})
	ctx := serverContext(t)
	var current atomic.Pointer[Optcache]
	current.Store(h)
	var clients sync.WaitGroup
	var done atomic.Bool
	for id := range 4 {
		clients.Go(func() {
			g := rand.New(rand.NewPCG(uint64(id), 7))
			for !done.Load() {
				h := current.Load()
				for range 50 {
					checkEncoded(t, ctx, h, g)
				}
			}
		})
	}
	rounds := 8
	if raceEnabled {
		rounds = 3
	}
	for i := range rounds {
		o := roomFor(benchOptions(2000 + 1500*(i%3)))
		o.lineAligned = i%2 == 0
		next := nextOf(t, h, o)
		current.Store(next)
		h.stop()
		h = next
		if i%2 == 1 {
			settled(h)
		}
	}
	done.Store(true)
	clients.Wait()
	settled(h)
}
