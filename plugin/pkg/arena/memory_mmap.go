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

// ZeroPart sets n words, 1 or more, to zero and, on Linux, gives their pages back to
// the kernel, if they are whole ones. Goroutines that load atomically meanwhile see the
// old word or zero. No store to them may run beside it: it could survive.
func (m *Memory) ZeroPart(from, n int) {
	part := m.words[from:][:n]
	if !discard(unsafe.Slice((*byte)(unsafe.Pointer(&part[0])), n*8)) {
		m.storeZeros(from, n)
	}
	runtime.KeepAlive(m)
}
