package fastpath

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin/pkg/reuseport"

	"github.com/optcache/optcache/plugin/pkg/udp"
	"github.com/optcache/optcache/test/freeport"
)

// besideVar has the address on which a process of TestMain's opens a socket, until it is killed.
const besideVar = "OPTCACHE_TEST_BESIDE"

func TestMain(m *testing.M) {
	if addr := os.Getenv(besideVar); addr != "" {
		if _, err := reuseport.ListenPacket("udp", addr); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("open")
		time.Sleep(time.Minute) // Go ends a program that waits for nothing
	}
	if form := os.Getenv(formVar); form != "" {
		serveForm(form)
	}
	os.Exit(m.Run())
}

// beside starts another process with a socket on an address.
func beside(t *testing.T, addr string) (end func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), besideVar+"="+addr)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(end)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "open\n" {
		t.Fatalf("the other process: %q, %v", line, err)
	}
	return end
}

// replying answers everything, for a fast path that was asked for or not.
type replying struct{ asked bool }

func (r replying) NewAnswerer() Answerer { return r }
func (replying) Workers() int            { return 2 }
func (replying) Generation() int         { return 0 }
func (replying) Over() bool              { return false }
func (r replying) Asked() bool           { return r.asked }
func (replying) Sent()                   {}
func (replying) Answer(b Batch) {
	for i := range b.Len() {
		b.Reply(i, []byte("reply"))
	}
}

// A fast path that nobody has asked for yields to a process that stays, and comes back when that has gone. One that was asked for
// stays. A process that comes and goes, as in a rolling update, ends nothing.
func TestUnaskedFastPathYields(t *testing.T) {
	if err := udp.Supported(); err != nil {
		t.Skip(err)
	}
	for _, asked := range []bool{false, true} {
		t.Run(fmt.Sprintf("asked %v", asked), func(t *testing.T) {
			server, err := reuseport.ListenPacket("udp", freeport.Address(t, "127.0.0.1"))
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			addr := server.LocalAddr().String()
			l := &listener{addr: "dns://" + addr, counts: countersOf("dns://" + addr)}
			g := &generation{Service: replying{asked}, answerers: make([]Answerer, 1)}
			l.serves.Store(g)
			locked := func(f func()) {
				listeners.mu.Lock()
				defer listeners.mu.Unlock()
				f()
			}
			locked(func() {
				listeners.m[l.addr] = l
				if err := l.open(g); err != nil {
					t.Fatal(err)
				}
			})
			defer locked(func() {
				l.drain()
				l.close()
			})
			expect := func(when string, workers int64, why string) {
				t.Helper()
				if n, off := l.counts.workers.Load(), Off(l.addr); n != workers || off != why {
					t.Errorf("%s: %d workers, want %d; %q, want %q", when, n, workers, off, why)
				}
			}
			look := func(times int) {
				for range times {
					l.look()
				}
			}
			look(2 * yieldAfter)
			expect("alone", 2, "")

			end := beside(t, addr)
			look(yieldAfter - 1)
			expect("beside another process for a while", 2, "")
			end()
			look(1)
			end = beside(t, addr)
			look(yieldAfter - 1)
			expect("beside another one for a while", 2, "")
			look(1)
			if asked {
				expect("beside another process for long", 2, "")
				return
			}
			expect("beside another process for long", 0, offShared)
			locked(func() {
				if err := l.open(g); err != nil { // as a reload does
					t.Fatal(err)
				}
			})
			expect("after a reload", 0, offShared)
			look(yieldAfter)
			expect("later", 0, offShared)
			end()
			look(1)
			expect("alone again", 2, "")
			c, err := net.Dial("udp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			query := make([]byte, 12)
			query[5] = 1
			c.Write(query)
			if n, err := c.Read(make([]byte, 16)); err != nil || n != len("reply") {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
}
