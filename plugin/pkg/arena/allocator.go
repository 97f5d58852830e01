package arena

import (
	"fmt"
	"math/bits"
	"unsafe"
)

// This file says which granules of a region are taken. It does not know what they hold.

// wordRun is the number of granules in one word of the bitmaps, and the length
// of run that a word can hold. With granules of 64 bytes it is a 4 KiB page.
const wordRun = 64

// Allocator hands out runs of granules from a region. A granule is the unit of
// allocation, and its size is the caller's choice. The Allocator knows granules
// by number only, and never touches the region.
//
// A run of 64 granules or fewer never straddles a multiple of 64, so that with
// granules of 64 bytes it is read through one page's TLB entry. A longer run
// begins at a multiple of 64 and ends anywhere.
//
// Alloc, Free and the rest allocate no Go memory. An Allocator is not safe for
// concurrent use.
type Allocator struct {
	granules int
	span     int // length of a piece, in granules
	inUse    int

	used   []uint64 // bit set: the granule is in a run, or past the end of the region
	starts []uint64 // bit set: a run begins at the granule
	gaps   gapTree  // longest run of free granules in each word of used
}

// NewSpannedAllocator returns an allocator for a region of that many granules, 0 or more. They are numbered from 0, and all
// are free. The region consists of pieces of span granules, a multiple of 64. A run never reaches from one piece into the
// next, so no run is longer than a piece.
func NewSpannedAllocator(granules, span int) *Allocator {
	if granules < 0 {
		panic(fmt.Sprintf("arena: region of %d granules", granules))
	}
	if span < wordRun || span%wordRun != 0 {
		panic(fmt.Sprintf("arena: span of %d granules", span))
	}
	words := granules / wordRun
	if granules%wordRun != 0 {
		words++
	}
	a := &Allocator{
		granules: granules,
		span:     span,
		used:     make([]uint64, words),
		starts:   make([]uint64, words),
		gaps:     newGapTree(words),
	}
	if rest := granules % wordRun; rest != 0 {
		a.used[words-1] = ^uint64(0) << rest
	}
	for w := range a.used { // the bitmaps are not read: pages that are never touched cost no memory
		a.gaps.set(w, min(granules-w*wordRun, wordRun))
	}
	return a
}

// Alloc takes a run of n granules, n >= 1, at the lowest place where one fits.
// This keeps the touched part of the region compact. Alloc reports false when
// no place fits. When the free granules are scattered, that can be so although
// more than n granules are free.
func (a *Allocator) Alloc(n int) (start int, ok bool) {
	switch {
	case n < 1:
		panic(fmt.Sprintf("arena: run of %d granules", n))
	case n > a.granules-a.inUse || n > a.span:
		return 0, false
	case n <= wordRun:
		start = a.placeShort(n)
	default:
		start = a.placeLong(n)
	}
	if start < 0 {
		return 0, false
	}
	a.starts[start/wordRun] |= 1 << (start % wordRun)
	a.flip(start, n)
	a.inUse += n
	return start, true
}

// placeShort finds the lowest place for a run that fits a word, or -1.
func (a *Allocator) placeShort(n int) int {
	w := a.gaps.next(0, n)
	if w < 0 {
		return -1
	}
	return w*wordRun + bits.TrailingZeros64(runsOf(^a.used[w], n))
}

// placeLong finds the lowest place for a run longer than a word, or -1: free
// words, and after them a word whose lower granules are free.
func (a *Allocator) placeLong(n int) int {
	whole, rest := n/wordRun, n%wordRun
	for first := 0; ; {
		w := a.gaps.next(first, wordRun)
		if w < 0 {
			return -1
		}
		if next := a.spanEnd(w * wordRun); w*wordRun+n > next {
			first = next / wordRun
			continue
		}
		end := w + 1
		for end < w+whole && end < len(a.used) && a.used[end] == 0 {
			end++
		}
		if end == w+whole && (rest == 0 || end < len(a.used) && a.used[end]&runMask(0, rest) == 0) {
			return w * wordRun
		}
		// The word at end is past the region, or partly taken. No run can include it.
		first = end + 1
	}
}

// spanEnd returns the end of the piece that a granule is in.
func (a *Allocator) spanEnd(granule int) int { return (granule/a.span + 1) * a.span }

// Free frees the run of n granules that begins at start. If there is no such
// run (a double free, a wrong start, a wrong length), Free panics and changes
// nothing.
func (a *Allocator) Free(start, n int) {
	if !a.isRun(start, n) {
		panic(fmt.Sprintf("arena: free of granules [%d,+%d): no such run", start, n))
	}
	a.starts[start/wordRun] &^= 1 << (start % wordRun)
	a.flip(start, n)
	a.inUse -= n
}

// isRun reports whether a run of exactly n granules begins at start.
func (a *Allocator) isRun(start, n int) bool {
	if start < 0 || n < 1 || start >= a.granules || n > a.granules-start {
		return false
	}
	if !isSet(a.starts, start) {
		return false
	}
	end := start + n
	begins := uint64(1) << (start % wordRun) // no other run may begin within this one
	for at := start; at < end; at = at&^(wordRun-1) + wordRun {
		w, run := at/wordRun, runMask(at%wordRun, end-at)
		if a.used[w]&run != run || a.starts[w]&run != begins {
			return false
		}
		begins = 0
	}
	return end == a.granules || !isSet(a.used, end) || isSet(a.starts, end)
}

