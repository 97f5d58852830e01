package optcache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/sketch"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// Here is the whole engine: store, index, arena, policy and hot tier together, without DNS. Time
// is a plain number that the tests choose.

// openStore returns a store that is closed when the test ends.
func openStore(tb testing.TB, z sizes) *store {
	tb.Helper()
	st, err := newStore(z)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(st.close)
	return st
}

// tinySizes is a store of one shard.
func tinySizes(capacity [classes]int, granuleWords int) sizes {
	return sizes{
		shards: 1, capacity: capacity, granuleWords: granuleWords, pieces: [classes]int{1, 1},
		buckets: index.Buckets(capacity[success] + capacity[denial]), hotSets: 4, hotAfter: 3,
	}
}

var granuleSizes = []struct {
	name  string
	words int
}{{"packed", packedGranuleWords}, {"aligned", alignedGranuleWords}}

// ask1 sets the key of a question by its number, of up to nine digits; do and cd are bits 0 and
// 1 of variant.
func ask1(st *store, s *scratch, n, variant int) {
	name := []byte("\x0ehost-000000000\x07example\x00")
	for i := 14; n > 0; i, n = i-1, n/10 {
		name[i] += byte(n % 10)
	}
	s.key.set(st.seed, name, 1, 1, variant&keyDO != 0, variant&keyCD != 0)
	s.body = wire.HeaderLen + len(name) + questionTail
}

// insertSample stores an answer for s.key.
func insertSample(st *store, s *scratch, a *sample, now int64) bool {
	e := a.header()
	s.ttlAt = append(s.ttlAt[:0], a.ttlAt...)
	return st.insert(s, &e, a.body, a.wildcard, now)
}

// plainSample is an answer that lives long, with a body of n bytes.
func plainSample(c class, n int, now int64) sample {
	a := sample{ttl: 1e6, stored: now, body: bytes.Repeat([]byte{byte(n)}, n)}
	if c == denial {
		a.flags = flagDenial
	}
	return a
}

