package optcache

import (
	"hash/maphash"
	"math"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"unsafe"

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

// sizes is how the memory of a store is laid out.
type sizes struct {
	shards       int
	capacity     [classes]int // entries
	granuleWords int          // unit of allocation: a line, or two words when packed
	pieces       [classes]int // of one shard's region
	buckets      int          // of one shard's index
	hotSets      int          // of one shard, at the most
	autoHot      bool         // the hot tier's size is looked for
	hotAfter     uint32       // accesses before promotion
}

const (
	// defaultEntryBytes is the memory that the default bound allows for an entry. A typical
	// answer takes 128 to 256 bytes; what is never touched costs no physical memory.
	defaultEntryBytes = 1 << 10

	// leastEntryBytes is what the smallest useful record, its slot and the policy take. It
	// bounds the entries that an index is made for when max_memory is small.
	leastEntryBytes = 176

	// entriesPerShard is the size a shard should have. Smaller ones cut the policy's view of
	// the traffic short, larger ones make writers wait for each other.
	entriesPerShard = 1024
	maxShards       = 256

	// pieceBytes is the unit in which the shards' regions take their turns in the arena. Each
	// region fills from its low end, all at about the same pace, so that what is used of the
	// arena is dense and lies on few, huge pages, whatever the bound is. No record is larger
	// than a piece.
	pieceBytes = 128 << 10
	pieceWords = pieceBytes / wordBytes

	// regionPieces is the size that a region should have at the least. It keeps the shards few
	// when memory is small.
	regionPieces = 2

	// maxRecordShare is the part of its region that one record may take.
	maxRecordShare = 4

	packedGranuleWords  = 2
	alignedGranuleWords = lineBytes / wordBytes

	// allocatorBytes is what an allocator takes for 64 granules, and a little more.
	allocatorBytes = 18
)

// plan lays out the memory that the options ask for. The whole, index and bookkeeping
// included, stays within the bound in bytes.
func plan(o *options) sizes {
	z := sizes{hotAfter: uint32(o.promotionThreshold), granuleWords: packedGranuleWords}
	if o.lineAligned {
		z.granuleWords = alignedGranuleWords
	}
	z.capacity = [classes]int{o.success.capacity, o.denial.capacity}
	entries := z.capacity[success] + z.capacity[denial]
	hotPercentage := o.hotPercentage
	if hotPercentage == hotAuto {
		hotPercentage, z.autoHot = autoHotPercentage, true
	}
	least := int64(leastEntryBytes + hotEntryBytes*hotPercentage/100)
	bound := o.maxMemory
	if bound == 0 {
		bound = int64(entries) * (defaultEntryBytes + least)
	}
	if most := int(min(bound/least, math.MaxInt32)); entries > most {
		for c := range z.capacity {
			z.capacity[c] = max(int(int64(z.capacity[c])*int64(most)/int64(entries)), 1)
		}
		entries = z.capacity[success] + z.capacity[denial]
	}
	shards := min(entries/entriesPerShard, int(bound/(int64(classes)*regionPieces*pieceBytes)), maxShards)
	z.shards = 1 << (bits.Len(uint(max(shards, 1))) - 1)

	perShard := (entries + z.shards - 1) / z.shards
	z.buckets = index.Buckets(perShard)
	if hot := perShard * hotPercentage / 100; hot > 0 {
		z.hotSets = (hot + hotWays - 1) / hotWays
	}

	// What remains is for the records, shared between the classes as the entries are.
	left := bound/int64(z.shards) - z.overhead(perShard)
	piece := int64(pieceBytes + z.pieceGranules()/64*allocatorBytes)
	pieces := int(min(left/piece, math.MaxInt32/int64(z.pieceGranules())))
	z.pieces[denial] = int(int64(pieces) * int64(z.capacity[denial]) / int64(entries))
	z.pieces[denial] = max(z.pieces[denial], min(regionPieces, pieces/2), 1)
	z.pieces[success] = max(pieces-z.pieces[denial], 1)
	return z
}

// pieceGranules is the number of granules in a piece.
func (z *sizes) pieceGranules() int { return pieceWords / z.granuleWords }

// overhead is the memory of one shard without its records, in bytes.
func (z *sizes) overhead(entries int) int64 {
	return int64(z.buckets)*lineBytes + int64(z.hotSets)*hotSetBytes +
		int64(entries)*policyBytes + int64(unsafe.Sizeof(shard{})) + 4096
}

// region is the memory that one class has in a shard.
type region struct {
	words  []uint64 // of the class, in all shards; the pieces of the shards take turns
	first  int      // where this shard's first piece starts, in words
	stride int      // from one of its pieces to the next
	alloc  *arena.Allocator
	hand   int // where the next large record makes room
}

// at returns the words from one place in the region, counted without the other shards' pieces,
// to the end of its piece; nil when there is no such place.
func (r *region) at(word int) []uint64 {
	piece, within := word/pieceWords, word%pieceWords
	start := r.first + piece*r.stride
	if start >= len(r.words) {
		return nil
	}
	return r.words[start+within : start+pieceWords]
}

// shard is an independent part of the store.
type shard struct {
	// mu is held by writers. It guards the policy, the allocators and seq, and makes its holder
	// the only writer of index, arena and hot tier, whose words readers load atomically.
	mu     sync.Mutex
	closed bool
	seq    uint64 // of the last record written
	policy slru
	ev     *events // of the request that holds mu
	seen   int64   // time of that request

	index    index.Table
	hot      hotTier
	regions  [classes]region
	granule  int    // in words
	hotAfter uint32 // accesses before promotion
	saturate uint32 // where an access counter stops

	entries [classes]atomic.Int64 // for the metrics, which take no lock
	used    atomic.Int64          // granules in records, likewise

	_ [lineBytes]byte // shards do not share a line
}

// store holds the answers of one instance. All methods are safe for concurrent use.
type store struct {
	sizes
	seed    maphash.Seed
	shards  []shard
	climber *climber

	// The memories are kept here because their words are unmapped when they are not.
	data, slots, hot *arena.Memory
}

// newStore allocates a store. It fails when the system has not got the memory.
func newStore(z sizes) (*store, error) {
	st := &store{sizes: z, seed: maphash.MakeSeed(), shards: make([]shard, z.shards)}
	st.climber = newClimber(z.capacity[success]+z.capacity[denial], z.autoHot)
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
		sh.policy = newSLRU(capacity, sh, st.climber)
		sh.seq = rand.Uint64() >> 1 // nobody outside can guess what a word will hold
		sh.granule, sh.hotAfter = z.granuleWords, z.hotAfter
		// The policy tells four levels of use apart at the most.
		sh.saturate = max(z.hotAfter, 3)
	}
	return st, nil
}