// flip makes n free granules used, or n used granules free. All n must be in the
// same state.
func (a *Allocator) flip(start, n int) {
	end := start + n
	for at := start; at < end; at = at&^(wordRun-1) + wordRun {
		w := at / wordRun
		a.used[w] ^= runMask(at%wordRun, end-at)
		a.noteGap(w)
	}
}

func (a *Allocator) noteGap(w int) { a.gaps.set(w, longestRun(^a.used[w])) }

// Used returns the number of granules in allocated runs.
func (a *Allocator) Used() int { return a.inUse }

// Cap returns the number of granules in the region.
func (a *Allocator) Cap() int { return a.granules }

// FirstIn returns the lowest start of an allocated run that lies in [from, to).
// Bounds outside the region are clipped to it. A run that begins before from
// is not found, even if it reaches past from.
func (a *Allocator) FirstIn(from, to int) (start int, ok bool) {
	from, to = max(from, 0), min(to, a.granules)
	for at := from; at < to; at = at&^(wordRun-1) + wordRun {
		w := at / wordRun
		if x := a.starts[w] & runMask(at%wordRun, to-at); x != 0 {
			return w*wordRun + bits.TrailingZeros64(x), true
		}
	}
	return 0, false
}

// scan is the number of words that Emptiest looks at.
const scan = 1024

// Emptiest returns the place for a run of n granules that has the fewest used granules. It looks at 1024 words from granule
// hint, 0 or more, and wraps around. A place begins at a multiple of 64. For n of 64 or less it is a whole word, so that to
// may be more than from+n. No run reaches into the place from below. The last run in it may reach past to.
//
// Emptiest reports false when there is no such place. It changes nothing.
func (a *Allocator) Emptiest(n, hint int) (from, to int, ok bool) {
	if n < 1 || n > a.span {
		return 0, 0, false
	}
	n = max(n, wordRun)
	whole, rest := n/wordRun, n%wordRun
	least, inWhole, next := n+1, 0, -1
	for i := range min(scan, len(a.used)) {
		w := (hint/wordRun + i) % len(a.used)
		start := w * wordRun
		if end := start + n; end > a.granules || end > a.spanEnd(start) {
			next = -1
			continue
		}
		if w == next {
			inWhole += bits.OnesCount64(a.used[w+whole-1]) - bits.OnesCount64(a.used[w-1])
		} else {
			inWhole = 0
			for _, used := range a.used[w : w+whole] {
				inWhole += bits.OnesCount64(used)
			}
		}
		next = w + 1
		taken := inWhole
		if rest > 0 {
			taken += bits.OnesCount64(a.used[w+whole] & runMask(0, rest))
		}
		if taken < least && (!isSet(a.used, start) || isSet(a.starts, start)) {
			from, to, ok, least = start, start+n, true, taken
		}
	}
	return from, to, ok
}

// Fence takes all free granules in [from, to), so that Alloc puts no run there. It appends the starts of the runs that it
// makes to starts. The caller frees these runs.
func (a *Allocator) Fence(from, to int, starts []int) []int {
	for at := from; at < to; at = at&^(wordRun-1) + wordRun {
		w := at / wordRun
		for gaps := ^a.used[w] & runMask(at%wordRun, to-at); gaps != 0; {
			bit := bits.TrailingZeros64(gaps)
			n := bits.TrailingZeros64(^(gaps >> bit))
			gaps &^= runMask(bit, n)
			a.starts[w] |= 1 << bit
			a.flip(w*wordRun+bit, n)
			a.inUse += n
			starts = append(starts, w*wordRun+bit)
		}
	}
	return starts
}

// Length returns the length of the run that begins at start.
func (a *Allocator) Length(start int) int {
	end := start + 1
	for end < a.granules {
		w, bit := end/wordRun, end%wordRun
		if stops := (^a.used[w] | a.starts[w]) >> bit; stops != 0 {
			end += bits.TrailingZeros64(stops)
			break
		}
		end += wordRun - bit
	}
	return min(end, a.granules) - start
}

// Bytes returns the memory that the allocator itself takes: a little more than
// 17 bytes for every 64 granules.
func (a *Allocator) Bytes() int64 {
	bitmaps := int64(cap(a.used)+cap(a.starts)) * 8
	return int64(unsafe.Sizeof(*a)) + bitmaps + a.gaps.bytes()
}

// Resident returns for how much of Bytes the kernel has given memory. It is safe beside the other methods.
func (a *Allocator) Resident() int64 {
	n := int64(unsafe.Sizeof(*a)) + Resident(a.used) + Resident(a.starts) + int64(cap(a.gaps.levels))*sliceHeader
	for _, level := range a.gaps.levels {
		n += Resident(level)
	}
	return n
}

func isSet(bitmap []uint64, granule int) bool {
	return bitmap[granule/wordRun]>>(granule%wordRun)&1 != 0
}
