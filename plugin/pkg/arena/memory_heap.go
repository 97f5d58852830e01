//go:build !unix || race

package arena

import (
	"fmt"
	"unsafe"
)

// This file is a Memory on Go's heap, for systems without mmap and for the race detector.

// alignment is that of the first word, in bytes: a cache line.
const alignment = 64

func (m *Memory) reserve(size int) (err error) {
	// make panics for a length that no address space holds.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	n := size / 8
	words := make([]uint64, n+alignment/8-1)
	past := int(uintptr(unsafe.Pointer(&words[0])) % alignment)
	skip := (alignment - past) % alignment / 8
	m.words = words[skip : skip+n : skip+n]
	return nil
}

// ZeroPart sets n words to zero. A goroutine that loads a word atomically
// meanwhile sees the old word or zero. No goroutine may store to the words
// meanwhile: its store could survive.
func (m *Memory) ZeroPart(from, n int) { m.storeZeros(from, n) }