// share is the part of n that shard i gets; the parts add up to n.
func share(n, shards, i int) int {
	part := n / shards
	if i < n%shards {
		part++
	}
	return max(part, 1)
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
	if st.hot != nil {
		st.hot.Zero()
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

// len returns the number of entries of a class. It takes no lock.
func (st *store) len(c class) (n int64) {
	for i := range st.shards {
		n += st.shards[i].entries[c].Load()
	}
	return n
}

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
	if st.hot != nil {
		memories = append(memories, st.hot)
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
	entries := (st.capacity[success] + st.capacity[denial] + st.sizes.shards - 1) / st.sizes.shards
	granules := (st.pieces[success] + st.pieces[denial]) * st.pieceGranules()
	return int64(st.sizes.shards) * (st.overhead(entries) + int64(granules)/64*allocatorBytes)
}

func (st *store) shard(hash uint64) *shard { return &st.shards[hash&uint64(len(st.shards)-1)] }

// lookup fills s with the answer for s.key that may be served at now, and reports whether
// there is one. It takes no lock and allocates nothing, unless the answer is larger than the
// buffers of s; the access that makes an entry popular tries for the lock and promotes it.
func (st *store) lookup(s *scratch, now int64) bool {
	hit := st.find(s, now)
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
	return hit
}

// find is lookup, but for the counting.
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
		if n := seen.Count(); n < sh.saturate && sh.index.Bump(slot, seen) && n+1 == sh.hotAfter {
			sh.promote(s, slot, seen, now)
		}
		return true
	}
	return false
}

// find looks for the record in the arena that answers s.key at now. A denial that is alive goes
// before a positive answer, unless it is a failure: that never hides an answer that may be
// served. The header of what it returns is in s.entry. again is true when a writer came between.
func (sh *shard) find(s *scratch, now int64) (slot int, seen index.Slot, record []uint64, again bool) {
	var c index.Cursor
	var found entry
	for {
		i, candidate, ok := sh.index.Next(&c, s.key.hash)
		if !ok {
			break
		}
		w, ok := sh.record(candidate)
		if !ok {
			return 0, 0, nil, true
		}
		e := loadEntry(w)
		if !e.sane(len(w)) || !e.hasKey(w, &s.key) {
			if !sh.index.Load(i).Same(candidate) {
				return 0, 0, nil, true
			}
			continue
		}
		if e.remaining(now) <= 0 || record != nil && !before(&e, &found) {
			continue
		}
		slot, seen, record, found = i, candidate, w, e
	}
	s.entry = found
	return slot, seen, record, false
}

// before reports whether a goes before b, when both are alive and of different classes.
func before(a, b *entry) bool {
	if a.flags.class() == success {
		a, b = b, a
		return a.failure()
	}
	return !a.failure()
}

