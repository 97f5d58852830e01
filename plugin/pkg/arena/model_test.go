package arena

import (
	"slices"
	"testing"
)

// model is the allocator as one would write it without caring for speed, next
// to the one under test.
type model struct {
	t     testing.TB
	a     *Allocator
	taken []bool
	runs  map[int]int // length by start
	order []int       // starts, oldest first
}

func newModel(t testing.TB, granules int) *model {
	return &model{t: t, a: NewAllocator(granules), taken: make([]bool, granules), runs: map[int]int{}}
}

// place is the lowest start at which n granules may go, or -1.
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

// refuse checks that freeing what is not a run panics and leaves all as it was.
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

// evictWindow empties a window the way a caller does, and checks that every
// overlapping run was found and that a run then fits.
func (m *model) evictWindow(n, hint int) {
	m.t.Helper()
	from, to := m.a.Window(n, hint)
	if n < 1 || n > len(m.taken) {
		if from != 0 || to != 0 {
			m.t.Fatalf("Window(%d, %d) = %d, %d in %d granules; want 0, 0", n, hint, from, to, len(m.taken))
		}
		return
	}
	if from < 0 || to > len(m.taken) || to-from < n {
		m.t.Fatalf("Window(%d, %d) = %d, %d in %d granules", n, hint, from, to, len(m.taken))
	}
	for start, ok := m.a.FirstIn(from, to); ok; start, ok = m.a.FirstIn(from, to) {
		m.free(slices.Index(m.order, start))
	}
	if i := slices.Index(m.taken[from:to], true); i >= 0 {
		m.t.Fatalf("Window(%d, %d) = %d, %d: granule %d belongs to a run that begins before it", n, hint, from, to, from+i)
	}
	before := len(m.order)
	if m.alloc(n); len(m.order) == before {
		m.t.Fatalf("Window(%d, %d) = %d, %d: emptied, and no run fits", n, hint, from, to)
	}
}

// checkAll compares the whole state.
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
