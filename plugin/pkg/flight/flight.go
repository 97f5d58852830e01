package flight

import (
	"context"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

// This file has groups, flights and waiting. The calls are made by the users of the package.

const (
	shards    = 64
	lineBytes = 64

	// WaitersInAll bounds the waiters in all, as a multiple of Group.Waiters. Beyond the bound, a request does not wait. It
	// starts another flight instead, or is refused, as for a flight that has too many waiters.
	WaitersInAll = 100

	// HungPerKey and hungInAll bound the leaders that hang while other flights replace theirs: for one key, and for all keys.
	//
	// Beyond HungPerKey, flights of the key start at growing intervals. The next one starts when the outage has lasted twice
	// as long as at the last start. Beyond hungInAll, flights of all keys start less often. So few more leaders hang, even in
	// a month. But flights never stop altogether. A leader that hangs for good never comes back, and its key must still get a
	// value when the outage is over.
	HungPerKey = 16
	hungInAll  = 10_000
)

// Key tells flights apart. Equal keys must have the same hash. Two keys with the same hash that are not equal share no flight.
type Key[K any] interface {
	Hash() uint64
	Equal(K) bool
}

// Group is a set of flights. Each key has one flight that requests join, and maybe older ones that it has replaced. Waiters
// and Wait must be set before it is used. A Group must not be copied. Its methods are safe for concurrent use.
type Group[K Key[K], V any] struct {
	Waiters int           // requests that may wait for one flight, 1 or more
	Wait    time.Duration // how long a flight takes until a waiter becomes its second leader, 1 ms or more

	waiting atomic.Int64 // waiters of all flights
	away    atomic.Int64 // leaders that have not called Back, of flights that others have replaced
	shards  [shards]shard[K, V]
}

type shard[K Key[K], V any] struct {
	mu sync.Mutex               // guards m, and the fields of its flights but Key, brought and value
	m  map[uint64]*Flight[K, V] // by the key's hash
	_  [lineBytes]byte          // padding to prevent false sharing
}

// Flight is one call for a key, and the requests that wait for it. Key must be set before the flight is used. A Flight is used
// for one call only.
type Flight[K Key[K], V any] struct {
	Key K

	leaders int           // leaders that have not called Back
	waiters int           // requests that wait for it
	again   bool          // there has been a second leader; false again when a leader comes back without a value
	ended   bool          // no leader or waiter can join, and the value is final
	done    chan struct{} // closed when the flight has ended; nil before the first waiter
	vacant  chan struct{} // has a token when a leader has come back without a value; made with done
	begun   time.Time     // when it started

	behind   *Flight[K, V] // the flight for the same key that this one has replaced, or nil
	replaced bool          // another flight has replaced this one
	detached bool          // no other request may wait for this flight: see Detach

	// Written before done is closed, and only read afterwards.
	brought bool // there is a value
	value   V
}

// Outcome says how a wait has ended.
type Outcome uint8

const (
	Abandoned  Outcome = iota // the flight has ended without a value: the waiter may join again
	Completed                 // the flight has a value
	Gone                      // the waiter's client has gone away
	TooLate                   // the deadline has passed
	Relaunched                // the waiter is the second leader now: it must make the call, and then call Back
)

// Role is what a request becomes by joining.
type Role uint8

const (
	Leads   Role = iota // it has started the flight: it must make the call, and then call Back
	Waits               // it is a waiter of the flight: it must call Await or AwaitOnce
	Busy                // there is a flight, and the request must not wait
	Alone               // another key has the same hash: it should make the call without a flight
	Refused             // too many leaders hang: it must do without a value
)

// Waiting returns the number of waiters.
func (g *Group[K, V]) Waiting() int64 { return g.waiting.Load() }

// Away returns the number of leaders that have not called Back, of flights that others have replaced.
func (g *Group[K, V]) Away() int64 { return g.away.Load() }

// UnderWay returns the number of keys with a flight that has not ended, or whose leaders have not all called Back.
func (g *Group[K, V]) UnderWay() (n int) {
	for i := range g.shards {
		sh := &g.shards[i]
		sh.mu.Lock()
		n += len(sh.m)
		sh.mu.Unlock()
	}
	return n
}

func (g *Group[K, V]) shard(f *Flight[K, V]) *shard[K, V] { return &g.shards[f.Key.Hash()>>32%shards] }

// Value returns the flight's value. It may be called only when a wait has ended with Completed. All waiters get the same
// pointer, and must not change the value.
func (f *Flight[K, V]) Value() *V { return &f.value }

// Lone makes the caller the leader of f without Join, so that no other request can join f. The caller must call Back.
func (f *Flight[K, V]) Lone() { f.leaders = 1 }

// Join starts f, unless its key has a flight already. It returns the flight that the caller leads or waits for, and the
// caller's role. mayWait says whether the caller may become a waiter. A flight that has ended, takes too long or has too many
// waiters is replaced by f, if mayReplace allows it. The flight is nil for the roles Alone and Refused.
func (g *Group[K, V]) Join(f *Flight[K, V], mayWait bool) (*Flight[K, V], Role) {
	sh, hash := g.shard(f), f.Key.Hash()
	sh.mu.Lock()
	defer sh.mu.Unlock()
	other, now := sh.m[hash], time.Now()
	switch {
	case other == nil:
	case !other.Key.Equal(f.Key):
		return nil, Alone
	case other.ended || other.detached || g.old(other, now) || mayWait && g.full(other):
		if !other.detached && !g.mayReplace(other, now) {
			return nil, Refused
		}
		other.replaced = true
		g.away.Add(int64(other.leaders))
	case !mayWait:
		return other, Busy
	default:
		g.wait1(other)
		return other, Waits
	}
	if sh.m == nil {
		sh.m = make(map[uint64]*Flight[K, V])
	}
	sh.m[hash] = f
	f.leaders, f.begun, f.behind = 1, now, other
	return f, Leads
}

// wait1 adds one waiter to f. The caller holds the shard's lock.
func (g *Group[K, V]) wait1(f *Flight[K, V]) {
	g.waiting.Add(1)
	f.waiters++
	if f.done == nil {
		f.done, f.vacant = make(chan struct{}), make(chan struct{}, 1)
	}
}

// old reports whether f takes longer than any request waits in all. Its leaders count as hung.
func (g *Group[K, V]) old(f *Flight[K, V], now time.Time) bool { return now.Sub(f.begun) > 2*g.Wait }

// full reports whether f, or the group, has as many waiters as are allowed.
func (g *Group[K, V]) full(f *Flight[K, V]) bool {
	return f.waiters >= g.Waiters || g.waiting.Load() >= int64(g.Waiters)*WaitersInAll
}

// mayReplace reports whether another flight may replace f, which takes no more waiters. It is false while too many leaders
// hang and f has started too recently; see HungPerKey. It drops flights behind f whose leaders are all back. The caller holds
// the shard's lock.
func (g *Group[K, V]) mayReplace(f *Flight[K, V], now time.Time) bool {
	hung, first := 0, f
	for h := f; h != nil; h = h.behind {
		if g.old(h, now) {
			hung += h.leaders
			first = h
		}
		for h.behind != nil && h.behind.leaders == 0 {
			h.behind = h.behind.behind
		}
	}
	if f.ended && f.leaders == 0 {
		return true // the last call has come back, so the outage is over
	}
	crowds := g.away.Load() / hungInAll
	if hung < HungPerKey && crowds == 0 {
		return true
	}
	const mostDoublings = 20 // bounds the shift: with the longest Wait, this is years
	pause := 2 * g.Wait << min(3*bits.Len64(uint64(crowds)), mostDoublings)
	if hung >= HungPerKey {
		pause = max(pause, f.begun.Sub(first.begun))
	}
	return now.Sub(f.begun) > pause
}

// Detach takes the flights under way whose key is one of those out of the way: requests that come from now on start others.
// Those that wait already get what comes.
func (g *Group[K, V]) Detach(which func(K) bool) {
	for i := range g.shards {
		sh := &g.shards[i]
		sh.mu.Lock()
		for _, f := range sh.m {
			if which(f.Key) {
				f.detached = true
			}
		}
		sh.mu.Unlock()
	}
}

// State is how a flight is.
type State struct {
	Begun    time.Time
	Leaders  int  // that have not called Back
	Waiters  int  // requests that wait for it
	Detached bool // no other request may wait for it
}

// Each calls f for every flight under way, those that others have replaced included. f must not use the group: it is called under
// a lock.
func (g *Group[K, V]) Each(f func(K, State)) {
	for i := range g.shards {
		sh := &g.shards[i]
		sh.mu.Lock()
		for _, fl := range sh.m {
			for ; fl != nil; fl = fl.behind {
				if fl.leaders > 0 {
					f(fl.Key, State{fl.begun, fl.leaders, fl.waiters, fl.detached})
				}
			}
		}
		sh.mu.Unlock()
	}
}

// Overtaken reports whether f has ended, or another flight has replaced it. A leader calls it to learn whether its result
// comes late.
func (g *Group[K, V]) Overtaken(f *Flight[K, V]) bool {
	sh := g.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return f.ended || f.replaced
}

// leave removes one waiter from f.
func (g *Group[K, V]) leave(f *Flight[K, V]) {
	sh := g.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	g.waiting.Add(-1)
	f.waiters--
}

// relaunch makes a waiter the second leader of f, and reports whether it did so. f may have one second leader, and another
// one each time that a leader comes back without a value.
func (g *Group[K, V]) relaunch(f *Flight[K, V]) bool {
	sh := g.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if f.ended || f.again {
		return false
	}
	f.again = true
	f.leaders++
	if f.replaced {
		g.away.Add(1)
	}
	return true
}

// Complete ends f with a value, and with it all flights behind f, whose waiters get the same value. Complete calls value
// once, or not at all if there has been no waiter. value must not use the group, because Complete holds a lock. The leaders
// of f must still call Back.
func (g *Group[K, V]) Complete(f *Flight[K, V], value func() V) {
	sh := g.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	value = sync.OnceValue(value)
	for ; f != nil; f = f.behind {
		if f.ended {
			continue
		}
		f.ended = true
		if f.done != nil {
			f.value, f.brought = value(), true
			close(f.done)
		}
	}
}

// Back says that a leader of f has returned from the call. Each leader must call it once. It does nothing more if f has
// ended. If no other leader is left, f ends with *value, or without a value if value is nil. If another leader is left and
// value is nil, a waiter takes the caller's place as a leader.
func (g *Group[K, V]) Back(f *Flight[K, V], value *V) {
	sh := g.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	f.leaders--
	if f.replaced {
		g.away.Add(-1)
	}
	switch {
	case f.ended:
	case f.leaders == 0:
		f.ended = true
		if f.done != nil {
			if value != nil {
				f.value, f.brought = *value, true
			}
			close(f.done)
		}
	case value == nil:
		f.again = false
		select {
		case f.vacant <- struct{}{}:
		default:
		}
	}
	// The flights stay in the map until all leaders are back, because mayReplace counts them.
	hash := f.Key.Hash()
	if head := sh.m[hash]; head != nil && head.ended && !head.anyAway() {
		delete(sh.m, hash)
	}
}

// anyAway reports whether any leader of f, or of the flights behind it, has not called Back.
func (f *Flight[K, V]) anyAway() bool {
	for ; f != nil; f = f.behind {
		if f.leaders > 0 {
			return true
		}
	}
	return false
}

// outcome returns Completed or Abandoned. done must be closed.
func (f *Flight[K, V]) outcome() Outcome {
	if f.brought {
		return Completed
	}
	return Abandoned
}

// Await waits until f ends, ctx is done or the deadline has passed. Only a waiter may call it, once for each Join. Await
// makes the waiter the second leader in two cases: the waiter has waited for Group.Wait and there is no second leader, or a
// leader has come back without a value.
func (g *Group[K, V]) Await(ctx context.Context, f *Flight[K, V], deadline time.Time) Outcome {
	defer g.leave(f)
	timer := time.NewTimer(min(g.Wait, time.Until(deadline)))
	defer timer.Stop()
	for {
		select {
		case <-f.done:
			return f.outcome()
		case <-ctx.Done():
			return Gone
		case <-f.vacant:
			if g.relaunch(f) {
				return Relaunched
			}
		case <-timer.C:
			if !time.Now().Before(deadline) {
				return TooLate
			}
			if g.relaunch(f) {
				return Relaunched
			}
			timer.Reset(time.Until(deadline))
		}
	}
}

// Watch adds a waiter to f, for a leader that has the call made by another goroutine. It must be called before the call
// starts. The caller must then call AwaitOnce.
func (g *Group[K, V]) Watch(f *Flight[K, V]) {
	sh := g.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	g.wait1(f)
}

// AwaitOnce is Await with a limit in time instead of a deadline. It never makes the waiter a leader.
func (g *Group[K, V]) AwaitOnce(ctx context.Context, f *Flight[K, V], most time.Duration) Outcome {
	defer g.leave(f)
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-f.done:
		return f.outcome()
	case <-ctx.Done():
		return Gone
	case <-timer.C:
		return TooLate
	}
}
