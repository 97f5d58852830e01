//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package snapshot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// This file tests what happens to files: writers that are killed or run at once, full disks, links, and other users.

// childVariable makes the test binary do a job in place of the tests: a word, and then a path.
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
	case job == "write":
		_, err := Write(path, testHeader, slices.Values(typical(3)))
		fmt.Println(Reason(err), err)
	case job == "read":
		_, err := Read(path, Limits{}, nil, func(*Record) error { return nil })
		fmt.Println(Reason(err), err)
	}
}

// child returns the command that makes the test binary do a job.
func child(job, path string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+job+" "+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// versions returns the two contents that the writers write in turn.
func versions() [2][]*Record {
	a := typical(4000)
	return [2][]*Record{a, append(slices.Clone(a[1000:]), unusual()...)}
}

func writeForever(path string) {
	both := versions()
	for i := 0; ; i++ {
		_, err := Write(path, testHeader, slices.Values(both[i%2]))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if i == 0 {
			fmt.Println("begun")
		}
	}
}

// checkEither fails the test if the file does not have one of the two contents, whole.
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

// TestKilledWriter kills writers at random moments. OPTCACHE_KILLS is how many.
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
		if files, err := filepath.Glob(path + ".tmp*"); err != nil || len(files) > 1 {
			t.Fatalf("%q have been left: %v", files, err)
		} else {
			left += len(files)
		}
	}
	t.Logf("%d of %d were killed while they wrote", left, kills)
	// Their temporary files do not disturb the next writer.
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
			for range 20 {
				if _, err := Write(path, testHeader, slices.Values(both[w])); err != nil {
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

// TestLastWriterWins writes to the same path from within Write. Neither writer removes the other's temporary file.
func TestLastWriterWins(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	want, other := typical(10), typical(3)
	_, err := Write(path, testHeader, func(yield func(*Record) bool) {
		if _, err := Write(path, testHeader, slices.Values(other)); err != nil {
			t.Errorf("the second: %v", err)
		}
		checkEither(t, path, [2][]*Record{other, other})
		for _, r := range want {
			yield(r)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	checkEither(t, path, [2][]*Record{want, want})
	checkFolder(t, path, "cache")
}

// TestPanickingCaller tests that a panic of the caller leaves no file.
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

// TestFullDisk writes a larger file than the process's limit allows.
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
	for _, name := range []string{"open", "secret", "fine", "group", "twice"} {
		if _, err := Write(at(name), testHeader, slices.Values(typical(3))); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Chmod(at("open"), 0o666),
		os.Chmod(at("secret"), 0),
		os.Chmod(at("group"), 0o660), // as fsGroup does
		os.Link(at("twice"), at("second")),
		os.Symlink("/dev/null", at("device")),
		os.Symlink("nowhere", at("dangling")),
		os.Symlink("circle", at("circle")),
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
		"none": missing, "none/none": missing, "empty": cutOff, "group": "", "twice": notRegular, "second": notRegular,
		"device": notRegular, "dangling": missing, "circle": other,
	}
	if os.Geteuid() == 0 {
		delete(tests, "secret") // root may read every file
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

// TestWriteLeavesOthersAlone writes beside files that have names of temporary files, and are not abandoned files of a
// writer.
func TestWriteLeavesOthersAlone(t *testing.T) {
	t.Parallel()
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, put := range map[string]func(path string) error{
		"link":         func(path string) error { return os.Symlink(victim, path) },
		"hard link":    func(path string) error { return os.Link(victim, path) },
		"FIFO":         func(path string) error { return unix.Mkfifo(path, 0o600) },
		"folder":       func(path string) error { return os.Mkdir(path, 0o700) },
		"everybody's":  func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o666)) },
		"another name": func(path string) error { return os.WriteFile(path+".old", nil, 0o600) },
	} {
		path := filepath.Join(t.TempDir(), "cache")
		if err := errors.Join(put(path+".tmp"), put(path+".tmp1")); err != nil {
			t.Fatal(err)
		}
		before, _ := filepath.Glob(path + ".*")
		want := typical(3)
		if _, err := Write(path, testHeader, slices.Values(want)); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		checkEither(t, path, [2][]*Record{want, want})
		if after, _ := filepath.Glob(path + ".*"); !slices.Equal(after, before) {
			t.Errorf("%s: there are %q, and were %q", name, after, before)
		}
	}
	if b, err := os.ReadFile(victim); string(b) != "precious" {
		t.Errorf("the victim has %q, %v", b, err)
	}
}

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		prepare func(path string) error
		reason  string
	}{
		"folder at PATH": {func(path string) error { return os.Mkdir(path, 0o700) }, notRegular},
		"no folder":      {func(path string) error { return os.Remove(filepath.Dir(path)) }, missing},
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
}

// TestWriteReplacesLinks tests that Write replaces a link at the path, and leaves its target alone.
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

// TestLeftoversAreRemoved tests that Write removes the files of killed writers, and keeps that of a running one.
func TestLeftoversAreRemoved(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	for _, name := range []string{".tmp", ".tmp1", ".tmp4294967295"} {
		if err := os.WriteFile(path+name, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	alive, err := create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	want := typical(3)
	if _, err := Write(path, testHeader, slices.Values(want)); err != nil {
		t.Fatal(err)
	}
	checkEither(t, path, [2][]*Record{want, want})
	checkFolder(t, path, "cache", filepath.Base(alive.Name()))
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

// owned describes a regular file with any owner, which only root could create.
type owned struct {
	fs.FileInfo
	mode  fs.FileMode
	uid   int
	links int
}

func (o owned) Mode() fs.FileMode { return o.mode }
func (o owned) Sys() any {
	stat := &syscall.Stat_t{Uid: uint32(o.uid)}
	reflect.ValueOf(stat).Elem().FieldByName("Nlink").SetUint(uint64(o.links)) // its type is not the same everywhere
	return stat
}

func TestOwnerIsUserOrRoot(t *testing.T) {
	t.Parallel()
	me := os.Geteuid()
	for _, test := range []struct {
		info owned
		want string
	}{
		{owned{mode: 0o600, uid: me, links: 1}, ""},
		{owned{mode: 0o600, uid: 0, links: 1}, ""},
		{owned{mode: 0o600, uid: me, links: 0}, ""}, // a writer has just replaced it
		{owned{mode: 0o660, uid: me, links: 1}, ""}, // fsGroup
		{owned{mode: 0o600, uid: me + 1, links: 1}, permission},
		{owned{mode: 0o600, uid: 65534, links: 1}, permission}, // 65534 is the user nobody, which does not run this test
		{owned{mode: 0o600, uid: me, links: 2}, notRegular},
		{owned{mode: 0o602, uid: me, links: 1}, permission},
		{owned{mode: fs.ModeDevice | 0o600, uid: me, links: 1}, notRegular},
		{owned{mode: fs.ModeSymlink | 0o600, uid: me, links: 1}, notRegular},
	} {
		if err := distrust(test.info); Reason(err) != test.want {
			t.Errorf("%+v: %v, want %q", test.info, err, test.want)
		}
	}
}

// TestFilesOfOthers has two users in shared folders. It needs root.
func TestFilesOfOthers(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files to other users")
	}
	const me, foe, group = 12345, 12346, 12347
	base, err := os.MkdirTemp("/tmp", "optcache-owner-") // in a folder that other users can enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	binary := filepath.Join(base, "child")
	if b, err := os.ReadFile(os.Args[0]); err != nil || os.WriteFile(binary, b, 0o755) != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	// as runs a job, write or read, as a user, and returns the reason of its error.
	as := func(uid int, job, path string) string {
		cmd := child(job, path)
		cmd.Path = binary
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), Groups: []uint32{group}}}
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s as %d: %v", job, uid, err)
		}
		reason, _, _ := strings.Cut(string(out), " ")
		return reason
	}
	own := func(path string) int {
		info, err := os.Lstat(path)
		if err != nil {
			return -1
		}
		uid, _ := owner(info)
		return int(uid)
	}
	for name, folder := range map[string]struct {
		mode     os.FileMode
		uid, gid int
	}{
		"sticky":   {os.ModeSticky | 0o777, 0, 0},     // /tmp
		"emptyDir": {0o777, 0, 0},                     // of Kubernetes
		"fsGroup":  {os.ModeSetgid | 0o770, 0, group}, // emptyDir with a group
		"foe's":    {os.ModeSetgid | 0o770, foe, group},
	} {
		for _, user := range []int{0, me} {
			dir, err := os.MkdirTemp(base, "")
			if err := errors.Join(err, os.Chown(dir, folder.uid, folder.gid), os.Chmod(dir, folder.mode)); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "cache")
			check := func(what, got, want string) {
				t.Helper()
				if got != want {
					t.Errorf("%s, as %d: %s: %q, want %q", name, user, what, got, want)
				}
			}
			// A file of another user is not trusted. If the folder allows it, Write replaces the file.
			check("foe writes", as(foe, "write", path), "")
			check("read a foe's file", as(user, "read", path), permission)
			blocked := folder.mode&os.ModeSticky != 0 && user != 0
			if blocked {
				check("replace a foe's file", as(user, "write", path), permission)
				check("read it then", as(user, "read", path), permission)
				check("foe removes it", fmt.Sprint(os.Remove(path)), "<nil>")
			}
			// Another user has created files with names of temporary files, and can write to them later.
			for _, n := range []string{".tmp", ".tmp1"} {
				if err := errors.Join(os.WriteFile(path+n, nil, 0o600), os.Chown(path+n, foe, foe), os.Chmod(path+n, 0o666)); err != nil {
					t.Fatal(err)
				}
			}
			check("write", as(user, "write", path), "")
			check("read", as(user, "read", path), "")
			if uid := own(path); uid != user {
				t.Errorf("%s: the file belongs to %d, not to %d", name, uid, user)
			}
			if own(path+".tmp") != foe || own(path+".tmp1") != foe {
				t.Errorf("%s, as %d: another's files are gone", name, user)
			}
			// fsGroup gives all files to a group, whose members may write them.
			if err := errors.Join(os.Chown(path, user, group), os.Chmod(path, 0o660)); err != nil {
				t.Fatal(err)
			}
			check("read with fsGroup", as(user, "read", path), "")
			// A file of root is trusted by every user that may read it.
			if err := errors.Join(os.Chown(path, 0, 0), os.Chmod(path, 0o644)); err != nil {
				t.Fatal(err)
			}
			check("read root's", as(user, "read", path), "")
			// Read does not follow a link of another user, even to such a file. It follows a link of its own user.
			link := filepath.Join(dir, "link")
			if err := errors.Join(os.Symlink(path, link), os.Lchown(link, foe, foe)); err != nil {
				t.Fatal(err)
			}
			check("a foe's link", as(user, "read", link), permission)
			if err := os.Lchown(link, user, user); err != nil {
				t.Fatal(err)
			}
			check("a link", as(user, "read", link), "")
		}
	}
}

// TestExchangedBeforeRename puts another file at the temporary name just before the rename. A user who may write to
// the folder can do so.
func TestExchangedBeforeRename(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	_, err := Write(path, testHeader, func(func(*Record) bool) {
		names, err := filepath.Glob(path + ".tmp*")
		if err != nil || len(names) != 1 {
			t.Fatalf("%q, %v", names, err)
		}
		if err := errors.Join(os.Remove(names[0]), os.WriteFile(names[0], nil, 0o600), os.Chmod(names[0], 0o666)); err != nil {
			t.Fatal(err)
		}
	})
	if Reason(err) != permission || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
}
