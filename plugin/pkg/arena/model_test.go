package arena

import (
	"slices"
	"testing"
)

// This file is a model of the Allocator, for allocator_test.go.

// unspanned returns an allocator for a region in one piece.
func unspanned(granules int) *Allocator {
	return NewSpannedAllocator(granules, (granules/wordRun+1)*wordRun)
}

// model is a simple and slow allocator. It does each operation beside the
// allocator under test, and compares the results.
type model struct {
	t     testing.TB
	a     *Allocator
	taken []bool
	runs  map[int]int // length by start
	order []int       // starts, oldest first
}

func newModel(t testing.TB, granules int) *model {
	return &model{t: t, a: unspanned(granules), taken: make([]bool, granules), runs: map[int]int{}}
}

// place returns the lowest start of a free place for n granules, or -1.
func (m *model) place(n int) int {
	for start := 0; start+n <= len(m.taken); start++ {
		if n > 64 && start%64 != 0 || n <= 64 && start%64+n > 64 {
			continue
		}
		if !slices.Contains(m.taken[start:start+n], true) {
			return start
		}
	}
	return -1
}

func (m *model) fill(start, n int, taken bool) {
	for i := start; i < start+n; i++ {
		m.taken[i] = taken
	}
}

func (m *model) alloc(n int) {
	m.t.Helper()
	want := m.place(n)
	got, ok := m.a.Alloc(n)
	if ok != (want >= 0) || ok && got != want {
		m.t.Fatalf("Alloc(%d) = %d, %v; the lowest place is %d", n, got, ok, want)
	}
	if !ok {
		return
	}
	m.fill(got, n, true)
	m.runs[got] = n
	m.order = append(m.order, got)
}

// free gives back the i-th oldest run.
func (m *model) free(i int) {
	m.t.Helper()
	start := m.order[i]
	n := m.runs[start]
	m.a.Free(start, n)
	m.fill(start, n, false)
	delete(m.runs, start)
	m.order = slices.Delete(m.order, i, i+1)
}

// refuse checks that Free of a run that does not exist panics and changes nothing.
func (m *model) refuse(start, n int) {
	m.t.Helper()
	if length, ok := m.runs[start]; ok && length == n {
		return
	}
	used := m.a.Used()
	if !panics(func() { m.a.Free(start, n) }) {
		m.t.Fatalf("Free(%d, %d) freed something that is not a run", start, n)
	}
	if m.a.Used() != used {
		m.t.Fatalf("Used() = %d after a refused Free, was %d", m.a.Used(), used)
	}
}

func panics(f func()) (did bool) {
	defer func() { did = recover() != nil }()
	f()
	return false
}

// checkFirstIn compares FirstIn with a look at every granule.
func (m *model) checkFirstIn(from, to int) {
	m.t.Helper()
	want, wantOK := 0, false
	for i := max(from, 0); i < min(to, len(m.taken)) && !wantOK; i++ {
		if _, wantOK = m.runs[i]; wantOK {
			want = i
		}
	}
	if got, ok := m.a.FirstIn(from, to); got != want || ok != wantOK {
		m.t.Fatalf("FirstIn(%d, %d) = %d, %v; want %d, %v", from, to, got, ok, want, wantOK)
	}
}

// empty fences and empties the place that Emptiest finds, as a caller does. It checks that no place is emptier, and that a
// run fits there afterwards.
func (m *model) empty(n, hint int) {
	m.t.Helper()
	from, to, ok := m.a.Emptiest(n, hint)
	length := max(n, 64)
	least, cut := length+1, m.cut()
	for start := 0; n >= 1 && start+length <= len(m.taken); start += 64 {
		if taken := m.takenIn(start, start+length); !cut[start] && taken < least {
			least = taken
		}
	}
	if ok != (least <= length) || ok && (from < 0 || from%64 != 0 || to != from+length || cut[from] || m.takenIn(from, to) != least) {
		m.t.Fatalf("Emptiest(%d, %d) = %d, %d, %v; the least that is taken is %d", n, hint, from, to, ok, least)
	}
	if !ok {
		return
	}
	var starts []int
	for i := from; i < to; i++ {
		if length, begins := m.runs[i]; begins {
			starts = append(starts, i)
			if got := m.a.Length(i); got != length {
				m.t.Fatalf("Length(%d) = %d, want %d", i, got, length)
			}
		}
	}
	fences := m.a.Fence(from, to, nil)
	fenced := 0
	for _, at := range fences {
		fenced += m.a.Length(at)
	}
	if m.a.Used() != m.takenIn(0, len(m.taken))+fenced || fenced != length-least {
		m.t.Fatalf("Fence(%d, %d) takes %d granules, %d were free", from, to, fenced, length-least)
	}
	if at, ok := m.a.Alloc(1); ok {
		if at >= from && at < to {
			m.t.Fatalf("a run at %d, behind the fence from %d to %d", at, from, to)
		}
		m.a.Free(at, 1)
	}
	for _, at := range fences {
		m.a.Free(at, m.a.Length(at))
	}
	for _, start := range starts {
		m.free(slices.Index(m.order, start))
	}
	before := len(m.order)
	if m.alloc(n); len(m.order) == before {
		m.t.Fatalf("Emptiest(%d, %d) = %d, %d: emptied, and no run fits", n, hint, from, to)
	}
}

// cut returns the granules that are in a run and do not begin it.
func (m *model) cut() []bool {
	cut := slices.Clone(m.taken)
	for start := range m.runs {
		cut[start] = false
	}
	return cut
}

func (m *model) takenIn(from, to int) (n int) {
	for _, taken := range m.taken[from:to] {
		if taken {
			n++
		}
	}
	return n
}

// checkAll compares the whole state of model and allocator.
func (m *model) checkAll() {
	m.t.Helper()
	used := 0
	for i, taken := range m.taken {
		if taken {
			used++
		}
		if taken != isSet(m.a.used, i) {
			m.t.Fatalf("granule %d: used is %v, want %v", i, !taken, taken)
		}
		if _, begins := m.runs[i]; begins != isSet(m.a.starts, i) {
			m.t.Fatalf("granule %d: a run begins is %v, want %v", i, !begins, begins)
		}
	}
	if m.a.Used() != used || m.a.Cap() != len(m.taken) {
		m.t.Fatalf("Used, Cap = %d, %d; want %d, %d", m.a.Used(), m.a.Cap(), used, len(m.taken))
	}
	for w := range m.a.used {
		longest, run := 0, 0
		for i := w * 64; i < min(w*64+64, len(m.taken)); i++ {
			if run++; m.taken[i] {
				run = 0
			}
			longest = max(longest, run)
		}
		if got := m.a.gaps.levels[0][w/8] >> (w % 8 * 8) & 0xff; int(got) != longest {
			m.t.Fatalf("word %d: longest gap noted as %d, is %d", w, got, longest)
		}
	}
}
