// Package flushed remembers what has been flushed from a cache, and when. An answer that came of a question asked before a
// flush must not get into the cache after it: not from a request that was under way, not from a store whose answers are
// moved, not from a snapshot.
package flushed

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// Kinds is a set of kinds of answers.
type Kinds uint8

const (
	Successes Kinds = 1 << iota // NOERROR with an answer, and referrals
	Denials                     // NXDOMAIN and NODATA
	Failures                    // SERVFAIL, NOTIMP, and with back-off REFUSED and FORMERR

	AllKinds = Successes | Denials | Failures
)

// KindOf returns the kind of a record with those flags.
func KindOf(f record.Flags) Kinds {
	switch {
	case f.Class() == record.Success:
		return Successes
	case f&record.FlagVoid != 0:
		return Failures
	}
	return Denials
}

// Filter says which answers are meant.
type Filter struct {
	Name    []byte // the qname, in wire format and lower case; nil: any
	Subtree bool   // or a name below Name
	Qtype   uint16 // 0: any
	Kinds   Kinds
	Expired bool  // only what has expired
	Before  int64 // only what was stored then or before, in ns on the store's clock; 0: whenever it was
}

// HasKey reports whether answers under a key may be meant.
func (f *Filter) HasKey(k *record.Key) bool {
	if f.Qtype != 0 && k.Qtype() != f.Qtype {
		return false
	}
	if f.Name == nil {
		return true
	}
	if f.Subtree {
		return wire.InZone(k.Name(), f.Name)
	}
	return string(k.Name()) == string(f.Name)
}

// Has reports whether the answer e under a key is meant at now, in ns on the store's clock.
func (f *Filter) Has(k *record.Key, e *record.Entry, now int64) bool {
	return (f.Before == 0 || e.Stored <= f.Before) && KindOf(e.Flags)&f.Kinds != 0 && (!f.Expired || e.Remaining(now) <= 0) && f.HasKey(k)
}

// most is how many flushes a log remembers one by one.
const most = 256

// Log remembers flushes. A nil Log remembers none. Its methods are safe for concurrent use; those that look take no lock.
type Log struct {
	mu      sync.Mutex // held by Add
	entries atomic.Pointer[entries]
}

// entries do not change once they are in a log.
type entries struct {
	horizon int64 // every answer to a question that was asked then or before is taken as flushed
	list    []flush
}

type flush struct {
	Filter
	at   int64
	over *atomic.Bool
}

// has reports whether the flush removes e. Whether e has expired is judged at the time of the flush.
func (f *flush) has(k *record.Key, e *record.Entry) bool { return f.Filter.Has(k, e, f.at) }

// Add notes a flush at a time, in ns on the store's clock. The caller calls over when the flush has been through all stores. A
// full log forgets the filter of its oldest flush. It then takes every answer to a question that was asked before that flush as
// flushed: such an answer is served once, and not kept.
func (l *Log) Add(f Filter, at int64) (over func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := &entries{horizon: math.MinInt64} // times before the process started are negative
	if last := l.entries.Load(); last != nil {
		*next = *last
	}
	state := new(atomic.Bool)
	next.list = append(slices.Clone(next.list), flush{f, at, state})
	if len(next.list) > most {
		next.horizon = max(next.horizon, next.list[0].at)
		next.list = next.list[1:]
	}
	l.entries.Store(next)
	return func() { state.Store(true) }
}

// load returns the entries, or nil.
func (l *Log) load() *entries {
	if l == nil {
		return nil
	}
	return l.entries.Load()
}

// Has reports whether the answer e under a key, which came of a question asked at that time, has been flushed since.
func (l *Log) Has(k *record.Key, e *record.Entry, asked int64) bool {
	all := l.load()
	if all == nil {
		return false
	}
	return asked <= all.horizon || slices.ContainsFunc(all.list, func(f flush) bool { return asked <= f.at && f.has(k, e) })
}

// HasMoving reports whether the answer e, which moves from one store to another, is being flushed now. It looks at no flush that
// is over: such a flush has been through both stores.
func (l *Log) HasMoving(k *record.Key, e *record.Entry) bool {
	all := l.load()
	return all != nil && slices.ContainsFunc(all.list, func(f flush) bool {
		return !f.over.Load() && e.Stored <= f.at && f.has(k, e)
	})
}

// HasRead reports whether the answer e, which is read from a snapshot, has been flushed since the reading began.
func (l *Log) HasRead(k *record.Key, e *record.Entry, began int64) bool {
	all := l.load()
	return all != nil && (all.horizon >= began || slices.ContainsFunc(all.list, func(f flush) bool { return f.at >= began && f.has(k, e) }))
}
