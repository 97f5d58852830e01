// Package memlimit finds out how much memory the process can have.
package memlimit

import (
	"io/fs"
	"math"
	"path"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
)

// The memory that a server takes beside its caches, in bytes: CoreDNS itself, and room for the Go runtime and for misses under way.
// docs/sizing.md has both.
const (
	itself = 80 << 20
	room   = 64 << 20
)

// ForCaches returns how much of limit, in bytes, caches may take: what the process itself does not need, and an eighth at
// least. heap is what Heap returns. ForCaches depends on nothing that changes while the process runs, so that a reload finds the
// same.
func ForCaches(limit, heap int64) int64 { return max(limit-itself-max(room, heap), limit/8) }

// Heap returns how large Go's heap grows in any case, in bytes. That is GOMEMLIMIT with GOGC=off, and otherwise 0: a heap that is
// collected stays small beside the caches, which lie outside.
func Heap() int64 {
	read := []metrics.Sample{{Name: "/gc/gogc:percent"}, {Name: "/gc/gomemlimit:bytes"}}
	metrics.Read(read)
	for i := range read {
		if read[i].Value.Kind() != metrics.KindUint64 {
			return 0
		}
	}
	return heapOf(read[0].Value.Uint64(), read[1].Value.Uint64())
}

// heapOf is Heap for values of the metrics. Both are the largest number of their type without a bound: of int for GOGC, and of int64.
func heapOf(gogc, memory uint64) int64 {
	if gogc < math.MaxInt32 || memory >= math.MaxInt64 {
		return 0
	}
	return int64(memory)
}

// Of returns how much memory the process can have, in bytes, and for messages the source of that limit: the machine,
// or one of its control groups (cgroups version 1 or 2). limit is 0 if the system does not tell. root is the root of
// the file system.
func Of(root fs.FS) (limit int64, whose string) {
	number := func(name string, field int, unit int64) {
		content, err := fs.ReadFile(root, name)
		fields := strings.Fields(string(content))
		if err != nil || len(fields) <= field {
			return
		}
		n, err := strconv.ParseInt(fields[field], 10, 64)
		if err != nil || n <= 0 || n > math.MaxInt64/unit { // "max", or a number that stands for no limit
			return
		}
		if n *= unit; limit == 0 || n < limit {
			limit, whose = n, "the control group has"
			if unit > 1 {
				whose = "the machine has"
			}
		}
	}
	number("proc/meminfo", 1, 1<<10) // MemTotal: N kB
	content, _ := fs.ReadFile(root, "proc/self/cgroup")
	for line := range strings.Lines(string(content)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3) // number:controllers:path
		if len(parts) < 3 {
			continue
		}
		mount, files := "sys/fs/cgroup", []string{"memory.max", "memory.high"} // above memory.high, the group hardly gets on
		if parts[1] != "" {
			if !slices.Contains(strings.Split(parts[1], ","), "memory") {
				continue
			}
			mount, files = "sys/fs/cgroup/memory", []string{"memory.limit_in_bytes"}
		}
		// A group's limit bounds the groups below it. In a container, the path may be the one outside, while the
		// mount is the container's own: the loop then finds the limit at a shorter path.
		for group := path.Join("/", parts[2]); ; group = path.Dir(group) {
			for _, file := range files {
				number(path.Join(mount, group, file), 0, 1)
			}
			if group == "/" {
				break
			}
		}
	}
	return limit, whose
}
