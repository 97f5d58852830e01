package optcache

import (
	"hash/maphash"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/arena"
	"github.com/optcache/optcache/plugin/pkg/index"
)

// This file is the store: what holds the answers of one instance. It joins index, arena, hot
// tier and policy, and knows the rules between readers and writers.
//
// The store is cut into shards by hash. A writer holds its shard's lock. A reader takes none:
//
//  1. it finds a slot of the index whose tag fits, and the record the slot points at;
//  2. it compares the full key and copies the answer out, word by word;
//  3. it loads the slot and then the record's seq again. If both are as before, the record
//     stood all the time, and the copy is good; otherwise it starts over.
//
// This holds because records are never changed in place. A writer puts a new answer elsewhere,
// repoints the slot in one store, and only then frees the old record's memory. Whoever reads
// memory that has got a new tenant sees the slot changed; should the slot by then point to the
// same place again, the record there has another seq, for each write in a shard has its own.

// maxRetries is how often a reader starts over. Each time somebody else has written the very
// entry it was reading; after that many the request is a miss.
const maxRetries = 16

// tier is where a hit was found.
type tier uint8

const (
	tierHot tier = iota
	tierProtected
	tierProbationary
	tiers
)

var tierNames = [tiers]string{"hot", "protected", "probationary"}

// events counts what the policy did during one request.
type events struct {
	evicted  [classes]uint32
	promoted [tiers]uint32 // by the tier entered
	demoted  [tiers]uint32 // by the tier left
}

// store holds the answers of one instance. All methods are safe for concurrent use.
type store struct {
	sizes
	seed    maphash.Seed
	shards  []shard
	climber *climber

	users  atomic.Int32          // instances that use it: see reload.go
	from   atomic.Pointer[store] // whose answers are moving here
	to     atomic.Pointer[store] // where the answers have gone
	rules  *rules                // for those
	moving sync.Mutex            // held while they do
	kept   atomic.Int64          // how many answers the last reload has left

	// The memories are kept here because their words are unmapped when they are not.
	data, slots, hot, states *arena.Memory
}

// newStore allocates a store. It fails when the system has not got the memory.
func newStore(z sizes) (*store, error) {
	st := &store{sizes: z, seed: maphash.MakeSeed(), shards: make([]shard, z.shards)}
	st.users.Store(1)
	st.climber = newClimber(z.entries(), z.autoHot)
	dataPieces := z.shards * (z.pieces[success] + z.pieces[denial])
	slotWords := z.buckets * index.SlotsPerBucket
	hotWords := z.hotSets * hotSetBytes / wordBytes
	var err error
	if st.data, err = arena.NewMemory(int64(dataPieces) * pieceBytes); err != nil {
		return nil, err
	}
	if st.slots, err = arena.NewMemory(int64(z.shards) * int64(slotWords) * wordBytes); err != nil {
		return nil, err
	}
	var hot []uint64
	if hotWords > 0 {
		if st.hot, err = arena.NewMemory(int64(z.shards) * int64(hotWords) * wordBytes); err != nil {
			return nil, err
		}
		hot = st.hot.Words()
	}
	stateWords := z.stateWords()
	var states []uint64
	if stateWords > 0 {
		if st.states, err = arena.NewMemory(int64(z.shards) * int64(stateWords) * wordBytes); err != nil {
			return nil, err
		}
		states = st.states.Words()
	}
	data, slots := st.data.Words(), st.slots.Words()
	border := z.shards * z.pieces[success] * pieceWords
	areas := [classes][]uint64{data[:border:border], data[border : dataPieces*pieceWords]}
	for i := range st.shards {
		sh := &st.shards[i]
		var capacity [classes]int
		for c := range capacity {
			capacity[c] = share(z.capacity[c], z.shards, i)
			sh.regions[c] = region{
				words:  areas[c],
				first:  i * pieceWords,
				stride: z.shards * pieceWords,
				alloc:  arena.NewSpannedAllocator(z.pieces[c]*z.pieceGranules(), z.pieceGranules()),
			}
		}
		sh.index = index.New(slots[i*slotWords:][:slotWords:slotWords])
		if z.hotSets > 0 {
			// All slots come before all tags, so that slots start on a line.
			n := z.hotSets * hotWays * hotSlotWords
			sh.hot.slots = hot[i*n:][:n:n]
			sh.hot.tags = hot[z.shards*n+i*z.hotSets:][:z.hotSets:z.hotSets]
			sh.hot.sets.Store(uint64(st.climber.hotSets(z.hotSets)))
		}
		sh.stale, sh.preferPositive = z.stale, z.preferPositive
		if stateWords > 0 {
			sh.states = states[i*stateWords:][:stateWords:stateWords]
		}
		sh.policy = newSLRU(capacity, sh, st.climber)
		sh.seq = rand.Uint64() >> 1 // nobody outside can guess what a word will hold
		sh.granule, sh.hotAfter = z.granuleWords, z.hotAfter
		// The policy tells four levels of use apart at the most.
		sh.saturate = max(z.hotAfter, 3)
	}
	return st, nil
}

// close empties the store for good and gives its memory back, while requests that are still
// under way may use it: they find nothing and store nothing.
func (st *store) close() {
	for i := range st.shards {
		sh := &st.shards[i]
		sh.mu.Lock()
		sh.closed = true
		sh.mu.Unlock()
	}
	st.slots.Zero()
	for _, m := range []*arena.Memory{st.hot, st.states} {
		if m != nil {
			m.Zero()
		}
	}
	st.data.Zero()
	for i := range st.shards {
		sh := &st.shards[i]
		for c := range sh.entries {
			sh.entries[c].Store(0)
		}
		sh.used.Store(0)
	}
}

