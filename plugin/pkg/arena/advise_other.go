//go:build unix && !linux && !race

package arena

// This file stands for advise_linux.go on other Unix systems.

// noReserve is 0: other kernels overcommit by default, or lack the flag.
const noReserve = 0

func adviseHuge([]byte) {}

// discard does nothing, and reports false. Only on Linux does MADV_DONTNEED
// promise zeros.
func discard([]byte) bool { return false }
