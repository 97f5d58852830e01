package optcache

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/chain"
)

// This file measures what the control interface and the counts of what comes most often cost a hit:
//
//	go test -run '^$' -bench BenchmarkTop -benchtime 1000x -count 5 .

// BenchmarkTop serves hits with all of it and without.
func BenchmarkTop(b *testing.B) {
	compareHits(b, benchOptions(10_000), benchOptions(10_000), func(h *Optcache) { h.store.countTop(prefixes{24, 56}) })
}

// BenchmarkUpstreamOptions serves hits with all options of docs/upstream.md and without, to clients that have no client subnet:
//
//	go test -run '^$' -bench BenchmarkUpstreamOptions -benchtime 1000x -count 3 .
func BenchmarkUpstreamOptions(b *testing.B) {
	without := benchOptions(10_000)
	without.prefetch = prefetchOptions{amount: 2, gap: time.Minute, percentage: 10}
	without.stale = staleOptions{upTo: time.Hour}
	with := without
	with.cut = cutOptions{on: true, probe: true}
	with.servfailMost = time.Minute
	with.upstream = upstreamOptions{perSecond: 900, burst: 10_000, wait: time.Second}
	with.withoutSOA = 5 * time.Second
	with.jitter = 10
	with.ttls = []admit.TTLs{bound(7200, 60, "example.org."), bound(60, 0, "example.net.", dns.TypeAAAA)}
	with.staleFor = []admit.Switch{switched(false, "example.net.")}
	with.prefetchFor = []admit.Switch{switched(false, "example.net.")}
	with.ecs = ecsOptions{ecsScoped, defaultSubnets}
	compareHits(b, with, without, func(*Optcache) {})
}

// compareHits serves hits to 1,000 names by an instance with options, which also set is called for, and by another one, in turn. The
// time is that of the thread on a core, so that what else the machine does costs less. The ratio is the median of the rounds'
// ratios.
func compareHits(b *testing.B, withOptions, withoutOptions options, set func(*Optcache)) {
	const names, hits = 1000, 4000
	var questions []*dns.Msg
	for i := range names {
		questions = append(questions, question(fmt.Sprintf("host-%d.example.org.", i)))
	}
	// side returns a function that serves hits, from an instance with or without it.
	side := func(b *testing.B, with, fastPath bool) func() {
		o := withoutOptions
		if with {
			o = withOptions
		}
		h := newStarted(b, o, addressUpstream)
		if with {
			set(h)
		}
		ctx, w := serverContext(b), newUDPWriter()
		var writers []*request.ScrubWriter
		for range 5 { // into the hot tier
			for _, r := range questions {
				h.ServeDNS(ctx, request.NewScrubWriter(r, w), r)
			}
		}
		h.Next = neverAsked(b)
		for _, r := range questions {
			writers = append(writers, request.NewScrubWriter(r, w))
		}
		if !fastPath {
			return func() {
				for i := range hits {
					h.ServeDNS(ctx, writers[i%names], questions[i%names])
				}
			}
		}
		f := newFast(b, h, "dns://127.0.0.1:53", chain.Effects{})
		var packets [][]byte
		for _, r := range questions {
			p, err := r.Pack()
			if err != nil {
				b.Fatal(err)
			}
			packets = append(packets, p)
		}
		from := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 7).To4(), Port: 40212}
		return func() {
			for i := range hits {
				f.ask(packets[i%names], from)
			}
		}
	}
	for _, path := range []string{"chain", "fastpath"} {
		b.Run(path, func(b *testing.B) {
			without, with := side(b, false, path == "fastpath"), side(b, true, path == "fastpath")
			clocked := func(serve func()) float64 {
				begun := threadTime(b)
				serve()
				return float64(threadTime(b)-begun) / hits
			}
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			var ratios, ns []float64
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				var one, other float64
				if i%2 == 0 {
					one, other = clocked(with), clocked(without)
				} else {
					other, one = clocked(without), clocked(with)
				}
				ratios, ns = append(ratios, one/other), append(ns, one)
			}
			slices.Sort(ratios)
			slices.Sort(ns)
			b.ReportMetric(ratios[len(ratios)/2], "of-without")
			b.ReportMetric(ns[len(ns)/2], "ns/hit")
			b.ReportMetric(0, "ns/op")
			if n := testing.AllocsPerRun(3, with) / hits; n >= 0.01 {
				b.Errorf("%v allocations a hit", n)
			}
		})
	}
}

// threadTime returns how long the thread has been on a core.
func threadTime(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

// BenchmarkSorted finds the 100 largest of a million answers.
func BenchmarkSorted(b *testing.B) {
	h := newStarted(b, benchOptions(flushed1M+flushed1M/4), addressUpstream)
	fillMillion(b, h, millionth)
	for _, sort := range []string{"bytes", "name"} {
		b.Run(sort, func(b *testing.B) {
			for b.Loop() {
				if page, err := (controlBlock{h}).List(control.Filter{Sort: sort, Limit: 100}); err != nil || len(page.Answers) != 100 {
					b.Fatal(len(page.Answers), err)
				}
			}
		})
	}
}
