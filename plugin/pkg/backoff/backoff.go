// Package backoff says for how long failures are kept (RFC 9520 section 3.2). Each further failure of a name doubles the time, and
// so do failures of all names of a zone whose upstream is gone. One success ends it. The package knows names by their hashes only.
//
// A table of names has a fixed size. A name that it forgets, or takes for another one of nearly the same hash, is only asked for
// too early or too late.
package backoff

import (
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// goneAfter is how many failures in a row, without one success of a name of the zone, say that the upstream of the zone is gone.
	goneAfter = 8

	ways     = 8 // words in a set, which is a line of the CPU's cache
	minNames = 1 << 8
	maxNames = 1 << 16
)

// Names returns how many names a table should have room for, beside that many records of failures at most: a power of two. Half of
// the room is spare, so that few sets are full.
func Names(records int) int {
	return 1 << bits.Len(uint(max(min(2*int64(records), maxNames), minNames)-1))
}

// A word is one name, from the highest bit: the tag (21 bits), the hold (11 bits), and when the name has failed (32 bits, which
// may wrap around). Both times are in ticks. 0 is no name.
const (
	tick     = int64(250 * time.Millisecond)
	holdBits = 11
	timeBits = 32
	tagShift = holdBits + timeBits

	mostHold = 1<<holdBits - 1 // in ticks, 8 minutes
)

// Typed returns a name of its own for the questions of one type for a name.
func Typed(name uint64, qtype uint16) uint64 {
	return name + (uint64(qtype)+1)*0x9e3779b97f4a7c15 // 2^64 over the golden ratio: it spreads the types
}

// Table has the names that have failed, and the zones. All methods are safe for concurrent use. Only those of a zone that fails
// take a lock.
type Table struct {
	least, most time.Duration // of a hold, in whole seconds
	words       []atomic.Uint64

	mu    sync.Mutex // guards zones
	zones map[string]*Zone
}

// New returns a table for that many names, a power of two. A failure is kept for least at first, and for most at last. Both are
// whole seconds; least is 1 s or more, and most 5 minutes or less.
func New(names int, least, most time.Duration) *Table {
	return &Table{least: least, most: min(most, time.Duration(mostHold*tick)), words: make([]atomic.Uint64, names)}
}

// Bytes returns the memory of a table for that many names.
func Bytes(names int) int64 { return int64(names) * 8 }

// Is reports whether New makes such a table.
func (t *Table) Is(names int, least, most time.Duration) bool {
	return t != nil && len(t.words) == names && t.least == least && t.most == most
}

// Zones returns zones by their names, in the same order. A zone that the last call has returned keeps its state. The table
// forgets the other ones, which those who have them may go on using.
func (t *Table) Zones(names []string) (all []*Zone) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := make(map[string]*Zone)
	for _, name := range names {
		if next[name] == nil {
			next[name] = t.zones[name]
		}
		if next[name] == nil {
			z := &Zone{table: t}
			z.turn.Store(never)
			z.back.Store(math.MinInt64)
			next[name] = z
		}
		all = append(all, next[name])
	}
	t.zones = next
	return all
}

// Forget forgets a name.
func (t *Table) Forget(name uint64) {
	if word, old, ok := t.find(name); ok {
		word.CompareAndSwap(old, 0) // if that fails, the name has failed anew, or another one has taken its place
	}
}

