package topk

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// The bounds of the paper hold for streams of any kind: each count is between what it says, each key above the bound is there,
// and no error is above the total divided by the places.
func TestBoundsHold(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(r, 1.1, 1, 5000)
	n := 0
	for name, next := range map[string]func() uint64{
		"zipf":  zipf.Uint64,
		"even":  func() uint64 { return r.Uint64N(500) },
		"once":  func() uint64 { n++; return uint64(n) },
		"turns": func() uint64 { n++; return uint64(n % 129) }, // one more than there are places, in turn: the worst case
	} {
		const places = 128
		s := New(places)
		truth := make(map[string]uint64)
		total := uint64(0)
		for range 20_000 {
			key, by := fmt.Sprint(next()), 1+r.Uint64N(3)
			s.Add([]byte(key), by)
			truth[key] += by
			total += by
		}
		there := make(map[string]bool)
		for _, p := range s.heap {
			there[string(p.key)] = true
			if have := truth[string(p.key)]; have > p.count || have < p.count-p.error || p.error > total/places {
				t.Errorf("%s: %q: %d, with an error of %d, is %d in truth", name, p.key, p.count, p.error, have)
			}
		}
		for key, have := range truth {
			if have > s.floor() && !there[key] {
				t.Errorf("%s: %q, which came %d times, is missing; the bound is %d", name, key, have, s.floor())
			}
		}
		if len(s.heap) > places || len(s.at) != len(s.heap) || s.total != total {
			t.Errorf("%s: %d places, %d hashes, total %d of %d", name, len(s.heap), len(s.at), s.total, total)
		}
		for i := range s.heap {
			if s.at[s.heap[i].hash] != i || i > 0 && s.heap[(i-1)/2].count > s.heap[i].count {
				t.Fatalf("%s: the heap is out of order at %d", name, i)
			}
		}
	}
}

func TestCountsAreExactWhereThereAreFewKeys(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := NewWindow(time.Minute, 10, start)
	for i := range 10 {
		for range i + 1 {
			w.Add(fmt.Appendf(nil, "k%d", i), 1, start)
		}
	}
	got := w.Top(3, start)
	if len(got.Items) != 3 || string(got.Items[0].Key) != "k9" || got.Items[0].Count != 10 || got.Items[2].Count != 8 || got.Items[0].Error != 0 ||
		got.Total != 55 || got.Coarse != 1 || got.Skipped != 0 {
		t.Errorf("%+v", got)
	}
	// The caller's key is not kept, and what Top returns is nobody else's.
	got.Items[0].Key[0] = 'x'
	if again := w.Top(1, start); string(again.Items[0].Key) != "k9" {
		t.Errorf("%+v", again)
	}
}

// What came long ago is forgotten, and what came lately is not.
func TestWindow(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := NewWindow(time.Minute, 4, start)
	add := func(key string, n uint64, at time.Duration) { w.Add([]byte(key), n, start.Add(at)) }
	add("old", 7, 0)
	add("both", 2, time.Second)
	add("both", 3, 61*time.Second)
	add("new", 1, 62*time.Second)
	want := func(at time.Duration, since time.Duration, total uint64, items ...string) {
		t.Helper()
		got := w.Top(10, start.Add(at))
		var all []string
		for _, it := range got.Items {
			all = append(all, fmt.Sprintf("%s %d", it.Key, it.Count))
		}
		if !slices.Equal(all, items) || got.Total != total || got.Since.Sub(start) != since {
			t.Errorf("after %v: %v, since %v, total %d", at, all, got.Since.Sub(start), got.Total)
		}
	}
	want(63*time.Second, 0, 13, "old 7", "both 5", "new 1")
	want(122*time.Second, 61*time.Second, 4, "both 3", "new 1")
	want(10*time.Minute, 10*time.Minute, 0)
	add("next", 1, 11*time.Minute)
	want(11*time.Minute, 10*time.Minute, 1, "next 1")
}

// The bounds hold for a window of two full sketches.
func TestBoundsOfAWindow(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := NewWindow(time.Minute, 64, start)
	truth := make(map[string]uint64)
	zipf := rand.NewZipf(rand.New(rand.NewPCG(3, 4)), 1.05, 1, 3000)
	const n = 20_000
	for i := range n {
		key := fmt.Sprint(zipf.Uint64())
		truth[key]++
		w.Add([]byte(key), 1, start.Add(time.Duration(i)*100*time.Second/n))
	}
	got := w.Top(1000, start.Add(100*time.Second))
	seen := make(map[string]bool)
	for _, it := range got.Items {
		if seen[string(it.Key)] {
			t.Errorf("%s is there twice", it.Key)
		}
		seen[string(it.Key)] = true
		if have := truth[string(it.Key)]; have > it.Count || have < it.Count-it.Error || it.Error > got.Bound {
			t.Errorf("%s: %d, with an error of %d, is %d in truth", it.Key, it.Count, it.Error, have)
		}
	}
	for key, have := range truth {
		if have > got.Bound && !seen[key] {
			t.Errorf("%s, which came %d times, is missing; the bound is %d", key, have, got.Bound)
		}
	}
	if got.Total != n || got.Bound > n/64 || !slices.IsSortedFunc(got.Items, func(a, b Item) int { return cmp.Compare(b.Count, a.Count) }) {
		t.Errorf("total %d, bound %d", got.Total, got.Bound)
	}
}

// Nobody waits, and nothing that is lost goes unsaid.
func TestAtOnce(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := NewWindow(time.Hour, 8, start)
	var all sync.WaitGroup
	const callers, each = 8, 2000
	for c := range callers {
		all.Go(func() {
			for range each {
				w.Add([]byte{byte(c)}, 1, start)
			}
		})
		all.Go(func() { w.Top(3, start) })
	}
	all.Wait()
	if got := w.Top(10, start); got.Total+got.Skipped != callers*each {
		t.Errorf("%d counted, %d skipped", got.Total, got.Skipped)
	}
	w.mu.Lock()
	if w.TryAdd([]byte("x"), 1, start) {
		t.Error("it has not said that it counts nothing")
	}
	w.mu.Unlock()
}

func TestKeysWithAPlaceCostNothing(t *testing.T) {
	s := New(100)
	keys := make([][]byte, 300)
	for i := range keys {
		keys[i] = fmt.Appendf(nil, "key number %d", i)
		s.Add(keys[i], 1)
	}
	if n := testing.AllocsPerRun(1000, func() { s.Add(keys[299], 1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAdd(b *testing.B) {
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, 100_000)
	keys := make([][]byte, 1<<16)
	for i := range keys {
		keys[i] = fmt.Appendf(nil, "\x05host%d\x07example\x03org\x00", zipf.Uint64())
	}
	now := time.Now()
	w := NewWindow(time.Hour, 1024, now)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		w.TryAdd(keys[i&(1<<16-1)], 1, now)
	}
}
