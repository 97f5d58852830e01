package arena

import (
	"sort"
	"sync"
	"time"
	"unsafe"
)

// This file says how much of each Memory is on huge pages. How the kernel says that is in huge_linux.go.

// hugePages are the mappings of the process that have huge pages, in the order of their addresses.
type hugePages []hugeMapping

// hugeMapping is a mapping with huge pages.
type hugeMapping struct {
	from, to uintptr
	bytes    int64 // of the mapping on huge pages
}

// of returns the index of the mapping that a memory lies in, or -1 if that mapping has no huge pages.
func (h hugePages) of(m *Memory) int {
	at := uintptr(unsafe.Pointer(&m.words[0]))
	i := sort.Search(len(h), func(i int) bool { return h[i].to > at })
	if i == len(h) || h[i].from > at {
		return -1
	}
	return i
}

// among returns how many bytes of each memory are on huge pages. The kernel joins neighbouring memories to one mapping. So
// among splits the huge pages of a mapping in the ratio of the memories' resident bytes. No memory gets more than its
// resident bytes.
func (h hugePages) among(memories []*Memory, resident []int64) []int64 {
	in, total := make([]int, len(memories)), make([]int64, len(h))
	for i, m := range memories {
		if in[i] = h.of(m); in[i] >= 0 {
			total[in[i]] += resident[i]
		}
	}
	huge := make([]int64, len(memories))
	for i := range memories {
		if in[i] >= 0 && resident[i] > 0 {
			part := float64(resident[i]) / float64(total[in[i]])
			huge[i] = min(int64(float64(h[in[i]].bytes)*part), resident[i])
		}
	}
	return huge
}

const (
	// hugeTimeout bounds the time of one read of smaps. For smaps the kernel looks at each page of the process.
	hugeTimeout = 100 * time.Millisecond

	// hugePause is the pause between two reads of smaps, as a multiple of the time that the last read took.
	hugePause = 100
)

// HugeReader reads which memory the kernel has put on huge pages. The zero HugeReader is ready to use. It is safe for
// concurrent use.
type HugeReader struct {
	mu   sync.Mutex // guards the fields below
	last hugePages
	ok   bool      // the last read has succeeded
	due  time.Time // when the next read is allowed
}

// Among returns, for each memory, how many bytes are on huge pages. resident has, for each memory, how many bytes are in
// physical memory. ok is false where the kernel does not say, or if reading took longer than a tenth of a second.
//
// Among reads /proc/self/smaps. That takes milliseconds, and more in a process with many gigabytes on small pages. So Among
// spends at most a hundredth of the time on reading, and uses the values of the last read meanwhile.
func (r *HugeReader) Among(memories []*Memory, resident []int64) (huge []int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if begun := time.Now(); !begun.Before(r.due) {
		r.last, r.ok = readHuge(begun.Add(hugeTimeout))
		r.due = begun.Add((hugePause + 1) * time.Since(begun))
	}
	if !r.ok {
		return nil, false
	}
	return r.last.among(memories, resident), true
}
