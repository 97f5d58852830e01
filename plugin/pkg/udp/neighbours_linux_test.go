package udp

import (
	"bufio"
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

// What is on an address is told right while sockets on other ports come and go all the time. The kernel's table of all sockets skips
// rows then.
func TestNeighboursWhileOthersComeAndGo(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			first := foreign(t, freeport.Address(t, host), foreignMark)
			defer first.Close()
			s, err := open(first.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
			if err != nil {
				t.Fatal(err)
			}
			if dump(s.fd, domain) == nil {
				t.Skip("the kernel tells of sockets in its table only")
			}
			stop := make(chan struct{})
			var others sync.WaitGroup
			defer others.Wait()
			defer close(stop)
			for range 2 {
				others.Go(func() {
					for {
						var open [50]net.PacketConn
						for i := range open {
							open[i], _ = net.ListenPacket("udp", net.JoinHostPort(host, "0"))
						}
						for _, c := range open {
							if c != nil {
								c.Close()
							}
						}
						select {
						case <-stop:
							return
						default:
						}
					}
				})
			}
			for range 1000 {
				if found, err := neighbours(s.fd); err != nil || len(found) != 2 {
					t.Fatalf("%d sockets, %v, want 2", len(found), err)
				}
			}
		})
	}
}

// Both lists of the kernel name the same sockets on an address, connected ones included, and none on another address.
func TestListsOfSocketsAgree(t *testing.T) {
	port := freeport.Port(t)
	here := foreign(t, fmt.Sprintf("127.0.0.1:%d", port), foreignMark)
	there := foreign(t, fmt.Sprintf("127.0.0.2:%d", port), foreignMark)
	defer there.Close()
	defer here.Close()
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
	list := dump(s.fd, unix.AF_INET)
	if list == nil {
		t.Skip("the kernel tells of sockets in its table only")
	}
	if len(list) != 3 {
		t.Errorf("%d sockets on the port, want 3", len(list))
	}
	text, err := os.ReadFile("/proc/self/net/udp")
	if err != nil {
		t.Fatal(err)
	}
	a, b := onAddress(list, own), onAddress(rows(string(text)), own)
	if len(a) != 2 || !maps.Equal(a, b) {
		t.Errorf("%v and %v", a, b)
	}
}
