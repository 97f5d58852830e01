package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A restart finds in the file what was there before: after SIGTERM, with the snapshot of the end; after SIGKILL, with
// the last one. dnstap-read shows what is in the file.
func TestRestartKeepsAnswers(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	path := filepath.Join(t.TempDir(), "answers.zst")
	corefile := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\n\t\tcache_file_path "+path+" 1s\n\t}")
	const names = 300
	s := start(t, corefile)
	askHosts(t, s, names)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		eventually(t, func() error {
			if n := sum(t, s.addr("metrics"), "coredns_optcache_snapshot_entries"); n != names {
				return fmt.Errorf("%v answers in the snapshot", n)
			}
			return nil
		})
		s.stopped = true
		s.signal(sig)
		<-s.exited
		s = start(t, corefile)
		if !s.waitFor(fmt.Sprintf("Has read %d answers", names)) {
			t.Fatal("the answers have not been read")
		}
		askHosts(t, s, names)
		if n := sum(t, s.addr("metrics"), "coredns_optcache_snapshot_loaded_entries"); n != names {
			t.Errorf("/metrics tells of %v answers that were read", n)
		}
	}
	askedOnce(t, u, names)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	t.Run("dnstap-read", func(t *testing.T) {
		needs(t, "zstd", "dnstap-read")
		out, err := exec.Command("bash", "-c", "zstd -dc "+path+" | dnstap-read /dev/stdin").CombinedOutput()
		if err != nil || strings.Count(string(out), "host-") < names {
			t.Errorf("%v: %d lines: %.500s", err, strings.Count(string(out), "\n"), out)
		}
	})
}

// Two blocks with one file are an error that names it, whatever the blocks differ in.
func TestOneFileForTwoBlocks(t *testing.T) {
	t.Parallel()
	for name, blocks := range map[string][2]string{
		"zones":                               {"example.org:0 {\n\tbind 127.0.0.1", "example.net:0 {\n\tbind 127.0.0.1"},
		"addresses":                           {".:0 {\n\tbind 127.0.0.1", ".:0 {\n\tbind 127.0.0.2"},
		"addresses, and one beside the other": {".:0 {\n\tbind 127.0.0.1", ".:0 {\n\tbind 127.0.0.2"},
		"views":                               {".:0 {\n\tview one {\n\t\texpr false\n\t}", ".:0 {\n"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "answers")
			rest := "\n\toptcache {\n\t\tcache_file_path " + path + "\n\t}\n\twhoami\n}\n"
			text := blocks[0] + rest
			if strings.Contains(name, "beside") {
				rest = strings.Replace(rest, path, path+".tmp", 1)
			}
			text += blocks[1] + rest
			line := strings.Count(text[:strings.LastIndex(text, path)], "\n") + 1
			conf := filepath.Join(t.TempDir(), "Corefile")
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), bin, "-conf", conf)
			cmd.WaitDelay = time.Second
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), fmt.Sprintf("%s:%d", conf, line)) || !strings.Contains(string(out), path) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
