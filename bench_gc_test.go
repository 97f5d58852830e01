package optcache

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

// million is the number of entries that the benchmarks of large caches fill in.
const million = 1_000_000

// BenchmarkCollector is the marking in a cycle of the garbage collector with a million answers
// cached, and what of it is due to them: the same without any answers, subtracted. The figures are
// CPU time of all cores, as the runtime accounts for it; ns/op is the wall time of a cycle. Of the
// cycles the lowest is taken, for the machine may have other guests.
func BenchmarkCollector(b *testing.B) {
	for _, of := range []struct {
		name string
		new  func(tb testing.TB, next plugin.Handler) plugin.Handler
	}{
		{"optcache", func(tb testing.TB, next plugin.Handler) plugin.Handler {
			return newStarted(tb, benchOptions(million), next)
		}},
		{"cache", func(tb testing.TB, next plugin.Handler) plugin.Handler { return newStock(tb, million, next) }},
	} {
		b.Run(of.name, func(b *testing.B) {
			defer debug.SetGCPercent(debug.SetGCPercent(-1)) // no cycle but ours
			upstream := new(countedUpstream)
			h := of.new(b, upstream)
			empty := math.Inf(1)
			for range 20 {
				empty = min(empty, markCycle())
			}
			debug.SetGCPercent(100)
			fill(b, h, upstream, million)
			debug.SetGCPercent(-1)
			runtime.GC() // the garbage of the filling
			full := math.Inf(1)
			for b.Loop() {
				full = min(full, markCycle())
			}
			b.ReportMetric(full, "mark-ms/GC")
			b.ReportMetric(full-empty, "more-than-empty-ms/GC")
			runtime.KeepAlive(h)
		})
	}
}

// markCycle runs a cycle of the garbage collector and returns the CPU time of its marking in ms.
func markCycle() float64 {
	before := markTime()
	runtime.GC()
	return (markTime() - before) * 1e3
}

// markTime is the CPU time, in seconds, of all marking up to the end of the last cycle.
func markTime() (seconds float64) {
	marking := []metrics.Sample{
		{Name: "/cpu/classes/gc/mark/assist:cpu-seconds"},
		{Name: "/cpu/classes/gc/mark/dedicated:cpu-seconds"},
		{Name: "/cpu/classes/gc/mark/idle:cpu-seconds"},
	}
	metrics.Read(marking)
	for _, s := range marking {
		seconds += s.Value.Float64()
	}
	return seconds
}

// newStock returns the built-in cache with room for that many positive answers, set up from a
// Corefile as the server would: it has no other way to a capacity.
func newStock(tb testing.TB, capacity int, next plugin.Handler) *cache.Cache {
	tb.Helper()
	c := caddy.NewTestController("dns", fmt.Sprintf("cache {\n success %d\n}", capacity))
	c.ServerBlockKeys = []string{"."}
	setup, err := caddy.DirectiveAction("dns", "cache")
	if err != nil {
		tb.Fatal(err)
	}
	if err := setup(c); err != nil {
		tb.Fatal(err)
	}
	plugins := dnsserver.GetConfig(c).Plugin
	h, ok := plugins[len(plugins)-1](next).(*cache.Cache)
	if !ok {
		tb.Fatal("the plugin of that name is another one")
	}
	return h
}

// fill has h keep the answers to n names, but for the few by which shards overflow.
func fill(tb testing.TB, h plugin.Handler, upstream *countedUpstream, n int) {
	tb.Helper()
	ctx := serverContext(tb)
	w := newUDPWriter()
	ask := func(i int) {
		r := question(millionName(i))
		h.ServeDNS(ctx, request.NewScrubWriter(r, w), r)
	}
	for i := range n {
		ask(i)
	}
	upstream.asked = 0
	const sample = 100
	for i := range n / sample {
		ask(i * sample)
	}
	if upstream.asked > n/sample/20 {
		tb.Fatalf("of %d answers %d are not cached", n/sample, upstream.asked)
	}
}

func millionName(i int) string { return fmt.Sprintf("host-%d.example.org.", i) }

// countedUpstream is addressUpstream with a counter. It is not safe for concurrent use.
type countedUpstream struct{ asked int }

func (u *countedUpstream) Name() string { return "counted" }

func (u *countedUpstream) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked++
	return addressUpstream(ctx, w, r)
}