// inArena reports whether the arena has a record of s.key in a class.
func inArena(st *store, s *scratch, c class) bool {
	sh := st.shard(s.key.hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	_, ok := sh.locate(&s.key, c.kind())
	return ok
}

// inHotTier reports whether the hot tier has a copy for s.key.
func inHotTier(st *store, s *scratch) bool {
	sh := st.shard(s.key.hash)
	_, ok := sh.hot.find(s.key.hash, &s.key, none)
	return ok
}

// checkStore fails unless everything that the store knows twice is the same both times.
func checkStore(tb testing.TB, st *store) {
	tb.Helper()
	var entries [classes]int64
	for i := range st.shards {
		checkShard(tb, st, &st.shards[i], uint64(i))
		for c := range entries {
			entries[c] += st.shards[i].entries[c].Load()
		}
	}
	for c := range entries {
		if got := st.len(class(c)); got != entries[c] {
			tb.Fatalf("len(%d) is %d, want %d", c, got, entries[c])
		}
	}
	if st.bytes() > st.bound() {
		tb.Fatalf("%d bytes, the bound is %d", st.bytes(), st.bound())
	}
}

// checkShard fails unless index slots, nodes, records, runs of the allocators and copies in the
// hot tier are each other's images.
func checkShard(tb testing.TB, st *store, sh *shard, number uint64) {
	tb.Helper()
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.ev != nil {
		tb.Fatal("the events of a request are still there")
	}
	var occupied int
	for slot := range st.buckets * index.SlotsPerBucket {
		if !sh.index.Load(slot).Empty() {
			occupied++
		}
	}
	live := checkPolicy(tb, &sh.policy)
	if occupied != len(live) {
		tb.Fatalf("%d slots of the index for %d entries", occupied, len(live))
	}

	var granules [classes]int
	var starts [classes][]int
	var keys [classes]map[string]bool
	copies := 0
	seqs := map[uint64]bool{}
	for c := range keys {
		keys[c] = map[string]bool{}
	}
	for _, id := range live {
		n := &sh.policy.nodes[id]
		slot := sh.index.Load(int(n.slot))
		if slot.Empty() || class(slot.Class()) != n.class || slot.Marked() != (n.segment == protected) || slot.Count() > sh.saturate {
			tb.Fatalf("node %d %+v: slot %#x", id, *n, slot)
		}
		w, ok := sh.record(slot)
		if !ok {
			tb.Fatalf("node %d points past its region", id)
		}
		e := loadEntry(w)
		if e.node() != id || e.flags.class() != n.class || !e.sane(len(w)) || e.seq > sh.seq || seqs[e.seq] {
			tb.Fatalf("node %d %+v: record %+v, seq of the shard %d", id, *n, e, sh.seq)
		}
		if want := second(e.stored) + e.ttl; n.expires != want {
			tb.Fatalf("node %d expires at %d, its record at %d", id, n.expires, want)
		}
		seqs[e.seq] = true
		var k key
		loadBytes(k.bytes[:words(e.keyLen)*wordBytes], w[headerWords:][:words(e.keyLen)])
		k.n, k.hash = e.keyLen, e.hash
		if k.hash&uint64(len(st.shards)-1) != number {
			tb.Fatalf("node %d is in the wrong shard", id)
		}
		name := string(k.bytes[:k.n])
		if keys[n.class][name] {
			tb.Fatalf("node %d: the class has its key twice", id)
		}
		keys[n.class][name] = true
		if at, ok := sh.locate(&k, n.class.kind()); !ok || at != int(n.slot) {
			tb.Fatalf("node %d of slot %d: located %v at %d", id, n.slot, ok, at)
		}
		granules[n.class] += sh.granules(e.size)
		starts[n.class] = append(starts[n.class], int(slot.Pos()))

		hs, ok := sh.hot.find(e.hash, nil, id)
		if ok != n.hot {
			tb.Fatalf("node %d: hot %v, but copied %v", id, n.hot, ok)
		}
		if !ok {
			continue
		}
		copies++
		if byKey, ok := sh.hot.find(e.hash, &k, none); !ok || byKey.set != hs.set || byKey.way != hs.way {
			tb.Fatalf("node %d: its copy is not found by key", id)
		}
		if c := loadEntry(hs.record); c.seq&1 != 0 || e.size > len(hs.record) || !slices.Equal(hs.record[1:e.size], w[1:e.size]) {
			tb.Fatalf("node %d: the copy %+v differs from the record %+v", id, c, e)
		}
		if _, other := sh.locate(&k, (1 - n.class).kind()); other {
			tb.Fatalf("node %d has a copy, but the other class has the key, too", id)
		}
	}
	for set := range uint64(len(sh.hot.tags)) {
		for way := range hotWays {
			if sh.hot.tag(set, way) == 0 {
				continue
			}
			if copies--; set >= sh.hot.sets.Load() {
				tb.Fatalf("set %d has a copy, but %d sets are in use", set, sh.hot.sets.Load())
			}
		}
	}
	if copies != 0 {
		tb.Fatalf("%d copies more in the nodes than in the hot tier", copies)
	}

	var used int64
	for c := range classes {
		alloc := sh.regions[c].alloc
		if granules[c] != alloc.Used() {
			tb.Fatalf("class %d: %d granules in records, the allocator has %d", c, granules[c], alloc.Used())
		}
		used += int64(granules[c])
		slices.Sort(starts[c])
		at := 0
		for _, want := range starts[c] {
			start, ok := alloc.FirstIn(at, alloc.Cap())
			if !ok || start != want {
				tb.Fatalf("class %d: a run at %d, %v; a record at %d", c, start, ok, want)
			}
			at = start + 1
		}
		if start, ok := alloc.FirstIn(at, alloc.Cap()); ok {
			tb.Fatalf("class %d: a run at %d without a record", c, start)
		}
		d := &sh.policy.classes[c]
		if got := d.segments[window].n + d.main(); int64(got) != sh.entries[c].Load() {
			tb.Fatalf("class %d: %d entries, counted %d", c, got, sh.entries[c].Load())
		}
	}
	if used != sh.used.Load() {
		tb.Fatalf("%d granules in records, counted %d", used, sh.used.Load())
	}
}

// model is a store that forgets nothing.
type model map[string]*[classes]*sample

func (m model) of(k *key) *[classes]*sample {
	name := string(k.bytes[:k.n])
	if m[name] == nil {
		m[name] = new([classes]*sample)
	}
	return m[name]
}

func (a *sample) alive(now int64) bool { return a != nil && now < a.stored+int64(a.ttl)*1e9 }

// expected is the answer for a key of which the store has these: a denial goes before an answer,
// a failure behind it.
func expected(have *[classes]*sample, now int64) *sample {
	s, d := have[success], have[denial]
	switch {
	case d.alive(now) && d.flags&flagRcode != rcodeServerFailure:
		return d
	case s.alive(now):
		return s
	case d.alive(now):
		return d
	}
	return nil
}

func TestStoreDoesWhatTheModelDoes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		z       sizes
		names   int
		ops     int
		largest int  // body, bytes
		roomy   bool // nothing is ever evicted
	}{
		{"roomy aligned", sizes{shards: 4, capacity: [classes]int{4000, 4000}, granuleWords: alignedGranuleWords,
			pieces: [classes]int{20, 20}, buckets: index.Buckets(2000), hotSets: 20, hotAfter: 3}, 300, 12_000, 400, true},
		{"roomy packed", sizes{shards: 2, capacity: [classes]int{4000, 4000}, granuleWords: packedGranuleWords,
			pieces: [classes]int{20, 20}, buckets: index.Buckets(4000), hotSets: 5, hotAfter: 1}, 300, 12_000, 400, true},
		{"roomy without hot tier", sizes{shards: 1, capacity: [classes]int{4000, 4000}, granuleWords: packedGranuleWords,
			pieces: [classes]int{32, 32}, buckets: index.Buckets(8000), hotAfter: 3}, 200, 6_000, 400, true},
		{"few entries", sizes{shards: 2, capacity: [classes]int{60, 30}, granuleWords: alignedGranuleWords,
			pieces: [classes]int{2, 2}, buckets: index.Buckets(45), hotSets: 1, hotAfter: 2}, 100, 20_000, 300, false},
		{"little memory", sizes{shards: 1, capacity: [classes]int{3000, 3000}, granuleWords: packedGranuleWords,
			pieces: [classes]int{2, 1}, buckets: index.Buckets(6000), hotSets: 3, hotAfter: 3}, 1500, 20_000, 80_000, false},
		{"little aligned memory", sizes{shards: 1, capacity: [classes]int{2000, 2000}, granuleWords: alignedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(4000), hotSets: 3, hotAfter: 3}, 800, 20_000, 60_000, false},
		{"one entry", sizes{shards: 1, capacity: [classes]int{1, 1}, granuleWords: packedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(2), hotSets: 1, hotAfter: 1}, 4, 10_000, 100, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			st := openStore(t, tc.z)
			rng := rand.New(rand.NewPCG(uint64(tc.ops), uint64(tc.names)))
			zipf := rand.NewZipf(rng, 1.1, 4, uint64(tc.names-1))
			s := newScratch()
			m := model{}
			now := int64(1e12)
			var hits, misses, refused, evicted, dropped, made int
			var tierHits [tiers]int
			for op := range tc.ops {
				ask1(st, s, int(zipf.Uint64()), rng.IntN(4)&rng.IntN(4))
				have := m.of(&s.key)
				// What has gone meanwhile went by eviction; what is there is what was put.
				for c := range classes {
					there := inArena(st, s, c)
					if there && have[c] == nil {
						t.Fatalf("op %d: class %d has a key that was never stored, or dropped", op, c)
					}
					if !there && have[c] != nil {
						if tc.roomy {
							t.Fatalf("op %d: class %d lost a key", op, c)
						}
						have[c] = nil
					}
				}
				switch what := rng.IntN(100); {
				case what < 30:
					length := rng.IntN(120)
					if rng.IntN(8) == 0 {
						length = rng.IntN(min(tc.largest, maxMessage))
					}
					a := randomSample(rng, class(rng.IntN(3)/2), length, now)
					c := a.flags.class()
					before := *have
					if insertSample(st, s, &a, now) {
						if before[c] == nil {
							made++
						}
						if c == success && have[denial] != nil && !have[denial].alive(now) {
							if inArena(st, s, denial) {
								t.Fatalf("op %d: a dead denial is kept beside a new answer", op)
							}
							have[denial] = nil
							dropped++
						}
						have[c] = &a
						if !inArena(st, s, c) {
							t.Fatalf("op %d: stored, but not there", op)
						}
						break
					}
					refused++
					sh := st.shard(s.key.hash)
					if sh.granules(len(s.record)) <= sh.regions[c].alloc.Cap()/maxRecordShare {
						t.Fatalf("op %d: refused %d granules of %d", op, sh.granules(len(s.record)), sh.regions[c].alloc.Cap())
					}
				case what < 97:
					want := expected(have, now)
					fillRandom(rng, s.out[:s.body])
					question := slices.Clone(s.out[:s.body])
					ok := st.lookup(s, now)
					if ok != (want != nil) {
						t.Fatalf("op %d: answered %v, want %v", op, ok, want != nil)
					}
					if !ok {
						misses++
						break
					}
					hits++
					tierHits[s.tier]++
					if diff := want.check(s); diff != "" {
						t.Fatalf("op %d: %s of the answer differs", op, diff)
					}
					if !bytes.Equal(s.out[:s.body], question) {
						t.Fatalf("op %d: the question has changed", op)
					}
					if left := s.entry.remaining(now); left < 1 || left > int64(want.ttl) {
						t.Fatalf("op %d: TTL %d of %d", op, left, want.ttl)
					}
				case what < 99:
					now += rng.Int64N(2e9)
				default: // everything dies
					if rng.IntN(20) == 0 {
						now += rng.Int64N(100e9)
					}
				}
				for c := range s.events.evicted {
					evicted += int(s.events.evicted[c])
				}
				s.events = events{}
				if op%500 == 0 {
					checkStore(t, st)
				}
			}
			checkStore(t, st)
			if left := int(st.len(success) + st.len(denial)); left > made-evicted || left < made-evicted-dropped {
				t.Errorf("%d entries made, %d evicted, at most %d dropped: %d left", made, evicted, dropped, left)
			}
			if tc.roomy && evicted > 0 || !tc.roomy && evicted == 0 {
				t.Errorf("%d evictions", evicted)
			}
			if hits == 0 || misses == 0 || tc.z.hotSets > 0 && tierHits[tierHot] == 0 {
				t.Errorf("%d hits, %d misses, by tier %d: the test tests nothing", hits, misses, tierHits)
			}
			t.Logf("%d hits %d, %d misses, %d refused, %d evicted", hits, tierHits, misses, refused, evicted)
		})
	}
}

