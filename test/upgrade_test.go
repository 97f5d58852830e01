package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// This file goes from one version to another, and back.

// fromVar names the commit or tag that is built as the version before. The Makefile sets it.
const fromVar = "OPTCACHE_FROM"

// versionBefore returns a folder with the source of the version before, or skips the test.
func versionBefore(t *testing.T) string {
	t.Helper()
	from := os.Getenv(fromVar)
	if from == "" {
		t.Skipf("%s is not set", fromVar)
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bash", "-o", "pipefail", "-c", `git -c "safe.directory=*" archive "$0" | tar -C "$1" -xf -`, from, dir)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s is not in this clone, which may be a shallow one (git fetch --unshallow --tags): %v\n%s", from, err, out)
	}
	return dir
}

// buildBefore builds the programs of a source into a folder, as `make build` does.
func buildBefore(t *testing.T, source, to string) {
	t.Helper()
	for _, program := range []string{"coredns", "optcachectl"} {
		build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w -X main.version=before -X main.commit=before",
			"-o", filepath.Join(to, program), "./cmd/"+program)
		build.Dir = source
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", program, err, out)
		}
	}
}

var (
	hasRead  = regexp.MustCompile(`Has read (\d+) answers from`)
	hasNot   = regexp.MustCompile(`\[WARNING\] .*(?:Starts with an empty cache|Has read 0 answers, then) \(version\): .*`)
	anyStart = regexp.MustCompile(`Has read \d+ answers.*|Starts with an empty cache.*`)
)

// What one version has kept, the other one reads whole, or refuses with a line that names the file and the versions; in both
// directions. All names are answered afterwards.
func TestUpgrade(t *testing.T) {
	dir := t.TempDir()
	buildBefore(t, versionBefore(t), dir)
	before := filepath.Join(dir, "coredns")
	u := newUpstream(t)
	path := filepath.Join(dir, "answers.zst")
	corefile := block("dns", u.addr, "optcache {\n\t\tserve_stale 1h\n\t\tcache_file_path "+path+"\n\t}")
	names, whole := 0, true
	run := func(version, binary string) {
		t.Helper()
		s := startBy(t, binary, corefile)
		if names > 0 {
			eventually(t, func() error {
				if out := s.out.String(); !anyStart.MatchString(out) {
					return fmt.Errorf("%s says nothing of the file:\n%s", version, out)
				}
				return nil
			})
			out := s.out.String()
			read := 0
			if m := hasRead.FindStringSubmatch(out); m != nil {
				read, _ = strconv.Atoi(m[1])
			}
			refused := hasNot.FindString(out)
			if read != names && (read != 0 || !strings.Contains(refused, path)) {
				t.Errorf("%s has read %d of %d answers: %s", version, read, names, anyStart.FindString(out))
			}
			t.Logf("%s: %s", version, anyStart.FindString(out))
			whole = whole && read == names
			askHosts(t, s, names)
			if whole {
				askedOnce(t, u, names)
			}
		}
		names += 100
		askHosts(t, s, names)
		s.stopped = true
		s.signal(syscall.SIGTERM)
		<-s.exited
	}
	run("the version before", before)
	run("this version", bin)
	run("the version before, again", before)
	run("this version, again", bin)
}

// A snapshot of a later version, as somebody has who goes back, is refused by one line. The server starts empty, serves, and keeps
// its answers in a file that it reads itself.
func TestSnapshotOfALaterVersion(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers.zst")
	later := readFile(t, filepath.Join(root, "plugin", "pkg", "snapshot", "testdata", "of-version-2.zst"))
	if err := os.WriteFile(path, []byte(later), 0o600); err != nil {
		t.Fatal(err)
	}
	u := newUpstream(t)
	corefile := block("dns", u.addr, "optcache {\n\t\tcache_file_path "+path+"\n\t}")
	s := start(t, corefile)
	if !s.waitFor("Starts with an empty cache (version): " + path + `: the snapshot has version "2" of the format, and this program reads 1`) {
		t.Fatalf("no such line:\n%s", s.out.String())
	}
	askHosts(t, s, 10)
	s.stopped = true
	s.signal(syscall.SIGTERM)
	<-s.exited
	if s = start(t, corefile); !s.waitFor("Has read 10 answers from " + path) {
		t.Errorf("%s", s.out.String())
	}
	askedOnce(t, u, 10)
}
