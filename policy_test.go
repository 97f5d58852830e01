package optcache

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// countLedger is the simplest ledger there is: counters by slot.
type countLedger struct {
	counts map[uint32]int
}

func (l *countLedger) takeAccessed(n *node) int {
	c := l.counts[n.slot]
	l.counts[n.slot] = 0
	return c
}

func (*countLedger) moved(*node, segment) {}

// policyRun drives a policy alone with a trace of keys and TTLs and returns the number of hits. There is memory for room
// entries.
func policyRun(capacity, room int, trace []request3) (hits int) {
	l := &countLedger{counts: make(map[uint32]int)}
	p := newSLRU([classes]int{capacity, 1}, l, newClimber(capacity, false))
	inside := make(map[uint32]uint32) // node by key
	for _, r := range trace {
		id, ok := inside[r.key]
		switch {
		case ok && r.second < p.nodes[id].expires:
			hits++
			if l.counts[r.key] < 3 {
				l.counts[r.key]++
			}
			continue
		case ok:
			p.renew(id, r.second+r.ttl)
			continue
		}
		for p.full(success) || len(inside) >= room {
			v := p.victim(success, r.second)
			n := &p.nodes[v]
			delete(inside, n.slot)
			delete(l.counts, n.slot)
			p.remove(v)
		}
		// Here the key is the slot, and a scramble of it the hash.
		inside[r.key] = p.add(success, uint64(r.key*2654435761)<<32, r.key, r.second+r.ttl)
	}
	return hits
}

type request3 struct{ second, key, ttl uint32 }

// syntheticTrace is DNS as far as the policy cares: Zipf popularity, a third of the requests
// repeating a recent one, a wave of one-time names in the middle third, TTLs of 5 s to an hour.
func syntheticTrace(n int) []request3 {
	rng := rand.New(rand.NewPCG(7, 8))
	zipf := rand.NewZipf(rng, 1.05, 8, 20_000)
	ttls := []uint32{5, 30, 60, 300, 300, 3600}
	trace := make([]request3, n)
	for i := range trace {
		key := uint32(zipf.Uint64())
		switch {
		case i > 500 && rng.IntN(3) == 0:
			key = trace[i-1-rng.IntN(500)].key
		case i > n/3 && i < 2*n/3 && rng.IntN(3) == 0:
			key = 1_000_000 + uint32(i)
		}
		trace[i] = request3{uint32(i / 200), key, ttls[key%uint32(len(ttls))]}
	}
	return trace
}

// TestPolicyHitsExactly guards the policy: whoever changes it changes these numbers, and should
// know by how much. `go run ./bench/hitratio` says what they mean on real traces.
func TestPolicyHitsExactly(t *testing.T) {
	trace := syntheticTrace(200_000)
	for _, tt := range []struct{ capacity, room, hits int }{
		{64, 64, 51124},
		{512, 512, 113531},
		{4096, 4096, 142049},
		// Memory is what is full.
		{128, 64, 52590},
		{1024, 512, 113925},
		{4096, 512, 114608},
	} {
		t.Run(fmt.Sprintf("%d of %d", tt.room, tt.capacity), func(t *testing.T) {
			if got := policyRun(tt.capacity, tt.room, trace); got != tt.hits {
				t.Errorf("%d hits, want %d", got, tt.hits)
			}
		})
	}
}

// TestPolicyResistsAScan: a flood of names that are asked for once does not push out those that
// are asked for all the time.
func TestPolicyResistsAScan(t *testing.T) {
	const room, popular = 1000, 500
	var trace []request3
	hitsOf := func(capacity int, flood bool) int {
		trace = trace[:0]
		for i := range uint32(100_000) {
			trace = append(trace, request3{0, i % popular, 3600})
			if flood {
				trace = append(trace, request3{0, 1_000_000 + i, 3600}, request3{0, 2_000_000 + i, 3600})
			}
		}
		return policyRun(capacity, room, trace)
	}
	for _, capacity := range []int{room, 2 * room, 5 * room} { // the latter when memory is full before
		calm, flooded := hitsOf(capacity, false), hitsOf(capacity, true)
		if flooded < calm*98/100 {
			t.Errorf("capacity %d: %d hits in a flood, %d without", capacity, flooded, calm)
		}
	}
}

func TestPolicyKeepsTheStandingOfTheDead(t *testing.T) {
	l := &countLedger{counts: make(map[uint32]int)}
	p := newSLRU([classes]int{10, 1}, l, newClimber(10, false))
	id := p.add(success, 42<<32, 0, 5)
	p.protect(id)
	if v := p.victim(success, 6); v != id {
		t.Fatalf("victim %d, want the dead entry %d", v, id)
	}
	p.remove(id)
	if id := p.add(success, 42<<32, 0, 100); p.nodes[id].segment != protected {
		t.Error("a name that was protected when it died is not protected when it comes back")
	}
	if id := p.add(success, 43<<32, 1, 100); p.nodes[id].segment != window {
		t.Error("a newcomer is not in the window")
	}
}

func TestClimberFindsTheTop(t *testing.T) {
	for _, top := range []float64{20, 250, 500, 800} {
		h := hill{at: firstWindow, least: leastWindow, most: mostWindow, step: firstStep}
		for range 200 {
			d := (h.at - top) / 1000
			h.climb(0.6 - d*d)
		}
		if h.at < top-60 || h.at > top+60 {
			t.Errorf("ended at %v, the top is at %v", h.at, top)
		}
	}
}

func TestHotTierFindsItsSize(t *testing.T) {
	if raceEnabled {
		t.Skip("one goroutine, and millions of requests")
	}
	t.Parallel()
	run := func(spread int) (capacity, most int64) {
		o := benchOptions(20_000)
		o.hotPercentage = hotAuto
		x, err := simulate(o)
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		rng := rand.New(rand.NewPCG(1, 2))
		for i := range 4_000_000 {
			// Popular names, evenly, and now and then a new one: sizes change at inserts.
			key := uint64(rng.IntN(spread))
			if i%20 == 0 {
				key = 1<<32 + uint64(i)
			}
			x.Request(key, 1<<30, time.Duration(i))
		}
		st := x.o.store
		return st.hotCapacity(), int64(st.sizes.shards * st.hotSets * hotWays)
	}
	few, most := run(100)
	many, _ := run(4000)
	if few >= many || many > most {
		t.Errorf("room for %d hot entries when 100 names are popular, %d when 4000 are; at most %d", few, many, most)
	}
}
