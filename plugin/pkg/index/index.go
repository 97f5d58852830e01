// Package index is the hash index of the cache. It says where the records with a hash are. It knows nothing of records
// and keys: to the index, a position is a number.
//
// The index is a table of buckets in memory that the caller provides. A bucket is a cache line of 64 bytes, with eight
// slots of eight bytes. A lookup normally touches one line. Readers take no lock, and load slots atomically. A slot has only
// 16 bits of the hash, so readers compare the key of the record that the slot points at. There is one writer at a time,
// under the caller's lock.
//
// When a bucket is full, a new slot goes to a following bucket. It is then displaced past each bucket between its home and
// its place. Each bucket counts, in its first slot, how many slots are displaced past it, as Folly's F14 does. So a search
// ends at the first bucket with a count of zero, and a removal needs no tombstone.
package index

import (
	"fmt"
	"sync/atomic"
)

const (
	// SlotsPerBucket slots of eight bytes fill one 64-byte line.
	SlotsPerBucket = 8

	// targetLoadNum/targetLoadDen is the share of slots that a full table uses. At 3/4, slots are displaced past about one
	// bucket in seven.
	targetLoadNum, targetLoadDen = 3, 4

	posBits   = 32
	tagShift  = posBits
	tagBits   = 16
	countBits = 8

	countShift    = tagShift + tagBits
	classShift    = countShift + countBits
	markShift     = classShift + 1
	overflowShift = markShift + 1

	countMask    = (1<<countBits - 1) << countShift
	overflowOne  = 1 << overflowShift
	overflowMask = 1<<64 - 1<<overflowShift
	identityMask = 1<<countShift - 1 // position and tag
	classMask    = 1 << classShift
	markMask     = 1 << markShift
	maxOverflow  = 1<<(64-overflowShift) - 1
	maxPos       = 1<<posBits - 2
	MaxCount     = 1<<countBits - 1 // MaxCount is where a slot's access counter must stop.
)

// Slot is one word of the index. From the low end it has a position (32 bits), a tag, which is 16 bits of the hash, an
// access count (8), the record's class (1), a mark (1), and the bucket's count of displaced slots (6, used in a bucket's
// first slot only). The zero Slot points nowhere.
type Slot uint64

// Pos returns the position that the slot has. It is valid only if the slot is not empty.
func (s Slot) Pos() uint32 { return uint32(s) - 1 }

// Empty reports whether the slot points nowhere.
func (s Slot) Empty() bool { return uint32(s) == 0 }

// Count returns the access count, 0 to MaxCount.
func (s Slot) Count() uint32 { return uint32(s>>countShift) & (1<<countBits - 1) }

// Class returns the class bit, 0 or 1.
func (s Slot) Class() int { return int(s>>classShift) & 1 }

// Marked reports whether the slot is marked. What the mark means is the caller's choice.
func (s Slot) Marked() bool { return s&markMask != 0 }

// Same reports whether both slots have the same position, tag and class. Their access counts and marks may differ.
func (s Slot) Same(t Slot) bool { return (uint64(s)^uint64(t))&(identityMask|classMask) == 0 }

func (s Slot) tag() uint64 { return uint64(s) >> tagShift & (1<<tagBits - 1) }

func (s Slot) overflow() uint64 { return uint64(s) >> overflowShift }

// Table is an index. Any number of readers may use it beside one writer.
type Table struct {
	words   []uint64
	buckets uint64
}

// Buckets returns how many buckets a table for that many entries needs, 2 or more.
func Buckets(entries int) int {
	slots := (entries*targetLoadDen + targetLoadNum - 1) / targetLoadNum
	return max((slots+SlotsPerBucket-1)/SlotsPerBucket, 2)
}

// New returns an empty index over words. The words must be zero, start on a 64-byte line, and be a whole number of buckets.
// No other code may use them, and the caller keeps their memory mapped.
func New(words []uint64) Table {
	if len(words) == 0 || len(words)%SlotsPerBucket != 0 {
		panic(fmt.Sprintf("index: %d words are no whole number of buckets", len(words)))
	}
	return Table{words: words, buckets: uint64(len(words) / SlotsPerBucket)}
}

// home returns the bucket where the search for hash begins. Bits 16 to 47 choose the bucket. Bits 48 to 63 are the tag. The
// low 16 bits are left to the caller, to choose a table.
func (t *Table) home(hash uint64) uint64 { return (hash >> 16 & 0xffffffff) * t.buckets >> 32 }

func tagOf(hash uint64) uint64 { return hash >> 48 }

// Cursor walks the slots that may belong to one hash. The zero Cursor starts a walk.
type Cursor struct {
	probed uint64 // buckets that are done
	next   uint64 // the next slot, within the current bucket
}

