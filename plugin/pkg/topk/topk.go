// Package topk finds the keys that come most often, in bounded memory.
//
// A Sketch is space-saving (Metwally, Agrawal, El Abbadi: Efficient computation of frequent and top-k elements in data streams,
// 2005). It has a number of places, each with a key and a count. A key without a place takes that of the least count, goes on
// counting from there, and remembers that count as its error. So a key's true count is at most its count, and at least its count
// less its error. No error is above the sum of all counts, divided by the places. A key whose true count is above that has a place.
//
// A Window has the counts of the last minutes: those of a period that has ended, and those since. It has two sketches, and adds
// them up as in Agarwal et al.: Mergeable summaries, 2013.
package topk

import (
	"bytes"
	"cmp"
	"hash/maphash"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Item is a key that comes often. Its true count is between Count-Error and Count.
type Item struct {
	Key          []byte // of nobody else
	Count, Error uint64
}

var seed = maphash.MakeSeed() // of all sketches, so that a key has one hash in both sketches of a window

// Sketch counts keys. It allocates nothing for a key that has a place, and little for another one. It is not safe for
// concurrent use.
type Sketch struct {
	most  int
	at    map[uint64]int // the place in heap, by the key's hash
	heap  []place        // the least count is the first
	total uint64         // the sum of all counts
}

type place struct {
	hash         uint64
	key          []byte
	count, error uint64 // error is by how much the count may be too high
}

// New returns a sketch with that many places, 1 or more.
func New(places int) *Sketch {
	return &Sketch{most: places, at: make(map[uint64]int)}
}

// Add counts a key n times. It keeps a copy of the key.
func (s *Sketch) Add(key []byte, n uint64) {
	s.total += n
	hash := maphash.Bytes(seed, key)
	i, known := s.at[hash]
	switch {
	case known:
		if !bytes.Equal(s.heap[i].key, key) {
			return // two keys of one hash, once in 2^64: the second one is not counted
		}
	case len(s.heap) < s.most:
		i = len(s.heap)
		s.heap = append(s.heap, place{hash: hash, key: bytes.Clone(key)})
		s.at[hash] = i
		s.up(i, n)
		return
	default:
		p := &s.heap[0]
		delete(s.at, p.hash)
		p.hash, p.key, p.error = hash, append(p.key[:0], key...), p.count
		s.at[hash] = 0
		i = 0
	}
	s.heap[i].count += n
	s.down(i)
}

// up gives a new place its count, and moves it to where it belongs.
func (s *Sketch) up(i int, count uint64) {
	s.heap[i].count = count
	for i > 0 && s.heap[(i-1)/2].count > count {
		s.swap(i, (i-1)/2)
		i = (i - 1) / 2
	}
}

func (s *Sketch) down(i int) {
	for {
		child := 2*i + 1
		if child+1 < len(s.heap) && s.heap[child+1].count < s.heap[child].count {
			child++
		}
		if child >= len(s.heap) || s.heap[child].count >= s.heap[i].count {
			return
		}
		s.swap(i, child)
		i = child
	}
}

func (s *Sketch) swap(i, j int) {
	s.heap[i], s.heap[j] = s.heap[j], s.heap[i]
	s.at[s.heap[i].hash], s.at[s.heap[j].hash] = i, j
}

// floor is what a key without a place may have been counted, at most.
func (s *Sketch) floor() uint64 {
	if len(s.heap) < s.most {
		return 0
	}
	return s.heap[0].count
}

// reset forgets all keys.
func (s *Sketch) reset() {
	clear(s.at)
	clear(s.heap)
	s.heap, s.total = s.heap[:0], 0
}

// Window counts keys in the last one to two periods. It is safe for concurrent use.
type Window struct {
	period  time.Duration
	skipped atomic.Uint64 // counts that Add has lost in this period

	mu        sync.Mutex // guards what follows
	now, last *Sketch    // of this period, and of the period before
	begun     time.Time  // this period
	since     time.Time  // the period before
	lost      uint64     // skipped of the period before
	coarse    [2]uint64  // the largest count that was added at once, in this period and in the period before
}

// NewWindow returns a window with periods that long, and that many places.
func NewWindow(period time.Duration, places int, now time.Time) *Window {
	return &Window{period: period, now: New(places), last: New(places), begun: now, since: now}
}

// TryAdd counts a key n times. It never waits: it reports false, and counts nothing, if another caller is at work.
func (w *Window) TryAdd(key []byte, n uint64, now time.Time) bool {
	if !w.mu.TryLock() {
		return false
	}
	defer w.mu.Unlock()
	w.turn(now)
	w.now.Add(key, n)
	w.coarse[0] = max(w.coarse[0], n)
	return true
}

// Add is TryAdd for callers that do not try again. What is not counted is in Top.Skipped.
func (w *Window) Add(key []byte, n uint64, now time.Time) {
	if !w.TryAdd(key, n, now) {
		w.skipped.Add(n)
	}
}

// turn begins a new period if one is over. The caller holds mu.
func (w *Window) turn(now time.Time) {
	over := now.Sub(w.begun)
	if over < w.period {
		return
	}
	w.now, w.last = w.last, w.now
	w.since, w.coarse[1], w.lost = w.begun, w.coarse[0], w.skipped.Swap(0)
	if over >= 2*w.period { // nothing has come for a whole period
		w.last.reset()
		w.since, w.coarse[1], w.lost = now, 0, 0
	}
	w.now.reset()
	w.begun, w.coarse[0] = now, 0
}

// Top is what a Window has found.
type Top struct {
	Items   []Item    // the largest counts, the largest first
	Since   time.Time // from when on keys are counted
	Total   uint64    // of the counts of all keys
	Bound   uint64    // no error is larger, and no key whose true count is larger is missing
	Coarse  uint64    // the largest count that was added at once: 1, unless the caller counts samples
	Skipped uint64    // counts that were lost because another caller was at work
}

// Top returns the n keys with the largest counts. It holds the lock for as long as it takes to copy all keys.
func (w *Window) Top(n int, now time.Time) Top {
	both, t := w.copy(now)
	bound := [2]uint64{both[0].floor(), both[1].floor()}
	t.Bound = bound[0] + bound[1]
	for i, s := range both {
		other := both[1-i]
		for _, p := range s.heap {
			it := Item{Key: p.key, Count: p.count + bound[1-i], Error: p.error + bound[1-i]}
			if at, has := other.at[p.hash]; has {
				if i == 1 {
					continue // it is among those of the first sketch
				}
				it.Count, it.Error = p.count+other.heap[at].count, p.error+other.heap[at].error
			}
			t.Items = append(t.Items, it)
		}
	}
	slices.SortFunc(t.Items, func(a, b Item) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Error, b.Error), bytes.Compare(a.Key, b.Key))
	})
	t.Items = t.Items[:min(n, len(t.Items))]
	return t
}

// copy returns copies of both sketches, and what is said of the window as a whole.
func (w *Window) copy(now time.Time) (both [2]*Sketch, t Top) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.turn(now)
	for i, s := range []*Sketch{w.now, w.last} {
		both[i] = &Sketch{most: s.most, at: maps.Clone(s.at), heap: slices.Clone(s.heap)}
		for j := range both[i].heap {
			both[i].heap[j].key = bytes.Clone(s.heap[j].key)
		}
		t.Total += s.total
	}
	t.Since, t.Coarse, t.Skipped = w.since, max(w.coarse[0], w.coarse[1]), w.lost+w.skipped.Load()
	return both, t
}
