package optcache

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/sketch"
)

// These tests are about the lists of the policy, on plain integers. The slot of a node is the name of an entry. How good the
// policy is, policy_test.go tests.

// notedLedger implements accessCounts, and records the calls.
type notedLedger struct {
	accesses map[uint32]int // by name of the entry
	always   bool           // each entry has always been accessed
	asked    int
	up, down int // into and out of the protected segment
	others   int // moves between other segments
}

func (l *notedLedger) takeAccessed(n *node) int {
	if l.asked++; l.asked > 1e7 {
		panic("the policy asks without end")
	}
	if n.segment == free {
		panic("the policy asks for an entry that is gone")
	}
	if l.always {
		return 1
	}
	count := l.accesses[n.slot]
	delete(l.accesses, n.slot)
	return count
}

func (l *notedLedger) moved(n *node, from segment) {
	switch protected {
	case n.segment:
		l.up++
	case from:
		l.down++
	default:
		l.others++
	}
}

func newNotedLedger() *notedLedger { return &notedLedger{accesses: map[uint32]int{}} }

var listed = []segment{window, probationary, protected, heavy}

// policyIDs returns the nodes of a segment from the youngest to the oldest. It follows next, and fails if a link or the
// segment's length is wrong.
func policyIDs(tb testing.TB, p *slru, c record.Class, s segment) (ids []uint32) {
	tb.Helper()
	l := &p.classes[c].segments[s]
	before := none
	for id := l.head; id != none; id = p.nodes[id].next {
		n := &p.nodes[id]
		if n.prev != before || n.class != c || n.segment != s {
			tb.Fatalf("node %d of class %d, segment %d: %+v behind %d", id, c, s, *n, before)
		}
		before = id
		if ids = append(ids, id); len(ids) > len(p.nodes) {
			tb.Fatalf("segment %d of class %d is a circle", s, c)
		}
	}
	if l.tail != before || l.n != len(ids) {
		tb.Fatalf("segment %d of class %d: tail %d, length %d, but %d nodes that end with %d", s, c, l.tail, l.n, len(ids), before)
	}
	return ids
}

// checkPolicy fails unless each node is either in exactly one list or free. It returns the nodes that are in a list.
func checkPolicy(tb testing.TB, p *slru) (live []uint32) {
	tb.Helper()
	where := make([]int, len(p.nodes))
	for c := range record.Classes {
		d := &p.classes[c]
		for _, s := range listed {
			for _, id := range policyIDs(tb, p, c, s) {
				where[id]++
				live = append(live, id)
			}
		}
		if l := d.segments[free]; l.n != 0 || l.head != none || l.tail != none {
			tb.Fatalf("class %d has a list of free nodes: %+v", c, l)
		}
		if got := d.entries(); got > d.capacity {
			tb.Fatalf("class %d has %d entries, its capacity is %d", c, got, d.capacity)
		}
		if len(d.ghost) != d.capacity {
			tb.Fatalf("class %d has %d ghosts, its capacity is %d", c, len(d.ghost), d.capacity)
		}
	}
	for id := p.freed; id != none; id = p.nodes[id].next {
		if where[id]++; where[id] > 1 || p.nodes[id].segment != free {
			tb.Fatalf("free node %d is in use, or twice free: %+v", id, p.nodes[id])
		}
	}
	for id, n := range where {
		if n != 1 {
			tb.Fatalf("node %d is in %d lists", id, n)
		}
	}
	return live
}

// naivePolicy is a second implementation of the policy. Its segments are slices of entries, from the youngest to the oldest.
type naivePolicy struct {
	segments  [record.Classes][segments][]*naiveEntry
	places    []*naiveEntry // by number of the node; nil: free
	vacant    []int         // free numbers; the last one is used first
	hand, age int
	accesses  map[uint32]int
	capacity  [record.Classes]int
	room      [record.Classes]int
	sketch    [record.Classes]*sketch.Sketch
	ghost     [record.Classes]map[uint64]uint32 // hashes by their place
	share     int                               // the window's share of the capacity, per mille
	up, down  int
	others    int
}

type naiveEntry struct {
	name, hash, expires uint32
	class               record.Class
	at                  segment
	touched             bool
}

func newNaivePolicy(capacity [record.Classes]int, share int) *naivePolicy {
	p := &naivePolicy{accesses: map[uint32]int{}, capacity: capacity, room: capacity, share: share}
	for c := range p.capacity {
		p.sketch[c] = sketch.New(capacity[c])
		p.ghost[c] = map[uint64]uint32{}
	}
	return p
}

