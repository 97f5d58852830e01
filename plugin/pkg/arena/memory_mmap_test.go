//go:build linux && !race

package arena

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"
)

// These tests are about a Memory that is a mapping: it is unmapped, and its pages go back to the kernel.

func TestUnreachableMemoryIsUnmapped(t *testing.T) {
	// The memory is so large that no later mapping takes its place.
	m := mustMemory(t, 1<<30)
	at := uintptr(unsafe.Pointer(&m.Words()[0]))
	if !mapped(t, at) {
		t.Fatalf("%#x is not mapped while the memory is reachable", at)
	}
	runtime.KeepAlive(m)

	for end := time.Now().Add(time.Minute); mapped(t, at); time.Sleep(10 * time.Millisecond) { // the cleanup runs in a goroutine of its own
		if time.Now().After(end) {
			t.Fatalf("%#x is still mapped", at)
		}
		runtime.GC()
	}
}

func mapped(t *testing.T, at uintptr) bool {
	t.Helper()
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Skip(err)
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to uintptr
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x", &from, &to); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		if from <= at && at < to {
			return true
		}
	}
	return false
}

func TestWhatIsGivenBackIsNotResident(t *testing.T) {
	if !ResidentIsKnown() {
		t.Skip("this machine does not say what is resident")
	}
	m := mustMemory(t, 64<<20)
	storeAll(m, 1)
	n := len(m.Words())
	for _, step := range []struct {
		from, n int
		left    int64
	}{{0, 0, 64 << 20}, {0, n / 2, 32 << 20}, {3 * n / 4, n / 4, 16 << 20}, {0, n, 0}} {
		if step.n > 0 {
			m.ZeroPart(step.from, step.n)
		}
		if got := m.Resident(); got != step.left {
			t.Errorf("%d bytes are left, want %d", got, step.left)
		}
	}
}
