package arena

import (
	"runtime"
	"unsafe"
)

// This file says for how much memory the kernel has given pages. How the kernel says that is in resident_linux.go.

// residentFrom is the size in bytes from which Resident makes a system call. Smaller slices count in full.
const residentFrom = 64 << 10

// Resident returns for how many bytes of s the kernel has given physical memory. Pages that were never touched cost none.
// Where the kernel does not say (ResidentIsKnown), and for small slices, Resident returns the whole size. s lies in a Memory
// or on Go's heap. The caller keeps a Memory reachable.
func Resident[T any](s []T) int64 {
	var one T
	whole := int64(cap(s)) * int64(unsafe.Sizeof(one))
	if whole < residentFrom || !ResidentIsKnown() {
		return whole
	}
	n, ok := residentIn(uintptr(unsafe.Pointer(unsafe.SliceData(s))), uintptr(whole))
	runtime.KeepAlive(s)
	if !ok {
		return whole
	}
	return n
}
