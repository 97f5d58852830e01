package arena

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

// These tests drive an Allocator beside the model in model_test.go, and test the placement rule.

// lengthOf returns a random run length, mostly one that a cache would ask for,
// and sometimes one near which the placement rule changes.
func lengthOf(r *rand.Rand) int {
	switch r.IntN(20) {
	case 0:
		return 60 + r.IntN(10)
	case 1:
		return 1 + r.IntN(64)
	case 2:
		return 65 + r.IntN(300)
	default:
		return 1 + r.IntN(6)
	}
}

func TestAllocatorAgreesWithModel(t *testing.T) {
	t.Parallel()
	for _, granules := range []int{0, 1, 7, 63, 64, 65, 100, 128, 512, 700, 1500} {
		t.Run(fmt.Sprint(granules), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, uint64(granules)))
			m := newModel(t, granules)
			for i := range 3000 {
				// Fill and drain in turns, so that the region is both almost full and almost empty.
				filling := i/300%2 == 0
				switch op := r.IntN(100); {
				case op < 2:
					m.empty(lengthOf(r), r.IntN(granules+1))
				case op < 10:
					from := r.IntN(granules+2) - 1
					m.checkFirstIn(from, from+r.IntN(200)-1)
				case op < 15 && granules > 0:
					m.refuse(r.IntN(granules), lengthOf(r))
				case filling == (op < 75) || len(m.order) == 0:
					m.alloc(lengthOf(r))
				default:
					m.free(r.IntN(len(m.order)))
				}
				if i%50 == 0 {
					m.checkAll()
				}
			}
			m.checkAll()
			for len(m.order) > 0 {
				m.free(len(m.order) - 1)
			}
			m.checkAll()
		})
	}
}

func TestRunsFollowThePlacementRule(t *testing.T) {
	t.Parallel()
	a := unspanned(1 << 12)
	r := rand.New(rand.NewPCG(2, 3))
	for {
		n := lengthOf(r)
		start, ok := a.Alloc(n)
		if !ok {
			break
		}
		if n <= 64 && start/64 != (start+n-1)/64 {
			t.Errorf("run of %d at %d straddles a word", n, start)
		}
		if n > 64 && start%64 != 0 {
			t.Errorf("run of %d at %d does not begin a word", n, start)
		}
	}
}

func TestLongRunSharesItsLastWord(t *testing.T) {
	t.Parallel()
	a := unspanned(192)
	for _, step := range []struct {
		n, want int
		ok      bool
	}{
		{64, 0, true},
		{70, 64, true}, // 64..133
		{65, 0, false},
		{58, 134, true}, // the rest of its last word
		{1, 0, false},
	} {
		if got, ok := a.Alloc(step.n); got != step.want || ok != step.ok {
			t.Fatalf("Alloc(%d) = %d, %v; want %d, %v", step.n, got, ok, step.want, step.ok)
		}
	}
	if a.Used() != a.Cap() {
		t.Errorf("Used() = %d of %d", a.Used(), a.Cap())
	}
}

func TestFreePanicsOnWhatIsNoRun(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		start, n int
	}{
		{"never allocated", 30, 2},
		{"inside a run", 1, 3},
		{"too short", 0, 3},
		{"too long, into the next run", 0, 5},
		{"too long, into free granules", 4, 5},
		{"long run too short", 64, 64},
		{"long run too long", 64, 71},
		{"no granules", 0, 0},
		{"negative length", 0, -4},
		{"before the region", -1, 1},
		{"at the end of the region", 190, 1},
		{"past the region", 180, 11},
		{"overflowing length", 0, math.MaxInt},
		{"freed already", 8, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := newModel(t, 190)
			m.alloc(4)  // 0..3
			m.alloc(4)  // 4..7
			m.alloc(4)  // 8..11
			m.alloc(70) // 64..133
			m.free(2)
			m.refuse(tc.start, tc.n)
			m.checkAll()
		})
	}
}

func TestAllocPanicsOnNoGranules(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, -1, math.MinInt} {
		if !panics(func() { unspanned(64).Alloc(n) }) {
			t.Errorf("Alloc(%d) did not panic", n)
		}
	}
	if !panics(func() { unspanned(-1) }) {
		t.Error("unspanned(-1) did not panic")
	}
}

func TestAllocRefusesMoreThanTheRegion(t *testing.T) {
	t.Parallel()
	for _, granules := range []int{0, 10, 64, 100} {
		for _, n := range []int{granules + 1, granules + 64, math.MaxInt} {
			if start, ok := unspanned(granules).Alloc(n); ok {
				t.Errorf("Alloc(%d) in %d granules = %d, true", n, granules, start)
			}
		}
	}
}

