package level2

import (
	"math"
	"sync/atomic"
	"time"
)

// This file knows how the second level does: whether it is asked at all, how long it takes, and what its clock says.

// breaker opens after some failures in a row, and closes when it is told so. Its methods are safe for concurrent use.
type breaker struct {
	failures atomic.Int32
	since    atomic.Int64 // when the first of them was, in ns of unix time
	open     atomic.Bool
}

const (
	// breakAfter is how many calls in a row must fail, or be late, until clients do not wait for the second level any more, and
	// breakTime for how long they must have done so: what is late at the same time is late for one reason.
	breakAfter = 5
	breakTime  = 100 * time.Millisecond
)

// failed counts a failure at a moment, and reports whether it has opened the breaker.
func (b *breaker) failed(now time.Time) bool {
	n := b.failures.Add(1)
	if n == 1 {
		b.since.Store(now.UnixNano())
	}
	return n >= breakAfter && now.UnixNano()-b.since.Load() >= int64(breakTime) && !b.open.Swap(true)
}

func (b *breaker) succeeded() {
	if b.failures.Load() != 0 {
		b.failures.Store(0)
	}
}

// trip opens the breaker.
func (b *breaker) trip() { b.open.Store(true) }

// close closes the breaker.
func (b *breaker) close() {
	b.failures.Store(0)
	b.open.Store(false)
}

// quantile estimates a quantile of values that come one by one, of the recent ones most. It is not exact: a step up or down for
// each value. Its methods are safe for concurrent use; values that come at the same moment may count as one.
type quantile struct {
	part float64       // 0 to 1
	most time.Duration // the estimate goes no higher, so that it comes down soon; 0: however high
	bits atomic.Int64  // the estimate in ns; 0: no value yet
}

// pace is by how much a value moves the estimate, as a part of it.
const pace = 0.08

func (q *quantile) observe(d time.Duration) {
	was := float64(q.bits.Load())
	d = max(d, time.Microsecond)
	switch {
	case was == 0:
		was = float64(d)
	case float64(d) > was:
		was *= 1 + pace*q.part
	default:
		was *= 1 - pace*(1-q.part)
	}
	if q.most > 0 {
		was = min(was, float64(q.most))
	}
	q.bits.Store(int64(max(was, 1000)))
}

func (q *quantile) value() time.Duration { return time.Duration(q.bits.Load()) }

// groupClock is the clock that a group of replicas has in common: the server's. The replicas' own clocks are not compared. now
// is between two bounds, because it takes a moment to ask.
type groupClock struct {
	state atomic.Pointer[clockReading]
}

type clockReading struct {
	at           time.Time // with a monotonic clock
	lower, upper int64     // ms
}

// drift is by how much two clocks drift apart at most, as a part of the time.
const drift = 2e-4

// bounds returns between what the time is at a moment, in ms. ok is false while it is not known.
func (c *groupClock) bounds(at time.Time) (lower, upper int64, ok bool) {
	r := c.state.Load()
	if r == nil {
		return 0, 0, false
	}
	passed := float64(at.Sub(r.at)) / 1e6
	slack := math.Abs(passed) * drift
	return r.lower + int64(math.Floor(passed-slack)), r.upper + int64(math.Ceil(passed+slack)), true
}

// set notes that the server said now, in ms, between asked and answered. It returns by how many ms the clock has been set back:
// 0 if it has not, as far as can be told. A clock that is a little late, up to futureSlack, is not believed: so it cannot be held
// back little by little.
func (c *groupClock) set(asked, answered time.Time, now int64) (back int64) {
	took := int64(math.Ceil(float64(answered.Sub(asked)) / 1e6))
	next := &clockReading{at: answered, lower: now, upper: now + took + 1}
	lower, upper, ok := c.bounds(answered)
	switch {
	case !ok:
	case next.upper < lower:
		if back = lower - next.upper; back <= futureSlack {
			return 0
		}
	case next.lower > upper: // set forward
	default: // both are true
		next.lower, next.upper = max(next.lower, lower), min(next.upper, upper)
	}
	c.state.Store(next)
	return back
}
