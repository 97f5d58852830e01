//go:build !race

package arena

import "golang.org/x/sys/unix"

// noReserve keeps pages that were never touched out of the kernel's commit
// accounting (except under vm.overcommit_memory=2, which ignores the flag).
const noReserve = unix.MAP_NORESERVE

// hugeFrom is the size in bytes from which huge pages are asked for: the
// least that, wherever it is mapped, holds a whole one of 2 MiB (x86-64, and
// arm64 with 4 KiB pages).
const hugeFrom = 4 << 20

// adviseHuge asks for huge pages, which spare a random read its TLB miss. A
// kernel without them says no, and nothing is lost.
func adviseHuge(data []byte) {
	if len(data) >= hugeFrom {
		_ = unix.Madvise(data, unix.MADV_HUGEPAGE)
	}
}

// discard gives the pages of data back, to read as zero from now on. It reports
// whether it could: pages locked by mlockall stay.
func discard(data []byte) bool {
	return unix.Madvise(data, unix.MADV_DONTNEED) == nil
}
