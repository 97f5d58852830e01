package optcache

import (
	"sync"
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/arena"
	"github.com/optcache/optcache/plugin/pkg/index"
)

// This file is one shard of the store: what its writers do, and the step of a lookup that needs to
// know how index and arena hang together. The rules between readers and writers are in store.go.

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

// nextWindow returns where the next large record should make room: behind the last one, at the
// start of a word of the allocator's bitmaps, in a piece that has so much left.
func (r *region) nextWindow(granules int) int {
	span := r.alloc.Span()
	at := (r.hand + 63) &^ 63
	if at%span+granules > span {
		at = (at/span + 1) * span
	}
	if at+granules > r.alloc.Cap() {
		return 0
	}
	return at
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
	stale    int64  // for how many seconds a record may be served after it has expired

	preferPositive bool
	states         []uint64 // see state.go

	entries [classes]atomic.Int64 // for the metrics, which take no lock
	used    atomic.Int64          // granules in records, likewise

	_ [lineBytes]byte // shards do not share a line
}

// find looks for the record in the arena that answers s.key at now; entry.rank says which one, when
// there are several. The header of what it returns is in s.entry. again is true when a writer came between.
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
		if e.seq == 0 { // somebody is writing here: the slot was an old one
			return 0, 0, nil, true
		}
		if !e.sane(len(w)) || !e.hasKey(w, &s.key) {
			if !sh.index.Load(i).Same(candidate) {
				return 0, 0, nil, true
			}
			continue
		}
		if !e.servable(now, sh.stale) || record != nil && found.rank() <= e.rank() {
			continue
		}
		slot, seen, record, found = i, candidate, w, e
	}
	s.entry = found
	return slot, seen, record, false
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

// maxStaleKept is for how many seconds the policy takes an entry that has expired as alive. RFC 8767
// section 5 suggests three days at the most.
const maxStaleKept = 30 * 24 * 3600

// second is a time on the store's clock in the unit of the policy.
func second(ns int64) uint32 { return uint32(ns / 1e9) }

// promote moves an entry up: into the protected segment, and into the hot tier if that has
// room for it. slot held seen when the entry was read. It never waits, and reports false when
// another writer is at work.
func (sh *shard) promote(s *scratch, slot int, seen index.Slot, now int64) bool {
	if !sh.mu.TryLock() {
		return false
	}
	sh.ev, sh.seen = &s.events, now
	defer sh.unlock()
	record, ok := sh.record(seen)
	if sh.closed || !ok || !sh.index.Load(slot).Same(seen) || loadEntry(record).seq != s.entry.seq {
		return true
	}
	id := s.entry.node()
	if sh.policy.nodes[id].segment == probationary {
		sh.policy.protect(id)
	}
	sh.heat(&s.key, slot, now)
	return true
}

// heat puts a copy of the record of k that slot points at into the hot tier, if that has room for it.
func (sh *shard) heat(k *key, slot int, now int64) {
	record, _ := sh.record(sh.index.Load(slot))
	e := loadEntry(record)
	n := &sh.policy.nodes[e.node()]
	if n.hot || e.size > hotSlotWords-1 || e.remaining(now) <= 0 || sh.hasOther(k, slot) {
		return
	}
	if to, ok := sh.hot.claim(e.hash, now); ok {
		sh.cool(to)
		sh.hot.put(to, e.hash, record[:e.size])
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

// next returns the next record of k, and its slot. For the writer only.
func (sh *shard) next(cur *index.Cursor, k *key) (slot int, e entry, ok bool) {
	for {
		i, s, ok := sh.index.Next(cur, k.hash)
		if !ok {
			return 0, e, false
		}
		w, _ := sh.record(s)
		if e = loadEntry(w); e.hasKey(w, k) {
			return i, e, true
		}
	}
}

// locate returns the slot of the record of k of a kind. For the writer only.
func (sh *shard) locate(k *key, kind recordFlags) (slot int, ok bool) {
	var cur index.Cursor
	for {
		slot, e, ok := sh.next(&cur, k)
		if !ok || e.flags.kind() == kind {
			return slot, ok
		}
	}
}

// hasOther reports whether k has a record beside the one that slot points at. For the writer only.
func (sh *shard) hasOther(k *key, slot int) bool {
	var cur index.Cursor
	for {
		i, _, ok := sh.next(&cur, k)
		if !ok || i != slot {
			return ok
		}
	}
}

// expiry is when the policy takes an entry with an answer of that time and TTL as dead.
func (sh *shard) expiry(stored int64, ttl uint32) uint32 {
	return uint32(max(stored/1e9+int64(ttl)+min(sh.stale, maxStaleKept), 0))
}

// supersede drops the records of s.key that have nothing left to say beside e, which is about to
// be stored: a denial that is dead or that e is the news to, and with prefer_positive an answer that
// e is better than.
func (sh *shard) supersede(s *scratch, e *entry, now int64) {
	if e.flags.class() == denial {
		return
	}
	if slot, ok := sh.locate(&s.key, flagDenial); ok {
		if id, old := sh.at(slot); e.supersedes || old.remaining(now) <= 0 && !sh.preferPositive {
			sh.drop(id)
		}
	}
	if e.flags&flagAnswers != 0 {
		if slot, ok := sh.locate(&s.key, 0); ok {
			id, _ := sh.at(slot)
			sh.drop(id)
		}
	}
}

// insert stores the record in s.record, that of e.
func (sh *shard) insert(s *scratch, e *entry, now int64) bool {
	c := e.flags.class()
	need := sh.granules(len(s.record))
	if need > sh.regions[c].alloc.Cap()/maxRecordShare {
		return false
	}
	kind := e.flags.kind()
	sh.supersede(s, e, now)
	pos, ok := sh.makeRoom(s, kind, need, now)
	if !ok {
		return false
	}
	expires := sh.expiry(now, e.ttl)

	slot, old := sh.locate(&s.key, kind)
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
	hits := e.hits
	if _, denied := sh.locate(&s.key, flagDenial); denied && e.flags.class() == success {
		hits = 0 // as in the built-in cache: a denial that is left is what was popular
	}
	sh.resetState(id, hits, e.hitsAt)
	sh.refreshHot(s, id)
	return true
}

// makeRoom finds a place for a record of s.key and of that kind, evicting what must go for it.
func (sh *shard) makeRoom(s *scratch, kind recordFlags, need int, now int64) (pos int, ok bool) {
	c := kind.class()
	r := &sh.regions[c]
	if _, old := sh.locate(&s.key, kind); !old {
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
	from, to := r.alloc.Window(need, r.nextWindow(need))
	r.hand = to
	for {
		start, ok := r.alloc.FirstIn(from, to)
		if !ok {
			break
		}
		e := loadEntry(r.at(start * sh.granule))
		sh.policy.remember(&sh.policy.nodes[e.node()])
		sh.drop(e.node())
		sh.ev.evicted[c]++
	}
	return r.alloc.Alloc(need)
}

// write puts a record where nobody should look yet. Somebody may all the same, who came by a slot
// that pointed there before, and will point there again: seq is 0 until all words are in place.
func (sh *shard) write(c class, pos int, record []uint64) {
	sh.seq++
	to := sh.regions[c].at(pos * sh.granule)
	atomic.StoreUint64(&to[wordSeq], 0)
	storeWords(to, record)
	atomic.StoreUint64(&to[wordSeq], sh.seq)
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