func TestDenialGoesBeforeAnAnswerAndFailureBehind(t *testing.T) {
	t.Parallel()
	const nxdomain = 3
	for _, tc := range []struct {
		name  string
		rcode recordFlags
		// which class answers while both live, only the answer does, only the denial does
		both, answer, denial class
	}{
		{"NXDOMAIN", nxdomain, denial, success, denial},
		{"NODATA", 0, denial, success, denial},
		{"SERVFAIL", rcodeServerFailure, success, success, denial},
	} {
		for _, hotFirst := range []bool{false, true} {
			for _, denialFirst := range []bool{false, true} {
				st := openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
				s := newScratch()
				ask1(st, s, 1, 0)
				a, d := plainSample(success, 10, 0), plainSample(denial, 20, 0)
				d.flags |= tc.rcode
				put := func(first, second *sample) {
					insertSample(st, s, first, 0)
					if hotFirst {
						for range 4 {
							st.lookup(s, 0)
						}
						if !inHotTier(st, s) {
							t.Errorf("%s: not promoted", tc.name)
						}
					}
					insertSample(st, s, second, 0)
				}
				ends := func(answer, denial uint32) {
					a.ttl, d.ttl = answer, denial
					if denialFirst {
						put(&d, &a)
					} else {
						put(&a, &d)
					}
					if inHotTier(st, s) {
						t.Errorf("%s: hot, although both classes have the key", tc.name)
					}
				}
				want := func(now int64, c class) {
					t.Helper()
					if !st.lookup(s, now) || s.entry.class() != c {
						t.Errorf("%s, hot first %v, denial first %v: class %d answers, want %d", tc.name, hotFirst, denialFirst, s.entry.class(), c)
					}
				}
				ends(10, 20)
				want(0, tc.both)
				want(15e9, tc.denial)
				if st.lookup(s, 20e9) {
					t.Errorf("%s: answered when both are dead", tc.name)
				}
				checkStore(t, st)

				st = openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
				ask1(st, s, 1, 0)
				ends(20, 10)
				want(0, tc.both)
				want(15e9, tc.answer)
				if st.lookup(s, 20e9) {
					t.Errorf("%s: answered when both are dead", tc.name)
				}
				checkStore(t, st)
			}
		}
	}
}

func TestNewAnswerRemovesADeadDenialOnly(t *testing.T) {
	t.Parallel()
	st := openStore(t, tinySizes([classes]int{10, 10}, packedGranuleWords))
	s := newScratch()
	for n, tc := range []struct {
		ttl  uint32
		kept bool
	}{{5, false}, {6, true}} {
		ask1(st, s, n, 0)
		a, d := plainSample(success, 10, 5e9), plainSample(denial, 10, 0)
		d.ttl = tc.ttl
		insertSample(st, s, &d, 0)
		insertSample(st, s, &a, 5e9)
		if got := inArena(st, s, denial); got != tc.kept {
			t.Errorf("denial with a TTL of %d s after 5 s: kept %v", tc.ttl, got)
		}
		checkStore(t, st)
	}
}

func TestFloodOfOneClassLeavesTheOther(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		for flood := range classes {
			st := openStore(t, sizes{
				shards: 2, capacity: [classes]int{100, 100}, granuleWords: granule.words,
				pieces: [classes]int{2, 2}, buckets: index.Buckets(100), hotSets: 2, hotAfter: 3,
			})
			s := newScratch()
			const kept = 40 // in two shards of 50
			for n := range kept {
				ask1(st, s, n, 0)
				a := plainSample(1-flood, 60, 0)
				insertSample(st, s, &a, 0)
			}
			for n := range 3000 {
				ask1(st, s, 1000+n, n%4)
				a := plainSample(flood, n%2000, 0)
				insertSample(st, s, &a, 0)
			}
			if got := st.len(1 - flood); got != kept || s.events.evicted[1-flood] != 0 || s.events.evicted[flood] == 0 {
				t.Errorf("%s: %d of %d entries are left after a flood of class %d; evicted %d", granule.name, got, kept, flood, s.events.evicted)
			}
			for n := range kept {
				ask1(st, s, n, 0)
				if !st.lookup(s, 0) || s.entry.class() != 1-flood {
					t.Errorf("%s: entry %d is gone after a flood of class %d", granule.name, n, flood)
				}
			}
			checkStore(t, st)
		}
	}
}

func TestEntriesStayWithinTheCapacity(t *testing.T) {
	t.Parallel()
	for _, shards := range []int{1, 2, 8} {
		capacity := [classes]int{100, 37}
		st := openStore(t, sizes{
			shards: shards, capacity: capacity, granuleWords: alignedGranuleWords,
			pieces: [classes]int{2, 2}, buckets: index.Buckets(137/shards + 1), hotSets: 1, hotAfter: 3,
		})
		s := newScratch()
		for n := range 600 {
			ask1(st, s, n, 0)
			a := plainSample(class(n%2), 30, 0)
			if !insertSample(st, s, &a, 0) || !st.lookup(s, 0) {
				t.Fatalf("%d shards: entry %d was not stored", shards, n)
			}
			if st.len(success) > int64(capacity[success]) || st.len(denial) > int64(capacity[denial]) {
				t.Fatalf("%d shards: %d and %d entries, capacity %v", shards, st.len(success), st.len(denial), capacity)
			}
		}
		if st.len(success) != int64(capacity[success]) || st.len(denial) != int64(capacity[denial]) {
			t.Errorf("%d shards: %d and %d entries, capacity %v", shards, st.len(success), st.len(denial), capacity)
		}
		checkStore(t, st)
	}
}

// planCases are options from one end to the other.
func planCases(capacities []int, memories []int64) (all []options) {
	for _, s := range capacities {
		for _, d := range capacities {
			for _, m := range memories {
				for _, hot := range []int{0, 1, 10, 50, hotAuto} {
					for _, aligned := range []bool{false, true} {
						o := benchOptions(s)
						o.denial.capacity, o.maxMemory, o.hotPercentage, o.lineAligned = d, m, hot, aligned
						all = append(all, o)
					}
				}
			}
		}
	}
	return all
}

// memoryFor is what a store may take: max_memory, or what the documentation says instead.
func memoryFor(o *options) int64 {
	if o.maxMemory != 0 {
		return o.maxMemory
	}
	hot := o.hotPercentage
	if hot == hotAuto {
		hot = autoHotPercentage
	}
	return int64(o.success.capacity+o.denial.capacity) * int64(defaultEntryBytes+leastEntryBytes+hotEntryBytes*hot/100)
}

func describeOptions(o *options) string {
	return fmt.Sprintf("success %d, denial %d, max_memory %d, hot %d, aligned %v",
		o.success.capacity, o.denial.capacity, o.maxMemory, o.hotPercentage, o.lineAligned)
}

var (
	planCapacities = []int{1024, 5000, 100_000, 10_000_000}
	planMemories   = []int64{0, 1 << 20, 3 << 20, 10_000_000, 64 << 20, 1 << 30, 8 << 30}
)

// failures lets a test over many combinations tell the first few and how many there are.
type failures struct {
	t *testing.T
	n int
}

func (f *failures) add(format string, args ...any) {
	if f.n++; f.n <= 5 {
		f.t.Errorf(format, args...)
	}
}

