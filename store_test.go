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

	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/sketch"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// These tests are about the whole engine, without DNS: store, index, region, policy and hot tier together. Time is a number
// that the tests choose.

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

// tinySizes returns the layout of a store with one shard.
func tinySizes(capacity [record.Classes]int, granuleWords int) sizes {
	return sizes{
		shards: 1, capacity: capacity, granuleWords: granuleWords, pieces: [record.Classes]int{1, 1},
		buckets: index.Buckets(capacity[record.Success] + capacity[record.Denial]), hotSets: 4, hotAfter: 3,
	}
}

var granuleSizes = []struct {
	name  string
	words int
}{{"packed", packedGranuleWords}, {"aligned", alignedGranuleWords}}

// ask1 sets s.Key to that of a question. The question is given by a number of up to nine digits. Bits 0 and 1 of variant are
// DO and CD.
func ask1(st *store, s *scratch, n, variant int) {
	name := []byte("\x0ehost-000000000\x07example\x00")
	for i := 14; n > 0; i, n = i-1, n/10 {
		name[i] += byte(n % 10)
	}
	s.Key.Set(st.seed, name, 1, 1, variant&record.KeyDO != 0, variant&record.KeyCD != 0)
	s.Body = wire.HeaderLen + len(name) + wire.QuestionTail
}

// insertSample stores an answer for s.Key.
func insertSample(st *store, s *scratch, a *sample, now int64) bool {
	e := a.header()
	s.TTLAt = append(s.TTLAt[:0], a.ttlAt...)
	return st.insert(s, &e, a.body, a.wildcard, now)
}

// plainSample returns an answer with a long TTL and a body of n bytes.
func plainSample(c record.Class, n int, now int64) sample {
	a := sample{ttl: 1e6, stored: now, body: bytes.Repeat([]byte{byte(n)}, n)}
	if c == record.Denial {
		a.flags = record.FlagDenial
	}
	return a
}

// inArena reports whether the region has a record of s.Key with the usual kind of a class.
func inArena(st *store, s *scratch, c record.Class) bool { return inArenaAs(st, s, usualKind(c)) }

