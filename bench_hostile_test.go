package optcache

import (
	"context"
	"fmt"
	"testing"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
)

// BenchmarkHostile is what messages cost that are made to cost the most (hostile_test.go), over
// TCP, from the handler's call to the packed reply; "plain" is an answer of as many records as
// "chain" has. A miss is beside the upstream.
func BenchmarkHostile(b *testing.B) {
	ctx := serverContext(b)
	const names = 1 << 16 // far more than the capacity: nearly all of them are misses
	for _, m := range hostileMessages() {
		for _, chain := range []struct {
			name string
			make func(*testing.B) plugin.Handler
		}{
			{"optcache", func(b *testing.B) plugin.Handler { return newStarted(b, hostileOptions(), m.upstream()) }},
			{"cache", func(b *testing.B) plugin.Handler { return stockCache(b, m.upstream(), "success 1024") }},
		} {
			b.Run(fmt.Sprintf("%s/miss/%s", m.name, chain.name), func(b *testing.B) {
				ask := m.asker(ctx, chain.make(b))
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					ask(i % names)
				}
			})
			b.Run(fmt.Sprintf("%s/hit/%s", m.name, chain.name), func(b *testing.B) {
				ask := m.asker(ctx, chain.make(b))
				for range 5 {
					ask(0)
				}
				b.ReportAllocs()
				for b.Loop() {
					ask(0)
				}
			})
		}
	}
}

// BenchmarkHostileNames asks for 100,000 names, over and over, in a cache with room for a million:
// names with one FNV-64 hash, and ordinary ones of the same length. hit-% is how many requests did
// not go to the next plugin.
func BenchmarkHostileNames(b *testing.B) {
	ctx := serverContext(b)
	for _, names := range []struct {
		name string
		of   func(int) string
	}{{"colliding", collidingName}, {"ordinary", ordinaryName}} {
		rs := make([]*dns.Msg, hostileNames)
		for i := range rs {
			rs[i] = asking(names.of(i), dns.TypeA)
		}
		for _, chain := range []struct {
			name string
			make func(*testing.B, plugin.Handler) plugin.Handler
		}{
			{"optcache", func(b *testing.B, next plugin.Handler) plugin.Handler {
				return newStarted(b, benchOptions(1_000_000), next)
			}},
			{"cache", func(b *testing.B, next plugin.Handler) plugin.Handler { return stockCache(b, next, "success 1000000") }},
		} {
			b.Run(fmt.Sprintf("%s/%s", names.name, chain.name), func(b *testing.B) {
				up := &counting{Handler: addressUpstream}
				h := chain.make(b, up)
				w := newUDPWriter()
				for _, r := range rs {
					h.ServeDNS(ctx, w, r)
				}
				up.asked = 0
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; b.Loop(); i++ {
					h.ServeDNS(ctx, w, rs[i%len(rs)])
				}
				b.ReportMetric(100*(1-float64(up.asked)/float64(b.N)), "hit-%")
			})
		}
	}
}

// counting is a handler that counts what it is asked. It is for one goroutine.
type counting struct {
	plugin.Handler
	asked int
}

func (c *counting) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	c.asked++
	return c.Handler.ServeDNS(ctx, w, r)
}
