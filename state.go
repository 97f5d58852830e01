package optcache

import (
	"sync/atomic"
	"time"
)

// This file keeps, where prefetch or serve_stale need it, two words for each entry beside its record,
// found by the number of its node: how often it is asked for, and when a refresh may be tried again.
// Readers change them without a lock. They are never unmapped or moved, so that a reader that is
// late writes to the words of the entry's successor at worst, which then counts one request too many.
const (
	// statePopularity is when the entry was asked for last, in ms on the store's clock, and how
	// often without too long a gap, up to what is asked of a popular one.
	statePopularity = iota

	// stateRetry is the time before which no refresh is tried, in ns on the store's clock, or 0.
	stateRetry

	stateWords
)

const (
	popularityBits = 24
	maxPopularity  = 1<<popularityBits - 1
	msMask         = 1<<(64-popularityBits) - 1

	// clocksDiffer is by how many ms at the most one request's time is ahead of another one's.
	clocksDiffer = 10_000

	// stateBytes is the memory of an entry's words.
	stateBytes = stateWords * wordBytes
)

// word returns one of the words of a node; nil when there are none.
func (sh *shard) word(id uint32, which int) *uint64 {
	at := int(id)*stateWords + which
	if at >= len(sh.states) {
		return nil
	}
	return &sh.states[at]
}

// resetState makes the words of a node those of a new entry, which has been asked for hits times
// until now. For the writer only.
func (sh *shard) resetState(id, hits uint32, now int64) {
	if w := sh.word(id, statePopularity); w != nil {
		popularity := uint64(0)
		if hits > 0 {
			popularity = packPopularity(now, hits)
		}
		atomic.StoreUint64(w, popularity)
		atomic.StoreUint64(sh.word(id, stateRetry), 0)
	}
}

// requests returns how often the entry in s has been asked for, as far as that is counted.
func (st *store) requests(s *scratch) uint32 {
	w := st.shard(s.key.hash).word(s.entry.node(), statePopularity)
	if w == nil {
		return 0
	}
	return uint32(atomic.LoadUint64(w) & maxPopularity)
}

func packPopularity(now int64, hits uint32) uint64 {
	return uint64(now/1e6)&msMask<<popularityBits | uint64(hits)
}

// countRequest counts a request for the entry in s and returns how often it has been asked for, most
// at the most, without a gap of more than that.
func (st *store) countRequest(s *scratch, now int64, gap time.Duration, most uint32) uint32 {
	w := st.shard(s.key.hash).word(s.entry.node(), statePopularity)
	if w == nil {
		return 0
	}
	for {
		old := atomic.LoadUint64(w)
		hits := oneMore(old, now, gap, most)
		next := old&^maxPopularity | uint64(hits) // the later time stays
		if sincePopular(old, now) > 0 {
			next = packPopularity(now, hits)
		}
		// Once the count has stopped, this writes no more than once for each tick of the clock.
		if next == old || atomic.CompareAndSwapUint64(w, old, next) {
			return hits
		}
	}
}

// popularity returns what countRequest would return.
func (st *store) popularity(s *scratch, now int64, gap time.Duration, most uint32) uint32 {
	w := st.shard(s.key.hash).word(s.entry.node(), statePopularity)
	if w == nil {
		return 0
	}
	return oneMore(atomic.LoadUint64(w), now, gap, most)
}

// oneMore returns how often an entry with that popularity has been asked for once it is asked for at
// now.
func oneMore(popularity uint64, now int64, gap time.Duration, most uint32) uint32 {
	hits := uint32(popularity & maxPopularity)
	if time.Duration(sincePopular(popularity, now))*time.Millisecond > gap {
		hits = 0
	}
	return min(hits+1, most)
}

// sincePopular returns how many ms before now an entry with that popularity was asked for; 0 if somebody whose clock
// is a tick ahead was faster.
func sincePopular(popularity uint64, now int64) uint64 {
	// A difference of times that have wrapped round is right all the same.
	since := (uint64(now/1e6) - popularity>>popularityBits) & msMask
	if since > msMask-clocksDiffer {
		return 0
	}
	return since
}

// mayRetry reports whether a refresh of the entry in s may be tried.
func (st *store) mayRetry(s *scratch, now int64) bool {
	w := st.shard(s.key.hash).word(s.entry.node(), stateRetry)
	if w == nil {
		return true
	}
	until := int64(atomic.LoadUint64(w))
	return until == 0 || now >= until
}

// postpone lets no refresh of an entry be tried until then. It takes one shard's lock.
func (st *store) postpone(k *key, kind recordFlags, until int64) {
	sh := st.shard(k.hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.closed {
		return
	}
	if slot, ok := sh.locate(k, kind); ok {
		id, _ := sh.at(slot)
		if w := sh.word(id, stateRetry); w != nil {
			atomic.StoreUint64(w, uint64(until))
		}
	}
}
