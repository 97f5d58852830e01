// Package clock is the clock by which answers age: monotonic, coarse, in ns since the process started. Where the system
// has such a clock (sinceBoot), it counts the time that the machine is suspended.
//
// To read the system's clock takes a quarter of the time of a hit, or more. To read this clock takes one load. TTLs are
// whole seconds, so the only loss is that an answer may be served one tick too long. The clock ticks only while it is
// read, so that an idle server does not wake up.
package clock

import (
	"sync/atomic"
	"time"
)

// Tick is how old a time from the clock may be. The clock's timer stands still while the machine is suspended. After
// suspension, a time from before it may be returned for as much as a Tick.
const Tick = 20 * time.Millisecond

// preciseNow returns the time in ns since the process started.
var preciseNow = newPreciseClock(sinceBoot)

// newPreciseClock returns a clock that begins at 0 and reads boot. If boot fails, as in some sandboxes, it reads Go's
// clock, which stands still on most systems while the machine is suspended.
func newPreciseClock(boot func() (time.Duration, bool)) func() int64 {
	start := time.Now()
	bootStart, usable := boot()
	return func() int64 {
		if usable {
			if t, ok := boot(); ok {
				return int64(t - bootStart)
			}
		}
		return int64(time.Since(start))
	}
}

// Ticking is a coarse clock. It ticks from the first read on. It stops at a tick if no read has come since the tick
// before. Its methods are safe for concurrent use.
type Ticking struct {
	// now is the time of the last tick in ns, without its lowest bit. That bit says that the clock has been read
	// since the tick. now is 0 while the clock is stopped.
	now atomic.Int64

	source func() int64
	timer  *time.Timer // runs if and only if now is not 0
}

const (
	clockStopped = 0
	clockRead    = 1
)

// NewTicking returns a clock that takes its time from source: ns, never negative.
func NewTicking(source func() int64) *Ticking {
	c := &Ticking{source: source}
	c.timer = time.AfterFunc(time.Hour, c.tick)
	c.timer.Stop()
	return c
}

// coarse is the clock of the process.
var coarse = NewTicking(preciseNow)

// Now returns the time in ns since the process started, up to a tick old.
func Now() int64 { return coarse.Read() }

// Read returns the time in ns, up to a tick old.
func (c *Ticking) Read() int64 {
	if t := c.now.Load(); t&clockRead != 0 {
		return t &^ clockRead
	}
	return c.firstRead()
}

// firstRead is the first read after a tick, or after the clock has stopped. Only this read writes to now, so that the
// reads of all cores share the cache line.
func (c *Ticking) firstRead() int64 {
	for {
		t := c.now.Load()
		switch {
		case t&clockRead != 0:
			return t &^ clockRead
		case t != clockStopped:
			if c.now.CompareAndSwap(t, t|clockRead) {
				return t
			}
		default:
			// The read that starts the clock does not set the bit, so that a single query costs a single tick.
			if t = c.fetch(); c.now.CompareAndSwap(clockStopped, t) {
				c.timer.Reset(Tick)
				return t
			}
		}
	}
}

func (c *Ticking) tick() {
	if t := c.now.Load(); t&clockRead == 0 && c.now.CompareAndSwap(t, clockStopped) {
		return // firstRead may start the timer again from here on
	}
	c.now.Store(c.fetch())
	c.timer.Reset(Tick)
}

// fetch returns the present time in the form that now has: without the lowest bit, and not 0.
func (c *Ticking) fetch() int64 { return c.source()&^clockRead + 2 }