func (f *failures) report(of int) {
	if f.n > 0 {
		f.t.Errorf("%d failures in %d combinations", f.n, of)
	}
}

func TestPlanStaysWithinMaxMemory(t *testing.T) {
	t.Parallel()
	cases := planCases(planCapacities, planMemories)
	f := failures{t: t}
	defer func() { f.report(len(cases)) }()
	for _, o := range cases {
		st := &store{sizes: plan(&o)}
		z := &st.sizes
		if z.shards < 1 || z.shards&(z.shards-1) != 0 || z.shards > maxShards {
			f.add("%s: %d shards", describeOptions(&o), z.shards)
		}
		want := [classes]int{o.success.capacity, o.denial.capacity}
		for c := range z.capacity {
			if z.capacity[c] < 1 || z.capacity[c] > want[c] || z.pieces[c] < 1 {
				f.add("%s: class %d: capacity %d, %d pieces", describeOptions(&o), c, z.capacity[c], z.pieces[c])
			}
			if o.maxMemory == 0 && z.capacity[c] != want[c] {
				f.add("%s: class %d: capacity %d", describeOptions(&o), c, z.capacity[c])
			}
		}
		bound := memoryFor(&o)
		pieces := int64(z.shards) * int64(z.pieces[success]+z.pieces[denial])
		if got := st.fixed() + pieces*pieceBytes; got > bound {
			f.add("%s: bound of %d, want at most %d (%+v)", describeOptions(&o), got, bound, *z)
		}
	}
}

// TestPlanKeepsMemoryForRecords: the hot tier holds copies of records in the arena, where they
// take half as much. With less memory there, what the user gave goes into empty slots.
func TestPlanKeepsMemoryForRecords(t *testing.T) {
	t.Parallel()
	cases := planCases(planCapacities, planMemories)
	f := failures{t: t}
	defer func() { f.report(len(cases)) }()
	for _, o := range cases {
		z := plan(&o)
		records := int64(z.pieces[success]+z.pieces[denial]) * pieceBytes
		if hot := int64(z.hotSets) * hotSetBytes; records < hot/2 {
			f.add("%s: a shard has %d bytes for records and %d for copies in the hot tier", describeOptions(&o), records, hot)
		}
	}
}

// TestPlanKeepsRoomForAnAnswer: the largest answer that goes over UDP without fragments
// (1232 bytes, DNS flag day 2020) must not be too large for a class.
func TestPlanKeepsRoomForAnAnswer(t *testing.T) {
	t.Parallel()
	const answer = 1232
	cases := planCases(planCapacities, planMemories)
	f := failures{t: t}
	defer func() { f.report(len(cases)) }()
	for _, o := range cases {
		z := plan(&o)
		for c := range classes {
			if largest := z.pieces[c] * pieceBytes / maxRecordShare; largest < answer+maxKey {
				f.add("%s: class %d takes records up to %d bytes (%d shards)", describeOptions(&o), c, largest, z.shards)
			}
		}
	}
}

// TestMemoryStaysWithinMaxMemory counts what a full store really holds.
func TestMemoryStaysWithinMaxMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("one goroutine and much memory: nothing for the race detector")
	}
	t.Parallel()
	cases := planCases([]int{1024, 6000}, []int64{0, 1 << 20, 2 << 20})
	f, tried := failures{t: t}, 0
	defer func() { f.report(tried) }()
	s := newScratch()
	for i, o := range cases {
		if i%17 != 0 {
			continue // 17 goes through all that the options can be
		}
		tried++
		st, err := newStore(plan(&o))
		if err != nil {
			t.Fatal(err)
		}
		a := [classes]sample{plainSample(success, 20, 0), plainSample(denial, 20, 0)}
		for n := range st.capacity[success] + st.capacity[denial] + 100 {
			ask1(st, s, n, 0)
			c := success
			if n%(st.capacity[success]+st.capacity[denial]) >= st.capacity[success] {
				c = denial
			}
			insertSample(st, s, &a[c], 0)
		}
		real := st.data.Bytes() + st.slots.Bytes()
		if st.hot != nil {
			real += st.hot.Bytes()
		}
		for i := range st.shards {
			sh := &st.shards[i]
			real += int64(cap(sh.policy.nodes)) * nodeBytes
			for c := range classes {
				d := &sh.policy.classes[c]
				real += int64(len(d.ghost))*4 + int64(sketch.Lines(d.capacity))*sketch.LineBytes
			}
			real += sh.regions[success].alloc.Bytes() + sh.regions[denial].alloc.Bytes()
		}
		if bound := memoryFor(&o); real > bound {
			f.add("%s: %d bytes, %d over (%+v)", describeOptions(&o), real, real-bound, st.sizes)
		}
		if st.bytes() > st.bound() {
			f.add("%s: in use %d bytes of %d", describeOptions(&o), st.bytes(), st.bound())
		}
		st.close()
	}
}

func TestLargeAndSmallRecordsShareLittleMemory(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		t.Run(granule.name, func(t *testing.T) {
			t.Parallel()
			st := openStore(t, sizes{
				shards: 2, capacity: [classes]int{2000, 2000}, granuleWords: granule.words,
				pieces: [classes]int{1, 1}, buckets: index.Buckets(2000), hotSets: 20, hotAfter: 3,
			})
			rng := rand.New(rand.NewPCG(8, uint64(granule.words)))
			s := newScratch()
			m := model{}
			var stored, refused, windows int
			for op := range 2500 {
				ask1(st, s, rng.IntN(400), 0)
				have := m.of(&s.key)
				n := 60 + rng.IntN(300)
				if rng.IntN(5) == 0 {
					n = 60 + rng.IntN(60_000)
				}
				a := plainSample(class(rng.IntN(2)), n, int64(op))
				c := a.flags.class()
				fillRandom(rng, a.body)
				there := [classes]bool{inArena(st, s, success), inArena(st, s, denial)}
				entries, used, evicted := st.len(success)+st.len(denial), st.bytes(), s.events.evicted
				if insertSample(st, s, &a, int64(op)) {
					have[c] = &a
					stored++
					if s.events.evicted[c] > evicted[c]+8 {
						windows++
					}
				} else {
					refused++
					sh := st.shard(s.key.hash)
					if sh.granules(len(s.record)) <= sh.regions[c].alloc.Cap()/maxRecordShare {
						t.Fatalf("op %d: %d bytes were refused", op, n)
					}
					if st.len(success)+st.len(denial) != entries || st.bytes() != used || s.events.evicted != evicted ||
						there != [classes]bool{inArena(st, s, success), inArena(st, s, denial)} {
						t.Fatalf("op %d: a refused answer has changed something", op)
					}
				}
				ask1(st, s, rng.IntN(400), 0)
				have = m.of(&s.key)
				for c := range classes {
					if !inArena(st, s, c) {
						have[c] = nil
					}
				}
				want := expected(have, int64(op))
				if ok := st.lookup(s, int64(op)); ok != (want != nil) {
					t.Fatalf("op %d: answered %v", op, ok)
				} else if ok {
					if diff := want.check(s); diff != "" {
						t.Fatalf("op %d: %s differs", op, diff)
					}
				}
				if op%200 == 0 {
					checkStore(t, st)
				}
			}
			checkStore(t, st)
			if refused == 0 || windows == 0 {
				t.Errorf("%d stored, %d refused, %d by window: the test tests nothing", stored, refused, windows)
			}
		})
	}
}

