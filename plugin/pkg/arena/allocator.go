package arena

import (
	"fmt"
	"math/bits"
	"unsafe"
)

// wordRun is the number of granules in one word of the bitmaps, and the length
// of run that a word can hold. With granules of 64 bytes it is a 4 KiB page.
const wordRun = 64

// Allocator hands out runs of granules from a region of a Memory, or of
// anything else that can be counted in granules: it keeps indexes, never
// touches the region, and leaves a granule's size to the caller.
//
// A run of 64 granules or fewer never straddles a multiple of 64, so that with
// granules of 64 bytes it is read through one page's TLB entry. A longer run
// begins at a multiple of 64 and ends anywhere.
//
// Alloc, Free and the rest allocate no Go memory. An Allocator is not safe for
// concurrent use.
type Allocator struct {
	granules int
	span     int // in granules; no run crosses a multiple of it
	inUse    int

	used   []uint64 // granule is taken; granules past the end of the region are, too
	starts []uint64 // a run begins at this granule
	gaps   gapTree  // longest run of free granules in each word of used
}

// NewAllocator returns an allocator for a region of that many granules, 0 or
// more, numbered from 0, all free.
func NewAllocator(granules int) *Allocator {
	return NewSpannedAllocator(granules, (granules/wordRun+1)*wordRun)
}

// NewSpannedAllocator returns an allocator for a region that lies in pieces of span granules, a
// multiple of 64: no run reaches from one piece into the next, and none is longer than a piece.
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
	for w := range a.used {
		a.noteGap(w)
	}
	return a
}

// Alloc takes a run of n granules, n >= 1, at the lowest place where one fits,
// which keeps the touched part of the region compact. It reports false when
// none fits, which with scattered free granules can be so well before n
// granules are left.
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
		// The word at end is past the region or partly taken: no run spans it.
		first = end + 1
	}
}

// spanEnd returns the end of the span that a granule is in.
func (a *Allocator) spanEnd(granule int) int { return (granule/a.span + 1) * a.span }

// Free gives back the run that Alloc(n) returned as start. It panics, and
// changes nothing, when exactly this run is not allocated: a double free, a
// wrong start or a wrong length.
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
	begins := uint64(1) << (start % wordRun) // the one start that the run may contain
	for at := start; at < end; at = at&^(wordRun-1) + wordRun {
		w, run := at/wordRun, runMask(at%wordRun, end-at)
		if a.used[w]&run != run || a.starts[w]&run != begins {
			return false
		}
		begins = 0
	}
	return end == a.granules || !isSet(a.used, end) || isSet(a.starts, end)
}

// flip turns n granules from free to used or back; all of them are in one of
// the two states.
func (a *Allocator) flip(start, n int) {
	end := start + n
	for at := start; at < end; at = at&^(wordRun-1) + wordRun {
		w := at / wordRun
		a.used[w] ^= runMask(at%wordRun, end-at)
		a.noteGap(w)
	}
}

func (a *Allocator) noteGap(w int) { a.gaps.set(w, longestRun(^a.used[w])) }

// Used is the number of granules in allocated runs.
func (a *Allocator) Used() int { return a.inUse }

// Cap is the number of granules in the region.
func (a *Allocator) Cap() int { return a.granules }

// Span is the length of the pieces that no run crosses the border of, in granules.
func (a *Allocator) Span() int { return a.span }

// FirstIn returns the lowest start of an allocated run that lies in [from, to).
// Bounds outside the region are clipped to it. A run that begins before from
// is not found, even where it reaches past from; Window returns regions that
// no run enters from below.
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

// Window returns a region near granule hint that a run of n granules would fit
// if it were free: once every run that overlaps it is freed, Alloc(n) succeeds.
// Hint is any number and is wrapped around the region.
//
// Every run that overlaps [from, to) begins in it: from is lowered to the start
// of a run that would enter from below, so that the window can be longer than
// n. The last run may reach past to. Hence, for a caller that knows the length
// of the run at a start:
//
//	from, to := a.Window(n, hint)
//	for start, ok := a.FirstIn(from, to); ok; start, ok = a.FirstIn(from, to) {
//		a.Free(start, length(start))
//	}
//
// Window returns 0, 0 when no run of n granules ever fits: n < 1, n > Cap() or longer than a span.
func (a *Allocator) Window(n, hint int) (from, to int) {
	if n < 1 || n > a.granules || n > a.span {
		return 0, 0
	}
	at := hint % a.granules
	if at < 0 {
		at += a.granules
	}
	if n <= wordRun {
		from = a.windowShort(n, at)
	} else {
		from = min(at, a.granules-n) &^ (wordRun - 1)
		if from+n > a.spanEnd(from) {
			from = (a.spanEnd(from) - n) &^ (wordRun - 1)
		}
	}
	return a.runAround(from), from + n
}

// windowShort finds n granules within one word, around or near at. Where the
// word has room they begin at the start of the run or gap that holds at, which
// costs the fewest evictions.
func (a *Allocator) windowShort(n, at int) int {
	w := at / wordRun
	if w > 0 && n > a.granules-w*wordRun {
		// The region's last word is short; the one before it is whole.
		w, at = w-1, w*wordRun-1
	}
	end := min((w+1)*wordRun, a.granules)

	free := ^a.used[w]
	edges := a.starts[w] | free&^(free<<1)
	// No edge at or below means a long run that came in from the word before.
	from := w*wordRun + max(highestAtOrBelow(edges, at%wordRun), 0)
	return min(from, end-n)
}

// runAround returns the start of the run that granule at belongs to, or at
// itself when it is free.
func (a *Allocator) runAround(at int) int {
	if !isSet(a.used, at) {
		return at
	}
	bit := at % wordRun
	for w := at / wordRun; ; w-- {
		if start := highestAtOrBelow(a.starts[w], bit); start >= 0 {
			return w*wordRun + start
		}
		bit = wordRun - 1
	}
}

// Bytes is the memory that the allocator itself takes: 17 bytes and a little
// for every 64 granules.
func (a *Allocator) Bytes() int64 {
	bitmaps := int64(cap(a.used)+cap(a.starts)) * 8
	return int64(unsafe.Sizeof(*a)) + bitmaps + a.gaps.bytes()
}

func isSet(bitmap []uint64, granule int) bool {
	return bitmap[granule/wordRun]>>(granule%wordRun)&1 != 0
}