func TestLongestRunAndRunsOf(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(4, 5))
	words := []uint64{0, 1, 1 << 63, ^uint64(0), ^uint64(1), ^uint64(0) >> 1, 0x5555555555555555}
	for range 1000 {
		x := r.Uint64()
		words = append(words, x, x|r.Uint64(), x|r.Uint64()|r.Uint64(), ^uint64(0)>>r.IntN(64)<<r.IntN(64))
	}
	for _, x := range words {
		longest, at := 0, [64]int{} // at: length of the run of set bits from each bit on
		for i, run := 63, 0; i >= 0; i-- {
			if run++; x>>i&1 == 0 {
				run = 0
			}
			at[i], longest = run, max(longest, run)
		}
		if got := longestRun(x); got != longest {
			t.Fatalf("longestRun(%064b) = %d, want %d", x, got, longest)
		}
		for n := 1; n <= 64; n++ {
			want := uint64(0)
			for i, run := range at {
				if run >= n {
					want |= 1 << i
				}
			}
			if got := runsOf(x, n); got != want {
				t.Fatalf("runsOf(%064b, %d) = %064b, want %064b", x, n, got, want)
			}
		}
	}
}

func TestGapTreeNext(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(6, 7))
	for _, words := range []int{0, 1, 8, 9, 64, 65, 600} {
		tree, gaps := newGapTree(words), make([]int, words)
		for range 2000 {
			if words > 0 {
				w, gap := r.IntN(words), r.IntN(65)>>r.IntN(7)
				gaps[w] = gap
				tree.set(w, gap)
			}
			from, n := r.IntN(words+2), 1+r.IntN(64)
			want := -1
			for w := from; w < words && want < 0; w++ {
				if gaps[w] >= n {
					want = w
				}
			}
			if got := tree.next(from, n); got != want {
				t.Fatalf("%d words: next(%d, %d) = %d, want %d", words, from, n, got, want)
			}
		}
	}
}

func TestAllocatorMakesNoGarbage(t *testing.T) {
	a := unspanned(4096)
	if got := testing.AllocsPerRun(100, func() {
		short, _ := a.Alloc(3)
		long, _ := a.Alloc(200)
		from, to, _ := a.Emptiest(100, 17)
		a.FirstIn(from, to)
		a.Free(short, 3)
		a.Free(long, 200)
	}); got != 0 {
		t.Errorf("%v allocations per round, want 0", got)
	}
}

func TestAllocatorBytes(t *testing.T) {
	t.Parallel()
	const granules = 1 << 16
	words := float64(granules / 64)
	if got := float64(unspanned(granules).Bytes()); got < 17*words || got > 17.5*words {
		t.Errorf("Bytes() = %v for %v words", got, words)
	}
}

// FuzzAllocator drives an allocator and the model with the same operations. The
// first byte chooses the size of the region. Each further three bytes are an
// operation, a length and a position.
func FuzzAllocator(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 {
			return
		}
		granules := int(data[0]) * 3
		m := newModel(t, granules)
		for ops := data[1:]; len(ops) >= 3; ops = ops[3:] {
			op, n, at := ops[0], int(ops[1]), int(ops[2])*3
			if op >= 128 {
				n = n%8 + 1
			}
			switch op % 8 {
			case 0, 1, 2:
				m.alloc(max(n, 1))
			case 3, 4:
				if len(m.order) > 0 {
					m.free(at % len(m.order))
				}
			case 5:
				m.empty(n, at)
			case 6:
				m.checkFirstIn(at-1, at+n)
			case 7:
				m.refuse(at-1, n)
			}
		}
		m.checkAll()
	})
}

// BenchmarkAllocFree frees one random run and allocates another one, in a region
// of 65,536 granules with runs of 2 to 5. At 90 % the new run is the shortest one
// whenever more is used. "full" frees random runs until the new one fits, as a
// cache at its limit does.
func BenchmarkAllocFree(b *testing.B) {
	type run struct{ start, n int }
	const granules = 1 << 16
	fill := func(r *rand.Rand, upTo int) (*Allocator, []run) {
		a := unspanned(granules)
		var live []run
		for a.Used() < upTo {
			n := 2 + r.IntN(4)
			start, ok := a.Alloc(n)
			if !ok {
				break
			}
			live = append(live, run{start, n})
		}
		return a, live
	}
	// swapOut frees one random run and returns its place in live.
	swapOut := func(a *Allocator, r *rand.Rand, live []run) int {
		i := r.IntN(len(live))
		a.Free(live[i].start, live[i].n)
		return i
	}

	b.Run("used=90%", func(b *testing.B) {
		r := rand.New(rand.NewPCG(8, 9))
		a, live := fill(r, granules*9/10)
		b.ReportAllocs()
		for b.Loop() {
			i := swapOut(a, r, live)
			n := 2 + r.IntN(4)
			if a.Used() > granules*9/10 {
				n = 2
			}
			start, ok := a.Alloc(n)
			if !ok {
				b.Fatalf("no place for %d with %d used", n, a.Used())
			}
			live[i] = run{start, n}
		}
	})
	b.Run("full", func(b *testing.B) {
		r := rand.New(rand.NewPCG(8, 9))
		a, live := fill(r, granules)
		evicted := 0
		b.ReportAllocs()
		for b.Loop() {
			n := 2 + r.IntN(4)
			start, ok := a.Alloc(n)
			for !ok {
				i := swapOut(a, r, live)
				live[i] = live[len(live)-1]
				live = live[:len(live)-1]
				evicted++
				start, ok = a.Alloc(n)
			}
			live = append(live, run{start, n})
		}
		b.ReportMetric(float64(evicted)/float64(b.N), "evictions/op")
		b.ReportMetric(100*float64(a.Used())/granules, "%used")
	})
}
