package test

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/dns"
)

// A disk that is full, or read-only, costs a line in the log and a counter: the server serves, and what was on
// the disk before is still there after a crash.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mount := func(flags uintptr) error { return syscall.Mount("tmpfs", dir, "tmpfs", flags, "size=64k") }
	if err := mount(0); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	path := filepath.Join(dir, "answers")
	u := newUpstream(t)
	corefile := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\n\t\tcache_file_path "+path+" 1s\n\t}")
	s := start(t, corefile)
	metric := func(name string) float64 { return sum(t, s.addr("metrics"), "coredns_optcache_snapshot_"+name) }
	until := func(what string, ok func() bool) {
		t.Helper()
		eventually(t, func() error {
			if !ok() {
				return fmt.Errorf("%s: %v entries, %v failures", what, metric("entries"), metric("failures"))
			}
			return nil
		})
	}
	const few, many = 100, 5000
	// Names that cannot be compressed.
	name := func() string {
		b := make([]byte, 30)
		rand.Read(b)
		return hex.EncodeToString(b) + ".example.org."
	}
	var names []string
	add := func(n int) {
		for range n {
			names = append(names, name())
			ask(t, overUDP(s.addr("dns")), query(names[len(names)-1], dns.TypeA))
		}
	}
	add(few)
	until("a disk with room", func() bool { return metric("entries") == few })
	add(many)
	until("a full disk", func() bool { return metric("failures") > 1 })
	if !strings.Contains(s.out.String(), "No snapshot has been written (disk)") {
		t.Error("the log does not say that the disk is full")
	}
	until("nothing but the last snapshot left", func() bool { // a temporary file is there while one is written
		files, err := os.ReadDir(dir)
		return err == nil && len(files) == 1 && files[0].Name() == filepath.Base(path)
	})
	for _, name := range names {
		ask(t, overUDP(s.addr("dns")), query(name, dns.TypeA))
		if n := u.count(name, dns.TypeA); n != 1 {
			t.Fatalf("the upstream was asked %d times for %s", n, name)
		}
	}

	// A snapshot may have been written while the names came in, as long as there was room.
	kept := metric("entries")
	if kept < few || kept >= few+many {
		t.Errorf("%v entries in the last snapshot", kept)
	}
	s.stopped = true
	s.signal(syscall.SIGKILL)
	<-s.exited
	if err := mount(syscall.MS_REMOUNT | syscall.MS_RDONLY); err != nil {
		t.Fatal(err)
	}
	s = start(t, corefile)
	if !s.waitFor(fmt.Sprintf("Has read %v answers", kept)) {
		t.Fatal("the answers have not been read")
	}
	ask(t, overUDP(s.addr("dns")), query(names[0], dns.TypeA)) // series come with the first request
	until("a read-only disk", func() bool { return metric("failures") > 1 })
	if n := u.count(names[0], dns.TypeA); n != 1 {
		t.Errorf("the upstream was asked %d times for what was on the disk", n)
	}
}
