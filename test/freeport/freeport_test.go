package freeport

import (
	"context"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
)

// No two tests have the same port, and none that somebody listens on.
func TestPort(t *testing.T) {
	had := map[int]bool{}
	t.Run("many", func(t *testing.T) {
		for range 100 {
			port := Port(t)
			if had[port] {
				t.Fatalf("port %d twice", port)
			}
			had[port] = true
			if _, ok := lock(port); ok && runtime.GOOS == "linux" {
				t.Errorf("port %d can be locked twice", port)
			}
		}
	})
	locked := 0
	for port := range had {
		if _, is := taken.Load(port); is {
			t.Errorf("port %d is taken after the end", port)
		}
		if release, ok := lock(port); !ok {
			locked++
		} else {
			release()
		}
	}
	if locked > len(had)/10 { // other processes' tests may have got a few
		t.Errorf("%d of %d ports are locked after the end", locked, len(had))
	}
}

func TestPortInUse(t *testing.T) {
	c, err := net.ListenPacket("udp", Address(t, "127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if port := c.LocalAddr().(*net.UDPAddr).Port; unused(port) {
		t.Errorf("port %d is in use", port)
	}
}

// A port stays free while processes are started beside.
func TestPortWhileProcessesStart(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var beside sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer beside.Wait()
	defer cancel()
	for range 4 {
		beside.Go(func() {
			for ctx.Err() == nil {
				exec.CommandContext(ctx, self, "-test.run", "^$").Run()
			}
		})
	}
	for range 50 {
		l, err := net.Listen("tcp", Address(t, "127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}
