//go:build !race

package arena

import "golang.org/x/sys/unix"

// This file is what the kernel is asked to do with mapped memory, on Linux.

// noReserve keeps pages that were never touched out of the kernel's commit
// accounting. The kernel ignores the flag under vm.overcommit_memory=2.
const noReserve = unix.MAP_NORESERVE

// hugeFrom is the size in bytes from which adviseHuge asks for huge pages. A
// mapping of this size has a whole huge page of 2 MiB (x86-64, and arm64 with
// 4 KiB pages), wherever it begins.
const hugeFrom = 4 << 20

// adviseHuge asks for huge pages. They save random reads their TLB misses. A
// kernel without huge pages refuses, and the memory works all the same.
func adviseHuge(data []byte) {
	if len(data) >= hugeFrom {
		_ = unix.Madvise(data, unix.MADV_HUGEPAGE)
	}
}

// discard gives the pages of data back to the kernel. From then on they read as
// zero. It reports whether the kernel did so: pages locked by mlockall stay.
func discard(data []byte) bool {
	return unix.Madvise(data, unix.MADV_DONTNEED) == nil
}
