// Package freeport gives ports to tests that must know a port before a server opens it.
//
// To listen on port 0, close, and listen again on the port that the kernel chose is a race: meanwhile the kernel may
// give the port to somebody else. Nor is a UDP port that the kernel chose for a socket with SO_REUSEPORT a port of its
// own: the kernel may choose one that another such socket of the same user has. Both happen when the tests of several
// packages run at the same time.
package freeport

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
)

// The ports are below those that Linux chooses by itself (32768 and above, if nobody has changed it).
const (
	lowest = 10000
	count  = 22000
)

// taken has the ports that tests of this process have.
var taken sync.Map

// Port returns a port that nobody listens on, by UDP or TCP, and that no other test gets until t has ended. On Linux,
// that goes for the tests of other processes, too.
func Port(t testing.TB) int {
	t.Helper()
	first := rand.IntN(count)
	for i := range count {
		port := lowest + (first+i)%count
		if _, is := taken.LoadOrStore(port, true); is {
			continue
		}
		release, ok := lock(port)
		if ok && unused(port) {
			t.Cleanup(func() {
				release()
				taken.Delete(port)
			})
			return port
		}
		release()
		taken.Delete(port)
	}
	t.Fatalf("none of the ports from %d to %d is free", lowest, lowest+count-1)
	return 0
}

// Address returns an address of host with a port by Port.
func Address(t testing.TB, host string) string {
	t.Helper()
	return net.JoinHostPort(host, fmt.Sprint(Port(t)))
}

// lock takes a port among the processes of this network namespace, and reports whether nobody had it. An abstract unix
// socket is the lock: it has no file, belongs to the namespace as ports do, and ends with the process.
func lock(port int) (release func(), ok bool) {
	if runtime.GOOS != "linux" {
		return func() {}, true
	}
	l, err := net.Listen("unix", fmt.Sprintf("@optcache-test-port-%d", port))
	if err != nil {
		return func() {}, false
	}
	return func() { l.Close() }, true
}

// unused reports whether nobody has a port, at any address.
//
// On Linux that is read, and not tried. A process that is being started has our sockets until it becomes another program,
// even if we have closed them, so that a port that was tried may be in use for a moment.
func unused(port int) bool {
	if runtime.GOOS == "linux" {
		suffix := fmt.Appendf(nil, ":%04X", port)
		return !slices.ContainsFunc([]string{"tcp", "tcp6", "udp", "udp6"}, func(table string) bool {
			b, err := os.ReadFile("/proc/net/" + table) // without IPv6 there is none for it
			if err != nil && !os.IsNotExist(err) {
				return true
			}
			for line := range bytes.Lines(b) {
				if fields := bytes.Fields(line); len(fields) > 1 && bytes.HasSuffix(fields[1], suffix) {
					return true
				}
			}
			return false
		})
	}
	address := fmt.Sprintf(":%d", port)
	l, err := net.Listen("tcp", address)
	if err != nil {
		return false
	}
	defer l.Close()
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		return false
	}
	c.Close()
	return true
}
