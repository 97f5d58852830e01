// Package popularity keeps two words for each entry of a cache, beside the entry's record. They say how often the entry is
// asked for, and when a refresh may be tried again. The options prefetch and serve_stale need them. The eviction policy
// does not use them; it has counts of its own.
//
// Readers change the words without a lock. The caller does not unmap or move the words while a reader may use them. So a
// late reader can do no worse than write to the words of the next entry with the same number. That entry then has one
// request too many.
package popularity

import (
	"sync/atomic"
	"time"
)

// The words of an entry.
const (
	// counted has the time of the last request for the entry, in ms (40 bits), and the number of requests without too long
	// a gap (24 bits).
	counted = iota

	// retry has the time before which no refresh is tried, in ns. 0 means that one may be tried.
	retry

	// WordsPerEntry is how many words of 8 bytes an entry has.
	WordsPerEntry
)

const (
	countBits = 24

	// Most is where a count stops.
	Most = 1<<countBits - 1

	msMask = 1<<(64-countBits) - 1

	// clocksDiffer is by how much the time of one request can be ahead of that of another one, in ms, at most.
	clocksDiffer = 10_000
)

// Table has the words of all entries, WordsPerEntry for each. An entry is given by its number. An empty Table counts
// nothing, and each of its entries may be refreshed at any time. The methods are safe for concurrent use. Times are in ns
// on one monotonic clock.
type Table []uint64

// word returns one of the words of an entry, or nil when there are none.
func (t Table) word(id uint32, which int) *uint64 {
	at := int(id)*WordsPerEntry + which
	if at >= len(t) {
		return nil
	}
	return &t[at]
}

// State is the two words of an entry.
type State [WordsPerEntry]uint64

// NewState returns the state of an entry with count requests, 0 to Most, the last one at now.
func NewState(count uint32, now int64) (s State) {
	if count > 0 {
		s[counted] = pack(now, count)
	}
	return s
}

// Count returns the number of requests for the entry, up to Most.
func (s *State) Count() uint32 { return uint32(s[counted] & Most) }

// Since returns how long before now the last request for the entry came.
func (s *State) Since(now int64) time.Duration {
	return time.Duration(since(s[counted], now)) * time.Millisecond
}

// Load returns the state of an entry.
func (t Table) Load(id uint32) (s State) {
	for i := range s {
		if w := t.word(id, i); w != nil {
			s[i] = atomic.LoadUint64(w)
		}
	}
	return s
}

// Store sets the state of an entry. Requests that are counted at the same moment may be lost.
func (t Table) Store(id uint32, s State) {
	for i := range s {
		if w := t.word(id, i); w != nil {
			atomic.StoreUint64(w, s[i])
		}
	}
}

// Add counts a request for an entry at now. It returns the number of requests that came without a longer pause than gap
// between two of them, up to most. For an entry without words it returns 0.
func (t Table) Add(id uint32, now int64, gap time.Duration, most uint32) uint32 {
	w := t.word(id, counted)
	if w == nil {
		return 0
	}
	for {
		old := atomic.LoadUint64(w)
		ago := since(old, now)
		count := uint32(old & Most)
		if time.Duration(ago)*time.Millisecond > gap {
			count = 0
		}
		count = min(count+1, most)
		next := old&^Most | uint64(count) // the later time stays
		if ago > 0 {
			next = pack(now, count)
		}
		// Once the count has stopped, this writes no more than once for each tick of the clock.
		if next == old || atomic.CompareAndSwapUint64(w, old, next) {
			return count
		}
	}
}

// MayRetry reports whether a refresh of an entry may be tried at now.
func (t Table) MayRetry(id uint32, now int64) bool {
	w := t.word(id, retry)
	if w == nil {
		return true
	}
	until := int64(atomic.LoadUint64(w))
	return until == 0 || now >= until
}

// Postpone forbids refreshes of an entry before until.
func (t Table) Postpone(id uint32, until int64) {
	if w := t.word(id, retry); w != nil {
		atomic.StoreUint64(w, uint64(until))
	}
}

func pack(now int64, count uint32) uint64 { return uint64(now/1e6)&msMask<<countBits | uint64(count) }

// since returns how many ms before now the last request for an entry with that word came. It is 0 if that request read the
// clock later than the current one, but was counted first.
func since(word uint64, now int64) uint64 {
	// The difference is right even if the time has wrapped round.
	ago := (uint64(now/1e6) - word>>countBits) & msMask
	if ago > msMask-clocksDiffer {
		return 0
	}
	return ago
}
