package cut

import (
	"fmt"
	"sync"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

func name(t testing.TB, s string) []byte {
	t.Helper()
	var b [wire.MaxName]byte
	n, ok := wire.PackName(b[:], s)
	if !ok {
		t.Fatalf("%q is no name", s)
	}
	return b[:n]
}

func TestHints(t *testing.T) {
	h := New(Words(1000))
	if !h.Empty() {
		t.Error("a new table is not empty")
	}
	com := name(t, "com.example.org.")
	h.Deny(com, false, false, 28)
	if h.Empty() {
		t.Error("a table with a denial is empty")
	}
	if q, ok := h.Look(com, false).Denied(false); !ok || q != 28 {
		t.Errorf("denied for %d, %v", q, ok)
	}
	for what, hint := range map[string]Hint{
		"with DO":      0,
		"with CD":      h.Look(com, true),
		"the parent":   h.Look(name(t, "example.org."), false),
		"a name below": h.Look(name(t, "a.com.example.org."), false),
	} {
		if what == "with DO" {
			hint = h.Look(com, false)
			if _, ok := hint.Denied(true); ok {
				t.Errorf("%s: denied", what)
			}
			continue
		}
		if hint != 0 {
			t.Errorf("%s: %x is known", what, hint)
		}
	}
	h.Deny(com, false, true, 1)
	if q, ok := h.Look(com, false).Denied(true); !ok || q != 1 {
		t.Errorf("with DO: denied for %d, %v", q, ok)
	}
	if q, _ := h.Look(com, false).Denied(false); q != 28 {
		t.Errorf("without DO: denied for %d", q)
	}
	h.Use(com, false)
	if q, ok := h.Look(com, false).Denied(false); !ok || q != 28 {
		t.Errorf("used: denied for %d, %v", q, ok)
	}

	// A name that exists takes the denials of all names above it back.
	h.Exist(name(t, "www.com.example.org."), false)
	for _, n := range []string{"www.com.example.org.", "com.example.org.", "example.org.", "org."} {
		hint := h.Look(name(t, n), false)
		_, ok := hint.Denied(false)
		_, okDO := hint.Denied(true)
		if !hint.Exists() || ok || okDO {
			t.Errorf("%s: exists %v, denied %v, with DO %v", n, hint.Exists(), ok, okDO)
		}
	}
	if h.Look([]byte{0}, false) != 0 {
		t.Error("there is a hint for the root")
	}
	h.Deny(com, false, false, 1) // newer
	if hint := h.Look(com, false); hint.Exists() {
		t.Error("what is denied exists")
	}
}

// What is used stays, also in a flood of other names.
func TestUsedHintsStay(t *testing.T) {
	h := New(Words(1000))
	kept := name(t, "com.example.org.")
	h.Deny(kept, false, false, 1)
	for i := range 200 * len(h.words) {
		h.Deny(name(t, fmt.Sprintf("n%d.example.org.", i)), false, false, 1)
		h.Use(kept, false)
	}
	if _, ok := h.Look(kept, false).Denied(false); !ok {
		t.Error("the hint that was used is gone")
	}
}

func TestWords(t *testing.T) {
	for denials, want := range map[int]int{0: minWords, 1: minWords, 128: 256, 129: 512, 9984: 32768, 1 << 30: maxWords} {
		if n := Words(denials); n != want {
			t.Errorf("%d denials: %d words, want %d", denials, n, want)
		}
	}
}

func TestConcurrent(t *testing.T) {
	h := New(Words(0))
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			for i := range 2000 {
				n := name(t, fmt.Sprintf("a%d.b%d.example.", i%50, g))
				h.Deny(n, i%2 == 0, i%3 == 0, uint16(i))
				h.Look(n, i%2 == 0)
				h.Exist(n, i%2 == 0)
				h.Use(n, false)
			}
		})
	}
	all.Wait()
}

func BenchmarkLook(b *testing.B) {
	h := New(Words(10_000))
	n := name(b, "www.google.com.default.svc.cluster.local.")
	h.Deny(name(b, "x."), false, false, 1)
	b.ReportAllocs()
	for b.Loop() {
		h.Look(n, false)
	}
}
