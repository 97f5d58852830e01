//go:build unix && !race

package arena

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (m *Memory) reserve(size int) error {
	data, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|noReserve)
	if err != nil {
		return err
	}
	adviseHuge(data)
	m.words = unsafe.Slice((*uint64)(unsafe.Pointer(&data[0])), size/8)
	runtime.AddCleanup(m, unmap, data)
	return nil
}

func unmap(data []byte) {
	// Fails only for a range that was never mapped.
	_ = unix.Munmap(data)
}

// Zero sets every word to zero and, on Linux, gives the pages back to the
// kernel. Goroutines that load atomically meanwhile see the old word or zero.
// No store may run beside it: it could survive.
func (m *Memory) Zero() {
	data := unsafe.Slice((*byte)(unsafe.Pointer(&m.words[0])), len(m.words)*8)
	if !discard(data) {
		m.storeZeros()
	}
	runtime.KeepAlive(m)
}
