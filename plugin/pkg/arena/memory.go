// Package arena is the storage under a cache whose entries hold no pointers:
// a Memory, which the garbage collector never scans, and an Allocator, which
// says what part of a region of it is taken.
//
// Readers copy out of a Memory without a lock, through sync/atomic, while one
// writer at a time stores into it. What tells a reader that it copied a torn or
// recycled entry (a sequence number, a key that no longer matches) is the
// caller's; so is the mutex around an Allocator. Neither type knows what an
// entry is.
package arena

import (
	"fmt"
	"math"
	"os"
	"sync/atomic"
)

// Memory is a fixed block of zeroed words. Where the platform has mmap it is
// an anonymous private mapping, costing physical memory only for the pages
// that were touched; elsewhere, and under the race detector, which does not
// watch mapped memory, it is a Go slice.
//
// The mapping lives as long as the *Memory is reachable and is given back to
// the kernel some time after. A word must not be touched later than that: it
// would fault.
type Memory struct {
	words []uint64
}

// NewMemory returns a zeroed Memory of the given number of bytes, 1 or more,
// rounded up to whole pages. Its first word is aligned to 64 bytes. It fails
// where the size does not fit the address space or the kernel refuses it; the
// Go slice has no such refusal short of the address space, only the runtime's
// out-of-memory exit.
func NewMemory(bytes int64) (*Memory, error) {
	if bytes < 1 {
		return nil, fmt.Errorf("arena: %d bytes of memory: must be 1 or more", bytes)
	}
	page := int64(os.Getpagesize())
	if bytes > int64(math.MaxInt)-page {
		return nil, fmt.Errorf("arena: %d bytes of memory: larger than the address space", bytes)
	}
	size := (bytes + page - 1) / page * page

	m := new(Memory)
	if err := m.reserve(int(size)); err != nil {
		return nil, fmt.Errorf("arena: %d bytes of memory: %w", size, err)
	}
	return m, nil
}

// Words is the whole memory. Words that more than one goroutine can reach are
// loaded and stored through sync/atomic only.
//
// The slice does not keep the memory mapped; the *Memory does. Whoever uses
// the slice keeps the *Memory reachable until after the last load, from a
// variable that outlives the read or with [runtime.KeepAlive].
func (m *Memory) Words() []uint64 { return m.words }

// Bytes is the size of the memory: the size asked for, rounded up to whole pages.
func (m *Memory) Bytes() int64 { return int64(len(m.words)) * 8 }

// Zero is ZeroPart of all words.
func (m *Memory) Zero() { m.ZeroPart(0, len(m.words)) }

// storeZeros is ZeroPart where no page can be given back.
func (m *Memory) storeZeros(from, n int) {
	for i := range m.words[from:][:n] {
		atomic.StoreUint64(&m.words[from+i], 0)
	}
}
