package arena

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"runtime"
	"strconv"
	"unsafe"
)

// HugeBytes returns how many bytes of memories the kernel has put on huge pages, as far as it
// says so. It reads /proc/self/smaps, which takes about a millisecond: nothing for a hot path.
// A memory that shares a mapping with something else counts the mapping's.
func HugeBytes(memories ...*Memory) int64 {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return 0
	}
	defer f.Close()
	defer runtime.KeepAlive(memories)
	return hugeIn(f, func(from, to uintptr) bool {
		for _, m := range memories {
			start := uintptr(unsafe.Pointer(&m.words[0]))
			if start < to && from < start+uintptr(m.Bytes()) {
				return true
			}
		}
		return false
	})
}

// hugeIn adds up the huge pages of the mappings in an smaps file that are wanted.
func hugeIn(smaps io.Reader, wanted func(from, to uintptr) bool) (total int64) {
	counts := false
	for lines := bufio.NewScanner(smaps); lines.Scan(); {
		line := lines.Bytes()
		name, rest, _ := bytes.Cut(line, []byte(" "))
		if !bytes.HasSuffix(name, []byte(":")) {
			from, to, _ := bytes.Cut(name, []byte("-")) // a mapping begins
			a, errFrom := strconv.ParseUint(string(from), 16, 64)
			b, errTo := strconv.ParseUint(string(to), 16, 64)
			counts = errFrom == nil && errTo == nil && wanted(uintptr(a), uintptr(b))
			continue
		}
		if counts && string(name) == "AnonHugePages:" {
			kb, _, _ := bytes.Cut(bytes.TrimSpace(rest), []byte(" "))
			n, _ := strconv.ParseInt(string(kb), 10, 64)
			total += n << 10
		}
	}
	return total
}
