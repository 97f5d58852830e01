package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control/api"
)

// shortDir returns a folder whose path is short enough for a unix socket in it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "oc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// buildTool builds optcachectl, once.
var buildTool = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "optcachectl-test-") // in the way of nobody, and small
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "optcachectl")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", path, "./cmd/optcachectl")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v\n%s", err, out)
	}
	return path, nil
})

// tool runs optcachectl with an address and returns what it prints, and its exit code.
func tool(t *testing.T, addr string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	path, err := buildTool()
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, append([]string{"-s", addr}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), code
}

// done is tool for commands that must succeed.
func done(t *testing.T, addr string, args ...string) string {
	t.Helper()
	out, errs, code := tool(t, addr, args...)
	if code != 0 {
		t.Fatalf("optcachectl %s: exit %d: %s", strings.Join(args, " "), code, errs)
	}
	return out
}

// The command and the server agree: what is held is shown, and what is flushed is gone, over reloads and restarts, too.
func TestControl(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	dir := shortDir(t)
	addr := "unix://" + filepath.Join(dir, "control.sock")
	corefile := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}",
		"optcache {\n\t\tcontrol "+addr+"\n\t\tcache_file_path "+filepath.Join(dir, "answers")+" 1h\n\t}")
	const names = 100
	s := start(t, corefile)
	askHosts(t, s, names)

	var status api.StatusReply
	if err := json.Unmarshal([]byte(done(t, addr, "status", "-o", "json")), &status); err != nil {
		t.Fatal(err)
	}
	if b := status.Blocks[0]; len(status.Blocks) != 1 || b.Misses != names || b.Entries["success"] != names || float64(b.Misses) != sum(t, s.addr("metrics"), "coredns_optcache_misses_total") {
		t.Errorf("status %+v", status)
	}
	if out := done(t, addr, "lookup", hostName(7), "A"); !strings.Contains(out, "NOERROR") || !strings.Contains(out, "\tA\t") && !strings.Contains(out, " A ") {
		t.Errorf("lookup shows\n%s", out)
	}
	if n := strings.Count(done(t, addr, "list", "--limit", "0", "-o", "json"), "\n"); n != names {
		t.Errorf("%d answers are listed", n)
	}
	if _, _, code := tool(t, addr, "lookup", "nothing.example.org"); code != 4 {
		t.Errorf("lookup of what is not held: exit %d", code)
	}
	if _, errs, code := tool(t, addr, "flush"); code != 2 || strings.Count(errs, "\n") > 2 {
		t.Errorf("flush of nothing: exit %d: %s", code, errs)
	}
	if _, errs, code := tool(t, addr, "flush", "a..b"); code != 1 || !strings.Contains(errs, "a..b") {
		t.Errorf("flush of what is no name: exit %d: %s", code, errs)
	}
	if _, _, code := tool(t, "unix://"+filepath.Join(dir, "none.sock"), "status"); code != 3 {
		t.Errorf("no server: exit %d", code)
	}

	// asked asks for a name and returns how often the upstream has been asked for it.
	asked := func(i int) int {
		ask(t, overUDP(s.addr("dns")), query(hostName(i), dns.TypeA))
		return u.count(hostName(i), dns.TypeA)
	}
	if out := done(t, addr, "flush", hostName(1), "-o", "json"); !strings.Contains(out, `"flushed":1`) && !strings.Contains(out, `"flushed": 1`) {
		t.Errorf("flush says %s", out)
	}
	if n, other := asked(1), asked(2); n != 2 || other != 1 {
		t.Errorf("the upstream was asked %d times for what was flushed, %d times for another", n, other)
	}

	// A listener outlives reloads.
	var failed atomic.Int32
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, _, code := tool(t, addr, "status"); code != 0 {
				failed.Add(1)
			}
		}
	}()
	for range 3 {
		s.reload(reloaded)
	}
	close(stop)
	<-ended
	if n := failed.Load(); n > 0 {
		t.Errorf("%d requests failed during reloads", n)
	}
	if n := asked(1); n != 2 {
		t.Errorf("after the reloads, the upstream was asked %d times", n)
	}

	done(t, addr, "alive")

	// What is flushed is not in the snapshot, even if the process is killed at once.
	done(t, addr, "snapshot")
	done(t, addr, "flush", hostName(3))
	s.stopped = true
	s.signal(syscall.SIGKILL)
	<-s.exited
	s = start(t, corefile)
	if !s.waitFor("Has read ") {
		t.Fatal("no snapshot has been read")
	}
	if n, other := asked(3), asked(4); n != 2 || other != 1 {
		t.Errorf("after the restart, the upstream was asked %d times for what was flushed, %d times for another", n, other)
	}
	out := done(t, addr, "flush", "example.org", "--subtree")
	if n := asked(5); n != 2 {
		t.Errorf("after a flush of the subtree (%s), the upstream was asked %d times", strings.TrimSpace(out), n)
	}
}