func (p *naivePolicy) take(e *naiveEntry) {
	if n := p.accesses[e.name]; n > 0 {
		p.sketch[e.class].Add(e.hash, n)
		e.touched = true
	}
	delete(p.accesses, e.name)
}

func (p *naivePolicy) accessed(e *naiveEntry) bool {
	p.take(e)
	was := e.touched
	e.touched = false
	return was
}

func (p *naivePolicy) aging() {
	for range min(ageing, len(p.places)) {
		p.age = (p.age + 1) % len(p.places)
		if e := p.places[p.age]; e != nil {
			p.take(e)
		}
	}
}

func (p *naivePolicy) add(c record.Class, name, hash, expires uint32) {
	p.aging()
	e := &naiveEntry{name: name, hash: hash, expires: expires, class: c, at: window}
	if n := len(p.vacant); n > 0 {
		p.places[p.vacant[n-1]] = e
		p.vacant = p.vacant[:n-1]
	} else {
		p.places = append(p.places, e)
	}
	p.sketch[c].Add(hash, 1)
	p.segments[c][window] = slices.Insert(p.segments[c][window], 0, e)
	place := uint64(hash) * uint64(p.capacity[c]) >> 32
	if known, ok := p.ghost[c][place]; ok && known == hash {
		delete(p.ghost[c], place)
		p.protect(e)
	}
}

func (p *naivePolicy) renew(e *naiveEntry, expires uint32) {
	p.aging()
	e.expires = expires
	p.sketch[e.class].Add(e.hash, 1)
	p.enter(e, e.at)
}

func (p *naivePolicy) leave(e *naiveEntry) {
	l := &p.segments[e.class][e.at]
	i := slices.Index(*l, e)
	*l = slices.Delete(*l, i, i+1)
}

func (p *naivePolicy) remove(e *naiveEntry) {
	p.leave(e)
	i := slices.Index(p.places, e)
	p.places[i] = nil
	p.vacant = append(p.vacant, i)
	delete(p.accesses, e.name)
}

func (p *naivePolicy) enter(e *naiveEntry, to segment) {
	p.leave(e)
	switch {
	case e.at == to:
	case to == protected:
		p.up++
	case e.at == protected:
		p.down++
	default:
		p.others++
	}
	e.at = to
	p.segments[e.class][to] = slices.Insert(p.segments[e.class][to], 0, e)
}

func (p *naivePolicy) window(c record.Class) int { return max(p.room[c]*p.share/1000, 1) }

func (p *naivePolicy) entries(c record.Class) (n int) {
	for _, l := range p.segments[c] {
		n += len(l)
	}
	return n
}

func (p *naivePolicy) protect(e *naiveEntry) {
	p.enter(e, protected)
	most := max((max(p.room[e.class], p.entries(e.class))-p.window(e.class))*8/10, 1)
	for moves := 0; len(p.segments[e.class][protected]) > most; moves++ {
		oldest := last(p.segments[e.class][protected])
		if moves < maxMoves && p.accessed(oldest) {
			p.enter(oldest, protected)
		} else {
			p.enter(oldest, probationary)
		}
	}
}

func last(l []*naiveEntry) *naiveEntry {
	if len(l) == 0 {
		return nil
	}
	return l[len(l)-1]
}

func (p *naivePolicy) victim(c record.Class, now uint32) *naiveEntry {
	for range min(sweep, len(p.places)) {
		p.hand = (p.hand + 1) % len(p.places)
		if e := p.places[p.hand]; e != nil && e.class == c && now > e.expires {
			if e.at == protected {
				p.ghost[c][uint64(e.hash)*uint64(p.capacity[c])>>32] = e.hash
			}
			return e
		}
	}
	p.room[c] = p.entries(c)
	for moves := 0; len(p.segments[c][window]) >= p.window(c); moves++ {
		e := last(p.segments[c][window])
		switch main := len(p.segments[c][probationary]) + len(p.segments[c][protected]); {
		case now > e.expires:
			return e
		case moves < maxMoves && p.accessed(e):
			p.enter(e, window)
		case main < p.room[c]-p.window(c):
			p.enter(e, probationary)
		default:
			rival := p.mainVictim(c, now)
			if rival == nil || now <= rival.expires && p.sketch[c].Estimate(e.hash) <= p.sketch[c].Estimate(rival.hash) {
				return e
			}
			p.enter(e, probationary)
			return rival
		}
	}
	if e := p.mainVictim(c, now); e != nil {
		return e
	}
	return last(p.segments[c][window])
}

