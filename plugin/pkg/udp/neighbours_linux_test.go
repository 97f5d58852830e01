package udp

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"sync"
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

// dumped returns what dump does. It skips the test where the kernel has no dump.
func dumped(t *testing.T, fd int) (found []row, pieces int) {
	t.Helper()
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		t.Fatal(err)
	}
	found, pieces, err = dump(fd, domain)
	if errors.Is(err, errRefused) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return found, pieces
}

// comeAndGo has some UDP sockets opened and closed all the time, by listen.
func comeAndGo(t *testing.T, sockets int, listen func() (net.PacketConn, error)) (stop func()) {
	end := make(chan struct{})
	var others sync.WaitGroup
	for range 2 {
		others.Go(func() {
			for {
				conns := make([]net.PacketConn, sockets)
				for i := range conns {
					conns[i], _ = listen()
				}
				for _, c := range conns {
					if c != nil {
						c.Close()
					}
				}
				select {
				case <-end:
					return
				default:
				}
			}
		})
	}
	return func() {
		close(end)
		others.Wait()
	}
}

// What is on an address is told right while sockets on other ports come and go all the time. The kernel's table of all sockets skips
// rows then.
func TestNeighboursWhileOthersComeAndGo(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			first := foreign(t, freeport.Address(t, host), foreignMark)
			s, err := open(first.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			dumped(t, s.fd)
			defer comeAndGo(t, 50, func() (net.PacketConn, error) { return net.ListenPacket("udp", net.JoinHostPort(host, "0")) })()
			for range 1000 {
				if found, err := neighbours(s.fd); err != nil || len(found) != 2 {
					t.Fatalf("%d sockets, %v, want 2", len(found), err)
				}
			}
		})
	}
}

// Both lists of the kernel name the same sockets on an address, connected ones included, and none on another address. One has them
// in several pieces if they are many.
func TestListsOfSocketsAgree(t *testing.T) {
	for _, more := range []int{0, 100} {
		port := freeport.Port(t)
		here := foreign(t, fmt.Sprintf("127.0.0.1:%d", port), foreignMark)
		foreign(t, fmt.Sprintf("127.0.0.2:%d", port), foreignMark)
		for range more {
			foreign(t, here.LocalAddr().String(), foreignMark)
		}
		s, err := open(here.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		if err := s.leave(); err != nil { // it is connected now
			t.Fatal(err)
		}
		own, err := inodeOf(s.fd)
		if err != nil {
			t.Fatal(err)
		}
		found, pieces := dumped(t, s.fd)
		if len(found) != 3+more || (pieces > 1) != (more > 0) {
			t.Errorf("%d sockets on the port in %d pieces, want %d", len(found), pieces, 3+more)
		}
		text, err := os.ReadFile("/proc/self/net/udp")
		if err != nil {
			t.Fatal(err)
		}
		a, b := onAddress(found, own), onAddress(rows(string(text)), own)
		if len(a) != 2+more || !maps.Equal(a, b) {
			t.Errorf("%d and %d sockets on the address, want %d", len(a), len(b), 2+more)
		}
		all, err := neighbours(s.fd)
		if err != nil || !maps.Equal(a, all) {
			t.Errorf("%d sockets, %v", len(all), err)
		}
	}
}

// Where the kernel refuses a dump, its table is read.
func TestNeighboursByTheTable(t *testing.T) {
	first := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark)
	s, err := open(first.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	defer refused.Store(refused.Load())
	refused.Store(true)
	if found, err := neighbours(s.fd); err != nil || len(found) != 2 {
		t.Errorf("%d sockets, %v, want 2", len(found), err)
	}
}
