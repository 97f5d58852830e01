package optcache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file tests what a reload does to the answers. It starts and stops instances in the order in which CoreDNS
// does. A whole server is reloaded in test/reload_test.go.

// firstOf returns a running instance of the first generation, with an identity of its own.
func firstOf(tb testing.TB, o options, next plugin.Handler) *Optcache {
	tb.Helper()
	return inPlace(tb, identity{keys: []string{"dns://.:53", "dns://example.org.:53"}, at: tb.Name()}, o, next)
}

// nextOf returns the instance that a reload starts as the successor of h. h is still running.
func nextOf(tb testing.TB, h *Optcache, o options) *Optcache {
	tb.Helper()
	instances.nextGeneration()
	return inPlace(tb, h.identity, o, h.Next)
}

func inPlace(tb testing.TB, p identity, o options, next plugin.Handler) *Optcache {
	tb.Helper()
	h := newOptcache(o)
	h.Next, h.identity = next, p
	var now atomic.Int64
	h.clock = now.Load
	if err := h.start(p.at, []plugin.Handler{h}); err != nil {
		tb.Fatal(err)
	}
	stopsWith(tb, h)
	return h
}

// roomFor bounds the memory of an instance. Under the race detector, all of it is cleared for each instance, which
// takes time.
func roomFor(o options) options {
	o.maxMemory = 6 << 20
	if raceEnabled {
		o.maxMemory = 3 << 20
	}
	return o
}

// settled waits until all answers have moved to h.
func settled(h *Optcache) *Optcache {
	for h.store.from.Load() != nil {
		runtime.Gosched()
	}
	h.store.moving.Lock()
	defer h.store.moving.Unlock()
	return h
}

// census answers like addressUpstream, and counts the queries.
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
	s, _ := h.scratchFor(asking(name, dns.TypeA), udp4Client)
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
			continue // the others take a minute each, and take no other locks
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
				if len(hot) < 50 || stayed < len(hot)*3/4 { // a look-up may promote an answer, and displace another
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
	if same.store.shards[0].held[0].closed {
		t.Error("the store is closed")
	}
	same.stop()
	if !same.store.shards[0].held[0].closed {
		t.Error("nobody has closed the store")
	}
}

// New limits hold for the answers of the predecessor: TTLs, disabled zones, and zones that are not served any more.
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
	for range 2 { // once before and once after the answers have moved
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

// Requests to previous generations find answers that have moved on, here twice.
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
	for range 2 { // once while they move, and once afterwards
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

// If there is no room for all answers, the popular ones stay.
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
	if n := small.store.usage().used; n > bound {
		t.Errorf("%d bytes, the larger bound is %d", n, bound)
	}
	if n := h.store.total(); n != 0 {
		t.Errorf("%d entries were left behind", n)
	}
}

// The answer to a query from before a reload reaches the store that serves after it.
func TestReloadDuringAMissKeepsItsAnswer(t *testing.T) {
	t.Parallel()
	asked, release := make(chan struct{}, 10), make(chan struct{})
	up := plugin.HandlerFunc(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		asked <- struct{}{}
		<-release
		return new(census).ServeDNS(ctx, w, r)
	})
	ctx := serverContext(t)
	generations := []*Optcache{firstOf(t, roomFor(sizedOptions(4096)), up)}
	names := []string{"host-1.example.org.", "no-1.example.org.", "host-2.sub.example.org."}
	var wg sync.WaitGroup
	for _, name := range names {
		wg.Go(func() { ask(ctx, generations[0], asking(name, dns.TypeA), udp4Client) })
		<-asked
	}
	for i, capacity := range []int{5000, 6000} {
		o := roomFor(sizedOptions(capacity))
		o.success.maxTTL = 100 * time.Second
		o.success.except = []string{"sub.example.org."}
		h := nextOf(t, generations[i], o)
		generations = append(generations, h)
		generations[i].stop()
		settled(h)
	}
	close(release)
	wg.Wait()
	last := generations[2]
	for i, name := range names {
		if _, ok := tierOf(last, name); ok != (i < 2) {
			t.Errorf("%s is there: %v", name, ok)
		}
	}
	if m := answer(t, ctx, last, asking(names[0], dns.TypeA)); len(m.Answer) != 1 || m.Answer[0].Header().Ttl != 100 {
		t.Errorf("the new limits do not hold: %v", m)
	}
}

// While answers move, requests for an entry are counted, and its refresh is postponed, in the store that has the
// entry.
func TestPopularityWhileAnswersMove(t *testing.T) {
	t.Parallel()
	o := roomFor(sizedOptions(4096))
	o.prefetch = prefetchOptions{amount: 100, gap: time.Minute, percentage: 10}
	o.stale = staleOptions{upTo: time.Hour, recheck: time.Minute}
	up := new(census)
	h := firstOf(t, o, up)
	ctx := serverContext(t)
	names := reloadNames(100)
	for range 3 {
		for _, name := range names {
			answer(t, ctx, h, asking(name, dns.TypeA))
		}
	}
	o.success.capacity = 5000
	next := nextOf(t, h, o)
	// In the new store, other answers have the same node numbers.
	for i := range 100 {
		answer(t, ctx, next, asking(fmt.Sprintf("new-%d.example.org.", i), dns.TypeA))
	}
	find := func(name string) *scratch {
		s, _ := next.scratchFor(asking(name, dns.TypeA), udp4Client)
		if !next.store.search(s, next.clock()) {
			t.Fatalf("%s is not there", name)
		}
		return s
	}
	check := func(when string, more uint32, mayRetry bool) {
		for i, name := range names {
			s := find(name)
			if n := s.in.requests(s); n != 2+more {
				t.Fatalf("%s, %s was asked for %d times, want %d", when, name, n, 2+more)
			}
			if got := s.in.mayRetry(s, next.clock()); got != mayRetry {
				t.Fatalf("%s, %s may be refreshed: %v", when, name, got)
			}
			fresh := find(fmt.Sprintf("new-%d.example.org.", i))
			if n := fresh.in.requests(fresh); n != 0 || !fresh.in.mayRetry(fresh, next.clock()) {
				t.Fatalf("%s, another entry was asked for %d times", when, n)
			}
		}
	}
	check("before", 0, true)
	for _, name := range names {
		answer(t, ctx, next, asking(name, dns.TypeA))
		s := find(name)
		next.store.postpone(&s.Key, s.Entry.Flags.Kind(), next.clock()+int64(time.Minute))
	}
	check("while they may move", 1, false)
	h.stop()
	settled(next)
	check("afterwards", 1, false)
	// An instance of the previous generation finds the entries in the store that they have moved to.
	for _, name := range names {
		answer(t, ctx, h, asking(name, dns.TypeA))
		s := find(name)
		h.store.postpone(&s.Key, s.Entry.Flags.Kind(), 0)
	}
	check("by the last generation", 2, true)
}

