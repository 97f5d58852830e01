package control

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/coredns/coredns/plugin/pkg/reuseport"

	"github.com/optcache/optcache/test/freeport"
)

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	path, _ := o.socket()
	if err := Listen(o, t, blocksOf(&fakeBlock{})); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	mustGet(t, clientOf(t, Addrs(t)[0]), "http://whatever/v1/status", 200)
	Release(t)
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is there at the end")
	}
}

// The mode is there from the first moment on, whatever the umask.
func TestUnixSocketIsNeverOpen(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere there is a moment")
	}
	path := filepath.Join(socketDir(t), "c.sock")
	l, err := (&net.ListenConfig{Control: privateSocket}).Listen(context.Background(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

// A directory that is missing is made for the server alone. It is an error if the one above is missing, too.
func TestDirectoryOfTheSocketIsMade(t *testing.T) {
	t.Parallel()
	dir := socketDir(t)
	o := Options{Address: unixScheme + filepath.Join(dir, "run", "c.sock")}
	listening(t, o, t, &fakeBlock{})
	mustGet(t, clientOf(t, Addrs(t)[0]), "http://x/v1/status", 200)
	if info, err := os.Stat(filepath.Join(dir, "run")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if _, err := listenUnix(filepath.Join(dir, "no", "such", "c.sock")); err == nil || !strings.Contains(err.Error(), "the socket's directory") {
		t.Errorf("two directories are missing: %v", err)
	}
}

// leaveStale leaves a socket that nobody listens on.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
}

func TestStaleSocketIsTakenOver(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	path, _ := o.socket()
	leaveStale(t, path)
	listening(t, o, t, &fakeBlock{})
	mustGet(t, clientOf(t, Addrs(t)[0]), "http://x/v1/status", 200)
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

func TestLivingSocketIsAnError(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	path, _ := o.socket()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := Listen(o, t, blocksOf()); err == nil || !strings.Contains(err.Error(), "address in use") || !strings.Contains(err.Error(), path) {
		t.Fatal(err)
	}
	go func() {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
		}
	}()
	for range 2 { // the question of before, and this one
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// A file that another has put in the socket's place is not removed.
func TestOnlyTheOwnSocketIsRemoved(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	path, _ := o.socket()
	if err := Listen(o, t, blocksOf()); err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	writeFile(t, path, "another's", 0o600)
	Release(t)
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// Another's port is an error, also if the other one would share it.
func TestAddressInUse(t *testing.T) {
	t.Parallel()
	for _, open := range []func(network, address string) (net.Listener, error){net.Listen, reuseport.Listen} {
		l, err := open("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		err = Listen(Options{Address: l.Addr().String()}, t, blocksOf())
		if err == nil || err.Error() != fmt.Sprintf("%q: address in use", l.Addr()) {
			t.Error(err)
		}
	}
}

// A reload may spell its address in another way, though the generation of before still listens.
func TestAddressInAnotherSpelling(t *testing.T) {
	t.Parallel()
	one, two := "one "+t.Name(), "two "+t.Name()
	listening(t, Options{Address: freeport.Address(t, "127.0.0.1")}, one, &fakeBlock{})
	_, port, _ := net.SplitHostPort(Addrs(one)[0].String())
	listening(t, Options{Address: "localhost:" + port}, two, &fakeBlock{})
	Release(one)
	mustGet(t, clientOf(t, Addrs(two)[0]), "http://localhost/v1/status", 200)
}

// What changes something is logged with who asked for it.
func TestLogSaysWhoAsked(t *testing.T) {
	o := atSocket(t)
	listening(t, o, t, &fakeBlock{answers: answersOf(3), status: Status{Snapshot: &SnapshotStatus{}}})
	c := clientOf(t, Addrs(t)[0])
	post := func(path, body string) string {
		return logged(t, func() {
			r, err := c.Post("http://x"+path, "application/json", strings.NewReader(body))
			if err != nil || r.StatusCode != http.StatusOK {
				t.Fatalf("%v %v", r, err)
			}
			r.Body.Close()
		})
	}
	who := "unix socket"
	if runtime.GOOS == "linux" {
		who = fmt.Sprintf("uid %d pid %d", os.Getuid(), os.Getpid())
	}
	got := post("/v1/flush", `{"name":"example.org","subtree":true,"type":"A","kinds":["denial"],"stale":true,"blocks":[0]}`)
	if want := `control: flush name="example.org." subtree type=A kinds=denial stale blocks=[0], by ` + who + ": 3 answers"; !strings.Contains(got, want) {
		t.Errorf("%q is not in %q", want, got)
	}
	if got := post("/v1/flush", `{"all":true}`); !strings.Contains(got, "control: flush all, by "+who+": 3 answers") {
		t.Errorf("%q", got)
	}
	if got := post("/v1/snapshot", `{}`); !strings.Contains(got, "control: snapshot, by "+who+": blocks [0] are written") {
		t.Errorf("%q", got)
	}
	if got := logged(t, func() { mustGet(t, c, "http://x/v1/list", 200) }); got != "" {
		t.Errorf("a question is logged: %q", got)
	}
}
