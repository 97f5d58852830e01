// Package redis starts a real server of the second level for tests: redis-server, as Debian has it.
package redis

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/test/child"
	"github.com/optcache/optcache/test/freeport"
)

// Server is a server on the loopback. It ends with the test.
type Server struct {
	Port int
	dir  string
	file []string // of its configuration, if there is one
	args []string
	cmd  *exec.Cmd
	t    testing.TB
}

// Start starts a server with more arguments, as --maxmemory 1mb. It has no persistence.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	return start(t, nil, append([]string{"--save", "", "--appendonly", "no"}, args...)...)
}

func start(t testing.TB, file []string, args ...string) *Server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("redis-server is not installed")
	}
	s := &Server{Port: freeport.Port(t), dir: t.TempDir(), file: file, args: args, t: t}
	s.Run()
	t.Cleanup(s.Stop)
	return s
}

// Run starts the server again after Stop. It is empty.
func (s *Server) Run() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", slices.Concat(s.file, []string{"--port", fmt.Sprint(s.Port), "--bind", "127.0.0.1", "--dir", s.dir}, s.args)...)
	var out bytes.Buffer
	s.cmd.Stdout, s.cmd.Stderr = &out, &out
	if err := child.Start(s.cmd); err != nil {
		s.t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; {
		conn, err := net.Dial("tcp", s.Addr())
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(end) {
			s.Stop()
			s.t.Fatalf("redis-server does not start: %v\n%s", err, out.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Addr returns HOST:PORT.
func (s *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", s.Port) }

// URL returns the server's URL.
func (s *Server) URL() string { return "valkey://" + s.Addr() }

// Stop kills the server.
func (s *Server) Stop() {
	if s.cmd.ProcessState == nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
	}
}

// Do runs a command by redis-cli, and returns what it prints.
func (s *Server) Do(args ...string) string {
	s.t.Helper()
	out, err := exec.Command("redis-cli", append([]string{"-p", fmt.Sprint(s.Port)}, args...)...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("redis-cli %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// Secret writes a file with secrets, and returns its path.
func Secret(t testing.TB, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Sentinel starts a sentinel that watches a server, and those that it copies itself to, as a set of that name.
func Sentinel(t testing.TB, set string, of *Server) *Server {
	t.Helper()
	config := filepath.Join(t.TempDir(), "sentinel.conf")
	text := fmt.Sprintf("sentinel monitor %s 127.0.0.1 %d 1\nsentinel down-after-milliseconds %[1]s 500\nsentinel failover-timeout %[1]s 2000\n", set, of.Port)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return start(t, []string{config}, "--sentinel")
}

// Cluster starts a cluster of six: three that write, and a replica of each.
func Cluster(t testing.TB) (all []*Server) {
	t.Helper()
	args := []string{"--cluster", "create"}
	for range 6 {
		s := Start(t, "--cluster-enabled", "yes", "--cluster-node-timeout", "500", "--cluster-require-full-coverage", "no", "--repl-diskless-sync-delay", "0", "--cluster-port", fmt.Sprint(freeport.Port(t)))
		all = append(all, s)
		args = append(args, s.Addr())
	}
	out, err := exec.Command("redis-cli", append(args, "--cluster-replicas", "1", "--cluster-yes")...).CombinedOutput()
	if err != nil {
		t.Fatalf("redis-cli: %v\n%s", err, out)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		ready := 0
		for _, s := range all {
			replication := s.Do("info", "replication")
			synced := strings.Contains(replication, "master_link_status:up") || strings.Contains(replication, "connected_slaves:1")
			if synced && strings.Contains(s.Do("cluster", "info"), "cluster_state:ok") {
				ready++
			}
		}
		if ready == len(all) {
			return all
		}
		if time.Now().After(end) {
			t.Fatal("the cluster does not become ready")
		}
	}
}