func TestLargestRecordsAreTakenWithEverythingElseInTheWay(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		z := tinySizes([classes]int{1000, 1000}, granule.words)
		z.pieces = [classes]int{1, 1}
		st := openStore(t, z)
		s := newScratch()
		sh := &st.shards[0]
		most := sh.regions[success].alloc.Cap() / maxRecordShare
		for n := range 300 {
			ask1(st, s, n, 0)
			overhead := (headerWords + words(s.key.n)) * wordBytes
			small := plainSample(success, n%50, 0)
			insertSample(st, s, &small, 0)
			ask1(st, s, 1000+n, 0)
			large := plainSample(success, most*granule.words*wordBytes-overhead, 0)
			if n%7 != 0 {
				continue
			}
			if !insertSample(st, s, &large, 0) || sh.granules(len(s.record)) != most {
				t.Fatalf("%s: the largest record there may be (%d granules of %d) was not stored", granule.name, sh.granules(len(s.record)), most)
			}
			if !st.lookup(s, 0) || large.check(s) != "" {
				t.Fatalf("%s: the largest record there may be is not found", granule.name)
			}
			larger := plainSample(success, len(large.body)+1, 0)
			if insertSample(st, s, &larger, 0) {
				t.Fatalf("%s: a record over the limit was stored", granule.name)
			}
			if !st.lookup(s, 0) || large.check(s) != "" {
				t.Fatalf("%s: a record over the limit has changed the one before", granule.name)
			}
			checkStore(t, st)
		}
	}
}

func TestPromotionComesAtTheThreshold(t *testing.T) {
	t.Parallel()
	for _, threshold := range []int{1, 2, 3, 4, 254, 255} {
		for c := range classes {
			z := tinySizes([classes]int{10, 10}, alignedGranuleWords)
			z.hotAfter = uint32(threshold)
			st := openStore(t, z)
			s := newScratch()
			ask1(st, s, 1, 0)
			a := plainSample(c, 40, 0)
			insertSample(st, s, &a, 0)
			for hit := 1; hit <= threshold+300; hit++ {
				if !st.lookup(s, 0) || a.check(s) != "" {
					t.Fatalf("threshold %d: hit %d is none", threshold, hit)
				}
				want := tierProbationary
				if hit > threshold {
					want = tierHot
				}
				if s.tier != want {
					t.Fatalf("threshold %d: hit %d came from the %s tier, want %s", threshold, hit, tierNames[s.tier], tierNames[want])
				}
			}
			if e := s.events; e.promoted != [tiers]uint32{tierHot: 1} || e.demoted != [tiers]uint32{} {
				t.Errorf("threshold %d: events %+v", threshold, e)
			}
			checkStore(t, st)
		}
	}
}

func TestRecordTooLargeForTheHotTierStaysInTheArena(t *testing.T) {
	t.Parallel()
	st := openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
	s := newScratch()
	for n, tc := range []struct {
		words int
		hot   bool
	}{{hotSlotWords - 1, true}, {hotSlotWords, false}, {1000, false}} {
		ask1(st, s, n, 0)
		a := plainSample(success, (tc.words-headerWords-words(s.key.n))*wordBytes, 0)
		insertSample(st, s, &a, 0)
		if len(s.record) != tc.words {
			t.Fatalf("record of %d words, want %d", len(s.record), tc.words)
		}
		for range 10 {
			if !st.lookup(s, 0) || a.check(s) != "" {
				t.Fatalf("record of %d words is lost", tc.words)
			}
		}
		if (s.tier == tierHot) != tc.hot {
			t.Errorf("record of %d words is answered from the %s tier", tc.words, tierNames[s.tier])
		}
	}
	checkStore(t, st)
}

// hit looks s.key up n times and returns the tier of the last hit.
func hit(t *testing.T, st *store, s *scratch, n int, now int64) tier {
	t.Helper()
	for range n {
		if !st.lookup(s, now) {
			t.Fatalf("%q: a miss", s.key.name())
		}
	}
	return s.tier
}

// amid looks s.key up n times, while other names are stored again now and then, which is when
// the policy looks who has been asked for, and returns the tier of the last hit.
func amid(t *testing.T, st *store, s *scratch, n int, now int64) tier {
	t.Helper()
	other := newScratch()
	for i := range n {
		hit(t, st, s, 1, now)
		if i%4 == 3 {
			ask1(st, other, 8+i%2, 0)
			a := plainSample(success, 20, now)
			insertSample(st, other, &a, now)
		}
	}
	return s.tier
}

func TestHotCopyFollowsTheArena(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		st := openStore(t, tinySizes([classes]int{10, 10}, granule.words))
		s := newScratch()
		ask1(st, s, 1, 0)
		for gen := range 50 {
			a := plainSample(success, 20+gen, 0)
			insertSample(st, s, &a, 0)
			if gen == 0 {
				hit(t, st, s, 3, 0)
			}
			if hit(t, st, s, 1, 0) != tierHot || a.check(s) != "" {
				t.Fatalf("%s: answer %d is not what the hot tier has", granule.name, gen)
			}
			checkStore(t, st)
		}
		large := plainSample(success, 2000, 0)
		insertSample(st, s, &large, 0)
		if hit(t, st, s, 1, 0) == tierHot || large.check(s) != "" || inHotTier(st, s) {
			t.Errorf("%s: an answer that is too large for the hot tier", granule.name)
		}
		checkStore(t, st)
	}
}

func TestLargeRecordsDoNotPushEachOtherOut(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		z := tinySizes([classes]int{2000, 10}, granule.words)
		z.pieces[success] = 1
		st := openStore(t, z)
		s := newScratch()
		for n := range 2000 { // the memory is full of small ones
			ask1(st, s, n, 0)
			a := plainSample(success, 10, 0)
			insertSample(st, s, &a, 0)
		}
		const large = 20
		a := plainSample(success, pieceBytes/5-300, 0)
		for n := range large {
			ask1(st, s, 5000+n, 0)
			if !insertSample(st, s, &a, 0) {
				t.Fatalf("%s: large record %d was refused", granule.name, n)
			}
			for older := max(n-2, 0); older < n; older++ {
				if ask1(st, s, 5000+older, 0); !st.lookup(s, 0) {
					t.Errorf("%s: large record %d went for %d, and there is room for four", granule.name, older, n)
				}
			}
			checkStore(t, st)
		}
	}
}

func TestHotCopyOfTheDeadIsRenewed(t *testing.T) {
	t.Parallel()
	st := openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
	s := newScratch()
	ask1(st, s, 1, 0)
	a := plainSample(success, 20, 0)
	a.ttl = 5
	insertSample(st, s, &a, 0)
	hit(t, st, s, 4, 0)
	if st.lookup(s, 5e9) {
		t.Fatal("a dead answer is served")
	}
	a.stored = 6e9
	insertSample(st, s, &a, 6e9)
	if hit(t, st, s, 1, 6e9) != tierHot || a.check(s) != "" {
		t.Error("a popular name that died and came back is not hot")
	}
	checkStore(t, st)
}

