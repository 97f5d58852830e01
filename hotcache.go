package optcache

import (
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file is the hot tier. The tier holds copies of the most popular records. Its memory is so compact that it stays in
// the CPU's caches, which the region of all records does not. Which record is copied, and when, is decided in shard.go.
//
// The hot tier buys speed, not hit ratio. Each record in it is in the region, too. So an entry whose copy is removed stays
// in its segment. A reader that meets a slot while a writer changes it looks in the region instead of waiting.
//
// The tier is set-associative. A set has four ways, with one slot of fixed size for each, and one word with four tags of 16
// bits. One load of that word usually shows that a key is not in the tier.
//
// The tier holds a key only while the region has one record of that key. So a hit needs no look at other records that may
// have to be served instead.
const (
	hotWays = 4

	// hotSlotWords is the size of a slot: four lines of 64 bytes. Access count and header take 56 bytes. The other 200 are
	// for key and answer, which is enough for an A answer with a few addresses.
	hotSlotWords = 32

	// hotSetBytes is the memory of a set: its slots and the word of tags.
	hotSetBytes = hotWays*hotSlotWords*record.WordBytes + record.WordBytes

	// hotEntryBytes is the memory of one entry's copy.
	hotEntryBytes = hotSetBytes / hotWays

	// hotSaturation is where a slot's access count stops. After that a hit writes nothing, and a popular name's line
	// does not move between cores.
	hotSaturation = 7

	hotTagBits = 16
)

// hotTier is the hot tier of one shard. The zero hotTier holds nothing, and has no room.
//
// The first word of a slot is its access count, which readers raise. The record follows. The record's seq is odd while the
// slot is empty or changes, even while the slot has a record, and 0 when the slot was never used. Writers hold the shard's
// lock.
type hotTier struct {
	tags  []uint64 // one word for each set; a tag of 0 is an empty way
	slots []uint64
	sets  atomic.Uint64 // number of sets in use, from the first one on
}

// hotSlot is one slot.
type hotSlot struct {
	set    uint64
	way    int
	words  []uint64 // access count and record
	record []uint64
}

// home returns the set for a hash.
func (h *hotTier) home(hash uint64) uint64 {
	return (hash >> 16 & 0xffffffff) * h.sets.Load() >> 32
}

// hotTag returns the part of a hash that a set keeps. It is never 0.
func hotTag(hash uint64) uint64 { return max(hash>>48, 1) }

func (h *hotTier) slot(set uint64, way int) hotSlot {
	w := h.slots[(set*hotWays+uint64(way))*hotSlotWords:][:hotSlotWords:hotSlotWords]
	return hotSlot{set: set, way: way, words: w, record: w[1:]}
}

func (h *hotTier) tag(set uint64, way int) uint64 {
	return atomic.LoadUint64(&h.tags[set]) >> (way * hotTagBits) & (1<<hotTagBits - 1)
}

// lookup fills s with the answer for s.Key if the tier has one that is alive at now. It takes no lock.
func (h *hotTier) lookup(s *scratch, now int64) bool {
	if len(h.tags) == 0 {
		return false
	}
	set, tag := h.home(s.Key.Hash), hotTag(s.Key.Hash)
	for way := range hotWays {
		if h.tag(set, way) != tag {
			continue
		}
		slot := h.slot(set, way)
		e := &s.Entry
		e.Load(slot.record)
		if e.Seq&1 != 0 || e.Seq == 0 || !e.Sane(len(slot.record)) || !e.HasKey(slot.record, &s.Key) || e.Remaining(now) <= 0 {
			continue
		}
		s.CopyAnswer(slot.record)
		if atomic.LoadUint64(&slot.record[record.WordSeq]) != e.Seq {
			continue
		}
		// By now the slot may hold another record, which then has one access too many.
		if c := atomic.LoadUint64(&slot.words[0]); c < hotSaturation {
			atomic.CompareAndSwapUint64(&slot.words[0], c, c+1)
		}
		return true
	}
	return false
}

// find returns the slot with the copy of the record of that hash and key or, when k is nil, of that hash and node. For the
// writer only.
func (h *hotTier) find(hash uint64, k *record.Key, node uint32) (hotSlot, bool) {
	if len(h.tags) == 0 {
		return hotSlot{}, false
	}
	set := h.home(hash)
	for way := range hotWays {
		if h.tag(set, way) != hotTag(hash) {
			continue
		}
		slot := h.slot(set, way)
		e := record.LoadEntry(slot.record)
		if k != nil && e.HasKey(slot.record, k) || k == nil && e.Hash == hash && e.Node() == node {
			return slot, true
		}
	}
	return hotSlot{}, false
}

// claim returns a slot for a record of that hash: a slot that is empty, whose record is dead at now, or whose access count
// is 0. If there is none, claim lowers the access count of each slot of the set by one, and ok is false. So a record that
// tries often enough gets a slot. For the writer only.
func (h *hotTier) claim(hash uint64, now int64) (slot hotSlot, ok bool) {
	if len(h.tags) == 0 {
		return hotSlot{}, false
	}
	set := h.home(hash)
	for way := range hotWays {
		slot := h.slot(set, way)
		e := record.LoadEntry(slot.record)
		if h.tag(set, way) == 0 || e.Remaining(now) <= 0 || slot.count() == 0 {
			return slot, true
		}
	}
	for way := range hotWays {
		slot := h.slot(set, way)
		slot.setCount(slot.count() - 1)
	}
	return hotSlot{}, false
}

// resize removes all copies, and changes the number of sets in use. sets is between 1 and the number that the tier has
// memory for. A reader that has loaded the old number looks in a wrong set. It finds nothing there, or a record that has
// its key and is right. For the writer only.
func (h *hotTier) resize(sets int) {
	for set := range h.tags {
		for way := range hotWays {
			if h.tag(uint64(set), way) != 0 {
				h.clear(h.slot(uint64(set), way))
			}
		}
	}
	h.sets.Store(uint64(sets))
}

// entries returns how many entries have a copy. It takes no lock.
func (h *hotTier) entries() (n int64) {
	for i := range h.tags {
		for tags := atomic.LoadUint64(&h.tags[i]); tags != 0; tags >>= hotTagBits {
			if tags&(1<<hotTagBits-1) != 0 {
				n++
			}
		}
	}
	return n
}

// put copies rec, a record of the region with at most hotSlotWords-1 words, to the slot. For the writer only.
func (h *hotTier) put(slot hotSlot, hash uint64, rec []uint64) {
	seq := h.clear(slot)
	for i := record.WordSeq + 1; i < len(rec); i++ {
		atomic.StoreUint64(&slot.record[i], atomic.LoadUint64(&rec[i]))
	}
	slot.setCount(1)
	atomic.StoreUint64(&slot.record[record.WordSeq], seq+1)
	h.setTag(slot, hotTag(hash))
}

// clear empties a slot. It makes the slot's seq odd, and returns the seq. For the writer only.
func (h *hotTier) clear(slot hotSlot) (seq uint64) {
	seq = atomic.LoadUint64(&slot.record[record.WordSeq]) | 1
	atomic.StoreUint64(&slot.record[record.WordSeq], seq)
	h.setTag(slot, 0)
	return seq
}

func (h *hotTier) setTag(slot hotSlot, tag uint64) {
	shift := slot.way * hotTagBits
	w := atomic.LoadUint64(&h.tags[slot.set])
	atomic.StoreUint64(&h.tags[slot.set], w&^((1<<hotTagBits-1)<<shift)|tag<<shift)
}

func (s hotSlot) count() uint64     { return atomic.LoadUint64(&s.words[0]) }
func (s hotSlot) setCount(n uint64) { atomic.StoreUint64(&s.words[0], n) }
func (s hotSlot) node() uint32      { e := record.LoadEntry(s.record); return e.Node() }
