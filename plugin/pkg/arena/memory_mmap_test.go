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

func TestUnreachableMemoryIsUnmapped(t *testing.T) {
	// Large enough to be a mapping of its own, that nothing else lands in.
	m := mustMemory(t, 1<<30)
	at := uintptr(unsafe.Pointer(&m.Words()[0]))
	if !mapped(t, at) {
		t.Fatalf("%#x is not mapped while the memory is reachable", at)
	}
	runtime.KeepAlive(m)

	for range 100 {
		runtime.GC()
		if !mapped(t, at) {
			return
		}
		time.Sleep(10 * time.Millisecond) // the cleanup runs in a goroutine of the runtime's
	}
	t.Errorf("%#x is still mapped", at)
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