func TestOtherClassEndsTheHotCopy(t *testing.T) {
	t.Parallel()
	for c := range classes {
		st := openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
		s := newScratch()
		ask1(st, s, 1, 0)
		a := plainSample(c, 20, 0)
		insertSample(st, s, &a, 0)
		if hit(t, st, s, 4, 0) != tierHot {
			t.Fatal("not hot")
		}
		b := plainSample(1-c, 30, 0)
		insertSample(st, s, &b, 0)
		want := &a
		if c == success {
			want = &b
		}
		for range 20 { // and it does not become hot while both are there
			if hit(t, st, s, 1, 0) == tierHot || want.check(s) != "" || inHotTier(st, s) {
				t.Fatalf("class %d was hot, then the other came: answered by class %d from the %s tier", c, s.entry.class(), tierNames[s.tier])
			}
		}
		if s.events.demoted[tierHot] != 1 {
			t.Errorf("%d demotions from the hot tier", s.events.demoted[tierHot])
		}
		checkStore(t, st)
	}
}

func TestDemotedIsNotLost(t *testing.T) {
	t.Parallel()
	z := tinySizes([classes]int{500, 10}, alignedGranuleWords)
	z.hotSets = 1
	st := openStore(t, z)
	s := newScratch()
	const names = 100
	for n := range names {
		ask1(st, s, n, 0)
		a := plainSample(success, 20+n%40, 0)
		insertSample(st, s, &a, 0)
	}
	// All of them ask for four places; who gets one pushes another out.
	for range 20 {
		for n := range names {
			ask1(st, s, n, 0)
			if !st.lookup(s, 0) || s.entry.bodyLen != 20+n%40 {
				t.Fatalf("name %d is lost", n)
			}
		}
	}
	if s.events.demoted[tierHot] == 0 {
		t.Error("nobody was demoted: the test tests nothing")
	}
	if s.events.evicted != [classes]uint32{} {
		t.Errorf("%d evictions", s.events.evicted)
	}
	checkStore(t, st)
}

// promotable returns a store of one hot set and ten names, of which the first four live 10 s.
func promotable(t *testing.T) (*store, *scratch) {
	z := tinySizes([classes]int{500, 10}, alignedGranuleWords)
	z.hotSets = 1
	st := openStore(t, z)
	s := newScratch()
	for n := range 10 {
		ask1(st, s, n, 0)
		a := plainSample(success, 20, 0)
		if n < hotWays {
			a.ttl = 10
		}
		insertSample(st, s, &a, 0)
	}
	return st, s
}

func TestPromotionThatMetAnotherWriterComesLater(t *testing.T) {
	t.Parallel()
	st, s := promotable(t)
	ask1(st, s, 5, 0)
	func() {
		sh := st.shard(s.key.hash)
		sh.mu.Lock()
		defer sh.mu.Unlock()
		if hit(t, st, s, 3, 0) != tierProbationary {
			t.Error("promoted without the lock")
		}
	}()
	if got := amid(t, st, s, 300, 0); got != tierHot {
		t.Errorf("300 hits later it is in the %s tier: the entry is never promoted", tierNames[got])
	}
	checkStore(t, st)
}

func TestWhoChallengesOftenEnoughBecomesHot(t *testing.T) {
	t.Parallel()
	st, s := promotable(t)
	for n := range hotWays {
		ask1(st, s, n, 0)
		if hit(t, st, s, 5, 0) != tierHot {
			t.Fatalf("name %d is not hot", n)
		}
	}
	// The four are not asked for again.
	ask1(st, s, 5, 0)
	if got := amid(t, st, s, 1000, 0); got != tierHot {
		t.Errorf("1000 hits later it is in the %s tier, behind names that nobody asks for", tierNames[got])
	}
	checkStore(t, st)
}

func TestWhoHasLeftTheHotTierCanComeBack(t *testing.T) {
	t.Parallel()
	st, s := promotable(t)
	for n := range hotWays {
		ask1(st, s, n, 0)
		hit(t, st, s, 5, 0)
	}
	// All four are dead for a moment, and others take their slots.
	for n := hotWays; n < 2*hotWays; n++ {
		ask1(st, s, n, 0)
		if hit(t, st, s, 5, 10e9) != tierHot {
			t.Fatalf("name %d is not hot", n)
		}
	}
	ask1(st, s, 0, 0)
	a := plainSample(success, 20, 10e9)
	insertSample(st, s, &a, 10e9)
	if got := amid(t, st, s, 1000, 10e9); got != tierHot {
		t.Errorf("1000 hits after its return the name is in the %s tier", tierNames[got])
	}
	checkStore(t, st)
}

func TestAnswerIsHotOnceTheDenialIsDead(t *testing.T) {
	t.Parallel()
	st, s := promotable(t)
	ask1(st, s, 5, 0)
	d := plainSample(denial, 20, 0)
	d.flags |= rcodeServerFailure
	d.ttl = 5
	insertSample(st, s, &d, 0)
	hit(t, st, s, 10, 0) // the answer is popular, but two classes have the key
	a := plainSample(success, 20, 6e9)
	insertSample(st, s, &a, 6e9)
	if got := amid(t, st, s, 100, 6e9); got != tierHot {
		t.Errorf("100 hits after the failure is gone the answer is in the %s tier", tierNames[got])
	}
	checkStore(t, st)
}

func TestAnswerIsHotOnceItIsSmallEnough(t *testing.T) {
	t.Parallel()
	st, s := promotable(t)
	ask1(st, s, 5, 0)
	a := plainSample(success, 1000, 0)
	insertSample(st, s, &a, 0)
	hit(t, st, s, 10, 0)
	a = plainSample(success, 50, 0)
	insertSample(st, s, &a, 0)
	if got := amid(t, st, s, 100, 0); got != tierHot {
		t.Errorf("100 hits after it has shrunk the answer is in the %s tier", tierNames[got])
	}
	checkStore(t, st)
}

func TestResizedHotTierStartsEmpty(t *testing.T) {
	t.Parallel()
	z := tinySizes([classes]int{100, 10}, alignedGranuleWords)
	z.hotSets, z.autoHot = 20, true
	st := openStore(t, z)
	s := newScratch()
	for n := range 40 {
		ask1(st, s, n, 0)
		a := plainSample(success, 20, 0)
		insertSample(st, s, &a, 0)
		hit(t, st, s, 5, 0)
	}
	for _, share := range []int64{1000, 50, 1, 400, 1000} {
		st.climber.hot.Store(share)
		before := st.hotCapacity()
		ask1(st, s, 50, 0)
		a := plainSample(success, 20, 0)
		insertSample(st, s, &a, 0)
		checkStore(t, st)
		want := max(20*share/1000, 1) * hotWays
		if got := st.hotCapacity(); got != want {
			t.Errorf("room for %d hot entries, want %d", got, want)
		}
		if got := st.hotCapacity(); got != before {
			for n := range 40 {
				if ask1(st, s, n, 0); inHotTier(st, s) {
					t.Errorf("name %d was copied before the hot tier got another size", n)
				}
			}
		}
		copied := 0
		for n := range 40 {
			if ask1(st, s, n, 0); hit(t, st, s, 10, 0) == tierHot {
				copied++
			}
		}
		if copied == 0 {
			t.Errorf("nobody becomes hot in %d sets", st.shards[0].hot.sets.Load())
		}
		checkStore(t, st)
	}
}

func TestSaturatedHitWritesNothing(t *testing.T) {
	t.Parallel()
	for _, size := range []int{20, 2000} { // in the hot tier, and too large for it
		st := openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
		s := newScratch()
		ask1(st, s, 1, 0)
		a := plainSample(success, size, 0)
		insertSample(st, s, &a, 0)
		hit(t, st, s, 300, 0)
		slots, hot, data := slices.Clone(st.slots.Words()), slices.Clone(st.hot.Words()), slices.Clone(st.data.Words())
		hit(t, st, s, 100, 0)
		if !slices.Equal(slots, st.slots.Words()) || !slices.Equal(hot, st.hot.Words()) || !slices.Equal(data, st.data.Words()) {
			t.Errorf("body of %d bytes: a hit writes although every counter is saturated", size)
		}
	}
}

