package optcache

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// countLedger implements accessCounts with one counter for each slot.
type countLedger struct {
	counts map[uint32]int
}

func (l *countLedger) takeAccessed(n *node) int {
	c := l.counts[n.slot]
	l.counts[n.slot] = 0
	return c
}

func (*countLedger) moved(*node, segment) {}

// policyRun drives the policy alone, with a trace of keys and TTLs, and returns the number of hits. At most room entries
// are kept, as if memory were full then.
func policyRun(capacity, room int, trace []request3) (hits int) {
	l := &countLedger{counts: make(map[uint32]int)}
	p := newSLRU([record.Classes]int{capacity, 1}, l, climber.New(capacity, false))
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
		for p.full(record.Success) || len(inside) >= room {
			v := p.victim(record.Success, r.second)
			n := &p.nodes[v]
			delete(inside, n.slot)
			delete(l.counts, n.slot)
			p.remove(v)
		}
		// The slot is the key, and the hash is a multiple of the key.
		inside[r.key] = p.add(record.Success, uint64(r.key*2654435761)<<32, r.key, r.second+r.ttl)
	}
	return hits
}

type request3 struct{ second, key, ttl uint32 }

// syntheticTrace returns requests that look like DNS to the policy: popularity by Zipf's law, a third of the requests
// repeat a recent one, the middle third has a flood of names that are asked for once, and TTLs are 5 s to an hour.
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

// TestPolicyHitsExactly fails when a change of the policy changes the number of hits. Then change the numbers here, and
// measure with `go run ./bench/hitratio` what the change means on real traces.
func TestPolicyHitsExactly(t *testing.T) {
	trace := syntheticTrace(200_000)
	for _, tt := range []struct{ capacity, room, hits int }{
		{64, 64, 51124},
		{512, 512, 113531},
		{4096, 4096, 142049},
		// Memory is full before the capacity is reached.
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

// TestPolicyResistsAScan: a flood of names that are asked for once must not displace names that are asked for all the time.
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
	for _, capacity := range []int{room, 2 * room, 5 * room} { // with more capacity than room, memory is full first
		calm, flooded := hitsOf(capacity, false), hitsOf(capacity, true)
		if flooded < calm*98/100 {
			t.Errorf("capacity %d: %d hits in a flood, %d without", capacity, flooded, calm)
		}
	}
}

func TestPolicyKeepsTheStandingOfTheDead(t *testing.T) {
	l := &countLedger{counts: make(map[uint32]int)}
	p := newSLRU([record.Classes]int{10, 1}, l, climber.New(10, false))
	id := p.add(record.Success, 42<<32, 0, 5)
	p.protect(id)
	if v := p.victim(record.Success, 6); v != id {
		t.Fatalf("victim %d, want the dead entry %d", v, id)
	}
	p.remove(id)
	if id := p.add(record.Success, 42<<32, 0, 100); p.nodes[id].segment != protected {
		t.Error("a name that was protected when it died is not protected when it comes back")
	}
	if id := p.add(record.Success, 43<<32, 1, 100); p.nodes[id].segment != window {
		t.Error("a newcomer is not in the window")
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
			// The popular names are all asked for alike. Now and then a new name comes, because the hot tier's size changes at
			// inserts only.
			key := uint64(rng.IntN(spread))
			if i%20 == 0 {
				key = 1<<32 + uint64(i)
			}
			x.Request(key, 1<<30, 0, time.Duration(i))
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
