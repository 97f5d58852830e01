package arena

import (
	"os"
	"runtime"
	"testing"
)

// These tests are about how much memory the kernel has given. They are skipped where it does not say.

// touch writes to each page of a part of some words.
func touch(words []uint64) {
	for i := 0; i < len(words); i += 512 {
		words[i] = 1
	}
}

func TestResidentIsWhatWasTouched(t *testing.T) {
	if !ResidentIsKnown() {
		t.Skip("this machine does not say what is resident")
	}
	const size = 64 << 20
	m := mustMemory(t, size)
	words := m.Words()
	expect := func(what string, want int64) {
		t.Helper()
		// A huge page at each end may reach past the part, and the test's own memory may share it.
		if got := m.Resident(); got < want || got > want+4<<20 {
			t.Errorf("%s: %d bytes are resident, want %d", what, got, want)
		}
	}
	expect("new", 0)
	sum := uint64(0)
	for i := 0; i < len(words); i += 512 {
		sum += words[i]
	}
	if pagemapReadable() && sum == 0 {
		expect("read", 0)
	}
	touch(words[:len(words)/2])
	expect("half", size/2)
	touch(words)
	expect("whole", size)
	runtime.KeepAlive(m)
}

// pagemapReadable reports whether the process can tell its own pages from the page of zeros.
func pagemapReadable() bool {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	f.Close()
	return true
}

func TestResidentOfAPart(t *testing.T) {
	if !ResidentIsKnown() {
		t.Skip("this machine does not say what is resident")
	}
	m := mustMemory(t, 1<<20)
	touch(m.Words())
	for _, part := range [][2]int{{0, 1 << 17}, {1, 1 << 17}, {511, 100_000}, {513, 9000}, {3, 5}} {
		s := m.Words()[part[0]:part[1]:part[1]]
		if got := Resident(s); got != int64(len(s))*8 {
			t.Errorf("words %v: %d bytes, want %d", part, got, len(s)*8)
		}
	}
	if got := Resident[uint64](nil); got != 0 {
		t.Errorf("%d bytes of nothing", got)
	}
	runtime.KeepAlive(m)
}

func TestAllocatorIsResidentWhereItIsUsed(t *testing.T) {
	a := NewSpannedAllocator(1<<24, 1<<13)
	if got := a.Resident(); got > a.Bytes() {
		t.Errorf("%d bytes of %d", got, a.Bytes())
	}
	before := a.Resident()
	for range 1 << 12 {
		a.Alloc(64)
	}
	if got := a.Resident(); got < before || got > a.Bytes() {
		t.Errorf("%d bytes of %d, before use %d", got, a.Bytes(), before)
	}
	if small := NewSpannedAllocator(100, 128); small.Resident() != small.Bytes() {
		t.Errorf("%d bytes of %d", small.Resident(), small.Bytes())
	}
}
