//go:build unix && !linux && !race

package arena

// noReserve is Linux's: other kernels overcommit without being asked, or lack the flag.
const noReserve = 0

func adviseHuge([]byte) {}

// discard reports that it did nothing: elsewhere than on Linux MADV_DONTNEED
// does not promise zeros.
func discard([]byte) bool { return false }