func (p *naivePolicy) mainVictim(c record.Class, now uint32) *naiveEntry {
	for range maxMoves {
		e := last(p.segments[c][probationary])
		if e == nil || now > e.expires || !p.accessed(e) {
			break
		}
		p.protect(e)
	}
	if e := last(p.segments[c][probationary]); e != nil {
		return e
	}
	return last(p.segments[c][protected])
}

func TestPolicyDoesWhatTheNaiveOneDoes(t *testing.T) {
	t.Parallel()
	for _, capacity := range [][record.Classes]int{{1, 1}, {2, 3}, {5, 1}, {10, 7}, {100, 40}, {400, 300}} {
		rng := rand.New(rand.NewPCG(uint64(capacity[0]), 9))
		ledger := newNotedLedger()
		climb := climber.New(1, false)
		p := newSLRU(capacity, ledger, climb)
		naive := newNaivePolicy(capacity, climb.WindowShare())
		ids := map[*naiveEntry]uint32{} // node of an entry
		var entries [record.Classes][]*naiveEntry
		forget := func(e *naiveEntry) {
			p.remove(ids[e])
			naive.remove(e)
			delete(ids, e)
			delete(ledger.accesses, e.name)
			i := slices.Index(entries[e.class], e)
			entries[e.class] = slices.Delete(entries[e.class], i, i+1)
		}
		next, now := uint32(0), uint32(100)
		var died []*naiveEntry
		evict := func(c record.Class) {
			id, want := p.victim(c, now), naive.victim(c, now)
			if want == nil || id == none {
				if want != nil || id != none {
					t.Fatalf("capacity %v: victim %d, the naive policy has %v", capacity, id, want)
				}
				return
			}
			if got := p.nodes[id].slot; got != want.name {
				t.Fatalf("capacity %v: victim %d, the naive policy has %d", capacity, got, want.name)
			}
			if now > want.expires {
				died = append(died, want)
			}
			forget(want)
		}
		for op := range 12_000 {
			c := record.Class(rng.IntN(int(record.Classes)))
			var some *naiveEntry
			if n := len(entries[c]); n > 0 {
				some = entries[c][rng.IntN(n)]
			}
			switch what := rng.IntN(100); {
			case what < 40: // a hit
				if some != nil {
					ledger.accesses[some.name]++
					naive.accesses[some.name]++
				}
			case what < 75: // a new entry, or one that returns
				for p.full(c) {
					evict(c)
				}
				hash, expires := rng.Uint32(), now+uint32(rng.IntN(30))
				if n := len(died); n > 0 && rng.IntN(2) == 0 {
					hash = died[n-1].hash
					died = died[:n-1]
				}
				id := p.add(c, uint64(hash)<<32|uint64(rng.Uint32()), next, expires)
				naive.add(c, next, hash, expires)
				i := slices.IndexFunc(naive.places, func(e *naiveEntry) bool { return e != nil && e.name == next })
				if id != uint32(i) {
					t.Fatalf("capacity %v: new node %d, want %d", capacity, id, i)
				}
				e := naive.places[i]
				ids[e] = id
				entries[c] = append(entries[c], e)
				next++
			case what < 80: // an eviction, as when memory is short
				evict(c)
			case what < 85: // promotion
				if some != nil {
					p.protect(ids[some])
					naive.protect(some)
				}
			case what < 90:
				if some != nil {
					p.renew(ids[some], now+20)
					naive.renew(some, now+20)
				}
			case what < 94: // an entry is dropped without the policy's choice
				if some != nil {
					forget(some)
				}
			case what < 96: // the climber moves
				naive.share = climber.LeastWindow + rng.IntN(climber.MostWindow-climber.LeastWindow)
				climb.Window.Store(int64(naive.share))
			default:
				now += uint32(rng.IntN(5))
			}
			if op%16 != 0 {
				continue
			}
			checkPolicy(t, &p)
			for c := range record.Classes {
				for _, s := range listed {
					got := policyIDs(t, &p, c, s)
					for i := range got {
						got[i] = p.nodes[got[i]].slot
					}
					var want []uint32
					for _, e := range naive.segments[c][s] {
						want = append(want, e.name)
					}
					if !slices.Equal(got, want) {
						t.Fatalf("capacity %v, op %d: segment %d of class %d is\n%d, the naive policy has\n%d", capacity, op, s, c, got, want)
					}
				}
			}
		}
		if ledger.up != naive.up || ledger.down != naive.down || ledger.others != naive.others {
			t.Errorf("capacity %v: told of %d moves up, %d down, %d others, want %d, %d and %d", capacity,
				ledger.up, ledger.down, ledger.others, naive.up, naive.down, naive.others)
		}
		if most := capacity[0] + capacity[1]; len(p.nodes) > most {
			t.Errorf("capacity %v: %d nodes", capacity, len(p.nodes))
		}
	}
}