// discard gives back the memory of an emptied shard's records.
func (st *store) discard(sh *shard) {
	for c := range sh.regions {
		r := &sh.regions[c]
		area := 0
		if class(c) == denial {
			area = st.sizes.shards * st.pieces[success] * pieceWords
		}
		for at := r.first; at < len(r.words); at += r.stride {
			st.data.ZeroPart(area+at, pieceWords)
		}
	}
}

// len returns the number of entries of a class. It takes no lock.
func (st *store) len(c class) (n int64) {
	for i := range st.shards {
		n += st.shards[i].entries[c].Load()
	}
	return n
}

// total returns the number of entries.
func (st *store) total() int64 { return st.len(success) + st.len(denial) }

// bytes returns the memory in use: what is fixed and the records.
func (st *store) bytes() int64 {
	var used int64
	for i := range st.shards {
		used += st.shards[i].used.Load()
	}
	return st.fixed() + used*int64(st.granuleWords)*wordBytes
}

// bound returns the most that bytes can become.
func (st *store) bound() int64 { return st.fixed() + st.data.Bytes() }

// hugeBytes returns how much of the memory is on huge pages.
func (st *store) hugeBytes() int64 {
	memories := []*arena.Memory{st.data, st.slots}
	for _, m := range []*arena.Memory{st.hot, st.states} {
		if m != nil {
			memories = append(memories, m)
		}
	}
	return arena.HugeBytes(memories...)
}

// hotCapacity returns how many entries the hot tier has room for.
func (st *store) hotCapacity() (n int64) {
	for i := range st.shards {
		n += int64(st.shards[i].hot.sets.Load()) * hotWays
	}
	return n
}

// fixed is the memory beside the records, in bytes.
func (st *store) fixed() int64 {
	granules := (st.pieces[success] + st.pieces[denial]) * st.pieceGranules()
	return int64(st.sizes.shards) * (st.overhead() + int64(granules)/64*allocatorBytes)
}

func (st *store) shard(hash uint64) *shard { return &st.shards[hash&uint64(len(st.shards)-1)] }

// lookup fills s with the answer for s.key that may be served at now, and reports whether
// there is one. It takes no lock and allocates nothing, unless the answer is larger than the
// buffers of s; the access that makes an entry popular tries for the lock and promotes it.
func (st *store) lookup(s *scratch, now int64) bool {
	hit := st.search(s, now)
	st.counted(s, hit)
	return hit
}

// search is find, and looks for what is on its way from one store to another where it may be: requests of the last
// generation end after the answers have moved on.
func (st *store) search(s *scratch, now int64) bool {
	if st.findOrigin(s, now) {
		return true
	}
	for to := st.to.Load(); to != nil; to = to.to.Load() {
		if to.findOrigin(s, now) {
			return true
		}
	}
	return false
}

// findOrigin is find, and looks for what has not arrived yet where it is.
func (st *store) findOrigin(s *scratch, now int64) bool {
	from := st.from.Load() // before the search: afterwards all may have arrived
	return st.find(s, now) || from != nil && st.findFrom(from, s, now)
}

// counted lets the climber know of a lookup, in time.
func (st *store) counted(s *scratch, hit bool) {
	if hit {
		s.tally.hits++
		if s.tier == tierHot {
			s.tally.hot++
		}
	}
	if s.tally.requests++; s.tally.requests == noteEvery {
		st.climber.note(s.tally)
		s.tally = tally{}
	}
}

// touch loads what a lookup of that hash looks at first, so that it is in the CPU's cache when it does.
func (st *store) touch(hash uint64) {
	sh := st.shard(hash)
	sh.index.Touch(hash)
	if len(sh.hot.tags) > 0 {
		atomic.LoadUint64(&sh.hot.tags[sh.hot.home(hash)])
	}
}

// find is lookup in the store alone, and without the counting.
func (st *store) find(s *scratch, now int64) bool {
	sh := st.shard(s.key.hash)
	if sh.hot.lookup(s, now) {
		s.tier = tierHot
		return true
	}
	for range maxRetries {
		slot, seen, record, again := sh.find(s, now)
		if again {
			continue
		}
		if record == nil {
			return false
		}
		s.copyAnswer(record)
		// The slot first, the seq last: see the top of this file.
		if !sh.index.Load(slot).Same(seen) || atomic.LoadUint64(&record[wordSeq]) != s.entry.seq {
			continue
		}
		s.tier = tierProbationary
		if seen.Marked() {
			s.tier = tierProtected
		}
		if n := seen.Count(); n < sh.saturate {
			if n+1 == sh.hotAfter {
				if !sh.promote(s, slot, seen, now) {
					return true // the next access tries again
				}
				// The entry may be marked now, or gone.
				if s := sh.index.Load(slot); s.Same(seen) && s.Count() == n {
					seen = s
				}
			}
			sh.index.Bump(slot, seen)
		}
		return true
	}
	return false
}

// insert stores an answer under s.key, as the newest of its class: e, its body, whose TTL
// offsets are in s.ttlAt, and the wildcard it was made from, if any. It takes one shard's lock.
// It reports false when the answer is too large.
func (st *store) insert(s *scratch, e *entry, body []byte, wildcard string, now int64) bool {
	s.buildRecord(e, body, wildcard)
	sh := st.shard(s.key.hash)
	sh.lock(s, now)
	defer sh.unlock()
	if sh.closed {
		return false
	}
	if st.autoHot {
		if sets := st.climber.hotSets(st.hotSets); uint64(sets) != sh.hot.sets.Load() {
			sh.resizeHot(sets)
		}
	}
	return sh.insert(s, e, now)
}
