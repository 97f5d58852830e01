// Package arena is the storage under a cache whose entries hold no pointers. A
// Memory is words that the garbage collector never scans. An Allocator says
// which part of a region is taken. Neither type knows what an entry is.
//
// Readers copy out of a Memory without a lock, through sync/atomic, while one
// writer at a time stores into it. A reader may copy an entry while the writer
// replaces it. How the reader finds out (a sequence number, a key that no longer
// matches) is up to the caller. So is the mutex around an Allocator.
package arena

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"sync/atomic"
)

// Memory is a fixed block of words, which are zero at first. On Unix it is an
// anonymous private mapping, and only pages that were touched cost physical
// memory. On other systems it is a Go slice. It is a Go slice under the race
// detector, too, because that does not watch mapped memory.
//
// The mapping lives as long as the *Memory is reachable. Some time after that
// the kernel gets it back, and an access to a word faults.
type Memory struct {
	words []uint64
}

// NewMemory returns a zeroed Memory of the given number of bytes, 1 or more,
// rounded up to whole pages. Its first word is aligned to 64 bytes. NewMemory
// fails if the size does not fit the address space, or if the kernel refuses.
// Where a Memory is a Go slice nothing refuses: a process without enough memory
// ends.
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

// Words returns the whole memory. Words that more than one goroutine can reach
// must be loaded and stored through sync/atomic only.
//
// The slice does not keep the memory mapped; the *Memory does. The caller keeps
// the *Memory reachable until after the last access, for instance with
// [runtime.KeepAlive].
func (m *Memory) Words() []uint64 { return m.words }

// Bytes returns the size of the memory: the size asked for, rounded up to whole pages.
func (m *Memory) Bytes() int64 { return int64(len(m.words)) * 8 }

// Resident returns for how much of Bytes the kernel has given memory.
func (m *Memory) Resident() int64 {
	defer runtime.KeepAlive(m)
	return Resident(m.words)
}

// Zero is ZeroPart for all words.
func (m *Memory) Zero() { m.ZeroPart(0, len(m.words)) }

// storeZeros is ZeroPart where no pages can be given back.
func (m *Memory) storeZeros(from, n int) {
	for i := range m.words[from:][:n] {
		atomic.StoreUint64(&m.words[from+i], 0)
	}
}
