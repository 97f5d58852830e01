package clock

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// suspendable is a precise clock for a synctest bubble. It adds the time in suspension, in which the bubble's timers
// stand still.
type suspendable struct {
	begun     time.Time
	suspended atomic.Int64
	fetches   atomic.Int64
}

func newSuspendable() *suspendable { return &suspendable{begun: time.Now()} }

func (s *suspendable) suspend(d time.Duration) { s.suspended.Add(int64(d)) }
func (s *suspendable) now() int64              { return int64(time.Since(s.begun)) + s.suspended.Load() }
func (s *suspendable) fetch() int64            { s.fetches.Add(1); return s.now() }

// age returns how old the time of c is.
func (s *suspendable) age(c *Ticking) time.Duration {
	return time.Duration(s.now() - c.Read())
}

// clockRounding is more than the clock's error from rounding, in ns.
const clockRounding = 2

func TestClockTicksOnlyWhileItIsRead(t *testing.T) {
	for _, c := range []struct {
		name          string
		every         time.Duration // between two reads
		reads         int
		least, atMost int64 // looks at the system's clock
	}{
		{"never", 0, 0, 0, 0},
		{"once", 0, 1, 1, 1},
		{"each second", time.Second, 60, 60, 60},
		{"each third tick", 3 * Tick, 100, 100, 100},
		{"each second tick, and a bit", 2*Tick + 1, 100, 100, 100},
		{"faster than ticks", Tick/4 + 1, 4000, 900, 1010},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSuspendable()
				clock := NewTicking(s.fetch)
				for range c.reads {
					if age := s.age(clock); age < -clockRounding || age > Tick {
						t.Fatalf("the time is %v old", age)
					}
					time.Sleep(c.every)
				}
				if n := s.fetches.Load(); n < c.least || n > c.atMost {
					t.Errorf("%d looks at the system's clock, want %d to %d", n, c.least, c.atMost)
				}
				time.Sleep(2 * Tick) // the last read causes one more tick
				before := s.fetches.Load()
				time.Sleep(24 * time.Hour)
				if n := s.fetches.Load() - before; n != 0 || clock.now.Load() != clockStopped {
					t.Errorf("nobody reads, and the clock ticked %d times, now %d", n, clock.now.Load())
				}
			})
		})
	}
}

// The timer stands still while the machine is suspended.
func TestClockAfterSuspend(t *testing.T) {
	const night = 8 * time.Hour
	for _, c := range []struct {
		name string
		idle time.Duration // from the last read to the suspension
		late time.Duration // from then to when the time must be right
	}{
		{"idle before", time.Minute, 0},
		{"idle for two ticks", 2*Tick + 1, 0},
		{"read just before", 0, Tick},
		{"read half a tick before", Tick / 2, Tick / 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSuspendable()
				clock := NewTicking(s.fetch)
				for range 100 {
					clock.Read()
					time.Sleep(time.Millisecond)
				}
				clock.Read()
				time.Sleep(c.idle)
				s.suspend(night)
				time.Sleep(c.late)
				synctest.Wait()
				if age := s.age(clock); age < -clockRounding || age > Tick {
					t.Errorf("%v after a night, the time is %v old", c.late, age)
				}
			})
		})
	}
}

// Reads and ticks may coincide. No reader gets a time older than a Tick, or older than a time that it has got before.
func TestClockIsNeverStoppedForReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSuspendable()
		clock := NewTicking(s.fetch)
		var readers sync.WaitGroup
		for i := range uint64(8) {
			readers.Go(func() {
				r := rand.New(rand.NewPCG(i, 0))
				var last int64
				for range 5000 {
					// Reads at the moment of a tick, too.
					time.Sleep([]time.Duration{0, 1, Tick / 2, Tick - 1, Tick, Tick + 1, 2 * Tick, 3*Tick + 1}[r.IntN(8)])
					now := clock.Read()
					if age := time.Duration(s.now() - now); age < -clockRounding || age > Tick || now < last {
						t.Errorf("the time is %v old, and %d ns after the last one", age, now-last)
						return
					}
					last = now
				}
			})
		}
		readers.Wait()
		time.Sleep(2 * Tick)
		synctest.Wait()
		if now := clock.now.Load(); now != clockStopped {
			t.Errorf("nobody reads, and the clock runs: %d", now)
		}
	})
}

func TestClockAllocatesNothing(t *testing.T) {
	clock := NewTicking(preciseNow)
	if n := testing.AllocsPerRun(1000, func() { clock.Read() }); n != 0 {
		t.Errorf("%v allocations while it runs", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		clock.now.Store(clockStopped)
		clock.timer.Stop()
		clock.Read()
	}); n != 0 {
		t.Errorf("%v allocations to start it", n)
	}
}

func TestPreciseClockWithoutTheSystems(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const up = 100 * time.Hour
		booted := time.Now().Add(-up)
		var slept time.Duration
		works := func() (time.Duration, bool) { return time.Since(booted) + slept, true }
		never := func() (time.Duration, bool) { return 0, false }
		calls := 0
		once := func() (time.Duration, bool) {
			if calls++; calls > 1 {
				return 0, false
			}
			return works()
		}
		withSleep, without, atFirst := newPreciseClock(works), newPreciseClock(never), newPreciseClock(once)
		time.Sleep(time.Second)
		slept = time.Minute
		for _, c := range []struct {
			name  string
			clock func() int64
			want  time.Duration
		}{
			{"a system that counts suspension", withSleep, time.Second + time.Minute},
			{"one that does not say", without, time.Second},
			{"one that does not say any more", atFirst, time.Second},
		} {
			if got := time.Duration(c.clock()); got != c.want {
				t.Errorf("%s: %v, want %v", c.name, got, c.want)
			}
		}
	})
}
