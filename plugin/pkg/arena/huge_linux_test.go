package arena

import (
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// These tests are about huge pages, with a made-up smaps file and with that of the process.

const smaps = `70000000-70800000 rw-p 00000000 00:00 0
Size:               8192 kB
AnonHugePages:      6144 kB
VmFlags: rd wr mr mw me ac sd hg
70800000-70900000 rw-p 00000000 00:00 0
AnonHugePages:         0 kB
71000000-71800000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
ffff-nonsense rw-p
AnonHugePages:      4096 kB
`

func TestHugePagesAreThoseOfTheirMappings(t *testing.T) {
	got, ok := hugeIn(strings.NewReader(smaps), func() bool { return false })
	want := hugePages{{0x70000000, 0x70800000, 6 << 20}, {0x71000000, 0x71800000, 2 << 20}}
	if !ok || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, ok, want)
	}
}

func TestHugePagesAreNotReadForLong(t *testing.T) {
	mappings := 0
	if got, ok := hugeIn(strings.NewReader(smaps), func() bool { mappings++; return mappings == 3 }); ok || got != nil {
		t.Errorf("%v when it is late", got)
	}
	if mappings != 3 {
		t.Errorf("it went on to mapping %d", mappings)
	}
	if _, ok := readHuge(time.Now().Add(-time.Second)); ok {
		t.Error("it is read after the deadline")
	}
	// The values of a read are used for a while.
	r := new(HugeReader)
	r.Among(nil, nil)
	due := r.due
	r.due = time.Now().Add(time.Hour)
	r.last, r.ok = hugePages{{0, 1, 1}}, true
	if r.Among(nil, nil); len(r.last) != 1 {
		t.Error("it was read again at once")
	}
	if due.IsZero() {
		t.Error("it may be read again at once")
	}
}

// Neighbouring memories share a mapping. Each must get its part of the huge pages, and no more than its resident bytes.
func TestHugePagesAreSharedAmongNeighbours(t *testing.T) {
	words := make([]uint64, 6<<20/8)
	at := uintptr(unsafe.Pointer(&words[0]))
	one, two, elsewhere := &Memory{words: words[:4<<20/8]}, &Memory{words: words[4<<20/8:]}, mustMemory(t, 1<<20)
	for _, tc := range []struct {
		huge     int64
		resident []int64
		want     []int64
	}{
		{0, []int64{4 << 20, 2 << 20, 1 << 20}, []int64{0, 0, 0}},
		{3 << 20, []int64{4 << 20, 2 << 20, 1 << 20}, []int64{2 << 20, 1 << 20, 0}},
		{6 << 20, []int64{4 << 20, 2 << 20, 1 << 20}, []int64{4 << 20, 2 << 20, 0}},
		{2 << 20, []int64{4 << 20, 0, 0}, []int64{2 << 20, 0, 0}},
		{6 << 20, []int64{1 << 20, 1 << 20, 0}, []int64{1 << 20, 1 << 20, 0}}, // the mapping has memory of others, too
		{2 << 20, []int64{0, 0, 0}, []int64{0, 0, 0}},
	} {
		h := hugePages{{0, at, 1 << 20}, {at, at + 6<<20, tc.huge}}
		if got := h.among([]*Memory{one, two, elsewhere}, tc.resident); !slices.Equal(got, tc.want) {
			t.Errorf("%d bytes are huge, %v resident: %v, want %v", tc.huge, tc.resident, got, tc.want)
		}
	}
}

func TestHugeBytesAreNoMoreThanTheResident(t *testing.T) {
	var memories []*Memory
	var resident []int64
	for i := range 4 {
		m := mustMemory(t, 16<<20)
		for at := range m.Words()[:i*(4<<20)/8] {
			m.Words()[at] = 1
		}
		memories, resident = append(memories, m), append(resident, m.Resident())
	}
	huge, ok := new(HugeReader).Among(memories, resident)
	if !ok {
		t.Skip("this machine does not say what is huge")
	}
	for i, n := range huge {
		if n < 0 || n > resident[i] || resident[i] > memories[i].Bytes() {
			t.Errorf("memory %d: %d bytes are huge, %d resident, of %d", i, n, resident[i], memories[i].Bytes())
		}
	}
}