// record returns the words from where a slot points to the end of the piece. ok is false when
// there is no room for a record: the slot was read while it changed.
func (sh *shard) record(s index.Slot) (w []uint64, ok bool) {
	w = sh.regions[s.Class()].at(int(s.Pos()) * sh.granule)
	return w, len(w) >= headerWords
}

// granules returns how many granules n words take.
func (sh *shard) granules(n int) int { return (n + sh.granule - 1) / sh.granule }

// lock takes the shard's lock for a request; unlock gives it back.
func (sh *shard) lock(s *scratch, now int64) {
	sh.mu.Lock()
	sh.ev, sh.seen = &s.events, now
}

func (sh *shard) unlock() {
	sh.ev = nil
	sh.mu.Unlock()
}

// second is a time on the store's clock in the unit of the policy.
func second(ns int64) uint32 { return uint32(ns / 1e9) }

// promote moves an entry up: into the protected segment, and into the hot tier if that has
// room for it. slot held seen when the entry was read. It never waits: when another writer is
// at work, the entry is promoted some other time.
func (sh *shard) promote(s *scratch, slot int, seen index.Slot, now int64) {
	if !sh.mu.TryLock() {
		return
	}
	sh.ev, sh.seen = &s.events, now
	defer sh.unlock()
	record, ok := sh.record(seen)
	if sh.closed || !ok || !sh.index.Load(slot).Same(seen) || loadEntry(record).seq != s.entry.seq {
		return
	}
	id := s.entry.node()
	n := &sh.policy.nodes[id]
	if n.segment == probationary {
		sh.policy.protect(id)
	}
	if n.hot || s.entry.size > hotSlotWords-1 {
		return
	}
	if _, other := sh.locate(&s.key, 1-n.class); other {
		return
	}
	if to, ok := sh.hot.claim(s.entry.hash, now); ok {
		sh.cool(to)
		sh.hot.put(to, s.entry.hash, record[:s.entry.size])
		n.hot = true
		sh.ev.promoted[tierHot]++
	}
}

// cool empties a slot of the hot tier and tells the policy.
func (sh *shard) cool(slot hotSlot) {
	if sh.hot.tag(slot.set, slot.way) == 0 {
		return
	}
	n := &sh.policy.nodes[slot.node()]
	n.hot = false
	sh.index.SetCount(int(n.slot), 0) // so that it may come back
	sh.hot.clear(slot)
	sh.ev.demoted[tierHot]++
}

// resizeHot gives the hot tier another size. It starts empty.
func (sh *shard) resizeHot(sets int) {
	for id := range sh.policy.nodes {
		if n := &sh.policy.nodes[id]; n.hot {
			n.hot = false
			sh.index.SetCount(int(n.slot), 0)
		}
	}
	sh.hot.resize(sets)
}

// locate returns the slot of the record of k in a class. For the writer only.
func (sh *shard) locate(k *key, c class) (slot int, ok bool) {
	var cur index.Cursor
	for {
		i, s, ok := sh.index.Next(&cur, k.hash)
		if !ok {
			return 0, false
		}
		if class(s.Class()) != c {
			continue
		}
		w, _ := sh.record(s)
		if e := loadEntry(w); e.hasKey(w, k) {
			return i, true
		}
	}
}

// insert stores an answer under s.key, as the newest of its class: e, its body, whose TTL
// offsets are in s.ttlAt, and the wildcard it was made from, if any. It takes the shard's lock.
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
	c := e.flags.class()
	need := sh.granules(len(s.record))
	if need > sh.regions[c].alloc.Cap()/maxRecordShare {
		return false
	}
	// A dead denial has nothing left to say beside a new answer.
	if c == success {
		if slot, ok := sh.locate(&s.key, denial); ok {
			if id, e := sh.at(slot); e.remaining(now) <= 0 {
				sh.drop(id)
			}
		}
	}
	pos, ok := sh.makeRoom(s, c, need, now)
	if !ok {
		return false
	}
	expires := second(now) + e.ttl

	slot, old := sh.locate(&s.key, c)
	var id uint32
	if old {
		id, _ = sh.at(slot)
		sh.policy.renew(id, expires)
	} else {
		id = sh.policy.add(c, s.key.hash, none, expires)
	}
	e.link = makeLink(id, e.wildcardLen(), e.excess())
	s.record[wordLink] = e.link
	sh.write(c, pos, s.record)
	if old {
		before := sh.index.Load(slot)
		sh.index.Repoint(slot, s.key.hash, uint32(pos))
		sh.free(before)
	} else if slot, ok = sh.index.Insert(s.key.hash, uint32(pos), int(c)); !ok {
		// Cannot be: the index has more slots than the policy has nodes.
		sh.policy.remove(id)
		sh.regions[c].alloc.Free(pos, need)
		return false
	} else {
		sh.entries[c].Add(1)
	}
	n := &sh.policy.nodes[id]
	n.slot = uint32(slot)
	sh.index.Mark(slot, n.segment == protected)
	sh.used.Add(int64(need))
	sh.refreshHot(s, id)
	return true
}

