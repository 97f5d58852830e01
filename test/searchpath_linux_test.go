package test

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() { newResolvers = resolversOfHost }

// resolversOfHost has the resolvers on a host of its own, as they ask port 53 alone and read /etc/resolv.conf. Behind that port is a
// relay to the server.
func resolversOfHost(t *testing.T) func(addr string, names []string, namespace int, musl bool) {
	needs(t, "gcc", "musl-gcc")
	h, err := newHost(t)
	if err != nil {
		t.Log(err)
		return nil
	}
	dir := t.TempDir()
	for _, args := range [][]string{
		{"ip", "-n", h.name, "link", "set", "lo", "up"},
		{"gcc", "-o", filepath.Join(dir, "glibc"), filepath.Join(root, "test/kubernetes/testdata/lookup.c")},
		{"musl-gcc", "-static", "-o", filepath.Join(dir, "musl"), filepath.Join(root, "test/kubernetes/testdata/lookup.c")},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
	}
	var to atomic.Pointer[string]
	relay(h.listen("127.0.0.1:53"), &to)
	return func(addr string, names []string, namespace int, musl bool) {
		t.Helper()
		to.Store(&addr)
		h.resolvConf(fmt.Sprintf("nameserver 127.0.0.1\nsearch ns%d.svc.cluster.local svc.cluster.local cluster.local ec2.internal\noptions ndots:5 timeout:5 attempts:3\n", namespace))
		libc := "glibc"
		if musl {
			libc = "musl"
		}
		got := h.output(append([]string{filepath.Join(dir, libc)}, names...)...)
		if want := strings.Join(names, ": 192.0.2.1\n") + ": 192.0.2.1\n"; got != want {
			t.Errorf("%s, namespace %d: %s", libc, namespace, got)
		}
	}
}

// listen listens for UDP on the host.
func (h host) listen(addr string) (conn net.PacketConn) {
	h.t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is on the host from now on, and ends with the goroutine
		fd, err := unix.Open(filepath.Join("/var/run/netns", h.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			conn, err = net.ListenPacket("udp4", addr)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		h.t.Fatalf("%s: %v", addr, err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

// relay passes queries on to the server whose address is in to, and its replies back, until conn is closed.
func relay(conn net.PacketConn, to *atomic.Pointer[string]) {
	go func() {
		buffer := make([]byte, 4096)
		for {
			n, client, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			query, addr := slices.Clone(buffer[:n]), *to.Load()
			go func() {
				server, err := net.Dial("udp", addr)
				if err != nil {
					return // the resolver asks again
				}
				defer server.Close()
				server.SetDeadline(time.Now().Add(askTimeout))
				reply := make([]byte, 4096)
				if _, err = server.Write(query); err != nil {
					return
				}
				if n, err := server.Read(reply); err == nil {
					conn.WriteTo(reply[:n], client)
				}
			}()
		}
	}()
}
