package arena

import (
	"strings"
	"testing"
)

func TestHugePagesOfTheWantedMappingsAreAddedUp(t *testing.T) {
	const smaps = `7f0000000000-7f0000800000 rw-p 00000000 00:00 0
Size:               8192 kB
AnonHugePages:      6144 kB
VmFlags: rd wr mr mw me ac sd hg
7f0001000000-7f0001800000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
ffff-nonsense rw-p
AnonHugePages:      4096 kB
`
	got := hugeIn(strings.NewReader(smaps), func(from, to uintptr) bool { return to == 0x7f0000800000 })
	if got != 6<<20 {
		t.Errorf("%d bytes, want %d", got, 6<<20)
	}
}

func TestHugeBytesIsNoMoreThanTheMemory(t *testing.T) {
	m, err := NewMemory(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	for i := range m.Words() {
		m.Words()[i] = 1
	}
	// Neighbouring mappings of the process may have been merged with this one.
	if got := HugeBytes(m); got < 0 {
		t.Errorf("%d bytes", got)
	}
}
