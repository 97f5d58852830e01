package arena

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"strconv"
	"time"
)

// This file reads which mappings are on huge pages from Linux's smaps file (proc_pid_smaps(5)).

// readHuge reads /proc/self/smaps. ok is false if that fails, or if it is not done at the deadline.
func readHuge(deadline time.Time) (h hugePages, ok bool) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil, false
	}
	defer f.Close()
	return hugeIn(f, func() bool { return time.Now().After(deadline) })
}

// hugeIn returns the mappings in an smaps file that have huge pages. It calls late at each mapping, and gives up when late
// reports true. That bounds the time, because the kernel looks at a mapping's pages only when that part of the file is read.
func hugeIn(smaps io.Reader, late func() bool) (h hugePages, ok bool) {
	var at hugeMapping
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		name, rest, _ := bytes.Cut(lines.Bytes(), []byte(" "))
		if !bytes.HasSuffix(name, []byte(":")) { // a mapping begins
			if late() {
				return nil, false
			}
			from, to, _ := bytes.Cut(name, []byte("-"))
			a, errFrom := strconv.ParseUint(string(from), 16, 64)
			b, errTo := strconv.ParseUint(string(to), 16, 64)
			if at = (hugeMapping{from: uintptr(a), to: uintptr(b)}); errFrom != nil || errTo != nil {
				at = hugeMapping{}
			}
			continue
		}
		if string(name) == "AnonHugePages:" && at.to > 0 {
			kb, _, _ := bytes.Cut(bytes.TrimSpace(rest), []byte(" "))
			if n, _ := strconv.ParseInt(string(kb), 10, 64); n > 0 {
				at.bytes = n << 10
				h = append(h, at)
			}
		}
	}
	return h, lines.Err() == nil
}