func TestHitAllocatesNothing(t *testing.T) {
	for _, granule := range granuleSizes {
		for _, size := range []int{20, 600, 3000} {
			st := openStore(t, tinySizes([classes]int{10, 10}, granule.words))
			s := newScratch()
			ask1(st, s, 1, 0)
			a := plainSample(success, size, 0)
			a.wildcard = "*.example."
			insertSample(st, s, &a, 0)
			if !st.lookup(s, 0) { // the buffers grow
				t.Fatal("a miss")
			}
			// The promotion is among these.
			if n := testing.AllocsPerRun(100, func() { st.lookup(s, 0) }); n != 0 {
				t.Errorf("%s, %d bytes, %s tier: %v allocations", granule.name, size, tierNames[s.tier], n)
			}
			ask1(st, s, 2, 0)
			if n := testing.AllocsPerRun(100, func() { st.lookup(s, 0) }); n != 0 {
				t.Errorf("%s: %v allocations for a miss", granule.name, n)
			}
		}
	}
}

func TestCollidingNamesKeepApart(t *testing.T) {
	t.Parallel()
	const names = 10 // one bucket of one home, and some of the next
	z := tinySizes([classes]int{names, 4}, packedGranuleWords)
	z.hotSets, z.buckets = 1, 2
	st := openStore(t, z)
	s := newScratch()
	where := func(hash uint64) uint64 { return hash>>48<<1 | hash>>47&1 } // tag and one of two buckets
	ask1(st, s, 0, 0)
	home := where(s.key.hash)
	var numbers []int
	for n := 0; len(numbers) < names; n++ {
		if ask1(st, s, n, 0); where(s.key.hash) == home {
			numbers = append(numbers, n)
		}
		if n > 50e6 {
			t.Fatal("no names that collide")
		}
	}
	rng := rand.New(rand.NewPCG(3, 4))
	stored := map[int]*sample{}
	for round := range 800 {
		n := numbers[rng.IntN(names)]
		ask1(st, s, n, 0)
		if rng.IntN(3) == 0 {
			a := plainSample(success, 1+rng.IntN(100), int64(round))
			a.ttl = 1e6 + uint32(n)
			if !insertSample(st, s, &a, 0) {
				t.Fatal("refused")
			}
			stored[n] = &a
		}
		if rng.IntN(50) == 0 {
			sh := &st.shards[0]
			sh.lock(s, 0)
			if slot, ok := sh.locate(&s.key, success.kind()); ok {
				id, _ := sh.at(slot)
				sh.drop(id)
			}
			sh.unlock()
			delete(stored, n)
		}
		for _, n := range numbers {
			ask1(st, s, n, 0)
			a := stored[n]
			if ok := st.lookup(s, 0); ok != (a != nil) {
				t.Fatalf("round %d: answered %v, stored %v", round, ok, a != nil)
			}
			if a != nil && a.check(s) != "" {
				t.Fatalf("round %d: another's answer", round)
			}
		}
		if round%100 == 0 {
			checkStore(t, st)
		}
	}
}

func TestNamesOfOneHashKeepApart(t *testing.T) {
	t.Parallel()
	const names, hash = 30, 0x1234_5678_9abc_0000
	z := tinySizes([classes]int{40, 40}, packedGranuleWords)
	z.hotSets = 1
	st := openStore(t, z)
	s := newScratch()
	for round := range 10 {
		for n := range names {
			ask1(st, s, n, 0)
			s.key.hash = hash
			a := plainSample(success, 1+n, int64(round))
			insertSample(st, s, &a, 0)
			if n%5 == 0 {
				d := plainSample(denial, 101+n, int64(round))
				insertSample(st, s, &d, 0)
			}
		}
		for n := range 2 * names {
			ask1(st, s, n, 0)
			s.key.hash = hash
			want := 1 + n
			if n%5 == 0 {
				want += 100
			}
			for range 4 {
				if ok := st.lookup(s, 0); ok != (n < names) || ok && (s.entry.bodyLen != want || s.entry.stored != int64(round)) {
					t.Fatalf("round %d, name %d: answered %v with %d bytes of %d", round, n, ok, s.entry.bodyLen, s.entry.stored)
				}
			}
		}
		checkStore(t, st)
	}
}

// TestSeqIsThatOfAFinishedRecord watches a place that is written again and again. A reader that
// came by an old slot, and finds the slot pointing there once more when it has copied the record,
// has only the seq to tell whether it copied while the record was written. So when a seq can be
// seen, all words of its record can.
func TestSeqIsThatOfAFinishedRecord(t *testing.T) {
	t.Parallel()
	const writes, recordWords = 3000, 2000
	st := openStore(t, tinySizes([classes]int{10, 10}, alignedGranuleWords))
	sh := &st.shards[0]
	place := sh.regions[success].at(0)
	first := sh.seq
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			seq := atomic.LoadUint64(&place[wordSeq])
			last := atomic.LoadUint64(&place[recordWords-1])
			if n := seq - first; seq != 0 && n <= writes && last < n {
				t.Errorf("the seq of write %d stands before a word of write %d", n, last)
				return
			}
		}
	})
	record := make([]uint64, recordWords)
	for n := uint64(1); n <= writes; n++ {
		for i := range record {
			record[i] = n
		}
		sh.write(success, 0, record)
	}
	stop.Store(true)
	wg.Wait()
}

func TestClosedStoreIsEmpty(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		z := tinySizes([classes]int{100, 100}, granule.words)
		st := openStore(t, z)
		s := newScratch()
		for n := range 100 {
			ask1(st, s, n, 0)
			a := plainSample(class(n%2), 30, 0)
			insertSample(st, s, &a, 0)
			hit(t, st, s, 5, 0)
		}
		fixed := st.fixed()
		st.close()
		for n := range 100 {
			ask1(st, s, n, 0)
			a := plainSample(class(n%2), 30, 0)
			if st.lookup(s, 0) || insertSample(st, s, &a, 0) || st.lookup(s, 0) {
				t.Fatal("a closed store answers or stores")
			}
		}
		if st.len(success) != 0 || st.len(denial) != 0 || st.bytes() != fixed {
			t.Errorf("a closed store has %d and %d entries and %d bytes", st.len(success), st.len(denial), st.bytes())
		}
		st.close() // a second time does no harm
	}
}

// stressNow is the time of the stress tests.
const stressNow = int64(1e9)

// A record of the stress tests checks itself: its body says for which key and of which generation
// it is, over and over, and its length, TTL, counts and wildcard follow from that.
func selfChecking(key uint64, gen uint64, largest int) (a sample) {
	x := (key+1)*0x9e3779b97f4a7c15 ^ gen*0xc2b2ae3d27d4eb4f
	x ^= x >> 29
	n := 16 + int(x%97)
	if x>>8%8 == 0 {
		n = 16 + int(x>>16%uint64(largest))
	}
	a = sample{ttl: uint32(x>>20&0xffff) + 1e6, stored: stressNow, body: make([]byte, n)}
	if key%4 == 3 && x>>40%2 == 0 {
		a.flags = flagDenial | 3
	}
	var pattern [16]byte
	binary.LittleEndian.PutUint64(pattern[:], key)
	binary.LittleEndian.PutUint64(pattern[8:], gen)
	for i := 0; i < n; i += copy(a.body[i:], pattern[:]) {
	}
	records := int(x >> 44 % 4)
	for i := range records {
		a.counts[i%3]++
		a.ttlAt = append(a.ttlAt, uint16((x+uint64(i))&7))
	}
	if x>>50%4 == 0 {
		a.wildcard = string(a.body[:1+x>>52%15])
	}
	return a
}