// policyOf returns a policy with an empty sketch. The window of its success class has the entries 0, 1, 2, …; 0 is the
// oldest. Its access counts are empty. An access that a test sets afterwards has not been taken by ageing.
func policyOf(capacity, n int) (*slru, *notedLedger) {
	l := newNotedLedger()
	p := newSLRU([record.Classes]int{capacity, capacity}, l, climber.New(1, false))
	for i := range uint32(n) {
		p.add(record.Success, uint64(i*2654435761)<<32, i, 1000)
	}
	return &p, l
}

func wantSegments(t *testing.T, p *slru, inWindow, probation, protect []uint32) {
	t.Helper()
	for i, want := range [][]uint32{inWindow, probation, protect} {
		if got := policyIDs(t, p, record.Success, listed[i]); !slices.Equal(got, want) {
			t.Errorf("segment %d: %d, want %d", listed[i], got, want)
		}
	}
	checkPolicy(t, p)
}

func TestWindowFillsTheMainPartFirst(t *testing.T) {
	t.Parallel()
	p, l := policyOf(8, 8) // two of them belong in the window
	if id := p.victim(record.Success, 0); id != 0 && id != 6 {
		t.Errorf("victim %d", id)
	}
	wantSegments(t, p, []uint32{7, 6}, []uint32{5, 4, 3, 2, 1, 0}, nil)
	if l.up != 0 || l.down != 0 {
		t.Errorf("%d moves up, %d down", l.up, l.down)
	}
}

func TestWindowGivesAnotherRoundToWhoWasAskedFor(t *testing.T) {
	t.Parallel()
	p, l := policyOf(8, 8)
	p.victim(record.Success, 0)
	l.accesses[6] = 1
	if id := p.victim(record.Success, 0); id != 7 {
		t.Errorf("victim %d, want 7, which nobody asked for", id)
	}
	wantSegments(t, p, []uint32{6, 7}, []uint32{5, 4, 3, 2, 1, 0}, nil)
}

func TestContestIsWonByWhoIsAskedForMore(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name                string
		challenger, rival   int // accesses in the sketch, in addition to the first one
		victim              uint32
		inWindow, probation []uint32
	}{
		{"equal", 0, 0, 6, []uint32{7, 6}, []uint32{5, 4, 3, 2, 1, 0}},
		{"fewer", 1, 2, 6, []uint32{7, 6}, []uint32{5, 4, 3, 2, 1, 0}},
		{"more", 2, 1, 0, []uint32{7}, []uint32{6, 5, 4, 3, 2, 1, 0}},
	} {
		p, _ := policyOf(8, 8)
		p.victim(record.Success, 0)
		d := &p.classes[record.Success]
		d.sketch.Add(p.nodes[6].hash, tc.challenger)
		d.sketch.Add(p.nodes[0].hash, tc.rival)
		if id := p.victim(record.Success, 0); id != tc.victim {
			t.Errorf("%s: victim %d, want %d", tc.name, id, tc.victim)
		}
		wantSegments(t, p, tc.inWindow, tc.probation, nil)
	}
}

func TestAccessedRivalIsProtected(t *testing.T) {
	t.Parallel()
	p, l := policyOf(8, 8)
	p.victim(record.Success, 0)
	l.accesses[0], l.accesses[1] = 1, 1
	p.victim(record.Success, 0)
	wantSegments(t, p, []uint32{7, 6}, []uint32{5, 4, 3, 2}, []uint32{1, 0})
	if l.up != 2 {
		t.Errorf("told of %d moves up", l.up)
	}
}

func TestAgedAccessStillCounts(t *testing.T) {
	t.Parallel()
	p, l := policyOf(8, 8)
	p.victim(record.Success, 0)
	l.accesses[0] = 1
	for range 8 {
		p.age() // takes the access; the rival must count as accessed nevertheless
	}
	if len(l.accesses) != 0 {
		t.Fatal("ageing has not come round")
	}
	p.victim(record.Success, 0)
	wantSegments(t, p, []uint32{7, 6}, []uint32{5, 4, 3, 2, 1}, []uint32{0})
}

func TestTheDeadGoFirst(t *testing.T) {
	t.Parallel()
	for _, at := range listed {
		for _, accessed := range []int{0, 1} {
			p, l := policyOf(8, 8)
			p.victim(record.Success, 0)
			id := uint32(7)
			if at != window {
				id = 3
			}
			if at == protected {
				p.protect(id)
			}
			p.nodes[id].expires = 5
			l.accesses[id] = accessed
			if got := p.victim(record.Success, 5); got == id && accessed > 0 {
				t.Errorf("segment %d: gone in its last second", at)
			}
			if got := p.victim(record.Success, 6); got != id {
				t.Errorf("segment %d: victim %d, want the dead %d", at, got, id)
			}
			checkPolicy(t, p)
		}
	}
}

