package test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/optcache/optcache/test/child"
	"github.com/optcache/optcache/test/freeport"
)

// This file starts and ends the process under test.

const (
	// patience bounds every wait for something that is to happen. It is only used up when it
	// does not happen.
	patience = time.Minute

	// startTries is how often a server is started before a port that is taken counts as an error.
	startTries = 5

	pollEvery = 10 * time.Millisecond
)

// server is a running CoreDNS.
type server struct {
	t       testing.TB
	cmd     *exec.Cmd
	conf    string // path of its Corefile
	out     *output
	ports   map[string]string // by name
	exited  chan struct{}     // closed when the process is gone
	stopped bool              // the test has ended it
}

// portName is how a Corefile in these tests writes a port that the kernel chooses: ${dns}. The
// same name is the same port everywhere in it.
var portName = regexp.MustCompile(`\$\{(\w+)\}`)

// start runs the binary with a Corefile until the test ends, and waits until it serves.
func start(t testing.TB, corefile string, env ...string) *server {
	t.Helper()
	return startBy(t, bin, corefile, env...)
}

// startBy is start for a binary that becomes CoreDNS.
func startBy(t testing.TB, binary, corefile string, env ...string) *server {
	t.Helper()
	for try := 1; ; try++ {
		s := launchBy(t, binary, corefile, env...)
		if s.waitFor("CoreDNS-") {
			t.Cleanup(s.end)
			return s
		}
		s.kill()
		if out := s.out.String(); !strings.Contains(out, "address already in use") || try == startTries {
			t.Fatalf("does not start:\n%s\nCorefile:\n%s", out, readFile(t, s.conf))
		}
	}
}

// launch starts the process and waits for nothing.
func launch(t testing.TB, corefile string, env ...string) *server {
	t.Helper()
	return launchBy(t, bin, corefile, env...)
}

func launchBy(t testing.TB, binary, corefile string, env ...string) *server {
	t.Helper()
	s := &server{t: t, out: new(output), ports: map[string]string{}, exited: make(chan struct{})}
	s.conf = filepath.Join(t.TempDir(), "Corefile")
	s.write(corefile)

	s.cmd = exec.Command(binary, "-conf", s.conf)
	s.cmd.Dir = root
	s.cmd.Env = append(os.Environ(), env...)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := child.Start(s.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		s.cmd.Wait()
		close(s.exited)
	}()
	return s
}

// write makes a text the server's Corefile, with ports for its ${NAMES}.
func (s *server) write(corefile string) {
	s.t.Helper()
	text := portName.ReplaceAllStringFunc(corefile, func(ref string) string {
		name := portName.FindStringSubmatch(ref)[1]
		if s.ports[name] == "" {
			s.ports[name] = strconv.Itoa(freeport.Port(s.t))
		}
		return s.ports[name]
	})
	// The server never reads half of it.
	next := s.conf + ".next"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(next, s.conf); err != nil {
		s.t.Fatal(err)
	}
}

// addr is where the port of that name is.
func (s *server) addr(port string) string {
	s.t.Helper()
	if s.ports[port] == "" {
		s.t.Fatalf("the Corefile has no port ${%s}", port)
	}
	return net.JoinHostPort("127.0.0.1", s.ports[port])
}

// waitFor waits until the output has the text, and reports whether it came. The line with the
// version comes when all sockets are open: from then on no query is refused.
func (s *server) waitFor(text string) bool {
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if strings.Contains(s.out.String(), text) {
			return true
		}
		select {
		case <-s.exited:
			return strings.Contains(s.out.String(), text)
		case <-time.After(pollEvery):
		}
	}
	return false
}

// end kills the process and fails the test if it was dead already, or came close.
func (s *server) end() {
	select {
	case <-s.exited:
		if !s.stopped {
			s.t.Errorf("the server ended by itself: %v", s.cmd.ProcessState)
		}
	default:
	}
	s.kill()
	out := s.out.String()
	for _, bad := range []string{"panic", "Recovered", "fatal error", "DATA RACE"} {
		if strings.Contains(out, bad) {
			s.t.Errorf("the server's output has %q", bad)
		}
	}
	if s.t.Failed() {
		s.t.Logf("output of the server:\n%s", out)
	}
}

func (s *server) kill() {
	s.cmd.Process.Kill()
	<-s.exited
}

// output is what a process printed so far. It is safe for concurrent use.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// eventually waits until check returns nil, and fails the test with its last error otherwise.
func eventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v: %v", patience, err)
		}
		time.Sleep(pollEvery)
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// block is a server block on the port of that name, which forwards behind the plugins given.
func block(port, upstream string, plugins ...string) string {
	return fmt.Sprintf(".:${%s} {\n\tbind 127.0.0.1\n\terrors\n\t%s\n\tforward . %s\n}\n",
		port, strings.Join(plugins, "\n\t"), upstream)
}
