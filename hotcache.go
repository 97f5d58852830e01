package optcache

import "sync/atomic"

// This file is the hot tier: copies of the most popular records in memory so compact that it
// stays in the CPU's caches while the arena does not. It buys speed, not hit ratio: every
// record in it stands in the arena, too, so that what leaves the hot tier is demoted to the
// protected segment and never dropped, and a reader that finds a slot changing under its eyes
// goes to the arena instead of waiting.
//
// The tier is set-associative: four ways to a set, one word of four 16-bit tags for the set,
// a fixed slot for each way. One load says that a name is not here.
//
// It holds a key only while the arena has that key in one class. The hit is then decided on
// the spot, with no look at what the other class may say.
const (
	hotWays = 4

	// hotSlotWords is the size of a slot: four 64-byte lines. With the counter and the header
	// that leaves 200 bytes for key and answer, enough for an A answer with a few addresses.
	hotSlotWords = 32

	// hotSetBytes is the memory of a set: its slots and the word of tags.
	hotSetBytes = hotWays*hotSlotWords*wordBytes + wordBytes

	// hotEntryBytes is the memory of one entry's copy.
	hotEntryBytes = hotSetBytes / hotWays

	// hotSaturation is where a slot's access counter stops. A hit on a slot that is asked for
	// all the time then writes nothing, and the name's line is not torn between cores.
	hotSaturation = 7

	hotTagBits = 16
)

// hotTier is the hot tier of one shard. The zero hotTier holds nothing.
//
// The first word of a slot is its access counter, raised by readers; the record follows. Its
// seq is odd while the slot changes, and 0 when it was never used. Writers hold the shard's lock.
type hotTier struct {
	tags  []uint64 // one word for each set; a tag of 0 is an empty way
	slots []uint64
	sets  atomic.Uint64 // in use, the first ones
}

// hotSlot is a slot, by its words.
type hotSlot struct {
	set    uint64
	way    int
	words  []uint64 // counter and record
	record []uint64
}

func (h *hotTier) home(hash uint64) uint64 {
	return (hash >> 16 & 0xffffffff) * h.sets.Load() >> 32
}

// hotTag is the part of a hash that a set keeps; never 0.
func hotTag(hash uint64) uint64 { return max(hash>>48, 1) }

func (h *hotTier) slot(set uint64, way int) hotSlot {
	w := h.slots[(set*hotWays+uint64(way))*hotSlotWords:][:hotSlotWords:hotSlotWords]
	return hotSlot{set: set, way: way, words: w, record: w[1:]}
}

func (h *hotTier) tag(set uint64, way int) uint64 {
	return atomic.LoadUint64(&h.tags[set]) >> (way * hotTagBits) & (1<<hotTagBits - 1)
}

// lookup fills s with the answer for s.key if the tier has one that is alive at now. It takes
// no lock.
func (h *hotTier) lookup(s *scratch, now int64) bool {
	if len(h.tags) == 0 {
		return false
	}
	set, tag := h.home(s.key.hash), hotTag(s.key.hash)
	for way := range hotWays {
		if h.tag(set, way) != tag {
			continue
		}
		slot := h.slot(set, way)
		e := &s.entry
		e.load(slot.record)
		if e.seq&1 != 0 || e.seq == 0 || !e.sane(len(slot.record)) || !e.hasKey(slot.record, &s.key) || e.remaining(now) <= 0 {
			continue
		}
		s.copyAnswer(slot.record)
		if atomic.LoadUint64(&slot.record[wordSeq]) != e.seq {
			continue
		}
		// The slot may have a new tenant by now, which then has one access too many.
		if c := atomic.LoadUint64(&slot.words[0]); c < hotSaturation {
			atomic.CompareAndSwapUint64(&slot.words[0], c, c+1)
		}
		return true
	}
	return false
}

// find returns the slot that holds a copy of the record of that hash and key, or of that hash
// and node when k is nil. For the writer only.
func (h *hotTier) find(hash uint64, k *key, node uint32) (hotSlot, bool) {
	if len(h.tags) == 0 {
		return hotSlot{}, false
	}
	set := h.home(hash)
	for way := range hotWays {
		if h.tag(set, way) != hotTag(hash) {
			continue
		}
		slot := h.slot(set, way)
		e := loadEntry(slot.record)
		if k != nil && e.hasKey(slot.record, k) || k == nil && e.hash == hash && e.node() == node {
			return slot, true
		}
	}
	return hotSlot{}, false
}

// claim returns a slot for a record of that hash: one that is empty, dead at now, or not asked
// for. If there is none, every slot of the set loses one access, so that who challenges often
// enough gets in, and ok is false. For the writer only.
func (h *hotTier) claim(hash uint64, now int64) (slot hotSlot, ok bool) {
	if len(h.tags) == 0 {
		return hotSlot{}, false
	}
	set := h.home(hash)
	for way := range hotWays {
		slot := h.slot(set, way)
		e := loadEntry(slot.record)
		if h.tag(set, way) == 0 || e.remaining(now) <= 0 || slot.count() == 0 {
			return slot, true
		}
	}
	for way := range hotWays {
		slot := h.slot(set, way)
		slot.setCount(slot.count() - 1)
	}
	return hotSlot{}, false
}

// resize changes how many sets are in use, between 1 and those there is memory for, and forgets
// all copies. A reader that counts on the old number finds nothing, or what it has looked for.
// For the writer only.
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

// put makes the slot a copy of a record of at most hotSlotWords-1 words, which is that of the
// arena. For the writer only.
func (h *hotTier) put(slot hotSlot, hash uint64, record []uint64) {
	seq := h.clear(slot)
	for i := wordSeq + 1; i < len(record); i++ {
		atomic.StoreUint64(&slot.record[i], atomic.LoadUint64(&record[i]))
	}
	slot.setCount(1)
	atomic.StoreUint64(&slot.record[wordSeq], seq+1)
	h.setTag(slot, hotTag(hash))
}

// clear empties a slot and leaves its seq, which it returns, odd. For the writer only.
func (h *hotTier) clear(slot hotSlot) (seq uint64) {
	seq = atomic.LoadUint64(&slot.record[wordSeq]) | 1
	atomic.StoreUint64(&slot.record[wordSeq], seq)
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
func (s hotSlot) node() uint32      { e := loadEntry(s.record); return e.node() }