// ForgetAll forgets all names and failures.
func (t *Table) ForgetAll() {
	for i := range t.words {
		t.words[i].Store(0)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, z := range t.zones {
		z.end(math.MinInt64)
	}
}

// find returns the word of a name. If there is none, it returns the word that the name may have, with ok false.
func (t *Table) find(name uint64) (word *atomic.Uint64, old uint64, ok bool) {
	set := t.words[name&uint64(len(t.words)/ways-1)*ways:][:ways]
	var first int64
	for i := range set {
		w := set[i].Load()
		if w != 0 && w>>tagShift == name>>tagShift {
			return &set[i], w, true
		}
		// The one that has failed first gives way. An empty one goes first.
		at := int64(math.MinInt64)
		if w != 0 {
			at = int64(uint32(w))
		}
		if word == nil || at < first {
			word, old, first = &set[i], w, at
		}
	}
	return word, old, false
}

// never is a time that does not come.
const never = math.MaxInt64

// Zone is a zone with an upstream. All methods are safe for concurrent use. Times are in ns on a clock that never goes back.
type Zone struct {
	table *Table

	mu       sync.Mutex    // guards the fields up to last
	failures int           // in a row, up to goneAfter
	hold     time.Duration // of the zone
	until    int64         // when it ends
	last     int64         // when the last failure was

	failing atomic.Bool  // failures is not 0
	turn    atomic.Int64 // from when on the next request may be let through; never, if the upstream is not gone
	back    atomic.Int64 // when the upstream was back last, in ticks
}

// Failed notes that a name of the zone has failed, and returns for how long the failure is kept, in whole seconds.
//
// A name's hold is twice the last one, if that has ended. A failure within the hold is kept for what is left of it, and never for
// less than the shortest hold. After the longest hold without a further failure, the name is new.
func (z *Zone) Failed(name uint64, now int64) time.Duration {
	t := z.table
	least := max(t.least, z.failed(now))
	hold := least
	for range ways { // others may write to the same word meanwhile
		word, old, known := t.find(name)
		hold = least
		if known && z.counts(old, now) {
			last := holdOf(old)
			switch left := last - age(old, now); {
			case left > 0:
				return max(left.Truncate(time.Second), t.least)
			case left > -t.most:
				hold = max(hold, min(2*last, t.most))
			}
		}
		if word.CompareAndSwap(old, name>>tagShift<<tagShift|uint64(int64(hold)/tick)<<timeBits|uint64(uint32(now/tick))) {
			break
		}
	}
	return hold
}

// failed notes a failure of the zone. It returns the zone's hold if its upstream is gone, and otherwise 0.
func (z *Zone) failed(now int64) time.Duration {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.failures < goneAfter && now-z.last > 2*int64(z.table.most) {
		z.failures = 0
	}
	switch {
	case z.failures == 0:
		z.hold = z.table.least
		z.until = now + int64(z.hold)
	case now >= z.until:
		z.hold = min(2*z.hold, z.table.most)
		z.until = now + int64(z.hold)
	}
	z.last = now
	z.failing.Store(true)
	if z.failures < goneAfter {
		if z.failures++; z.failures == goneAfter {
			z.turn.Store(now + int64(z.table.least))
		}
	}
	if z.failures < goneAfter {
		return 0
	}
	return z.hold
}

// Succeeded notes that a name of the zone has had an answer or a denial to a question of that type. It takes a lock only after a
// failure.
func (z *Zone) Succeeded(name uint64, qtype uint16, now int64) {
	if z.failing.Load() {
		z.end(now / tick)
	}
	z.table.Forget(name)
	z.table.Forget(Typed(name, qtype))
}

// end ends the row of failures. If the upstream was gone, it is back at a time in ticks.
func (z *Zone) end(at int64) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.failures == goneAfter {
		z.turn.Store(never)
		z.back.Store(at)
	}
	z.failures = 0
	z.failing.Store(false)
}

// Gone reports whether the upstream of the zone is gone.
func (z *Zone) Gone() bool { return z.turn.Load() != never }

// Stands reports whether a failure of a name may be served that came at a time and was to be kept for another. A failure that is
// kept for no longer than the shortest hold may be in any case. Another one may be for as long, unless the upstream has been back
// since, and longer only while the name is within its hold.
func (z *Zone) Stands(name uint64, came int64, kept time.Duration, now int64) bool {
	return kept <= z.table.least || now-came < int64(z.table.least) && came/tick > z.back.Load() || z.Holds(name, now)
}

// Holds reports whether a name is within its hold.
func (z *Zone) Holds(name uint64, now int64) bool {
	_, w, known := z.table.find(name)
	return known && z.counts(w, now) && age(w, now) < holdOf(w)
}

// Due reports whether TakeTurn may return true.
func (z *Zone) Due(now int64) bool { return now >= z.turn.Load() }

// TakeTurn reports whether a request may be let through to the upstream, which is gone. It lets one through in each time of the
// shortest hold, so that somebody notices when the upstream is back.
func (z *Zone) TakeTurn(now int64) bool {
	at := z.turn.Load()
	return now >= at && z.turn.CompareAndSwap(at, now+int64(z.table.least))
}

// counts reports whether the name of a word has failed since the upstream was back last.
func (z *Zone) counts(w uint64, now int64) bool {
	return now/tick-int64(age(w, now))/tick > z.back.Load()
}

func holdOf(w uint64) time.Duration { return time.Duration(int64(w>>timeBits&mostHold) * tick) }

// age returns how long ago the name of a word has failed.
func age(w uint64, now int64) time.Duration {
	return time.Duration(max(int64(int32(uint32(now/tick)-uint32(w))), 0) * tick)
}
