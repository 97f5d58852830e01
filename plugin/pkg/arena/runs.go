package arena

// This file finds runs of set bits within one word of a bitmap.

// runMask returns a word with n bits set from bit on, as far as the word reaches; n >= 1.
func runMask(bit, n int) uint64 {
	return ^uint64(0) >> (64 - min(n, 64)) << bit
}

// runsOf returns the bits of x at which a run of n set bits begins,
// 1 <= n <= 64 (Warren, Hacker's Delight, 2nd ed., section 6-2).
func runsOf(x uint64, n int) uint64 {
	for n > 1 {
		half := n / 2
		x &= x >> half
		n -= half
	}
	return x
}

// longestRun returns the length of the longest run of set bits in x, 0..64.
func longestRun(x uint64) int {
	if x == ^uint64(0) {
		return 64
	}
	// of[k] has the bits at which runs of 1<<k bits begin. The length is then
	// put together from its highest binary digit down.
	var of [6]uint64
	of[0] = x
	top := 0
	for top < 5 {
		longer := of[top] & (of[top] >> (1 << top))
		if longer == 0 {
			break
		}
		top++
		of[top] = longer
	}
	length, begins := 0, ^uint64(0)
	for k := top; k >= 0; k-- {
		if longer := begins & (of[k] >> length); longer != 0 {
			begins = longer
			length += 1 << k
		}
	}
	return length
}