// inArenaAs reports whether the region has a record of s.Key of a kind.
func inArenaAs(st *store, s *scratch, kind record.Flags) bool {
	sh := st.shard(s.Key.Hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	_, ok := sh.locate(&s.Key, kind)
	return ok
}

// inHotTier reports whether the hot tier has a copy for s.Key.
func inHotTier(st *store, s *scratch) bool {
	sh := st.shard(s.Key.Hash)
	_, ok := sh.hot.find(s.Key.Hash, &s.Key, none)
	return ok
}

// checkStore fails if two parts of the store contradict each other.
func checkStore(tb testing.TB, st *store) {
	tb.Helper()
	var entries [record.Classes]int64
	for i := range st.shards {
		checkShard(tb, st, &st.shards[i], uint64(i))
		for c := range entries {
			entries[c] += st.shards[i].held[st.seed.Owner()].entries[c].Load()
		}
	}
	for c := range entries {
		if got := st.len(record.Class(c)); got != entries[c] {
			tb.Fatalf("len(%d) is %d, want %d", c, got, entries[c])
		}
	}
	if u := st.usage(); u.used > u.reserved || u.reserved > st.bound() {
		tb.Fatalf("%d bytes of %d, the bound is %d", u.used, u.reserved, st.bound())
	}
}

// checkShard fails unless index slots, nodes, records, runs of the allocator and copies in the hot tier belong together.
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

	var granules, heavies [record.Classes]int
	var starts []int
	var keys [record.Classes]map[string]bool
	copies := 0
	seqs := map[uint64]bool{}
	for c := range keys {
		keys[c] = map[string]bool{}
	}
	for _, id := range live {
		n := &sh.policy.nodes[id]
		slot := sh.index.Load(int(n.slot))
		if slot.Empty() || record.Class(slot.Class()) != n.class || slot.Marked() != (n.segment == protected) || slot.Count() > sh.saturate {
			tb.Fatalf("node %d %+v: slot %#x", id, *n, slot)
		}
		w, ok := sh.record(slot)
		if !ok {
			tb.Fatalf("node %d points past its region", id)
		}
		e := record.LoadEntry(w)
		if e.Node() != id || e.Flags.Class() != n.class || !e.Sane(len(w)) || e.Seq > sh.seq || seqs[e.Seq] {
			tb.Fatalf("node %d %+v: record %+v, seq of the shard %d", id, *n, e, sh.seq)
		}
		if want := second(e.Stored) + e.TTL + uint32(st.all()[record.Owner(e.Hash)].stale); n.expires != want {
			tb.Fatalf("node %d expires at %d, its record at %d", id, n.expires, want)
		}
		seqs[e.Seq] = true
		var k record.Key
		record.LoadBytes(k.Bytes[:record.Words(e.KeyLen)*record.WordBytes], w[record.HeaderWords:][:record.Words(e.KeyLen)])
		k.Len, k.Hash = e.KeyLen, e.Hash
		if k.Hash&uint64(len(st.shards)-1) != number {
			tb.Fatalf("node %d is in the wrong shard", id)
		}
		name := string(k.Bytes[:k.Len])
		if of := fmt.Sprint(e.Flags.Kind(), record.Owner(e.Hash), name); keys[n.class][of] {
			tb.Fatalf("node %d: the class has its key twice as one kind", id)
		} else {
			keys[n.class][of] = true
		}
		if at, ok := sh.locate(&k, e.Flags.Kind()); !ok || at != int(n.slot) {
			tb.Fatalf("node %d of slot %d: located %v at %d", id, n.slot, ok, at)
		}
		granules[n.class] += sh.granules(e.Size)
		if (e.Size > heavyWords) != (n.segment == heavy) {
			tb.Fatalf("node %d of %d words is in segment %d", id, e.Size, n.segment)
		}
		if n.segment == heavy {
			heavies[n.class] += sh.granules(e.Size)
		}
		starts = append(starts, int(slot.Pos()))

		hs, ok := sh.hot.find(e.Hash, nil, id)
		if ok != n.hot {
			tb.Fatalf("node %d: hot %v, but copied %v", id, n.hot, ok)
		}
		if !ok {
			continue
		}
		copies++
		if byKey, ok := sh.hot.find(e.Hash, &k, none); !ok || byKey.set != hs.set || byKey.way != hs.way {
			tb.Fatalf("node %d: its copy is not found by key", id)
		}
		if c := record.LoadEntry(hs.record); c.Seq&1 != 0 || e.Size > len(hs.record) || !slices.Equal(hs.record[1:e.Size], w[1:e.Size]) {
			tb.Fatalf("node %d: the copy %+v differs from the record %+v", id, c, e)
		}
		if sh.hasOther(&k, int(n.slot)) {
			tb.Fatalf("node %d has a copy, but the key has another record, too", id)
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

	r := &sh.region
	slices.Sort(starts)
	at := 0
	for _, want := range starts {
		start, ok := r.alloc.FirstIn(at, r.alloc.Cap())
		if !ok || start != want {
			tb.Fatalf("a run at %d, %v; a record at %d", start, ok, want)
		}
		at = start + 1
	}
	if start, ok := r.alloc.FirstIn(at, r.alloc.Cap()); ok {
		tb.Fatalf("a run at %d without a record", start)
	}
	used := 0
	for c := range record.Classes {
		if granules[c] != r.used[c] || heavies[c] != r.heavy[c] {
			tb.Fatalf("class %d: %d granules in records, %d in heavy ones; counted %d and %d", c, granules[c], heavies[c], r.used[c], r.heavy[c])
		}
		used += granules[c]
		d := &sh.policy.classes[c]
		var entries int64
		held := 0
		for i := range sh.held {
			entries += sh.held[i].entries[c].Load()
			held += sh.held[i].granules[c]
		}
		if got := d.entries(); int64(got) != entries || granules[c] != held {
			tb.Fatalf("class %d: %d entries, counted %d; %d granules, counted %d", c, got, entries, granules[c], held)
		}
	}
	if used != r.alloc.Used() {
		tb.Fatalf("%d granules in records, the allocator has %d", used, r.alloc.Used())
	}
}

// usualKind returns the kind that the records of a class have without prefer_positive.
func usualKind(c record.Class) record.Flags {
	if c == record.Denial {
		return record.FlagDenial
	}
	return 0
}

// recordBytes returns the memory that the store's records take, in bytes.
func (st *store) recordBytes() (n int64) {
	for i := range st.shards {
		sh := &st.shards[i]
		n += int64(sh.region.alloc.Used()*sh.granule) * record.WordBytes
	}
	return n
}

// model is a store that never evicts.
type model map[string]*held

// held has the answers of one key: a positive answer, a denial, and a failure. Each may be nil.
type held [3]*sample

const failure = 2

// modelKinds are the kinds of records that the model knows, in the order of held.
var modelKinds = [...]record.Flags{0, record.FlagDenial, record.FlagDenial | record.FlagVoid}

func (m model) of(k *record.Key) *held {
	name := string(k.Bytes[:k.Len])
	if m[name] == nil {
		m[name] = new(held)
	}
	return m[name]
}

func (a *sample) alive(now int64) bool { return a != nil && now < a.stored+int64(a.ttl)*1e9 }

// expected returns the answer that the store should serve when it has these. A denial comes before a positive answer, and a
// failure after it.
func expected(have *held, now int64) *sample {
	for _, i := range []int{int(record.Denial), int(record.Success), failure} {
		if have[i].alive(now) {
			return have[i]
		}
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
		{"roomy aligned", sizes{shards: 4, capacity: [record.Classes]int{4000, 4000}, granuleWords: alignedGranuleWords,
			pieces: [record.Classes]int{20, 20}, buckets: index.Buckets(2000), hotSets: 20, hotAfter: 3}, 300, 12_000, 400, true},
		{"roomy packed", sizes{shards: 2, capacity: [record.Classes]int{4000, 4000}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{20, 20}, buckets: index.Buckets(4000), hotSets: 5, hotAfter: 1}, 300, 12_000, 400, true},
		{"roomy without hot tier", sizes{shards: 1, capacity: [record.Classes]int{4000, 4000}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{32, 32}, buckets: index.Buckets(8000), hotAfter: 3}, 200, 6_000, 400, true},
		{"few entries", sizes{shards: 2, capacity: [record.Classes]int{60, 30}, granuleWords: alignedGranuleWords,
			pieces: [record.Classes]int{2, 2}, buckets: index.Buckets(45), hotSets: 1, hotAfter: 2}, 100, 20_000, 300, false},
		{"little memory", sizes{shards: 1, capacity: [record.Classes]int{3000, 3000}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{2, 1}, buckets: index.Buckets(6000), hotSets: 3, hotAfter: 3}, 1500, 20_000, 80_000, false},
		{"little aligned memory", sizes{shards: 1, capacity: [record.Classes]int{2000, 2000}, granuleWords: alignedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(4000), hotSets: 3, hotAfter: 3}, 800, 20_000, 60_000, false},
		{"one entry", sizes{shards: 1, capacity: [record.Classes]int{1, 1}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(2), hotSets: 1, hotAfter: 1}, 4, 10_000, 100, false},
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
				have := m.of(&s.Key)
				// A record that is gone was evicted. A record that is there must have been stored.
				for c, kind := range modelKinds {
					there := inArenaAs(st, s, kind)
					if there && have[c] == nil {
						t.Fatalf("op %d: kind %d has a key that was never stored, or dropped", op, c)
					}
					if !there && have[c] != nil {
						if tc.roomy {
							t.Fatalf("op %d: kind %d lost a key", op, c)
						}
						have[c] = nil
					}
				}
				switch what := rng.IntN(100); {
				case what < 30:
					length := rng.IntN(120)
					if rng.IntN(8) == 0 {
						length = rng.IntN(min(tc.largest, record.MaxMessage))
					}
					a := randomSample(rng, record.Class(rng.IntN(3)/2), length, now)
					kind := slices.Index(modelKinds[:], a.flags.Kind())
					before := *have
					if insertSample(st, s, &a, now) {
						if before[kind] == nil {
							made++
						}
						for other := range have { // a positive answer or a denial replaces all others, a failure none
							if other != kind && kind != failure && have[other] != nil {
								if inArenaAs(st, s, modelKinds[other]) {
									t.Fatalf("op %d: kind %d is kept beside a later one of kind %d", op, other, kind)
								}
								have[other] = nil
								dropped++
							}
						}
						have[kind] = &a
						if !inArenaAs(st, s, modelKinds[kind]) {
							t.Fatalf("op %d: stored, but not there", op)
						}
						break
					}
					refused++
					if len(s.Words) <= heavyWords {
						t.Fatalf("op %d: refused %d words", op, len(s.Words))
					}
					for other := range have {
						if have[other] != nil && !inArenaAs(st, s, modelKinds[other]) {
							have[other] = nil // it was dropped for the record that was refused
							dropped++
						}
					}
				case what < 97:
					want := expected(have, now)
					fillBytes(rng, s.Out[:s.Body])
					question := slices.Clone(s.Out[:s.Body])
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
					if !bytes.Equal(s.Out[:s.Body], question) {
						t.Fatalf("op %d: the question has changed", op)
					}
					if left := s.Entry.Remaining(now); left < 1 || left > int64(want.ttl) {
						t.Fatalf("op %d: TTL %d of %d", op, left, want.ttl)
					}
				case what < 99:
					now += rng.Int64N(2e9)
				default: // all entries expire
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
			if left := int(st.len(record.Success) + st.len(record.Denial)); left > made-evicted || left < made-evicted-dropped {
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

// An answer or a denial replaces the older records of its key. A failure, or a response that says nothing, replaces only
// records of its kind, and is served only if there is nothing else to serve.
func TestWhatReplacesWhat(t *testing.T) {
	t.Parallel()
	const nxdomain = 3
	answer, name, data := record.Flags(0), record.FlagDenial|nxdomain, record.FlagDenial
	servfail, notimp, nothing, best := record.FlagDenial|record.FlagVoid|record.RcodeServerFailure, record.FlagDenial|record.FlagVoid|4, record.FlagVoid, record.FlagAnswers
	for _, tc := range []struct {
		old, new record.Flags
		ended    bool // the new record replaces the old one
		served   record.Flags
	}{
		{answer, name, true, name}, {answer, data, true, data}, {name, answer, true, answer}, {data, answer, true, answer},
		{answer, answer, true, answer}, {name, data, true, data},
		{answer, servfail, false, answer}, {answer, notimp, false, answer}, {answer, nothing, false, answer},
		{name, servfail, false, name}, {name, notimp, false, name}, {data, nothing, false, data},
		{servfail, answer, true, answer}, {notimp, name, true, name}, {nothing, answer, true, answer}, {nothing, data, true, data},
		{servfail, notimp, true, notimp}, {servfail, nothing, true, nothing}, {nothing, servfail, true, servfail},
		{best, name, false, best}, {best, answer, false, best}, {best, servfail, false, best}, {best, best, true, best},
		{name, best, true, best}, {answer, best, true, best}, {servfail, best, true, best},
	} {
		for _, hot := range []bool{false, true} {
			st := openStore(t, tinySizes([record.Classes]int{10, 10}, alignedGranuleWords))
			s := newScratch()
			ask1(st, s, 1, 0)
			sampleOf := func(flags record.Flags, n int, now int64) sample {
				a := plainSample(flags.Class(), n, now)
				a.flags, a.ttl = flags, 20
				return a
			}
			a, b := sampleOf(tc.old, 10, 0), sampleOf(tc.new, 20, 1e9)
			insertSample(st, s, &a, 0)
			for range 4 {
				if hot && !st.lookup(s, 0) {
					t.Fatal("not there")
				}
			}
			insertSample(st, s, &b, 1e9)
			for range 5 {
				if !st.lookup(s, 2e9) || s.Entry.Flags != tc.served {
					t.Fatalf("%#x, then %#x: served %#x, want %#x", tc.old, tc.new, s.Entry.Flags, tc.served)
				}
			}
			left := st.total()
			if ended := left == 1; ended != tc.ended {
				t.Errorf("%#x, then %#x: %d entries are left", tc.old, tc.new, left)
			}
			checkStore(t, st)
			// An older record arrives later, as records of a predecessor or a snapshot do.
			if !tc.ended || tc.old.Kind() == tc.new.Kind() {
				continue
			}
			if e, f := a.header(), b.header(); e.Replaces(&f) || !f.Replaces(&e) {
				t.Errorf("%#x of before ends %#x", tc.old, tc.new)
			}
		}
	}
}

func TestFloodOfOneClassLeavesTheOther(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		for flood := range record.Classes {
			st := openStore(t, sizes{
				shards: 2, capacity: [record.Classes]int{100, 100}, granuleWords: granule.words,
				pieces: [record.Classes]int{2, 2}, buckets: index.Buckets(100), hotSets: 2, hotAfter: 3,
			})
			s := newScratch()
			const kept = 40 // in two shards with room for 50 each
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
				if !st.lookup(s, 0) || s.Entry.Flags.Class() != 1-flood {
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
		capacity := [record.Classes]int{100, 37}
		st := openStore(t, sizes{
			shards: shards, capacity: capacity, granuleWords: alignedGranuleWords,
			pieces: [record.Classes]int{2, 2}, buckets: index.Buckets(137/shards + 1), hotSets: 1, hotAfter: 3,
		})
		s := newScratch()
		for n := range 1200 { // so many that each shard is full, whatever the seed
			ask1(st, s, n, 0)
			a := plainSample(record.Class(n%2), 30, 0)
			if !insertSample(st, s, &a, 0) || !st.lookup(s, 0) {
				t.Fatalf("%d shards: entry %d was not stored", shards, n)
			}
			if st.len(record.Success) > int64(capacity[record.Success]) || st.len(record.Denial) > int64(capacity[record.Denial]) {
				t.Fatalf("%d shards: %d and %d entries, capacity %v", shards, st.len(record.Success), st.len(record.Denial), capacity)
			}
		}
		if st.len(record.Success) != int64(capacity[record.Success]) || st.len(record.Denial) != int64(capacity[record.Denial]) {
			t.Errorf("%d shards: %d and %d entries, capacity %v", shards, st.len(record.Success), st.len(record.Denial), capacity)
		}
		checkStore(t, st)
	}
}

// planCases returns options over the whole range.
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

// memoryFor returns how much memory a store may take: max_memory, or what the documentation says is the default.
func memoryFor(o *options) int64 {
	if o.maxMemory != 0 {
		return min(o.maxMemory, mostMemory)
	}
	hot := o.hotPercentage
	if hot == hotAuto {
		hot = climber.AutoHotPercentage
	}
	return min(int64(o.success.capacity+o.denial.capacity)*int64(defaultEntryBytes+leastEntryBytes+hotEntryBytes*hot/100), mostMemory)
}

func describeOptions(o *options) string {
	return fmt.Sprintf("success %d, denial %d, max_memory %d, hot %d, aligned %v",
		o.success.capacity, o.denial.capacity, o.maxMemory, o.hotPercentage, o.lineAligned)
}

var (
	planCapacities = []int{1024, 5000, 100_000, 10_000_000}
	planMemories   = []int64{0, 1 << 20, 3 << 20, 10_000_000, 64 << 20, 1 << 30, 8 << 30}
)

// failures is for a test over many combinations: it reports the first few failures, and how many there are.
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
		st := &pool{sizes: plan(&o)}
		z := &st.sizes
		if z.shards < 1 || z.shards&(z.shards-1) != 0 || z.shards > maxShards {
			f.add("%s: %d shards", describeOptions(&o), z.shards)
		}
		want := [record.Classes]int{o.success.capacity, o.denial.capacity}
		for c := range z.capacity {
			if z.capacity[c] < 1 || z.capacity[c] > want[c] || z.pieces[c] < 1 {
				f.add("%s: class %d: capacity %d, %d pieces", describeOptions(&o), c, z.capacity[c], z.pieces[c])
			}
			if o.maxMemory == 0 && memoryFor(&o) < mostMemory && z.capacity[c] != want[c] {
				f.add("%s: class %d: capacity %d", describeOptions(&o), c, z.capacity[c])
			}
		}
		bound := memoryFor(&o)
		pieces := int64(z.shards) * int64(z.pieces[record.Success]+z.pieces[record.Denial])
		if got := st.fixed() + pieces*pieceBytes; got > bound {
			f.add("%s: bound of %d, want at most %d (%+v)", describeOptions(&o), got, bound, *z)
		}
	}
}

// TestPlanKeepsMemoryForRecords: the hot tier holds copies of records. In the region a record takes half as much memory as
// a slot. With too little memory for the region, the slots would stay empty.
func TestPlanKeepsMemoryForRecords(t *testing.T) {
	t.Parallel()
	cases := planCases(planCapacities, planMemories)
	f := failures{t: t}
	defer func() { f.report(len(cases)) }()
	for _, o := range cases {
		z := plan(&o)
		records := int64(z.pieces[record.Success]+z.pieces[record.Denial]) * pieceBytes
		if hot := int64(z.hotSets) * hotSetBytes; records < hot/2 {
			f.add("%s: a shard has %d bytes for records and %d for copies in the hot tier", describeOptions(&o), records, hot)
		}
	}
}

// TestPlanKeepsRoomForAnAnswer: each class must have room for the largest answer that goes over UDP without fragments (1232
// bytes, DNS flag day 2020).
func TestPlanKeepsRoomForAnAnswer(t *testing.T) {
	t.Parallel()
	const answer = 1232
	cases := planCases(planCapacities, planMemories)
	f := failures{t: t}
	defer func() { f.report(len(cases)) }()
	for _, o := range cases {
		z := plan(&o)
		for c := range record.Classes {
			if largest := z.pieces[c] * pieceBytes / maxRecordShare; largest < answer+record.MaxKey {
				f.add("%s: class %d takes records up to %d bytes (%d shards)", describeOptions(&o), c, largest, z.shards)
			}
		}
	}
}

// TestMemoryStaysWithinMaxMemory counts the memory that a full store really has.
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
			continue // each 17th case: together they have every value of every option
		}
		tried++
		st, err := newStore(plan(&o))
		if err != nil {
			t.Fatal(err)
		}
		a := [record.Classes]sample{plainSample(record.Success, 20, 0), plainSample(record.Denial, 20, 0)}
		for n := range st.capacity[record.Success] + st.capacity[record.Denial] + 100 {
			ask1(st, s, n, 0)
			c := record.Success
			if n%(st.capacity[record.Success]+st.capacity[record.Denial]) >= st.capacity[record.Success] {
				c = record.Denial
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
			for c := range record.Classes {
				d := &sh.policy.classes[c]
				real += int64(len(d.ghost))*4 + int64(sketch.Lines(d.capacity))*sketch.LineBytes
			}
			real += sh.region.alloc.Bytes()
		}
		if bound := memoryFor(&o); real > bound {
			f.add("%s: %d bytes, %d over (%+v)", describeOptions(&o), real, real-bound, st.sizes)
		}
		if u := st.usage(); u.used > u.reserved || u.reserved > st.bound() || u.reserved < real {
			f.add("%s: in use %d bytes of %d, the bound is %d; holds %d", describeOptions(&o), u.used, u.reserved, st.bound(), real)
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
				shards: 2, capacity: [record.Classes]int{2000, 2000}, granuleWords: granule.words,
				pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(2000), hotSets: 20, hotAfter: 3,
			})
			rng := rand.New(rand.NewPCG(8, uint64(granule.words)))
			s := newScratch()
			m := model{}
			var stored, refused int
			for op := range 2500 {
				ask1(st, s, rng.IntN(400), 0)
				have := m.of(&s.Key)
				n := 60 + rng.IntN(300)
				if rng.IntN(5) == 0 {
					n = 60 + rng.IntN(60_000)
				}
				a := plainSample(record.Class(rng.IntN(2)), n, int64(op))
				c := a.flags.Class()
				fillBytes(rng, a.body)
				there := [record.Classes]bool{inArena(st, s, record.Success), inArena(st, s, record.Denial)}
				entries, used, evicted := st.len(record.Success)+st.len(record.Denial), st.recordBytes(), s.events.evicted
				if insertSample(st, s, &a, int64(op)) {
					*have = held{}
					have[c] = &a
					stored++
				} else {
					refused++
					sh := st.shard(s.Key.Hash)
					if len(s.Words) <= heavyWords {
						t.Fatalf("op %d: %d bytes were refused", op, n)
					}
					if tooLarge := sh.granules(len(s.Words)) > sh.region.share[c]/maxRecordShare; tooLarge && (st.len(record.Success)+st.len(record.Denial) != entries || st.recordBytes() != used || s.events.evicted != evicted ||
						there != [record.Classes]bool{inArena(st, s, record.Success), inArena(st, s, record.Denial)}) {
						t.Fatalf("op %d: a refused answer has changed something", op)
					}
				}
				ask1(st, s, rng.IntN(400), 0)
				have = m.of(&s.Key)
				for c := range record.Classes {
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
			if refused == 0 || stored == 0 {
				t.Errorf("%d stored, %d refused: the test tests nothing", stored, refused)
			}
		})
	}
}

func TestLargestRecordsAreTakenWhenTheyAreAskedForOften(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		z := tinySizes([record.Classes]int{1000, 1000}, granule.words)
		z.pieces = [record.Classes]int{1, 1}
		st := openStore(t, z)
		s := newScratch()
		sh := &st.shards[0]
		most := sh.region.share[record.Success] / maxRecordShare
		for n := range 300 {
			ask1(st, s, n, 0)
			overhead := (record.HeaderWords + record.Words(s.Key.Len)) * record.WordBytes
			small := plainSample(record.Success, n%50, 0)
			insertSample(st, s, &small, 0)
			ask1(st, s, 1000+n, 0)
			large := plainSample(record.Success, most*granule.words*record.WordBytes-overhead, 0)
			if n%7 != 0 {
				continue
			}
			in := false
			for range 20 {
				in = in || insertSample(st, s, &large, 0)
			}
			if !in || sh.granules(len(s.Words)) != most {
				t.Fatalf("%s: the largest record there may be (%d granules of %d) was not stored", granule.name, sh.granules(len(s.Words)), most)
			}
			if !st.lookup(s, 0) || large.check(s) != "" {
				t.Fatalf("%s: the largest record there may be is not found", granule.name)
			}
			larger := plainSample(record.Success, len(large.body)+1, 0)
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
		for c := range record.Classes {
			z := tinySizes([record.Classes]int{10, 10}, alignedGranuleWords)
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
	st := openStore(t, tinySizes([record.Classes]int{10, 10}, alignedGranuleWords))
	s := newScratch()
	for n, tc := range []struct {
		words int
		hot   bool
	}{{hotSlotWords - 1, true}, {hotSlotWords, false}, {1000, false}} {
		ask1(st, s, n, 0)
		a := plainSample(record.Success, (tc.words-record.HeaderWords-record.Words(s.Key.Len))*record.WordBytes, 0)
		insertSample(st, s, &a, 0)
		if len(s.Words) != tc.words {
			t.Fatalf("record of %d words, want %d", len(s.Words), tc.words)
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

// hit looks s.Key up n times, and returns the tier of the last hit.
func hit(t *testing.T, st *store, s *scratch, n int, now int64) tier {
	t.Helper()
	for range n {
		if !st.lookup(s, now) {
			t.Fatalf("%q: a miss", s.Key.Name())
		}
	}
	return s.tier
}

// amid looks s.Key up n times, and returns the tier of the last hit. Meanwhile it stores other names again, because the
// policy takes access counts only at inserts.
func amid(t *testing.T, st *store, s *scratch, n int, now int64) tier {
	t.Helper()
	other := newScratch()
	for i := range n {
		hit(t, st, s, 1, now)
		if i%4 == 3 {
			ask1(st, other, 8+i%2, 0)
			a := plainSample(record.Success, 20, now)
			insertSample(st, other, &a, now)
		}
	}
	return s.tier
}

func TestHotCopyFollowsTheArena(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		st := openStore(t, tinySizes([record.Classes]int{10, 10}, granule.words))
		s := newScratch()
		ask1(st, s, 1, 0)
		for gen := range 50 {
			a := plainSample(record.Success, 20+gen, 0)
			insertSample(st, s, &a, 0)
			if gen == 0 {
				hit(t, st, s, 3, 0)
			}
			if hit(t, st, s, 1, 0) != tierHot || a.check(s) != "" {
				t.Fatalf("%s: answer %d is not what the hot tier has", granule.name, gen)
			}
			checkStore(t, st)
		}
		large := plainSample(record.Success, 2000, 0)
		insertSample(st, s, &large, 0)
		if hit(t, st, s, 1, 0) == tierHot || large.check(s) != "" || inHotTier(st, s) {
			t.Errorf("%s: an answer that is too large for the hot tier", granule.name)
		}
		checkStore(t, st)
	}
}

// TestLargeRecordsPayForLargeOnes: large records that have been asked for once displace each other, and no other records.
func TestLargeRecordsPayForLargeOnes(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		z := tinySizes([record.Classes]int{2000, 10}, granule.words)
		z.pieces[record.Success] = 4
		st := openStore(t, z)
		s := newScratch()
		for n := range 2000 { // the class is full
			ask1(st, s, n, 0)
			a := plainSample(record.Success, 150, 0)
			insertSample(st, s, &a, 0)
		}
		a := plainSample(record.Success, pieceBytes/5, 0)
		in, went := 0, uint32(0)
		for n := range 200 {
			before := s.events.evicted[record.Success]
			if ask1(st, s, 5000+n, 0); insertSample(st, s, &a, 0) {
				in++
			}
			if n >= 20 {
				went += s.events.evicted[record.Success] - before
			}
			if n%20 == 0 {
				checkStore(t, st)
			}
		}
		if in == 0 || went > 180 {
			t.Errorf("%s: %d of 200 large records got in; the last 180 cost %d others", granule.name, in, went)
		}
	}
}

func TestHotCopyOfTheDeadIsRenewed(t *testing.T) {
	t.Parallel()
	st := openStore(t, tinySizes([record.Classes]int{10, 10}, alignedGranuleWords))
	s := newScratch()
	ask1(st, s, 1, 0)
	a := plainSample(record.Success, 20, 0)
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
	for c := range record.Classes {
		st := openStore(t, tinySizes([record.Classes]int{10, 10}, alignedGranuleWords))
		s := newScratch()
		ask1(st, s, 1, 0)
		a := plainSample(c, 20, 0)
		insertSample(st, s, &a, 0)
		if hit(t, st, s, 4, 0) != tierHot {
			t.Fatal("not hot")
		}
		b := plainSample(1-c, 30, 0)
		insertSample(st, s, &b, 0)
		for range 20 {
			hit(t, st, s, 1, 0)
			if b.check(s) != "" {
				t.Fatalf("class %d was hot, then the other came: answered by class %d from the %s tier", c, s.Entry.Flags.Class(), tierNames[s.tier])
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
	z := tinySizes([record.Classes]int{500, 10}, alignedGranuleWords)
	z.hotSets = 1
	st := openStore(t, z)
	s := newScratch()
	const names = 100
	for n := range names {
		ask1(st, s, n, 0)
		a := plainSample(record.Success, 20+n%40, 0)
		insertSample(st, s, &a, 0)
	}
	// All names compete for four slots. A name that gets a slot displaces another one.
	for range 20 {
		for n := range names {
			ask1(st, s, n, 0)
			if !st.lookup(s, 0) || s.Entry.BodyLen != 20+n%40 {
				t.Fatalf("name %d is lost", n)
			}
		}
	}
	if s.events.demoted[tierHot] == 0 {
		t.Error("nobody was demoted: the test tests nothing")
	}
	if s.events.evicted != [record.Classes]uint32{} {
		t.Errorf("%d evictions", s.events.evicted)
	}
	checkStore(t, st)
}

// promotable returns a store with one set in the hot tier, and ten names. The first four have a TTL of 10 s.
func promotable(t *testing.T) (*store, *scratch) {
	z := tinySizes([record.Classes]int{500, 10}, alignedGranuleWords)
	z.hotSets = 1
	st := openStore(t, z)
	s := newScratch()
	for n := range 10 {
		ask1(st, s, n, 0)
		a := plainSample(record.Success, 20, 0)
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
		sh := st.shard(s.Key.Hash)
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
	// The first four are not asked for again.
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
	// All four are dead for a moment, and other names take their slots.
	for n := hotWays; n < 2*hotWays; n++ {
		ask1(st, s, n, 0)
		if hit(t, st, s, 5, 10e9) != tierHot {
			t.Fatalf("name %d is not hot", n)
		}
	}
	ask1(st, s, 0, 0)
	a := plainSample(record.Success, 20, 10e9)
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
	d := plainSample(record.Denial, 20, 0)
	d.flags |= record.RcodeServerFailure
	d.ttl = 5
	insertSample(st, s, &d, 0)
	hit(t, st, s, 10, 0) // the answer is popular, but the key has records in two classes
	a := plainSample(record.Success, 20, 6e9)
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
	a := plainSample(record.Success, 1000, 0)
	insertSample(st, s, &a, 0)
	hit(t, st, s, 10, 0)
	a = plainSample(record.Success, 50, 0)
	insertSample(st, s, &a, 0)
	if got := amid(t, st, s, 100, 0); got != tierHot {
		t.Errorf("100 hits after it has shrunk the answer is in the %s tier", tierNames[got])
	}
	checkStore(t, st)
}

func TestResizedHotTierStartsEmpty(t *testing.T) {
	t.Parallel()
	z := tinySizes([record.Classes]int{100, 10}, alignedGranuleWords)
	z.hotSets, z.autoHot = 20, true
	st := openStore(t, z)
	s := newScratch()
	for n := range 40 {
		ask1(st, s, n, 0)
		a := plainSample(record.Success, 20, 0)
		insertSample(st, s, &a, 0)
		hit(t, st, s, 5, 0)
	}
	for _, share := range []int64{1000, 50, 1, 400, 1000} {
		st.climber.Hot.Store(share)
		before := st.hotCapacity()
		ask1(st, s, 50, 0)
		a := plainSample(record.Success, 20, 0)
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
	for _, size := range []int{20, 2000} { // one fits the hot tier, the other does not
		st := openStore(t, tinySizes([record.Classes]int{10, 10}, alignedGranuleWords))
		s := newScratch()
		ask1(st, s, 1, 0)
		a := plainSample(record.Success, size, 0)
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
			st := openStore(t, tinySizes([record.Classes]int{10, 10}, granule.words))
			s := newScratch()
			ask1(st, s, 1, 0)
			a := plainSample(record.Success, size, 0)
			a.wildcard = "*.example."
			insertSample(st, s, &a, 0)
			if !st.lookup(s, 0) { // this makes the buffers grow
				t.Fatal("a miss")
			}
			// One of these lookups promotes the entry.
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
	const names = 10 // more than a bucket has slots for
	z := tinySizes([record.Classes]int{names, 4}, packedGranuleWords)
	z.hotSets, z.buckets = 1, 2
	st := openStore(t, z)
	s := newScratch()
	where := func(hash uint64) uint64 { return hash>>48<<1 | hash>>47&1 } // the tag, and which of the two buckets
	ask1(st, s, 0, 0)
	home := where(s.Key.Hash)
	var numbers []int
	for n := 0; len(numbers) < names; n++ {
		if ask1(st, s, n, 0); where(s.Key.Hash) == home {
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
			a := plainSample(record.Success, 1+rng.IntN(100), int64(round))
			a.ttl = 1e6 + uint32(n)
			if !insertSample(st, s, &a, 0) {
				t.Fatal("refused")
			}
			stored[n] = &a
		}
		if rng.IntN(50) == 0 {
			sh := &st.shards[0]
			sh.lock(s, 0)
			if slot, ok := sh.locate(&s.Key, usualKind(record.Success)); ok {
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
	z := tinySizes([record.Classes]int{40, 40}, packedGranuleWords)
	z.hotSets = 1
	st := openStore(t, z)
	s := newScratch()
	for round := range 10 {
		for n := range names {
			ask1(st, s, n, 0)
			s.Key.Hash = hash
			a := plainSample(record.Success, 1+n, int64(round))
			insertSample(st, s, &a, 0)
			if n%5 == 0 {
				d := plainSample(record.Denial, 101+n, int64(round))
				insertSample(st, s, &d, 0)
			}
		}
		for n := range 2 * names {
			ask1(st, s, n, 0)
			s.Key.Hash = hash
			want := 1 + n
			if n%5 == 0 {
				want += 100
			}
			for range 4 {
				if ok := st.lookup(s, 0); ok != (n < names) || ok && (s.Entry.BodyLen != want || s.Entry.Stored != int64(round)) {
					t.Fatalf("round %d, name %d: answered %v with %d bytes of %d", round, n, ok, s.Entry.BodyLen, s.Entry.Stored)
				}
			}
		}
		checkStore(t, st)
	}
}

// TestSeqIsThatOfAFinishedRecord watches a place that is written again and again. A reader may have loaded an old slot that
// points there. When it has copied the record, the slot may point there once more. Then only the seq tells the reader
// whether a writer was at work meanwhile. So a seq must be visible only when all other words of its record are.
func TestSeqIsThatOfAFinishedRecord(t *testing.T) {
	t.Parallel()
	const writes, recordWords = 3000, 2000
	st := openStore(t, tinySizes([record.Classes]int{10, 10}, alignedGranuleWords))
	sh := &st.shards[0]
	place := sh.region.at(0)
	first := sh.seq
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			seq := atomic.LoadUint64(&place[record.WordSeq])
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
		sh.write(0, record)
	}
	stop.Store(true)
	wg.Wait()
}

func TestClosedStoreIsEmpty(t *testing.T) {
	t.Parallel()
	for _, granule := range granuleSizes {
		z := tinySizes([record.Classes]int{100, 100}, granule.words)
		st := openStore(t, z)
		s := newScratch()
		for n := range 100 {
			ask1(st, s, n, 0)
			a := plainSample(record.Class(n%2), 30, 0)
			insertSample(st, s, &a, 0)
			hit(t, st, s, 5, 0)
		}
		st.close()
		for n := range 100 {
			ask1(st, s, n, 0)
			a := plainSample(record.Class(n%2), 30, 0)
			if st.lookup(s, 0) || insertSample(st, s, &a, 0) || st.lookup(s, 0) {
				t.Fatal("a closed store answers or stores")
			}
		}
		if st.len(record.Success) != 0 || st.len(record.Denial) != 0 {
			t.Errorf("a closed store has %d and %d entries", st.len(record.Success), st.len(record.Denial))
		}
		st.close() // a second call must do no harm
	}
}

// stressNow is the time of the stress tests, in ns.
const stressNow = int64(1e9)

// selfChecking returns an answer of the stress tests, which can be checked by itself. Its body repeats the key and the
// generation. Its length, TTL, counts and wildcard follow from these two.
func selfChecking(key uint64, gen uint64, largest int) (a sample) {
	x := (key+1)*0x9e3779b97f4a7c15 ^ gen*0xc2b2ae3d27d4eb4f
	x ^= x >> 29
	n := 16 + int(x%97)
	if x>>8%8 == 0 {
		n = 16 + int(x>>16%uint64(largest))
	}
	a = sample{ttl: uint32(x>>20&0xffff) + 1e6, stored: stressNow, body: make([]byte, n)}
	if key%4 == 3 && x>>40%2 == 0 {
		a.flags = record.FlagDenial | 3
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

// checkSelf compares the answer that a reader got for a key with the key and the generation in its body.
func checkSelf(s *scratch, key uint64, largest int) error {
	got := s.Out[s.Body:][:s.Entry.BodyLen]
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
		{"aligned", sizes{shards: 4, capacity: [record.Classes]int{200, 100}, granuleWords: alignedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(75), hotSets: 2, hotAfter: 3}, 600, 3000, 20_000},
		{"packed", sizes{shards: 4, capacity: [record.Classes]int{200, 100}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(75), hotSets: 2, hotAfter: 2}, 600, 3000, 20_000},
		{"tiny aligned", sizes{shards: 1, capacity: [record.Classes]int{6, 3}, granuleWords: alignedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(9), hotSets: 1, hotAfter: 1}, 12, 600, 20_000},
		{"tiny packed", sizes{shards: 1, capacity: [record.Classes]int{6, 3}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(9), hotSets: 1, hotAfter: 1}, 12, 600, 20_000},
		{"little memory", sizes{shards: 1, capacity: [record.Classes]int{2000, 1000}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(3000), hotSets: 20, hotAfter: 1}, 2000, 9000, 10_000},
		{"hot tier of changing size", sizes{shards: 1, capacity: [record.Classes]int{100, 50}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(150), hotSets: 12, autoHot: true, hotAfter: 1}, 100, 100, 20_000},
		{"one key", sizes{shards: 1, capacity: [record.Classes]int{2, 2}, granuleWords: packedGranuleWords,
			pieces: [record.Classes]int{1, 1}, buckets: index.Buckets(4), hotAfter: 1}, 1, 20_000, 8_000},
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
							st.climber.Hot.Store(rng.Int64N(1000))
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

			// The same once more, and meanwhile the store is closed.
			for i := range uint64(4) {
				wg.Go(func() { run(100+i, []int{0, 2, 20, 60}[i], true) })
			}
			for range 2000 {
				st.len(record.Success)
				st.usage()
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
			if st.len(record.Success) != 0 || st.len(record.Denial) != 0 {
				t.Errorf("%d and %d entries after close", st.len(record.Success), st.len(record.Denial))
			}
		})
	}
}

// TestReaderThatIsPutToSleep has more threads than cores, so that the kernel suspends readers while they copy a record. When
// such a reader goes on, the record has been replaced several times. Its place has been used for other records of the same
// name, and may hold one of them again.
func TestReaderThatIsPutToSleep(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	for _, granule := range granuleSizes {
		const largest = 24_000
		writes := int64(2500)
		if raceEnabled {
			writes = 300 // under the race detector no record has to be torn
		}
		z := tinySizes([record.Classes]int{2, 2}, granule.words)
		z.pieces = [record.Classes]int{2, 2}
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
					body := s.Out[s.Body:][:s.Entry.BodyLen]
					gen := binary.LittleEndian.Uint64(body)
					same := len(body) == longLength(gen, largest) && s.Entry.TTL == uint32(gen)+1e6
					for i := 0; same && i < len(body); i += 8 {
						same = binary.LittleEndian.Uint64(body[i:]) == gen
					}
					if !same {
						t.Errorf("%s: %d bytes that begin as generation %d, TTL %d: not one answer", granule.name, len(body), gen, s.Entry.TTL)
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

// longSample returns an answer of generation gen. Its body has about largest bytes, and repeats gen.
func longSample(gen uint64, largest int) sample {
	a := sample{ttl: uint32(gen) + 1e6, stored: stressNow, body: make([]byte, longLength(gen, largest))}
	for i := 0; i < len(a.body); i += 8 {
		binary.LittleEndian.PutUint64(a.body[i:], gen)
	}
	return a
}

// One class may use what the other class leaves of its share, in bytes and in entries. It gives that back when the other
// class needs it. A flood of one class must leave the share of the other alone.
func TestIdleMemoryIsLent(t *testing.T) {
	t.Parallel()
	short := func(z sizes) sizes { // entries are the limit, not bytes
		z.capacity, z.asked, z.pieces = [record.Classes]int{1000, 1000}, [record.Classes]int{20_000, 20_000}, [record.Classes]int{20, 20}
		z.buckets = index.Buckets(2000)
		return z
	}
	full := func(z sizes) sizes { // bytes are the limit
		z.pieces = [record.Classes]int{4, 4}
		return z
	}
	for _, granule := range granuleSizes {
		for name, change := range map[string]func(sizes) sizes{"entries": short, "bytes": full} {
			st := openStore(t, change(tinySizes([record.Classes]int{20_000, 20_000}, granule.words)))
			s := newScratch()
			fill := func(c record.Class, first int) {
				for n := range 20_000 {
					ask1(st, s, first+n, 0)
					a := plainSample(c, 150, 0)
					insertSample(st, s, &a, 0)
				}
				checkStore(t, st)
			}
			fill(record.Success, 0)
			alone := st.len(record.Success)
			fill(record.Denial, 100_000)
			shared, denials := st.len(record.Success), st.len(record.Denial)
			if shared > alone*60/100 || shared < alone*45/100 || denials < alone*45/100 {
				t.Errorf("%s, %s: %d positive answers alone; then %d beside %d denials", granule.name, name, alone, shared, denials)
			}
			fill(record.Success, 200_000)
			if left := st.len(record.Denial); left < denials*95/100 {
				t.Errorf("%s, %s: %d of %d denials are left", granule.name, name, left, denials)
			}
		}
	}
}

// max_memory auto bounds what the capacities ask for, and gives no more than they ask for.
func TestPlanOfMemoryAuto(t *testing.T) {
	t.Parallel()
	asked := sizedOptions(10_000)
	asked.maxMemory = 0
	much, little := asked, asked
	much.maxMemory, much.memoryAuto = 1<<40, true
	little.maxMemory, little.memoryAuto = 4<<20, true
	bound := asked
	bound.maxMemory = 4 << 20
	if plan(&much) != plan(&asked) {
		t.Errorf("much memory: %+v, want %+v", plan(&much), plan(&asked))
	}
	if plan(&little) != plan(&bound) {
		t.Errorf("little memory: %+v, want %+v", plan(&little), plan(&bound))
	}
}
