package test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// All that a server with optcache listens on is the port of its server block.
func TestNothingElseListens(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]int{"fastpath off": 2, "fastpath auto 3": 2 + 3} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			s := start(t, block("dns", u.addr, "optcache {\n\tprefetch 1\n\tserve_stale\n\t"+line+"\n}"))
			_, port, _ := strings.Cut(s.addr("dns"), ":")
			eventually(t, func() error {
				ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
				ours, others := 0, 0
				for _, addr := range listening(t, s.cmd.Process.Pid) {
					if strings.HasSuffix(addr, ":"+port) {
						ours++
					} else {
						others++
					}
				}
				if ours != want || others != 0 {
					return fmt.Errorf("%d sockets on the port of the server block, want %d; %d others", ours, want, others)
				}
				return nil
			})
		})
	}
}

// listening returns the addresses, as IP:PORT, that a process takes TCP connections or packets from
// anybody on: those of its sockets that have no peer.
func listening(t *testing.T, pid int) (addrs []string) {
	t.Helper()
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	open := make(map[string]bool)
	for _, fd := range fds {
		link, _ := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
		if inode, ok := strings.CutPrefix(link, "socket:["); ok {
			open[strings.TrimSuffix(inode, "]")] = true
		}
	}
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		f, err := os.Open(filepath.Join(proc, "net", table))
		if os.IsNotExist(err) { // no IPv6
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if len(fields) < 10 || !open[fields[9]] || !strings.HasSuffix(fields[2], ":0000") {
				continue
			}
			ip, port, _ := strings.Cut(fields[1], ":")
			n, err := strconv.ParseUint(port, 16, 16)
			if err != nil {
				t.Fatal(err)
			}
			addrs = append(addrs, fmt.Sprintf("%s %s:%d", table, ip, n))
		}
	}
	return addrs
}