// Next returns the next slot whose tag is that of hash, and the slot's number in the table. ok is false at the end. Next
// takes no lock. The slot may change meanwhile, so a reader loads it again (Load) after it has read what the slot points
// at, and compares both (Same).
func (t *Table) Next(c *Cursor, hash uint64) (slot int, s Slot, ok bool) {
	tag := tagOf(hash)
	for c.probed < t.buckets {
		b := t.home(hash) + c.probed
		if b >= t.buckets {
			b -= t.buckets
		}
		line := t.words[b*SlotsPerBucket:][:SlotsPerBucket:SlotsPerBucket]
		for i := c.next; i < SlotsPerBucket; i++ {
			s := Slot(atomic.LoadUint64(&line[i]))
			if s.tag() == tag && !s.Empty() {
				c.next = i + 1
				return int(b*SlotsPerBucket + i), s, true
			}
		}
		if Slot(atomic.LoadUint64(&line[0])).overflow() == 0 {
			return 0, 0, false
		}
		c.probed++
		c.next = 0
	}
	return 0, 0, false
}

// Touch loads the line where the search for hash begins, so that the line is in the CPU's cache when Next needs it. The
// result means nothing.
func (t *Table) Touch(hash uint64) uint64 {
	return atomic.LoadUint64(&t.words[t.home(hash)*SlotsPerBucket])
}

// Load returns the slot with that number.
func (t *Table) Load(slot int) Slot { return Slot(atomic.LoadUint64(&t.words[slot])) }

// Bump raises the access count of a slot by one if the slot is still s, and reports whether it has. If another goroutine
// has changed the slot, its change stays. The count of s must be below MaxCount. Bump takes no lock.
func (t *Table) Bump(slot int, s Slot) bool {
	return atomic.CompareAndSwapUint64(&t.words[slot], uint64(s), uint64(s)+1<<countShift)
}

// SetCount sets the access count of a slot, 0 to MaxCount. For the writer only. Accesses that are counted at the same
// moment may be lost.
func (t *Table) SetCount(slot int, count uint32) {
	w := atomic.LoadUint64(&t.words[slot])
	atomic.StoreUint64(&t.words[slot], w&^countMask|uint64(count)<<countShift)
}

// Mark sets or clears the mark of a slot. For the writer only. Accesses that are counted at the same moment may be lost.
func (t *Table) Mark(slot int, on bool) {
	w := atomic.LoadUint64(&t.words[slot]) &^ markMask
	if on {
		w |= markMask
	}
	atomic.StoreUint64(&t.words[slot], w)
}

// Insert puts a new slot for hash into the table, and returns the slot's number. ok is false when the table is full. pos is
// 0 to 2^32-2, class is 0 or 1. For the writer only.
func (t *Table) Insert(hash uint64, pos uint32, class int) (slot int, ok bool) {
	b, found := t.home(hash), false
	var probed uint64
	for ; probed < t.buckets && !found; probed++ {
		for i := range uint64(SlotsPerBucket) {
			if n := int(b*SlotsPerBucket + i); t.Load(n).Empty() {
				slot, found = n, true
				break
			}
		}
		b = t.after(b)
	}
	if !found {
		return 0, false
	}
	// The counts must go up before the slot is stored. Otherwise a reader could end its search too early.
	t.addOverflow(hash, slot/SlotsPerBucket, +1)
	t.put(slot, hash, pos, uint64(class&1)<<classShift)
	return slot, true
}

// Repoint makes a slot of hash point at another position, in one store. The slot keeps its access count, class and mark. For
// the writer only. Accesses that are counted at the same moment may be lost.
func (t *Table) Repoint(slot int, hash uint64, pos uint32) {
	t.put(slot, hash, pos, uint64(t.Load(slot))&(countMask|classMask|markMask))
}

// Remove empties a slot of hash. For the writer only.
func (t *Table) Remove(slot int, hash uint64) {
	atomic.StoreUint64(&t.words[slot], uint64(t.Load(slot))&overflowMask)
	t.addOverflow(hash, slot/SlotsPerBucket, -1)
}

func (t *Table) put(slot int, hash uint64, pos uint32, state uint64) {
	if pos > maxPos {
		panic(fmt.Sprintf("index: position %d out of range", pos))
	}
	w := uint64(t.Load(slot)) & overflowMask
	w |= uint64(pos+1) | tagOf(hash)<<tagShift | state
	atomic.StoreUint64(&t.words[slot], w)
}

func (t *Table) after(b uint64) uint64 {
	if b++; b == t.buckets {
		return 0
	}
	return b
}

// addOverflow adds by, 1 or -1, to the count of displaced slots of each bucket from the home of hash up to bucket, which is
// not included. A count that has reached its maximum stays there for good. A search then goes further than it must, which
// costs only time.
func (t *Table) addOverflow(hash uint64, bucket, by int) {
	for b := t.home(hash); b != uint64(bucket); b = t.after(b) {
		first := &t.words[b*SlotsPerBucket]
		w := atomic.LoadUint64(first)
		if Slot(w).overflow() == maxOverflow {
			continue
		}
		if by > 0 {
			w += overflowOne
		} else {
			w -= overflowOne
		}
		atomic.StoreUint64(first, w)
	}
}
