package arena

import (
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"
)

// These tests are about a Memory on each platform. memory_mmap_test.go has those for a mapping.

func TestNewMemoryIsAlignedZeroedWholePages(t *testing.T) {
	t.Parallel()
	page := int64(os.Getpagesize())
	for _, bytes := range []int64{1, 8, page - 1, page, page + 1, 100 * page, 5<<20 + 3} {
		m, err := NewMemory(bytes)
		if err != nil {
			t.Fatalf("NewMemory(%d): %v", bytes, err)
		}
		if got := m.Bytes(); got < bytes || got >= bytes+page || got%page != 0 {
			t.Errorf("NewMemory(%d): Bytes() = %d with pages of %d", bytes, got, page)
		}
		words := m.Words()
		if int64(len(words))*8 != m.Bytes() || cap(words) != len(words) {
			t.Errorf("NewMemory(%d): %d words, capacity %d, for %d bytes", bytes, len(words), cap(words), m.Bytes())
		}
		if at := uintptr(unsafe.Pointer(&words[0])); at%64 != 0 {
			t.Errorf("NewMemory(%d): first word at %#x, not aligned to 64", bytes, at)
		}
		checkWords(t, m, 0)
	}
}

func TestNewMemoryRefusesImpossibleSizes(t *testing.T) {
	t.Parallel()
	for _, bytes := range []int64{math.MinInt64, -1, 0, 1 << 62, math.MaxInt64 - 1, math.MaxInt64} {
		if m, err := NewMemory(bytes); err == nil || m != nil {
			t.Errorf("NewMemory(%d) = %v, %v; want an error", bytes, m, err)
		}
	}
}

func TestMemoryIsItsOwn(t *testing.T) {
	t.Parallel()
	one, two := mustMemory(t, 1<<16), mustMemory(t, 1<<16)
	storeAll(one, 1)
	storeAll(two, 2)
	checkWords(t, one, 1)
	checkWords(t, two, 2)
}

func TestZeroBesideReaders(t *testing.T) {
	t.Parallel()
	const old = 0xfeedfacecafebeef
	// More than hugeFrom on Linux, so that ZeroPart gives huge pages back, too.
	m := mustMemory(t, 8<<20)
	for range 3 {
		storeAll(m, old)
		var (
			readers sync.WaitGroup
			ready   sync.WaitGroup
			done    atomic.Bool
		)
		for r := range 2 {
			ready.Add(1)
			readers.Go(func() {
				ready.Done()
				words := m.Words()
				for i := r; !done.Load(); i = (i + 513) % len(words) {
					if got := atomic.LoadUint64(&words[i]); got != old && got != 0 {
						t.Errorf("word %d = %#x, want the old one or zero", i, got)
						return
					}
				}
			})
		}
		ready.Wait()
		m.Zero()
		checkWords(t, m, 0)
		done.Store(true)
		readers.Wait()
	}
	runtime.KeepAlive(m)
}

func TestStoreZeros(t *testing.T) {
	t.Parallel()
	m := mustMemory(t, 1<<16)
	storeAll(m, 7)
	m.storeZeros(0, len(m.words))
	checkWords(t, m, 0)
}

func mustMemory(t *testing.T, bytes int64) *Memory {
	t.Helper()
	m, err := NewMemory(bytes)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func storeAll(m *Memory, word uint64) {
	words := m.Words()
	for i := range words {
		atomic.StoreUint64(&words[i], word)
	}
	runtime.KeepAlive(m)
}

func checkWords(t *testing.T, m *Memory, want uint64) {
	t.Helper()
	words := m.Words()
	for i := range words {
		if got := atomic.LoadUint64(&words[i]); got != want {
			t.Fatalf("word %d = %#x, want %#x", i, got, want)
		}
	}
	runtime.KeepAlive(m)
}
