package test

import (
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This file plays systemd for the server: it hears what the server says of itself.

// A unit is ready when the server answers, and hears that it still does: with the fast path and without, and after a reload.
// Nothing of that is a query to CoreDNS. A server that is told to end says so.
func TestSystemdHearsHowTheServerIs(t *testing.T) {
	unit := readFile(t, filepath.Join(root, "deploy", "debian", "coredns-optcache.service"))
	m := regexp.MustCompile(`(?m)^WatchdogSec=(\d+)$`).FindStringSubmatch(unit)
	if m == nil || !strings.Contains(unit, "\nType=notify\n") {
		t.Fatalf("the unit has no watchdog:\n%s", unit)
	}
	if n, _ := strconv.Atoi(m[1]); n < 30 {
		t.Errorf("a busy server has %d s to answer", n)
	}
	for _, fastpath := range []string{"fastpath", "fastpath off"} {
		t.Run(fastpath, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(shortDir(t), "notify")
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			heard := func(want string) {
				t.Helper()
				conn.SetReadDeadline(time.Now().Add(patience))
				for buf := make([]byte, 512); ; {
					n, err := conn.Read(buf)
					if err != nil {
						t.Fatalf("no %s: %v", want, err)
					}
					if string(buf[:n]) == want {
						return
					}
				}
			}
			u := newUpstream(t)
			at := func(port string) string {
				return block(port, u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\n\t\t"+fastpath+"\n\t}")
			}
			s := start(t, at("dns"), "NOTIFY_SOCKET="+socket, "WATCHDOG_USEC=400000")
			heard("READY=1")
			for range 3 {
				heard("WATCHDOG=1")
			}
			s.write(at("other")) // who still asked at the old port would hear nothing
			s.signal(syscall.SIGUSR1)
			heard("READY=1")
			for range 3 {
				heard("WATCHDOG=1")
			}
			if n := sum(t, s.addr("metrics"), "coredns_dns_requests_total"); n != 0 {
				t.Errorf("%v queries have been counted", n)
			}
			s.stopped = true
			s.signal(syscall.SIGTERM)
			heard("STOPPING=1")
			<-s.exited
		})
	}
}
