//go:build unix && !race

package arena

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is a Memory in a mapping of its own.

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
	// Munmap fails only for a range that was never mapped.
	_ = unix.Munmap(data)
}

// ZeroPart sets n words, 1 or more, to zero. If the words are whole pages, it gives
// the pages back to the kernel on Linux. A goroutine that loads a word atomically
// meanwhile sees the old word or zero. No goroutine may store to the words
// meanwhile: its store could survive.
func (m *Memory) ZeroPart(from, n int) {
	part := m.words[from:][:n]
	if !discard(unsafe.Slice((*byte)(unsafe.Pointer(&part[0])), n*8)) {
		m.storeZeros(from, n)
	}
	runtime.KeepAlive(m)
}
