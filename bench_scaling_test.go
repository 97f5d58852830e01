package optcache

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

const (
	// scalingLimit is the most that a hit on two cores may take of the time on one; 0.5 is twice
	// the work. What is above is for the clock that both cores read and the barrier.
	scalingLimit = 0.52

	// scalingRound is how many hits a goroutine makes in a round. That takes a few milliseconds,
	// about as long as the system lets a thread run when others want the core, too.
	scalingRound = 16 << 10

	// scalingPatience is for how long more rounds are made, on a machine with other guests, before
	// the ratio counts as too high.
	scalingPatience = 15 * time.Second

	// controlLimit is the ratio that work must reach that shares nothing. Where it does not, the
	// machine has not let two cores run at once, and nothing can be said.
	controlLimit = 0.505
)

// BenchmarkScaling fails when two cores make hits at less than twice the pace of one: when a hit
// writes, or takes a lock on, what another core needs. Rounds on one core, two, and so on up to
// what the machine has take turns, and of each number of cores the fastest round counts, so that
// other guests of the machine do no harm as long as they let all cores go now and then. Where
// even work that shares nothing does not get twice as fast, the benchmark is skipped. The metrics
// are ns per hit by cores, and the ratio of each to that of one core; control is the ratio of the
// work that shares nothing on two.
func BenchmarkScaling(b *testing.B) {
	const names = 100_000
	b.Run("one-name", func(b *testing.B) {
		h := newStarted(b, benchOptions(10000), addressUpstream)
		scale(b, h, []*dns.Msg{question("www.example.org.")})
	})
	b.Run("zipf", func(b *testing.B) {
		h := newStarted(b, benchOptions(2*names), addressUpstream)
		scale(b, h, zipfQuestions(names, 1<<15))
	})
}

func scale(b *testing.B, h *Optcache, qs []*dns.Msg) {
	var cores []int
	for n := 1; n <= min(runtime.NumCPU(), 16); n *= 2 {
		cores = append(cores, n)
	}
	if len(cores) < 2 {
		b.Skip("needs two cores")
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	hits := make([]func(int), cores[len(cores)-1])
	for i := range hits {
		w := newScalingWorker(serverContext(b), h, qs, i*len(qs)/len(hits))
		for range 5 { // so that all counters are saturated
			w.hits(len(qs))
		}
		hits[i] = w.hits
	}
	h.Next = neverAsked(b)

	fastest, control := make([]float64, len(cores)), [2]float64{math.Inf(1), math.Inf(1)}
	for i := range fastest {
		fastest[i] = math.Inf(1)
	}
	round := func() {
		for i, n := range cores {
			runtime.GOMAXPROCS(n)
			fastest[i] = min(fastest[i], roundTogether(hits[:n]))
			if i < len(control) {
				control[i] = min(control[i], roundTogether([]func(int){shareNothing, shareNothing}[:n]))
			}
		}
	}
	for b.Loop() {
		round()
	}
	for start := time.Now(); fastest[1] > scalingLimit*fastest[0] && time.Since(start) < scalingPatience; {
		round()
	}
	ratio, possible := fastest[1]/fastest[0], control[1]/control[0]
	if ratio > scalingLimit && possible > controlLimit {
		b.Skipf("no two cores to be had: the ratio is %.3f, and %.3f for work that shares nothing", ratio, possible)
	}
	if ratio > scalingLimit {
		b.Fatalf("a hit on two cores takes %.3f of the time on one (%.1f and %.1f ns), more than %v; work that shares nothing %.3f",
			ratio, fastest[1], fastest[0], scalingLimit, possible)
	}
	b.ReportMetric(0, "ns/op") // of a round on all of them: says nothing
	for i, n := range cores {
		b.ReportMetric(fastest[i], fmt.Sprintf("ns/hit-%d", n))
		if n > 1 {
			b.ReportMetric(fastest[i]/fastest[0], fmt.Sprintf("ratio-%d", n))
		}
	}
	b.ReportMetric(possible, "control")
}

// shareNothing is work of about as long as n hits, in registers.
func shareNothing(n int) {
	x := uint64(n)
	for range n * 50 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	if x == 0 { // never: the state of a xorshift generator
		panic("x is 0")
	}
}

// scalingWorker makes hits with messages of its own, as every request has.
type scalingWorker struct {
	ctx context.Context
	h   plugin.Handler
	qs  []*dns.Msg
	sw  []*request.ScrubWriter
	at  int
}

func newScalingWorker(ctx context.Context, h plugin.Handler, qs []*dns.Msg, at int) *scalingWorker {
	s := &scalingWorker{ctx: ctx, h: h, at: at}
	w := newUDPWriter()
	for _, r := range qs {
		r = r.Copy()
		s.qs = append(s.qs, r)
		s.sw = append(s.sw, request.NewScrubWriter(r, w))
	}
	return s
}

func (s *scalingWorker) hits(n int) {
	at := s.at
	for range n {
		if at++; at >= len(s.qs) {
			at = 0
		}
		s.h.ServeDNS(s.ctx, s.sw[at], s.qs[at])
	}
	s.at = at
}

// roundTogether runs a round of all workers, each on a core, and returns the time per hit in ns:
// from when all were ready until the last one was done.
func roundTogether(workers []func(hits int)) float64 {
	var ready atomic.Int32
	var start time.Time
	var end sync.WaitGroup
	for _, work := range workers {
		end.Go(func() {
			// Whoever comes last gives the sign. The others wait without giving their core
			// away: they run on one each by then.
			if ready.Add(1) == int32(len(workers)) {
				start = time.Now()
				ready.Add(1)
			}
			for ready.Load() <= int32(len(workers)) {
			}
			work(scalingRound)
		})
	}
	end.Wait()
	return float64(time.Since(start)) / float64(len(workers)*scalingRound)
}
