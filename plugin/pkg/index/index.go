// Package index is the hash index of the cache: which record answers which hash.
//
// It is a table of cache-line buckets, eight slots of eight bytes each, in memory that the
// caller provides. A lookup normally touches one line. Readers take no lock: they load slots
// atomically and check what a slot points at themselves, for a slot holds only sixteen bits of
// the hash. There is one writer at a time, under the caller's lock.
//
// Collisions go to the following bucket. Each bucket counts, in its first slot, how many slots
// further on were displaced past it, as Folly's F14 does: a search ends at the first bucket
// with a count of zero, and removing needs no tombstone.
package index

import (
	"fmt"
	"sync/atomic"
)

const (
	// SlotsPerBucket slots of eight bytes fill one 64-byte line.
	SlotsPerBucket = 8

	// targetLoad is the share of slots that a full table uses. At 3/4 about one bucket in
	// seven has displaced a slot.
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

// Slot is one word of the index: a position, sixteen bits of the hash, an access counter, the
// class of the record and a mark. The zero Slot points nowhere.
type Slot uint64

// Pos returns the position the slot holds; only valid when the slot is not empty.
func (s Slot) Pos() uint32 { return uint32(s) - 1 }

// Empty reports whether the slot points nowhere.
func (s Slot) Empty() bool { return uint32(s) == 0 }

// Count returns the access counter, 0 to MaxCount.
func (s Slot) Count() uint32 { return uint32(s>>countShift) & (1<<countBits - 1) }

// Class returns the class bit, 0 or 1.
func (s Slot) Class() int { return int(s>>classShift) & 1 }

// Marked reports whether the slot is marked.
func (s Slot) Marked() bool { return s&markMask != 0 }

// Same reports whether both slots point at the same place for the same hash; their counters
// and marks may differ.
func (s Slot) Same(t Slot) bool { return (uint64(s)^uint64(t))&(identityMask|classMask) == 0 }

func (s Slot) tag() uint64 { return uint64(s) >> tagShift & (1<<tagBits - 1) }

func (s Slot) overflow() uint64 { return uint64(s) >> overflowShift }

// Table is an index over words, which it shares with nobody.
type Table struct {
	words   []uint64
	buckets uint64
}

// Buckets returns how many buckets a table for that many entries needs, at least 2.
func Buckets(entries int) int {
	slots := (entries*targetLoadDen + targetLoadNum - 1) / targetLoadNum
	return max((slots+SlotsPerBucket-1)/SlotsPerBucket, 2)
}

// New returns an empty index over words, zeroed memory of a whole number of buckets that
// starts on a 64-byte line.
func New(words []uint64) Table {
	if len(words) == 0 || len(words)%SlotsPerBucket != 0 {
		panic(fmt.Sprintf("index: %d words are no whole number of buckets", len(words)))
	}
	return Table{words: words, buckets: uint64(len(words) / SlotsPerBucket)}
}

// home is the bucket where the search for hash begins. Bits 16 to 47 choose it; bits 48 to 63
// are the tag and the low sixteen are left to the caller, to choose a table.
func (t *Table) home(hash uint64) uint64 { return (hash >> 16 & 0xffffffff) * t.buckets >> 32 }

func tagOf(hash uint64) uint64 { return hash >> 48 }

// Cursor walks the slots that may belong to one hash. The zero Cursor starts a walk.
type Cursor struct {
	probed uint64 // buckets left behind
	next   uint64 // slot to look at next, within the bucket
}

// Next returns the next slot whose tag is that of hash and its number in the table, and false
// at the end. It takes no lock. What it returns may have changed meanwhile: compare with Load
// after reading what the slot points at.
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

// Touch loads the line where the search for hash begins, so that it is in the CPU's cache
// when Next needs it.
func (t *Table) Touch(hash uint64) uint64 {
	return atomic.LoadUint64(&t.words[t.home(hash)*SlotsPerBucket])
}

// Load returns the slot of that number.
func (t *Table) Load(slot int) Slot { return Slot(atomic.LoadUint64(&t.words[slot])) }

// Bump raises the access counter of a slot by one, unless the slot is no longer s: whoever has
// been quicker is right. The counter of s must be below MaxCount. It takes no lock.
func (t *Table) Bump(slot int, s Slot) bool {
	return atomic.CompareAndSwapUint64(&t.words[slot], uint64(s), uint64(s)+1<<countShift)
}

// SetCount sets the access counter of a slot. For the writer only; accesses counted at the
// same moment may be lost.
func (t *Table) SetCount(slot int, count uint32) {
	w := atomic.LoadUint64(&t.words[slot])
	atomic.StoreUint64(&t.words[slot], w&^countMask|uint64(count)<<countShift)
}

// Mark sets or clears the mark of a slot. For the writer only; accesses counted at the same
// moment may be lost.
func (t *Table) Mark(slot int, on bool) {
	w := atomic.LoadUint64(&t.words[slot]) &^ markMask
	if on {
		w |= markMask
	}
	atomic.StoreUint64(&t.words[slot], w)
}

// Insert puts a new slot for hash into the table and returns its number, or false when the
// table has no room. For the writer only. pos is at most 2^32-2.
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
	// The counts go up before the slot can be found, so that no reader stops too early.
	t.addOverflow(hash, slot/SlotsPerBucket, +1)
	t.put(slot, hash, pos, uint64(class&1)<<classShift)
	return slot, true
}

// Repoint makes a slot of hash point at another position, in one store, and keeps its
// counter, class and mark. For the writer only.
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

// addOverflow counts one slot more or less as displaced past every bucket from the home of
// hash up to, not including, bucket. A count that reached its maximum stays there: the search
// then goes on one bucket too far, which costs time and nothing else.
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