func TestEvictionsInTheBackgroundAreCounted(t *testing.T) {
	t.Parallel()
	h := firstOf(t, roomFor(benchOptions(6000)), new(census))
	ctx := serverContext(t)
	const names = 4000
	for i := range names {
		answer(t, ctx, h, asking(fmt.Sprintf("host-%d.example.org.", i), dns.TypeA))
	}
	before := h.store.total()
	small := nextOf(t, h, roomFor(benchOptions(1024)))
	small.serverOf(nil)
	evicted := count(small, countEvicted+counter(record.Success))
	h.stop()
	settled(small)
	if n := count(small, countEvicted+counter(record.Success)) - evicted; int64(n) != before-small.store.total() {
		t.Errorf("%d evictions, and %d of %d answers are left", n, small.store.total(), before)
	}
}

// A failed reload leaves the previous instance as it was, and the next reload makes a successor of that. The test is
// not parallel, because rollBack stops all younger instances.
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
			instances.rollBack(h)
			for _, name := range names {
				answer(t, ctx, h, asking(name, dns.TypeA))
			}
		}
		// A start may fail for want of memory, when the predecessor is known.
		unborn := newOptcache(h.options)
		unborn.identity = h.identity
		instances.nextGeneration()
		instances.predecessor(unborn)
		instances.rollBack(h)
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

// An instance whose start fails when it has its store gives it back. Not parallel: see above.
func TestFailedStartGivesTheStoreBack(t *testing.T) {
	o := roomFor(sizedOptions(4096))
	h := firstOf(t, o, new(census))
	o.shared.Servers.Addresses, o.shared.SecretFile = []string{"127.0.0.1:1"}, filepath.Join(t.TempDir(), "none")
	for _, capacity := range []int{4096, 5000} {
		o.success.capacity = capacity
		instances.nextGeneration()
		failed := newOptcache(o)
		failed.Next, failed.identity, failed.clock = h.Next, h.identity, h.clock
		if err := failed.start(h.identity.at, []plugin.Handler{failed}); err == nil {
			t.Fatal("it has started without a secret")
		}
		instances.rollBack(h)
		if n := h.store.users.Load(); n != 1 || h.successor != nil || h.store.closed.Load() || capacity != 4096 && !failed.store.closed.Load() {
			t.Errorf("%d instances use the store, the successor is %v", n, h.successor)
		}
	}
}

// A reload that fails while the previous instance is stopped has taken effect: the new instance serves, and stays.
func TestReloadThatFailsLate(t *testing.T) {
	up := new(census)
	ctx := serverContext(t)
	h := firstOf(t, roomFor(sizedOptions(4096)), up)
	h.of = new(caddy.Instance) // not among the running ones
	names := reloadNames(100)
	for _, name := range names {
		answer(t, ctx, h, asking(name, dns.TypeA))
	}
	asked := up.asked.Load()
	next := nextOf(t, h, roomFor(sizedOptions(5000)))
	instances.rollBack(h)
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
	// CoreDNS may not know that the reload had an effect, and may reload from the first instance again.
	failed := nextOf(t, next, roomFor(sizedOptions(6000)))
	failed.of = new(caddy.Instance)
	instances.rollBack(h)
	if !failed.stopped.Load() || next.stopped.Load() || next.successor != nil || instances.reloading(next) {
		t.Error("what has failed then is still there")
	}
}

// An answer that the new instance has got before the old answers move is newer than those, and stays.
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
	next.Next, next.identity = up, h.identity
	var now atomic.Int64
	now.Store(100e9) // the denial has expired
	next.clock = now.Load
	if err := next.start(h.identity.at, []plugin.Handler{next}); err != nil {
		t.Fatal(err)
	}
	stopsWith(t, next)
	up.response = positive("new.example.org. 300 IN A 192.0.2.1")
	answer(t, ctx, next, r) // stale, and a refresh starts
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

// An instance with another identity is not a successor.
func TestReloadOfAnotherBlockStartsEmpty(t *testing.T) {
	t.Parallel()
	up := new(census)
	h := firstOf(t, roomFor(sizedOptions(4096)), up)
	for name, p := range map[string]identity{
		"address": {keys: h.identity.keys, at: "elsewhere"},
		"zone":    {keys: []string{"dns://example.net.:53"}, at: h.identity.at},
	} {
		instances.nextGeneration()
		if other := inPlace(t, p, roomFor(sizedOptions(4096)), up); other.store == h.store || other.store.from.Load() != nil {
			t.Errorf("another %s has taken over", name)
		}
	}
}

// Requests to both generations get the right answers while answers move and new ones are inserted.
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