// checkSelf compares what a reader got for a key with what the answer itself says that it is.
func checkSelf(s *scratch, key uint64, largest int) error {
	got := s.out[s.body:][:s.entry.bodyLen]
	if len(got) < 16 {
		return fmt.Errorf("key %d: a body of %d bytes", key, len(got))
	}
	of, gen := binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint64(got[8:])
	if of != key {
		return fmt.Errorf("key %d: the answer of key %d, generation %d, from the %s tier", key, of, gen, tierNames[s.tier])
	}
	want := selfChecking(key, gen, largest)
	if diff := want.check(s); diff != "" {
		return fmt.Errorf("key %d: %s is not that of generation %d, from the %s tier", key, diff, gen, tierNames[s.tier])
	}
	return nil
}

func TestReadersBesideWriters(t *testing.T) {
	for _, tc := range []struct {
		name    string
		z       sizes
		keys    int
		largest int
		ops     int // of each goroutine
	}{
		{"aligned", sizes{shards: 4, capacity: [classes]int{200, 100}, granuleWords: alignedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(75), hotSets: 2, hotAfter: 3}, 600, 3000, 20_000},
		{"packed", sizes{shards: 4, capacity: [classes]int{200, 100}, granuleWords: packedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(75), hotSets: 2, hotAfter: 2}, 600, 3000, 20_000},
		{"tiny aligned", sizes{shards: 1, capacity: [classes]int{6, 3}, granuleWords: alignedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(9), hotSets: 1, hotAfter: 1}, 12, 600, 20_000},
		{"tiny packed", sizes{shards: 1, capacity: [classes]int{6, 3}, granuleWords: packedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(9), hotSets: 1, hotAfter: 1}, 12, 600, 20_000},
		{"little memory", sizes{shards: 1, capacity: [classes]int{2000, 1000}, granuleWords: packedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(3000), hotSets: 20, hotAfter: 1}, 2000, 9000, 10_000},
		{"hot tier of changing size", sizes{shards: 1, capacity: [classes]int{100, 50}, granuleWords: packedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(150), hotSets: 12, autoHot: true, hotAfter: 1}, 100, 100, 20_000},
		{"one key", sizes{shards: 1, capacity: [classes]int{2, 2}, granuleWords: packedGranuleWords,
			pieces: [classes]int{1, 1}, buckets: index.Buckets(4), hotAfter: 1}, 1, 20_000, 8_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			st := openStore(t, tc.z)
			var gen, lookups, hits atomic.Uint64
			var closing atomic.Bool
			var failed atomic.Bool
			var wg sync.WaitGroup
			run := func(seed uint64, writes int, forever bool) {
				rng := rand.New(rand.NewPCG(seed, 77))
				zipf := rand.NewZipf(rng, 1.2, 3, uint64(max(tc.keys-1, 1)))
				s := newScratch()
				for op := 0; (op < tc.ops || forever && !closing.Load()) && !failed.Load(); op++ {
					key := zipf.Uint64() % uint64(tc.keys)
					ask1(st, s, int(key), 0)
					if rng.IntN(100) < writes {
						a := selfChecking(key, gen.Add(1), tc.largest)
						if tc.z.autoHot && op%16 == 0 {
							st.climber.hot.Store(rng.Int64N(1000))
						}
						insertSample(st, s, &a, stressNow)
						continue
					}
					lookups.Add(1)
					if !st.lookup(s, stressNow) {
						continue
					}
					hits.Add(1)
					if err := checkSelf(s, key, tc.largest); err != nil {
						failed.Store(true)
						t.Error(err)
						return
					}
				}
			}
			for i := range uint64(4) {
				wg.Go(func() { run(i, []int{0, 2, 20, 60}[i], false) })
			}
			wg.Wait()
			checkStore(t, st)
			if hits.Load() == 0 || hits.Load() == lookups.Load() && tc.keys > 1 {
				t.Errorf("%d hits in %d lookups: the test tests nothing", hits.Load(), lookups.Load())
			}

			// And once more, with the store closed under the hands of all.
			for i := range uint64(4) {
				wg.Go(func() { run(100+i, []int{0, 2, 20, 60}[i], true) })
			}
			for range 2000 {
				st.len(success)
				st.bytes()
			}
			st.close()
			closing.Store(true)
			wg.Wait()
			s := newScratch()
			for key := range tc.keys {
				ask1(st, s, key, 0)
				if st.lookup(s, stressNow) {
					t.Fatalf("key %d is found after close", key)
				}
			}
			if st.len(success) != 0 || st.len(denial) != 0 {
				t.Errorf("%d and %d entries after close", st.len(success), st.len(denial))
			}
		})
	}
}

// TestReaderThatIsPutToSleep has more threads than cores, so that the kernel stops readers in the
// midst of a record. When they go on, the record has been replaced several times, and its place
// has been used for other records of the same name, one of which may stand there once more.
func TestReaderThatIsPutToSleep(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	for _, granule := range granuleSizes {
		const largest = 24_000
		writes := int64(2500)
		if raceEnabled {
			writes = 300 // the race detector need not see a torn record
		}
		z := tinySizes([classes]int{2, 2}, granule.words)
		z.pieces = [classes]int{2, 2}
		z.hotSets = 0
		st := openStore(t, z)
		var left atomic.Int64
		left.Store(writes)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				s := newScratch()
				ask1(st, s, 0, 0)
				for n := left.Add(-1); n > 0; n = left.Add(-1) {
					a := longSample(uint64(n), largest)
					insertSample(st, s, &a, stressNow)
				}
			})
		}
		for range 4 {
			wg.Go(func() {
				s := newScratch()
				ask1(st, s, 0, 0)
				for left.Load() > 0 {
					if !st.lookup(s, stressNow) {
						continue
					}
					body := s.out[s.body:][:s.entry.bodyLen]
					gen := binary.LittleEndian.Uint64(body)
					same := len(body) == longLength(gen, largest) && s.entry.ttl == uint32(gen)+1e6
					for i := 0; same && i < len(body); i += 8 {
						same = binary.LittleEndian.Uint64(body[i:]) == gen
					}
					if !same {
						t.Errorf("%s: %d bytes that begin as generation %d, TTL %d: not one answer", granule.name, len(body), gen, s.entry.ttl)
						left.Store(0)
						return
					}
				}
			})
		}
		wg.Wait()
		checkStore(t, st)
	}
}

func longLength(gen uint64, largest int) int { return largest - int(gen%3)*8 }

// longSample is an answer of generation gen: about largest bytes that say so over and over.
func longSample(gen uint64, largest int) sample {
	a := sample{ttl: uint32(gen) + 1e6, stored: stressNow, body: make([]byte, longLength(gen, largest))}
	for i := 0; i < len(a.body); i += 8 {
		binary.LittleEndian.PutUint64(a.body[i:], gen)
	}
	return a
}