func TestOldestProtectedIsDemoted(t *testing.T) {
	t.Parallel()
	p, l := policyOf(8, 8) // (8-2)*80% = 4 may be protected
	for id := range uint32(5) {
		p.protect(id)
	}
	wantSegments(t, p, []uint32{7, 6, 5}, []uint32{0}, []uint32{4, 3, 2, 1})
	if l.up != 5 || l.down != 1 {
		t.Errorf("told of %d moves up and %d down", l.up, l.down)
	}
	// 1 and 2 have been accessed, and get another round. So 3 is demoted.
	l.accesses[1], l.accesses[2] = 1, 1
	p.protect(0)
	wantSegments(t, p, []uint32{7, 6, 5}, []uint32{3}, []uint32{2, 1, 0, 4})
	// An entry that is protected already moves to the young end. None is demoted.
	p.protect(4)
	wantSegments(t, p, []uint32{7, 6, 5}, []uint32{3}, []uint32{4, 2, 1, 0})
}

func TestGhostIsForTheDeadInGoodStanding(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		standing func(p *slru, id uint32)
		want     segment
	}{
		{"in the window", func(p *slru, id uint32) {}, window},
		{"probationary", func(p *slru, id uint32) { p.move(id, probationary) }, window},
		{"protected", func(p *slru, id uint32) { p.protect(id) }, protected},
		{"hot", func(p *slru, id uint32) { p.nodes[id].hot = true }, protected},
	} {
		p, _ := policyOf(10, 0)
		id := p.add(record.Success, 42<<32, 0, 5)
		tc.standing(p, id)
		if got := p.victim(record.Success, 6); got != id {
			t.Fatalf("%s: victim %d", tc.name, got)
		}
		p.remove(id)
		for i, want := range []segment{tc.want, window} { // a ghost entry is used once
			id := p.add(record.Success, 42<<32, 0, 100)
			if got := p.nodes[id].segment; got != want || p.nodes[id].hot {
				t.Errorf("%s: segment %d at return %d, want %d", tc.name, got, i+1, want)
			}
			p.remove(id)
		}
		if id := p.add(record.Denial, 42<<32, 0, 100); p.nodes[id].segment != window {
			t.Errorf("%s: the ghost of one class is known in the other", tc.name)
		}
		checkPolicy(t, p)
	}
}

func TestSearchForAVictimEnds(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ capacity, n, protect int }{
		{1, 1, 0}, {1, 1, 1}, {2, 2, 0}, {5, 5, 4}, {64, 64, 0}, {1000, 1000, 0}, {1000, 1000, 800}, {1000, 1000, 1000},
	} {
		for _, share := range []int64{climber.LeastWindow, climber.FirstWindow, climber.MostWindow} {
			p, l := policyOf(tc.capacity, tc.n)
			p.climber.Window.Store(share)
			for id := range tc.protect {
				p.protect(uint32(id))
			}
			p.victim(record.Success, 0) // entries that are too many for the window leave it
			l.asked, l.always = 0, true
			id := p.victim(record.Success, 0)
			if id == none || p.nodes[id].segment == free {
				t.Errorf("%+v, window %d: victim %d", tc, share, id)
			}
			// Each promotion may look at maxMoves entries of the protected segment.
			if most := maxMoves * (maxMoves + 3); l.asked > most {
				t.Errorf("%+v, window %d: looked at %d entries, want at most %d", tc, share, l.asked, most)
			}
			checkPolicy(t, p)
		}
	}
}

func TestFreedNodesAreUsedAgain(t *testing.T) {
	t.Parallel()
	p, _ := policyOf(8, 8)
	p.nodes[3].hot, p.nodes[3].touched = true, true
	for _, id := range []uint32{3, 5, 0} {
		p.remove(id)
	}
	checkPolicy(t, p)
	for i := range uint32(3) {
		id := p.add(record.Denial, 7<<32, 100+i, 1)
		if n := p.nodes[id]; id >= 8 || n.hot || n.touched || n.class != record.Denial || n.slot != 100+i || n.segment != window || n.hash != 7 {
			t.Errorf("node %d: %+v", id, n)
		}
	}
	if len(p.nodes) != 8 {
		t.Errorf("%d nodes", len(p.nodes))
	}
	checkPolicy(t, p)
}
