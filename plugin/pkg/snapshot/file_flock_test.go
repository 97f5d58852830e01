//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package snapshot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childVariable makes the test's binary do something else than tests: a word, then a path.
const childVariable = "OPTCACHE_SNAPSHOT_CHILD"

func TestMain(m *testing.M) {
	job, path, ok := strings.Cut(os.Getenv(childVariable), " ")
	switch {
	case !ok:
		os.Exit(m.Run())
	case job == "loop":
		writeForever(path)
	case job == "limited":
		writeLimited(path)
	}
}

// child returns the command that does a job.
func child(job, path string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+job+" "+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// versions returns the contents that writers write by turns.
func versions() [2][]*Record {
	a := typical(4000)
	return [2][]*Record{a, append(slices.Clone(a[1000:]), unusual()...)}
}

func writeForever(path string) {
	both := versions()
	for i := 0; ; i++ {
		_, err := Write(path, testHeader, slices.Values(both[i%2]))
		if err != nil && !errors.Is(err, errBusy) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if i == 0 {
			fmt.Println("begun")
		}
	}
}

// checkEither fails the test if the file has neither content, whole.
func checkEither(t *testing.T, path string, both [2][]*Record) {
	t.Helper()
	var got []*Record
	if _, err := Read(path, Limits{}, nil, func(r *Record) error {
		got = append(got, clone(r))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.EqualFunc(got, both[0], same) && !slices.EqualFunc(got, both[1], same) {
		t.Fatalf("%d records, which are neither %d nor %d", len(got), len(both[0]), len(both[1]))
	}
}

// TestKilledWriter kills writers at any moment. OPTCACHE_KILLS says how often.
func TestKilledWriter(t *testing.T) {
	t.Parallel()
	kills := 30
	if n, err := strconv.Atoi(os.Getenv("OPTCACHE_KILLS")); err == nil {
		kills = n
	}
	path := filepath.Join(t.TempDir(), "cache")
	both := versions()
	if _, err := Write(path, testHeader, slices.Values(both[0])); err != nil {
		t.Fatal(err)
	}
	left := 0
	for range kills {
		cmd := child("loop", path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Errorf("the writer says %q: %v", line, err)
		}
		time.Sleep(rand.N(30 * time.Millisecond))
		cmd.Process.Kill()
		if err := cmd.Wait(); cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the writer has ended by itself: %v", err)
		}
		checkEither(t, path, both)
		if _, err := os.Stat(path + ".tmp"); err == nil {
			left++
		}
	}
	t.Logf("%d of %d were killed while they wrote", left, kills)
	// What they have left is in nobody's way.
	if _, err := Write(path, testHeader, slices.Values(both[1])); err != nil {
		t.Fatal(err)
	}
	checkFolder(t, path, "cache")
}

func TestConcurrentWriters(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	both := versions()
	if _, err := Write(path, testHeader, slices.Values(both[0])); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for done := 0; done < 20; {
				switch _, err := Write(path, testHeader, slices.Values(both[w])); {
				case err == nil:
					done++
				case errors.Is(err, errBusy):
					time.Sleep(100 * time.Microsecond)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	for range 20 {
		checkEither(t, path, both)
	}
	wg.Wait()
	checkEither(t, path, both)
	checkFolder(t, path, "cache")
}

// TestSecondWriterIsRefused has the same path written from within Write.
func TestSecondWriterIsRefused(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	want := typical(10)
	_, err := Write(path, testHeader, func(yield func(*Record) bool) {
		if _, err := Write(path, testHeader, slices.Values(typical(3))); !errors.Is(err, errBusy) {
			t.Errorf("the second: %v", err)
		}
		for _, r := range want {
			yield(r)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	checkEither(t, path, [2][]*Record{want, want})
}

// TestPanickingCaller leaves nothing behind.
func TestPanickingCaller(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	func() {
		defer func() { recover() }()
		Write(path, testHeader, func(func(*Record) bool) { panic("mine") })
	}()
	checkFolder(t, path)
}

func writeLimited(path string) {
	limit := unix.Rlimit{Cur: 16 << 10, Max: 16 << 10}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		fmt.Println("skip", err)
		return
	}
	_, err := Write(path, testHeader, slices.Values(typical(5000)))
	fmt.Println(Reason(err), err)
}

// TestFullDisk writes more than the process may.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	want := typical(10)
	if _, err := Write(path, testHeader, slices.Values(want)); err != nil {
		t.Fatal(err)
	}
	out, err := child("limited", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(string(out), "skip") {
		t.Skip(string(out))
	}
	if !strings.HasPrefix(string(out), disk+" ") || !strings.Contains(string(out), path) {
		t.Errorf("the writer says %s", out)
	}
	checkEither(t, path, [2][]*Record{want, want})
	checkFolder(t, path, "cache")
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"open", "secret", "fine"} {
		if _, err := Write(at(name), testHeader, slices.Values(typical(3))); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Chmod(at("open"), 0o666),
		os.Chmod(at("secret"), 0),
		os.Symlink("fine", at("link")),
		unix.Mkfifo(at("fifo"), 0o600),
		os.WriteFile(at("empty"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]string{
		"fine": "", "link": "", "open": permission, "secret": permission, "fifo": notRegular, "": notRegular,
		"none": missing, "none/none": missing, "empty": cutOff,
	}
	if os.Geteuid() == 0 {
		delete(tests, "secret") // root may read all
	}
	for name, want := range tests {
		_, err := Read(at(name), Limits{}, nil, func(*Record) error { return nil })
		if Reason(err) != want {
			t.Errorf("%q: %v is %q, want %q", name, err, Reason(err), want)
		}
		if err != nil && !strings.Contains(err.Error(), at(name)) {
			t.Errorf("%q: %v does not name the file", name, err)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		prepare func(path string) error
		reason  string
	}{
		"link at PATH.tmp":      {func(path string) error { return os.Symlink(victim, path+".tmp") }, notRegular},
		"hard link at PATH.tmp": {func(path string) error { return os.Link(victim, path+".tmp") }, notRegular},
		"FIFO at PATH.tmp":      {func(path string) error { return unix.Mkfifo(path+".tmp", 0o600) }, notRegular},
		"folder at PATH.tmp":    {func(path string) error { return os.Mkdir(path+".tmp", 0o700) }, notRegular},
		"folder at PATH":        {func(path string) error { return os.Mkdir(path, 0o700) }, notRegular},
		"no folder":             {func(path string) error { return os.Remove(filepath.Dir(path)) }, missing},
	} {
		dir := filepath.Join(t.TempDir(), "folder")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "cache")
		if err := test.prepare(path); err != nil {
			t.Fatal(err)
		}
		_, err := Write(path, testHeader, slices.Values(typical(3)))
		if Reason(err) != test.reason || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v is %q", name, err, Reason(err))
		}
	}
	if b, err := os.ReadFile(victim); string(b) != "precious" {
		t.Errorf("the victim has %q, %v", b, err)
	}
}

// TestWriteReplacesLinks leaves alone what a link at the path leads to.
func TestWriteReplacesLinks(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	if err := errors.Join(os.WriteFile(path+".old", []byte("old"), 0o600), os.Symlink(path+".old", path)); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(path, testHeader, slices.Values(typical(3))); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path + ".old"); string(b) != "old" {
		t.Errorf("%q, %v", b, err)
	}
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() {
		t.Errorf("%v, %v", info, err)
	}
}

// TestLeftoversAreOverwritten includes those that others could read.
func TestLeftoversAreOverwritten(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	if err := errors.Join(os.WriteFile(path+".tmp", make([]byte, 1<<20), 0o600), os.Chmod(path+".tmp", 0o666)); err != nil {
		t.Fatal(err)
	}
	want := typical(3)
	if _, err := Write(path, testHeader, slices.Values(want)); err != nil {
		t.Fatal(err)
	}
	checkEither(t, path, [2][]*Record{want, want})
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestFailingDisk(t *testing.T) {
	t.Parallel()
	file := pack(t, testHeader, typical(3))
	r := io.MultiReader(strings.NewReader(string(file[:len(file)/2])), failing{})
	if _, err := read(r, Limits{}, nil, func(*Record) error { return nil }); Reason(err) != disk {
		t.Error(err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, unix.EIO }
