package chain

import (
	"testing"

	"github.com/miekg/dns"
)

type nothing struct{ dns.Writer }

// It changes nothing, and allocates nothing.
func TestRoomy(t *testing.T) {
	w := dns.Writer(&nothing{})
	if n := testing.AllocsPerRun(100, func() {
		if got := Roomy(w); got != w {
			t.Error("another writer")
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
	if makeRoom(true) != 0 {
		t.Error("the room is not empty")
	}
}

// deep calls itself with frames of about the size that the server and plugins have.
//
//go:noinline
func deep(n int, of [200]byte) byte {
	if n == 0 {
		return of[0]
	}
	of[n] = byte(n)
	return deep(n-1, of) + of[n]
}

// A goroutine for each request, in whose stack the frames of the server and of plugins are.
func BenchmarkRoomy(b *testing.B) {
	var w dns.Writer
	for name, decorate := range map[string]dns.DecorateWriter{"without": func(w dns.Writer) dns.Writer { return w }, "with": Roomy} {
		b.Run(name, func(b *testing.B) {
			done := make(chan struct{})
			for b.Loop() {
				go func() {
					decorate(w)
					deep(20, [200]byte{})
					done <- struct{}{}
				}()
				<-done
			}
		})
	}
}
