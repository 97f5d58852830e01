package chain

import (
	"context"
	"testing"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/test"

	"github.com/miekg/dns"
)

// It changes nothing, and allocates nothing.
func TestRoomy(t *testing.T) {
	m, w := new(dns.Msg), &test.ResponseWriter{}
	called := 0
	h := Roomy(plugin.HandlerFunc(func(_ context.Context, gotW dns.ResponseWriter, gotM *dns.Msg) (int, error) {
		if called++; gotW != w || gotM != m {
			t.Error("another request")
		}
		return dns.RcodeRefused, nil
	}))
	if n := testing.AllocsPerRun(100, func() {
		if rcode, err := h.ServeDNS(context.Background(), w, m); rcode != dns.RcodeRefused || err != nil {
			t.Errorf("%d, %v", rcode, err)
		}
	}); n > 0 || called != 101 {
		t.Errorf("%v allocations, %d calls", n, called)
	}
	if makeRoom(true) != 0 {
		t.Error("the room is not empty")
	}
}

// deep calls itself with frames of about the size that plugins have.
//
//go:noinline
func deep(n int, of [200]byte) byte {
	if n == 0 {
		return of[0]
	}
	of[n] = byte(n)
	return deep(n-1, of) + of[n]
}

// A goroutine for each request, in whose stack the plugins' frames are.
func BenchmarkRoomy(b *testing.B) {
	var h plugin.Handler = plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
		return int(deep(14, [200]byte{})), nil
	})
	for name, h := range map[string]plugin.Handler{"without": h, "with": Roomy(h)} {
		b.Run(name, func(b *testing.B) {
			done := make(chan struct{})
			for b.Loop() {
				go func() {
					h.ServeDNS(context.Background(), nil, nil)
					done <- struct{}{}
				}()
				<-done
			}
		})
	}
}
