package optcache

import (
	"sync"
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/arena"
	"github.com/optcache/optcache/plugin/pkg/flushed"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/popularity"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file is one shard of the store. It holds what writers do: promotion, insertion, making room, eviction. It also
// holds the step of a lookup that reads both the index and the region. The rules between readers and writers are in
// store.go. Which entry goes is decided in slru.go.

// region is the memory that a shard has for records, of both classes. Each class has a share. What one class leaves unused
// of its share is lent to the other class, and is taken back when the first one needs it.
type region struct {
	words  []uint64 // of all shards; the pieces of one shard lie between those of the others
	first  int      // where this shard's first piece starts, in words
	stride int      // from one of its pieces to the next, in words
	alloc  *arena.Allocator
	hand   int // the granule from which the next search for an almost empty place starts

	// All of these are in granules.
	share [record.Classes]int
	used  [record.Classes]int
	heavy [record.Classes]int // the part of used that heavy records have
}

const (
	// heavyWords is the size above which a record is heavy, in words. An answer that comes over UDP without fragments
	// (1232 bytes, DNS flag day 2020) is never heavy. Larger answers are few.
	heavyWords = 2048 / record.WordBytes

	// heavyShare divides a class's share. Heavy records may take one such part of it without a contest. For more than that
	// they must win one (rivals.yield).
	heavyShare = 4

	// fewVictims is how many records of usual size are evicted for another one before records are moved to make room. The
	// free granules lie scattered, but in full memory one or two victims are usually enough.
	fewVictims = 8

	// mostGathers is how many failed attempts to make room by moving records an insert makes before it gives up.
	mostGathers = 8
)

// at returns the words from a place in the region to the end of its piece, or nil when there is no such place. word counts
// the words of this shard's pieces only.
func (r *region) at(word int) []uint64 {
	piece, within := word/pieceWords, word%pieceWords
	start := r.first + piece*r.stride
	if start >= len(r.words) {
		return nil
	}
	return r.words[start+within : start+pieceWords]
}

// free returns how many granules are in no record.
func (r *region) free() int { return r.alloc.Cap() - r.alloc.Used() }

// payer returns the class that gives up records for a record of class c with need granules. That is c itself, unless c
// stays within its share and the other class has borrowed.
func (r *region) payer(c record.Class, need int) record.Class {
	if other := 1 - c; r.used[c]+need <= r.share[c] && r.used[other] > r.share[other] {
		return other
	}
	return c
}

// overweight reports whether the heavy records of a class, with so many granules more, take more than their part of the
// class's share (heavyShare).
func (r *region) overweight(c record.Class, more int) bool {
	return r.heavy[c]+more > r.share[c]/heavyShare
}

// holding is what one store of the pool has in a shard.
type holding struct {
	closed   bool                         // the store takes no more entries; guarded by the shard's mu
	granules [record.Classes]int          // guarded by the shard's mu
	entries  [record.Classes]atomic.Int64 // for the metrics, which take no lock

	_ [record.LineBytes - 40]byte // the shards of others do not share the line
}

// shard is an independent part of the pool.
type shard struct {
	// Writers hold mu. It guards held, seq, policy, ev and the allocator. Its holder is the only writer of index,
	// region and hot tier, but for the access counts, which readers raise. Readers load the words of all three atomically.
	mu     sync.Mutex
	held   []holding // by the owner of a store's seed
	seq    uint64    // of the last record written
	policy slru
	ev     *events // of the request that holds mu

	index    index.Table
	hot      hotTier
	region   region
	own      [record.Classes]int // entries of a class that the other class cannot take away; a class with more has borrowed
	granule  int                 // in words
	hotAfter uint32              // accesses before promotion
	saturate uint32              // where an access count stops

	states popularity.Table // by the policy's node; empty unless prefetch or serve_stale needs it

	_ [record.LineBytes]byte // shards do not share a line
}

// holding returns what the store has whose records have that hash.
func (sh *shard) holding(hash uint64) *holding { return &sh.held[record.Owner(hash)] }

// find looks in the region for the record that answers s.Key at now. A record may be served for stale seconds after it has
// expired. When there are several, find takes the one of the lowest rank (Entry.Rank). It leaves the record's header in s.Entry.
// again is true when a writer came between; the reader must then start over.
func (sh *shard) find(s *scratch, stale, now int64) (slot int, seen index.Slot, rec []uint64, again bool) {
	var c index.Cursor
	var found record.Entry
	for {
		i, candidate, ok := sh.index.Next(&c, s.Key.Hash)
		if !ok {
			break
		}
		w, ok := sh.record(candidate)
		if !ok {
			return 0, 0, nil, true
		}
		e := record.LoadEntry(w)
		if e.Seq == 0 { // a writer is at work in this place, so the slot has changed since it was loaded
			return 0, 0, nil, true
		}
		if !e.Sane(len(w)) || !e.HasKey(w, &s.Key) {
			if !sh.index.Load(i).Same(candidate) {
				return 0, 0, nil, true
			}
			continue
		}
		e.LoadUntil(w)
		if !e.Servable(now, stale) || rec != nil && found.Rank() <= e.Rank() {
			if !sh.index.Load(i).Same(candidate) { // the record has moved, and what was read may be of another record
				return 0, 0, nil, true
			}
			continue
		}
		slot, seen, rec, found = i, candidate, w, e
	}
	s.Entry = found
	return slot, seen, rec, false
}

// record returns the words from where a slot points to the end of the piece. ok is false when there is no room for a
// record's header. A reader that gets false has read words that a writer was changing.
func (sh *shard) record(s index.Slot) (w []uint64, ok bool) {
	w = sh.region.at(int(s.Pos()) * sh.granule)
	return w, len(w) >= record.HeaderWords
}

// granules returns how many granules n words take.
func (sh *shard) granules(n int) int { return (n + sh.granule - 1) / sh.granule }

// lock takes the shard's lock for a request at now. What the policy does meanwhile is counted in s.events. unlock gives the
// lock back.
func (sh *shard) lock(s *scratch, now int64) {
	sh.mu.Lock()
	sh.ev = &s.events
}

func (sh *shard) unlock() {
	sh.ev = nil
	sh.mu.Unlock()
}

// maxStaleKept bounds, in seconds, for how long the policy takes an expired entry as alive because of serve_stale. RFC 8767
// section 5 suggests one to three days.
const maxStaleKept = 30 * 24 * 3600

// second converts a time on the store's clock from nanoseconds to seconds, the unit of the policy.
func second(ns int64) uint32 { return uint32(ns / 1e9) }

// promote moves an entry up: into the protected segment, and into the hot tier if that has room for the entry. seen is what
// the slot held when the reader read the entry. promote never waits. It reports false when another writer holds the lock.
func (sh *shard) promote(s *scratch, slot int, seen index.Slot, now int64) bool {
	if !sh.mu.TryLock() {
		return false
	}
	sh.ev = &s.events
	defer sh.unlock()
	rec, ok := sh.record(seen)
	if sh.holding(s.Key.Hash).closed || !ok || !sh.index.Load(slot).Same(seen) || record.LoadEntry(rec).Seq != s.Entry.Seq {
		return true
	}
	id := s.Entry.Node()
	if sh.policy.nodes[id].segment == probationary {
		sh.policy.protect(id)
	}
	sh.heat(&s.Key, slot, now)
	return true
}

// heat puts a copy of the record that slot points at into the hot tier, if that has room for it and the record is the only
// one of k. For the writer only.
func (sh *shard) heat(k *record.Key, slot int, now int64) {
	rec, _ := sh.record(sh.index.Load(slot))
	e := record.LoadEntry(rec)
	n := &sh.policy.nodes[e.Node()]
	if n.hot || e.Size > hotSlotWords-1 || e.Remaining(now) <= 0 || sh.hasOther(k, slot) {
		return
	}
	if to, ok := sh.hot.claim(e.Hash, now); ok {
		sh.cool(to)
		sh.hot.put(to, e.Hash, rec[:e.Size])
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
	sh.index.SetCount(int(n.slot), 0) // an entry is promoted when its count reaches hotAfter, so the count must start anew
	sh.hot.clear(slot)
	sh.ev.demoted[tierHot]++
}

// resizeHot gives the hot tier another size, in sets, and empties it.
func (sh *shard) resizeHot(sets int) {
	for id := range sh.policy.nodes {
		if n := &sh.policy.nodes[id]; n.hot {
			n.hot = false
			sh.index.SetCount(int(n.slot), 0)
		}
	}
	sh.hot.resize(sets)
}

// next returns the header of the next record of k, and its slot. For the writer only.
func (sh *shard) next(cur *index.Cursor, k *record.Key) (slot int, e record.Entry, ok bool) {
	for {
		i, s, ok := sh.index.Next(cur, k.Hash)
		if !ok {
			return 0, e, false
		}
		w, _ := sh.record(s)
		if e = record.LoadEntry(w); e.HasKey(w, k) {
			return i, e, true
		}
	}
}

// locate returns the slot of the record of k of a kind. For the writer only.
func (sh *shard) locate(k *record.Key, kind record.Flags) (slot int, ok bool) {
	var cur index.Cursor
	for {
		slot, e, ok := sh.next(&cur, k)
		if !ok || e.Flags.Kind() == kind {
			return slot, ok
		}
	}
}

// hasOther reports whether k has a record beside the one that slot points at. For the writer only.
func (sh *shard) hasOther(k *record.Key, slot int) bool {
	var cur index.Cursor
	for {
		i, _, ok := sh.next(&cur, k)
		if !ok || i != slot {
			return ok
		}
	}
}

// expiry returns the second after which the policy takes an entry as dead: when its TTL and the time for which it may be
// served stale are over. stored, in ns on the store's clock, is from when on its TTL counts. stale is in seconds.
func expiry(e *record.Entry, stored, stale int64) uint32 {
	stale = min(stale, maxStaleKept)
	if e.Flags&record.FlagNoStale != 0 {
		stale = 0
	}
	return uint32(max(stored/1e9+int64(e.TTL)+stale, 0))
}

// dropRecords drops the records of k for which f reports true.
func (sh *shard) dropRecords(k *record.Key, f func(*record.Entry) bool) {
	var cur index.Cursor
	for {
		slot, e, ok := sh.next(&cur, k)
		if !ok {
			return
		}
		if f(&e) {
			id, _ := sh.at(slot)
			sh.drop(id)
			cur = index.Cursor{} // drop has changed the slots that the cursor counts on
		}
	}
}

// insert stores the record in s.Words, whose header is e. It also drops the records of the same key that e replaces
// (Entry.Replaces). The record may be served for stale seconds after it has expired.
//
// insert reports false when the record is too large, or when the policy keeps the entries that it would displace. In the
// second case the older record of the same kind may be gone, too.
func (sh *shard) insert(s *scratch, e *record.Entry, stale, now int64) bool {
	c := e.Flags.Class()
	need := sh.granules(len(s.Words))
	if need > sh.region.share[c]/maxRecordShare {
		return false
	}
	kind := e.Flags.Kind()
	sh.dropRecords(&s.Key, func(old *record.Entry) bool { return old.Flags.Kind() != kind && e.Replaces(old) })
	pos, ok := sh.makeRoom(s, kind, need, now)
	if !ok {
		return false
	}
	expires := expiry(e, now, stale)

	slot, old := sh.locate(&s.Key, kind)
	var id uint32
	if old {
		id, _ = sh.at(slot)
		sh.policy.renew(id, expires)
	} else {
		id = sh.policy.add(c, s.Key.Hash, none, expires)
	}
	sh.policy.weigh(id, len(s.Words) > heavyWords)
	e.Link = record.MakeLink(id, e.WildcardLen(), e.Excess())
	s.Words[record.WordLink] = e.Link
	sh.write(pos, s.Words)
	sh.account(e.Hash, c, len(s.Words), need)
	if old {
		before := sh.index.Load(slot)
		sh.index.Repoint(slot, s.Key.Hash, uint32(pos))
		sh.free(before)
	} else if slot, ok = sh.index.Insert(s.Key.Hash, uint32(pos), int(c)); !ok {
		// This cannot happen: the index has more slots than the policy has nodes.
		sh.policy.remove(id)
		sh.region.alloc.Free(pos, need)
		sh.account(e.Hash, c, len(s.Words), -need)
		return false
	} else {
		sh.holding(e.Hash).entries[c].Add(1)
	}
	n := &sh.policy.nodes[id]
	n.slot = uint32(slot)
	sh.index.Mark(slot, n.segment == protected)
	sh.states.Store(id, popularity.NewState(e.Hits, e.HitsAt))
	sh.refreshHot(s, id)
	return true
}

// makeRoom allocates need granules for the record in s.Words, which is of s.Key and of that kind. It evicts entries until
// there is room, both in the number of entries and in memory.
func (sh *shard) makeRoom(s *scratch, kind record.Flags, need int, now int64) (pos int, ok bool) {
	c, r := kind.Class(), &sh.region
	_, old := sh.locate(&s.Key, kind)
	few := fewVictims
	if len(s.Words) > heavyWords {
		if !sh.admit(s, kind, need, now) {
			return 0, false
		}
		old, few = false, 0
	}
	if !old {
		for sh.policy.full(c) && sh.evict(c, s.Key.Hash, now) {
		}
		for sh.crowded() {
			payer, rival := c, s.Key.Hash
			if other := 1 - c; sh.policy.classes[c].entries() < sh.own[c] && sh.policy.classes[other].entries() > sh.own[other] {
				payer, rival = other, 0
			}
			if !sh.evict(payer, rival, now) {
				break
			}
		}
	}
	// The free granules may lie in runs that are too short. Then records are moved out of the way (gather). If there is no
	// place to move them to, more records are evicted before the next attempt.
	slack := need/8 + 1
	for gather, failed := need+slack, 0; failed <= mostGathers; few-- {
		if pos, ok = r.alloc.Alloc(need); ok {
			return pos, true
		}
		if few <= 0 && r.free() >= gather {
			gather = r.free() + slack
			if sh.gather(need) {
				continue
			}
			failed++
		}
		payer, rival := r.payer(c, need), s.Key.Hash
		if payer != c {
			rival = 0
		}
		if !sh.evict(payer, rival, now) {
			if few <= 0 {
				break
			}
			few = 0
		}
	}
	return sh.clear(s, c, need, now)
}

// clear makes a free run of need granules at the place where the fewest granules are used, and evicts the records that lie
// there. It is the last resort of makeRoom. For a heavy record, clear evicts no living record of the other class; it
// reports false instead.
func (sh *shard) clear(s *scratch, c record.Class, need int, now int64) (pos int, ok bool) {
	r := &sh.region
	from, to, ok := r.alloc.Emptiest(need, r.hand)
	if !ok {
		return 0, false
	}
	var ids []uint32
	for at := from; ; {
		start, more := r.alloc.FirstIn(at, to)
		if !more {
			break
		}
		e := record.LoadEntry(r.at(start * sh.granule))
		n := &sh.policy.nodes[e.Node()]
		if len(s.Words) > heavyWords && n.class != c && second(now) <= n.expires {
			r.hand = to // the next search starts elsewhere
			sh.policy.refused(c, s.Key.Hash)
			return 0, false
		}
		ids = append(ids, e.Node())
		at = start + 1
	}
	for _, id := range ids {
		sh.ev.evicted[sh.policy.nodes[id].class]++
		sh.drop(id)
	}
	return r.alloc.Alloc(need)
}

// crowded reports whether the shard has as many entries as it may have, of both classes together.
func (sh *shard) crowded() bool {
	return sh.policy.classes[record.Success].entries()+sh.policy.classes[record.Denial].entries() >= sh.policy.most
}

// admit decides the contest between the heavy record in s.Words and the heavy entries that it would displace. If the record
// wins, admit evicts them and reports true.
//
// When memory is short, admit drops the record that the new one would replace before the contest, and whatever its
// outcome: that record is out of date.
func (sh *shard) admit(s *scratch, kind record.Flags, need int, now int64) bool {
	c, r := kind.Class(), &sh.region
	short := func() int { return need + need/8 + 1 - r.free() }
	if slot, old := sh.locate(&s.Key, kind); old && short() > 0 {
		id, _ := sh.at(slot)
		sh.drop(id)
	}
	for short() > 0 {
		id := sh.policy.dead(c, second(now))
		if id == none {
			break
		}
		sh.drop(id)
		sh.ev.evicted[c]++
	}
	want := short()
	if r.payer(c, need) != c {
		want -= r.used[1-c] - r.share[1-c]
	}
	if want <= 0 && !sh.policy.full(c) || !r.overweight(c, need) {
		return true // no contest: makeRoom evicts entries, as for a record of usual size
	}
	over := r.heavy[c] + need - r.share[c]/heavyShare
	rivals := sh.policy.rivals(c, min(want, over), second(now), func(n *node) int {
		_, e := sh.at(int(n.slot))
		return sh.granules(e.Size)
	})
	if !rivals.yield(sh.policy.estimate(c, s.Key.Hash), need) {
		sh.policy.refused(c, s.Key.Hash)
		return false
	}
	for _, id := range rivals.ids {
		sh.drop(id)
		sh.ev.evicted[c]++
	}
	return true
}

// gather makes a free run of need granules at the place where the fewest granules are used. It moves the records that lie
// there. It reports false when there is no room for them elsewhere.
func (sh *shard) gather(need int) bool {
	r := &sh.region
	from, to, ok := r.alloc.Emptiest(need, r.hand)
	if !ok {
		return false
	}
	r.hand = to
	var records []int
	for at := from; ; {
		start, ok := r.alloc.FirstIn(at, to)
		if !ok {
			break
		}
		records = append(records, start)
		at = start + 1
	}
	left := r.alloc.Fence(from, to, nil)
	moved := true
	for _, start := range records {
		w := r.at(start * sh.granule)
		e := record.LoadEntry(w)
		pos, ok := r.alloc.Alloc(sh.granules(e.Size))
		if !ok {
			moved = false
			break
		}
		sh.write(pos, w[:e.Size])
		sh.index.Repoint(int(sh.policy.nodes[e.Node()].slot), e.Hash, uint32(pos))
		left = append(left, start)
	}
	for _, start := range left {
		r.alloc.Free(start, r.alloc.Length(start))
	}
	return moved
}

// account adds granules, which may be negative, to the memory that a class uses, and a store. hash and size, in words, are those of
// the record that they are for.
func (sh *shard) account(hash uint64, c record.Class, size, granules int) {
	r := &sh.region
	sh.holding(hash).granules[c] += granules
	r.used[c] += granules
	if size > heavyWords {
		r.heavy[c] += granules
	}
}

// write writes a record to a place that no slot points at yet. A reader may look there all the same: it may have loaded a
// slot that pointed to this place earlier. By the time it has copied the record, the slot may point there again. So seq is
// 0 until all other words are in place.
func (sh *shard) write(pos int, rec []uint64) {
	sh.seq++
	to := sh.region.at(pos * sh.granule)
	atomic.StoreUint64(&to[record.WordSeq], 0)
	record.StoreWords(to, rec)
	atomic.StoreUint64(&to[record.WordSeq], sh.seq)
}

// refreshHot brings the hot tier's copy for s.Key up to date, after the record of node id has been written to the region.
func (sh *shard) refreshHot(s *scratch, id uint32) {
	slot, ok := sh.hot.find(s.Key.Hash, &s.Key, none)
	if !ok {
		return
	}
	if slot.node() == id && len(s.Words) <= hotSlotWords-1 {
		count := slot.count()
		sh.hot.put(slot, s.Key.Hash, s.Words)
		slot.setCount(count)
		return
	}
	sh.cool(slot)
}

// evict removes the entry of class c that the policy wants to go. rival is the hash of the new record, if that is of class
// c, too. It is 0 if the new record is of the other class, which takes back what it has lent. evict reports false when the
// class is empty.
func (sh *shard) evict(c record.Class, rival uint64, now int64) bool {
	id := none
	if sh.region.overweight(c, 0) {
		if id = sh.policy.dead(c, second(now)); id == none {
			id = sh.policy.heavyVictim(c, rival, second(now))
		}
	}
	if id == none {
		id = sh.policy.victim(c, second(now))
	}
	if id == none {
		return false
	}
	sh.drop(id)
	sh.ev.evicted[c]++
	return true
}

// at returns the node and the header of the record that a slot points at. For the writer only.
func (sh *shard) at(slot int) (uint32, record.Entry) {
	w, _ := sh.record(sh.index.Load(slot))
	e := record.LoadEntry(w)
	return e.Node(), e
}

// ownerOf returns the owner of a node's record, or -1 if the node has none. For the writer only.
func (sh *shard) ownerOf(id uint32) int {
	n := &sh.policy.nodes[id]
	if n.segment == free || n.slot == none {
		return -1
	}
	_, e := sh.at(int(n.slot))
	return record.Owner(e.Hash)
}

// drop removes an entry from the hot tier, the index, the region and the policy.
func (sh *shard) drop(id uint32) {
	n := &sh.policy.nodes[id]
	slot := int(n.slot)
	_, e := sh.at(slot)
	if n.hot {
		if hs, ok := sh.hot.find(e.Hash, nil, id); ok {
			sh.cool(hs)
		}
	}
	s := sh.index.Load(slot)
	sh.index.Remove(slot, e.Hash)
	sh.free(s)
	sh.holding(e.Hash).entries[n.class].Add(-1)
	sh.policy.remove(id)
}

// free frees the granules of the record that s points at. No slot of the index may point there any more.
func (sh *shard) free(s index.Slot) {
	w, _ := sh.record(s)
	e := record.LoadEntry(w)
	n := sh.granules(e.Size)
	sh.region.alloc.Free(int(s.Pos()), n)
	sh.account(e.Hash, record.Class(s.Class()), e.Size, -n)
}

// takeAccessed implements accessCounts. Accesses to an entry's copy in the hot tier count for the entry. A copy without an
// access since the last call leaves the hot tier.
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
		if hs, ok := sh.hot.find(e.Hash, nil, id); ok {
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

// moved implements accessCounts. It marks the index's slots of protected entries, because a hit reads from the mark which
// tier it was in. It counts promotions and demotions.
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

// accesses returns how often an entry has been asked for, as far as it is counted: by the copy in the hot tier, by the index, and
// by the popularity table. Each of these counts stops somewhere, or starts anew now and then. For the writer only.
func (sh *shard) accesses(id uint32) uint32 {
	n := &sh.policy.nodes[id]
	slot := int(n.slot)
	count := sh.index.Load(slot).Count()
	if n.hot {
		_, e := sh.at(slot)
		if copied, ok := sh.hot.find(e.Hash, nil, id); ok {
			count += uint32(copied.count())
		}
	}
	state := sh.states.Load(id)
	return max(count, state.Count())
}

// walkBatch is how many nodes are looked at while the lock of their shard is held.
const walkBatch = 256

// walk gives the records that a store has in the shard to f, in the order of their nodes, from one node on, until f returns false.
// f runs under the lock of the shard, which walk gives back after each walkBatch nodes. A record that comes or goes meanwhile may be
// left out. next is the node after the last one that f got, or none at the end.
func (sh *shard) walk(s *scratch, owner int, from uint32, now int64, f func(id uint32, e *record.Entry) bool) (next uint32) {
	for {
		sh.lock(s, now)
		for range walkBatch {
			if sh.held[owner].closed || from >= uint32(len(sh.policy.nodes)) {
				sh.unlock()
				return none
			}
			id := from
			from++
			n := &sh.policy.nodes[id]
			if n.segment == free || n.slot == none {
				continue
			}
			w, _ := sh.record(sh.index.Load(int(n.slot)))
			e := record.LoadEntry(w)
			if record.Owner(e.Hash) != owner {
				continue
			}
			s.Key.Load(&e, w)
			if !f(id, &e) {
				sh.unlock()
				return from
			}
		}
		sh.unlock()
	}
}

// flush removes what a filter says from those that a store has, and returns how many answers went.
func (sh *shard) flush(s *scratch, owner int, f *flushed.Filter, now int64) (n int) {
	sh.walk(s, owner, 0, now, func(id uint32, e *record.Entry) bool {
		if f.Has(&s.Key, e, now) {
			sh.drop(id)
			n++
		}
		return true
	})
	return n
}
