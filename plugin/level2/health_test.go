package level2

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestBreaker(t *testing.T) {
	b := new(breaker)
	now := time.Now()
	for range 3 * breakAfter { // many at once are one
		if b.failed(now) {
			t.Fatal("it opens early")
		}
	}
	b.succeeded()
	for i := range breakAfter {
		if opened := b.failed(now.Add(time.Duration(i+1) * breakTime)); opened != (i == breakAfter-1) {
			t.Fatalf("failure %d: %v", i, opened)
		}
	}
	if b.succeeded(); !b.open.Load() {
		t.Error("a late success has closed it")
	}
	if b.close(); b.open.Load() {
		t.Error("it stays open")
	}
}

func TestQuantileFollows(t *testing.T) {
	q := &quantile{part: 0.95}
	r := rand.New(rand.NewPCG(1, 2))
	for _, most := range []time.Duration{time.Millisecond, 10 * time.Millisecond, 500 * time.Microsecond} {
		for range 20000 {
			q.observe(time.Duration(r.Int64N(int64(most))))
		}
		if got := q.value(); got < most*85/100 || got > most*105/100 {
			t.Errorf("the 95th of values up to %v is %v", most, got)
		}
	}
}

// The true time is between the bounds, however long the answer took.
func TestClockIsBetweenItsBounds(t *testing.T) {
	var c groupClock
	start := time.Now()
	if _, _, ok := c.bounds(start); ok {
		t.Error("it is known before it has been asked")
	}
	r := rand.New(rand.NewPCG(1, 2))
	server := func(at time.Time) int64 { return 5_000_000 + at.Sub(start).Milliseconds() }
	at := start
	for range 1000 {
		there := at.Add(time.Duration(r.Int64N(5e6)))
		back := there.Add(time.Duration(r.Int64N(5e6)))
		if step := c.set(at, back, server(there)); step != 0 {
			t.Fatalf("set back by %d", step)
		}
		at = back.Add(time.Duration(r.Int64N(3e9)))
		lower, upper, ok := c.bounds(at)
		if now := server(at); !ok || now < lower || now > upper || upper-lower > 15 {
			t.Fatalf("%d is not between %d and %d", now, lower, upper)
		}
	}
	// A server cannot stop the time by small steps.
	stopped, held := server(at), at
	for range 10 {
		held = held.Add(900 * time.Millisecond)
		if back := c.set(held, held, stopped); back > 0 {
			break
		}
		if _, upper, _ := c.bounds(held); upper < server(held) {
			t.Fatalf("the clock is believed that it is %d, and it is %d", upper, server(held))
		}
	}
	if _, upper, _ := c.bounds(held); upper > stopped+1800 || held.Sub(at) > 2*time.Second {
		t.Errorf("a clock that stands still is not noticed in %v", held.Sub(at))
	}
	if back := c.set(held, held, stopped-60_000); back < 59_000 || back > 61_000 {
		t.Errorf("a clock that has been set back by a minute: %d ms", back)
	}
}
