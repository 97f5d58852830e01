package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// A server that has answered, and that nobody asks any more, must not wake up but for what the Go runtime does. An
// idle *cache* has 3 to 5 context switches each second; a clock that ticks all the time had 260.
func TestIdleServerSleeps(t *testing.T) {
	t.Parallel()
	const (
		watched   = 5 * time.Second
		perSecond = 30
		tries     = 4 // the Go runtime may collect garbage meanwhile, and gives memory back for a while
	)
	file := filepath.Join(t.TempDir(), "answers")
	for _, c := range []struct{ name, block string }{
		{"fastpath off", "optcache {\n        fastpath off\n    }"},
		{"auto", "optcache"},
		{"all that may have a timer", `optcache {
        prefetch 1 1m 90%
        serve_stale 1h verify 100ms
        hot_cache_percentage auto
        cache_file_path ` + file + ` 10m
    }`},
		{"fastpath", "optcache {\n        fastpath\n    }"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := start(t, `.:${dns} {
    bind 127.0.0.1
    `+c.block+`
    template IN A {
        answer "{{ .Name }} 3600 IN A 192.0.2.1"
    }
}`)
			for i := range 100 {
				m := new(dns.Msg).SetQuestion(fmt.Sprintf("host-%d.example.org.", i%10), dns.TypeA)
				ask(t, overUDP(s.addr("dns")), m)
			}
			time.Sleep(time.Second) // what the queries have begun ends
			var all []int
			for range tries {
				before := switches(t, s.cmd.Process.Pid)
				time.Sleep(watched)
				n := switches(t, s.cmd.Process.Pid) - before
				if n <= perSecond*int(watched/time.Second) {
					return
				}
				all = append(all, n)
			}
			t.Errorf("%d context switches in %v each, although nobody asked", all, watched)
		})
	}
}

// switches returns how often a process's threads have gone to sleep or lost their CPU.
func switches(t *testing.T, pid int) (n int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("process %d has no threads: %v", pid, err)
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for line := range bytes.Lines(status) {
			if name, value, ok := bytes.Cut(line, []byte(":")); ok && bytes.HasSuffix(name, []byte("ctxt_switches")) {
				count, err := strconv.Atoi(string(bytes.TrimSpace(value)))
				if err != nil {
					t.Fatal(err)
				}
				n += count
			}
		}
	}
	return n
}
