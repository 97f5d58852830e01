package udp

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/optcache/optcache/test/freeport"
)

// A reader that has entered the kernel while the socket was in blocking mode does not keep Close waiting.
func TestLimitedReaderComesBack(t *testing.T) {
	c, err := listen(freeport.Address(t, "127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := LimitWaits(); err != nil {
		t.Skip(err)
	}
	if err := raw.Control(func(fd uintptr) { err = unix.SetNonblock(int(fd), false) }); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, _, err := c.ReadFrom(make([]byte, 512))
		read <- err
	}()
	time.Sleep(waitLimit / 2) // without this, the reader may not be in the kernel yet, and the test shows nothing
	closed := make(chan error, 1)
	go func() { closed <- c.Close() }()
	select {
	case <-closed:
		if err := <-read; err == nil {
			t.Error("the reader has read something")
		}
	case <-time.After(20 * time.Second):
		(&net.Dialer{}).Dial("udp", c.LocalAddr().String())
		t.Fatal("Close waits for the reader")
	}
}

// otherAddress is the environment variable that makes TestOther a process that has a socket on an address.
const otherAddress = "OPTCACHE_OTHER_ADDRESS"

func TestOther(t *testing.T) {
	addr := os.Getenv(otherAddress)
	if addr == "" {
		return // it is part of TestOvertaken
	}
	c, err := listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Println("listening")
	io.Copy(io.Discard, os.Stdin)
}

// A group whose numbers are wrong leaves the kernel's choice to a process that has come later, and so knows the numbers. When
// that one goes, it does not.
func TestOvertaken(t *testing.T) {
	first := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark)
	g := group(t, first.LocalAddr().String(), 1)
	defer g.Close()
	other := exec.Command(os.Args[0], "-test.run", "^TestOther$")
	other.Env = append(os.Environ(), otherAddress+"="+first.LocalAddr().String())
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "listening\n" {
		t.Fatal(line, err)
	}
	want := func(s Standing, when string) {
		t.Helper()
		if got := g.Standing(); got != s {
			t.Errorf("%s: %v, want %v", when, got, s)
		}
	}
	want(Followed, "another process has come")
	first.Close()
	want(Overtaken, "a socket from before has closed")
	stdin.Close()
	other.Wait()
	want(Shifted, "the other process has gone")
}
