package memlimit

import (
	"math"
	"runtime/debug"
	"strings"
	"testing"
	"testing/fstest"
)

func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s + "\n")} }
	machine := file("MemTotal:       2097152 kB\nMemFree: 1 kB")
	for _, tc := range []struct {
		name string
		root fstest.MapFS
		want int64 // MB
		by   string
	}{
		{"nothing known", fstest.MapFS{}, 0, ""},
		{"machine", fstest.MapFS{"proc/meminfo": machine}, 2048, "machine"},
		{"version 2", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("0::/a/b"), "sys/fs/cgroup/a/b/memory.max": file("104857600")}, 100, "control group"},
		{"version 2, group around", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("0::/a/b"), "sys/fs/cgroup/a/b/memory.max": file("max"), "sys/fs/cgroup/a/memory.max": file("104857600")}, 100, "control group"},
		{"version 2, container", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("0::/"), "sys/fs/cgroup/memory.max": file("104857600")}, 100, "control group"},
		{"version 2, held back before", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("0::/a"), "sys/fs/cgroup/a/memory.max": file("209715200"), "sys/fs/cgroup/a/memory.high": file("104857600")}, 100, "control group"},
		{"version 2, no limit", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("0::/"), "sys/fs/cgroup/memory.max": file("max")}, 2048, "machine"},
		{"version 2, more than the machine has", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("0::/"), "sys/fs/cgroup/memory.max": file("1099511627776")}, 2048, "machine"},
		{"version 1", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("4:cpu:/x\n3:memory:/a\n0::/b"), "sys/fs/cgroup/memory/a/memory.limit_in_bytes": file("104857600")}, 100, "control group"},
		{"version 1, path from outside", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("3:memory,hugetlb:/docker/1"), "sys/fs/cgroup/memory/memory.limit_in_bytes": file("104857600")}, 100, "control group"},
		{"version 1, no limit", fstest.MapFS{"proc/meminfo": machine, "proc/self/cgroup": file("3:memory:/"), "sys/fs/cgroup/memory/memory.limit_in_bytes": file("9223372036854771712")}, 2048, "machine"},
		{"rubbish", fstest.MapFS{"proc/meminfo": file("?"), "proc/self/cgroup": file("x\n0:"), "sys/fs/cgroup/memory.max": file("-1")}, 0, ""},
	} {
		got, by := Of(tc.root)
		if got>>20 != tc.want || !strings.Contains(by, tc.by) {
			t.Errorf("%s: %d MB by %q", tc.name, got>>20, by)
		}
	}
}

func TestForCaches(t *testing.T) {
	t.Parallel()
	for limit, want := range map[int64]int64{100 << 20: 100 << 20 / 8, 152 << 20: 19 << 20, 200 << 20: 56 << 20, 1 << 30: 880 << 20} {
		if got := ForCaches(limit, 0); got != want {
			t.Errorf("of %d MB: %d bytes, want %d", limit>>20, got, want)
		}
	}
	if got, want := ForCaches(1<<30, 500<<20), int64(1<<30-(80+500)<<20); got != want {
		t.Errorf("beside a heap of 500 MB: %d bytes, want %d", got, want)
	}
	if got, want := ForCaches(1<<30, 1<<30), int64(1<<30/8); got != want {
		t.Errorf("beside a heap as large as the limit: %d bytes, want %d", got, want)
	}
}

// Only a heap that is not collected before grows up to GOMEMLIMIT.
func TestHeap(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(1 << 40))
	if got := Heap(); got != 0 {
		t.Errorf("%d bytes with GOGC", got)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if got := Heap(); got != 1<<40 {
		t.Errorf("%d bytes with GOGC=off", got)
	}
	debug.SetMemoryLimit(math.MaxInt64)
	if got := Heap(); got != 0 {
		t.Errorf("%d bytes without GOMEMLIMIT", got)
	}
}
