package arena

import "math/bits"

// gapTree knows the longest gap of every word of an Allocator's bitmap. A gap is
// a run of free granules. The tree finds the lowest word with a gap that is long
// enough in a handful of loads, however full the bitmap is.
//
// levels[0] has one byte, 0..64, for each word of the bitmap. Eight bytes are
// packed in one element. Each byte of levels[k+1] is the largest of the eight
// bytes in one element of levels[k]. The last level has one element.
type gapTree struct {
	levels [][]uint64
}

// lows has the lowest bit of every byte set.
const lows = 0x0101010101010101

// newGapTree returns a tree over that many words, every gap 0.
func newGapTree(words int) gapTree {
	var t gapTree
	for n := words; ; {
		n = (n + 7) / 8
		t.levels = append(t.levels, make([]uint64, n))
		if n <= 1 {
			return t
		}
	}
}

// set records the longest gap of a word, 0..64.
func (t *gapTree) set(word, gap int) {
	i, largest := uint(word), uint64(gap)
	for _, level := range t.levels {
		shift := i % 8 * 8
		old := level[i/8] >> shift & 0xff
		if old == largest {
			return
		}
		level[i/8] ^= (old ^ largest) << shift
		i, largest = i/8, largestByte(level[i/8])
	}
}

// next returns the lowest word at or above from whose longest gap is n or
// more, 1 <= n <= 64, or -1.
func (t *gapTree) next(from, n int) int {
	// Climb until a byte at or to the right of i is large enough, then walk down to its word.
	i, depth := uint(from), 0
	for ; ; depth++ {
		if depth == len(t.levels) || i/8 >= uint(len(t.levels[depth])) {
			return -1
		}
		right := atLeast(t.levels[depth][i/8], n) & (^uint64(0) << (i % 8 * 8))
		if right != 0 {
			i = i&^7 + firstByte(right)
			break
		}
		i = i/8 + 1
	}
	for depth--; depth >= 0; depth-- {
		i = i*8 + firstByte(atLeast(t.levels[depth][i], n))
	}
	return int(i)
}

const sliceHeader = 3 * bits.UintSize / 8 // bytes

// bytes returns the memory of the tree's levels.
func (t *gapTree) bytes() int64 {
	n := 0
	for _, level := range t.levels {
		n += cap(level) * 8
	}
	return int64(n + cap(t.levels)*sliceHeader)
}

// atLeast returns a word with the top bit of each byte set whose byte in x is n
// or more. Bytes of x are at most 64 and n is 1..64, so no sum carries into the
// next byte.
func atLeast(x uint64, n int) uint64 {
	return (x + uint64(128-n)*lows) & (128 * lows)
}

// firstByte returns the index of the lowest byte that is not zero. x must not be zero.
func firstByte(x uint64) uint { return uint(bits.TrailingZeros64(x)) / 8 }

func largestByte(x uint64) uint64 {
	largest := uint64(0)
	for ; x != 0; x >>= 8 {
		largest = max(largest, x&0xff)
	}
	return largest
}