// makeRoom finds a place for a record of s.key, evicting what must go for it.
func (sh *shard) makeRoom(s *scratch, c class, need int, now int64) (pos int, ok bool) {
	r := &sh.regions[c]
	if _, old := sh.locate(&s.key, c); !old {
		for sh.policy.full(c) && sh.evict(c, now) {
		}
	}
	// In memory that is full a few victims are usually enough. They lie scattered, so a large
	// record may need a region of its own to be cleared.
	const victims = 8
	for range victims {
		if pos, ok = r.alloc.Alloc(need); ok {
			return pos, true
		}
		if !sh.evict(c, now) {
			break
		}
	}
	from, to := r.alloc.Window(need, r.hand)
	r.hand = to
	for {
		start, ok := r.alloc.FirstIn(from, to)
		if !ok {
			break
		}
		e := loadEntry(r.at(start * sh.granule))
		sh.drop(e.node())
		sh.ev.evicted[c]++
	}
	return r.alloc.Alloc(need)
}

// write puts a record where nobody looks yet.
func (sh *shard) write(c class, pos int, record []uint64) {
	sh.seq++
	to := sh.regions[c].at(pos * sh.granule)
	atomic.StoreUint64(&to[wordSeq], sh.seq)
	storeWords(to, record)
}

// refreshHot brings the hot tier's copy of s.key in line with the arena, where the record of
// node id has just been written.
func (sh *shard) refreshHot(s *scratch, id uint32) {
	slot, ok := sh.hot.find(s.key.hash, &s.key, none)
	if !ok {
		return
	}
	if slot.node() == id && len(s.record) <= hotSlotWords-1 {
		count := slot.count()
		sh.hot.put(slot, s.key.hash, s.record)
		slot.setCount(count)
		return
	}
	sh.cool(slot)
}

// evict removes the entry of a class that the policy gives up. It reports false when there is
// none.
func (sh *shard) evict(c class, now int64) bool {
	id := sh.policy.victim(c, second(now))
	if id == none {
		return false
	}
	sh.drop(id)
	sh.ev.evicted[c]++
	return true
}

// at returns node and header of the record that a slot points at. For the writer only.
func (sh *shard) at(slot int) (uint32, entry) {
	w, _ := sh.record(sh.index.Load(slot))
	e := loadEntry(w)
	return e.node(), e
}

// drop removes an entry from everywhere.
func (sh *shard) drop(id uint32) {
	n := &sh.policy.nodes[id]
	slot := int(n.slot)
	_, e := sh.at(slot)
	if n.hot {
		if hs, ok := sh.hot.find(e.hash, nil, id); ok {
			sh.cool(hs)
		}
	}
	s := sh.index.Load(slot)
	sh.index.Remove(slot, e.hash)
	sh.free(s)
	sh.entries[n.class].Add(-1)
	sh.policy.remove(id)
}

// free gives back the memory of the record that a slot points, or pointed, at.
func (sh *shard) free(s index.Slot) {
	w, _ := sh.record(s)
	e := loadEntry(w)
	n := sh.granules(e.size)
	sh.regions[s.Class()].alloc.Free(int(s.Pos()), n)
	sh.used.Add(-int64(n))
}

// takeAccessed implements ledger. Accesses to an entry's copy in the hot tier count for the
// entry; a copy that nobody asks for any more is demoted.
func (sh *shard) takeAccessed(n *node) int {
	if n.slot == none {
		return 0 // not in the index yet
	}
	slot := int(n.slot)
	accessed := int(sh.index.Load(slot).Count())
	if accessed > 0 {
		sh.index.SetCount(slot, 0)
	}
	if n.hot {
		id, e := sh.at(slot)
		if hs, ok := sh.hot.find(e.hash, nil, id); ok {
			if count := hs.count(); count > 0 {
				hs.setCount(0)
				return accessed + int(count)
			}
			if accessed == 0 {
				sh.cool(hs)
			}
		}
	}
	return accessed
}

// moved implements ledger: a hit reads off the index whether an entry is protected.
func (sh *shard) moved(n *node, from segment) {
	switch protected {
	case n.segment:
		sh.ev.promoted[tierProtected]++
	case from:
		sh.ev.demoted[tierProtected]++
	default:
		return
	}
	if n.slot != none {
		sh.index.Mark(int(n.slot), n.segment == protected)
	}
}
