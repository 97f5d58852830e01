//go:build !unix || race

package arena

import (
	"fmt"
	"unsafe"
)

// alignment of the first word, in bytes: a cache line.
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

// ZeroPart sets n words to zero. Goroutines that load atomically meanwhile see
// the old word or zero. No store to them may run beside it: it could survive.
func (m *Memory) ZeroPart(from, n int) { m.storeZeros(from, n) }
