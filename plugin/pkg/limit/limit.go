// Package limit bounds how many questions per second go to the upstream. It is a token bucket with three orders of precedence:
// work that nobody waits for gets what is left below four fifths of the burst, requests that can be answered otherwise go when
// there is a token, and all others wait for their turn.
package limit

import (
	"context"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// spare is the part of the burst that background work leaves for requests.
const spare = 0.2

// Limiter is a token bucket. Its methods are safe for concurrent use. now is in ns on a clock that begins at 0, the same for all
// calls.
type Limiter struct {
	mu     sync.Mutex    // guards the fields below: a reservation and its cancellation are one step
	last   int64         // the latest time so far. A clock of ticks is read before the lock is taken, so calls come out of order
	bucket *rate.Limiter // in a time that begins at 0
}

// New returns a limiter for that many questions per second, 1 or more, and as many at once as burst says, 1 or more.
func New(perSecond, burst int) *Limiter {
	return &Limiter{bucket: rate.NewLimiter(rate.Limit(perSecond), burst)}
}

// at returns the moment of now, or the latest one so far. The caller holds mu.
func (l *Limiter) at(now int64) time.Time {
	l.last = max(l.last, now)
	return time.Unix(0, l.last)
}

// groups are the limiters that blocks share by a name. They last as long as the process, so that a reload keeps a bucket as it
// is. A Corefile bounds their number.
var groups = struct {
	mu sync.Mutex // guards m
	m  map[string]*Limiter
}{m: make(map[string]*Limiter)}

// Shared returns the limiter of a group. All blocks of the group have it. The numbers of the last call hold for all.
func Shared(group string, perSecond, burst int) *Limiter {
	groups.mu.Lock()
	defer groups.mu.Unlock()
	l := groups.m[group]
	if l == nil {
		l = New(perSecond, burst)
		groups.m[group] = l
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	at := time.Unix(0, l.last) // not the present: the bucket stays as it is
	l.bucket.SetLimitAt(at, rate.Limit(perSecond))
	l.bucket.SetBurstAt(at, burst)
	return l
}

// Spare takes a token for work in the background, and reports whether there was one to spare.
func (l *Limiter) Spare(now int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.at(now)
	return l.bucket.TokensAt(at) >= math.Max(1, spare*float64(l.bucket.Burst())) && l.bucket.AllowN(at, 1)
}

// Take takes a token for a request that can be answered with a stale answer, and reports whether there was one.
func (l *Limiter) Take(now int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bucket.AllowN(l.at(now), 1)
}

// Await takes a token for a request, and waits for it for most at the longest. It returns for how long it has waited, and whether
// it has the token. It has none, at once, if it would have to wait longer, and when ctx ends. So at most as many requests wait as
// tokens come in that time.
func (l *Limiter) Await(ctx context.Context, now int64, most time.Duration) (waited time.Duration, ok bool) {
	delay, ok := l.reserve(now, most)
	if !ok || delay == 0 {
		return 0, ok
	}
	turn := time.NewTimer(delay)
	defer turn.Stop()
	select {
	case <-turn.C:
		return delay, true
	case <-ctx.Done():
		return delay, false // the token is lost, which is on the safe side
	}
}

// reserve takes the next token that comes, if it comes within most, and returns when that is.
func (l *Limiter) reserve(now int64, most time.Duration) (delay time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.at(now)
	r := l.bucket.ReserveN(at, 1)
	if delay = r.DelayFrom(at); !r.OK() || delay > most {
		r.CancelAt(at)
		return 0, false
	}
	return delay, true
}
