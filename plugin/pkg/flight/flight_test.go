package flight

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// name is a key. Its hash depends on its length only, so that names of the same length collide.
type name string

func (n name) Hash() uint64      { return uint64(len(n)) << 32 }
func (n name) Equal(o name) bool { return n == o }

type group = Group[name, int]

func newGroup(waiters int) *group { return &group{Waiters: waiters, Wait: 2 * time.Second} }

func start(n name) *Flight[name, int] { return &Flight[name, int]{Key: n} }

func pointer(v int) *int { return &v }

// nothingIsLeft fails the test if a flight or a waiter is left.
func nothingIsLeft(t *testing.T, g *group) {
	t.Helper()
	if g.Waiting() != 0 || g.Away() != 0 || g.UnderWay() != 0 {
		t.Errorf("%d wait, %d are away, %d flights are under way", g.Waiting(), g.Away(), g.UnderWay())
	}
}

func TestOneCallIsMadeOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(100)
		var calls atomic.Int32
		var all sync.WaitGroup
		for range 101 {
			all.Go(func() {
				f, role := g.Join(start("a"), true)
				if role == Leads {
					calls.Add(1)
					time.Sleep(time.Second)
					g.Complete(f, func() int { return 7 })
					g.Back(f, nil)
					return
				}
				if got := g.Await(t.Context(), f, time.Now().Add(time.Minute)); got != Completed || *f.Value() != 7 {
					t.Errorf("outcome %d, value %d", got, *f.Value())
				}
			})
		}
		all.Wait()
		if calls.Load() != 1 {
			t.Errorf("%d calls", calls.Load())
		}
		nothingIsLeft(t, g)
	})
}

func TestWhatBackBrings(t *testing.T) {
	for value, want := range map[*int]Outcome{pointer(3): Completed, nil: Abandoned} {
		synctest.Test(t, func(t *testing.T) {
			g := newGroup(10)
			f, _ := g.Join(start("a"), true)
			_, role := g.Join(start("a"), true)
			if role != Waits {
				t.Fatalf("role %d", role)
			}
			go func() {
				time.Sleep(time.Second)
				g.Back(f, value)
			}()
			if got := g.Await(t.Context(), f, time.Now().Add(time.Minute)); got != want || value != nil && *f.Value() != *value {
				t.Errorf("outcome %d, value %d", got, *f.Value())
			}
			nothingIsLeft(t, g)
		})
	}
}

func TestKeysThatCollideGoAlone(t *testing.T) {
	g := newGroup(10)
	f, _ := g.Join(start("a"), true)
	if _, role := g.Join(start("b"), true); role != Alone {
		t.Errorf("role %d", role)
	}
	if _, role := g.Join(start("a"), false); role != Busy {
		t.Errorf("role %d", role)
	}
	g.Back(f, nil)
	nothingIsLeft(t, g)
}

func TestWaitersAreBounded(t *testing.T) {
	g := newGroup(1)
	first, _ := g.Join(start("a"), true)
	g.Join(start("a"), true)
	second, role := g.Join(start("a"), true) // the first flight has as many waiters as it may have
	if role != Leads || second == first {
		t.Fatalf("role %d", role)
	}
	g.Complete(second, func() int { return 1 })
	if got := g.Await(t.Context(), first, time.Now().Add(time.Minute)); got != Completed {
		t.Errorf("what the second flight brings is not for those who wait for the first one: %d", got)
	}
	g.Back(first, nil)
	g.Back(second, nil)
	nothingIsLeft(t, g)
}

func TestWaiterWhoseClientGoesAway(t *testing.T) {
	g := newGroup(10)
	f, _ := g.Join(start("a"), true)
	g.Join(start("a"), true)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("away"))
	if got := g.Await(ctx, f, time.Now().Add(time.Minute)); got != Gone {
		t.Errorf("outcome %d", got)
	}
	g.Back(f, nil)
	nothingIsLeft(t, g)
}

// A request that has waited for one flight has less time for the next one.
func TestTimeToWaitIsForAllFlights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(10)
		leader, waiter := start("a"), start("a")
		g.Join(leader, true)
		begun := time.Now()
		time.Sleep(1500 * time.Millisecond)
		deadline := begun.Add(4 * time.Second)
		for _, want := range []struct {
			outcome Outcome
			at      time.Duration
		}{{Relaunched, 3500 * time.Millisecond}, {TooLate, 4 * time.Second}, {TooLate, 4 * time.Second}} {
			if f, role := g.Join(waiter, true); role != Waits || f != leader {
				t.Fatal("it does not wait")
			}
			if got := g.Await(t.Context(), leader, deadline); got != want.outcome || time.Since(begun) != want.at {
				t.Errorf("outcome %d after %v, want %d after %v", got, time.Since(begun), want.outcome, want.at)
			}
		}
	})
}

// When too many leaders hang in all, flights of each key start less often.
func TestHungCallsAreBoundedInAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(10)
		begun := time.Now()
		g.Join(start("a"), true)
		g.away.Store(hungInAll)
		for _, want := range []struct {
			at   time.Duration
			role Role
		}{{4 * time.Second, Waits}, {5 * time.Second, Refused}, {32 * time.Second, Refused}, {33 * time.Second, Leads}, {34 * time.Second, Waits}} {
			time.Sleep(time.Until(begun.Add(want.at)))
			if _, role := g.Join(start("a"), true); role != want.role {
				t.Errorf("after %v: role %d, want %d", want.at, role, want.role)
			}
		}
	})
}

func TestGroupUnderStress(t *testing.T) {
	g := &group{Waiters: 4, Wait: time.Millisecond}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for n := range 500 {
				f, role := g.Join(start(name("abc"[n%3:])), i%4 > 0)
				if role == Waits {
					if g.Await(t.Context(), f, time.Now().Add(3*time.Millisecond)) != Relaunched {
						continue
					}
					role = Leads
				}
				if role == Leads {
					if n%5 == 0 {
						time.Sleep(2 * time.Millisecond)
					}
					if n%7 > 0 {
						g.Complete(f, func() int { return n })
					}
					g.Back(f, nil)
				}
			}
		})
	}
	all.Wait()
	nothingIsLeft(t, g)
}

// What was asked for before is not for those who come after.
func TestDetach(t *testing.T) {
	g := newGroup(10)
	old, _ := g.Join(start("a"), true)
	g.Join(start("a"), true) // waits
	other, _ := g.Join(start("bb"), true)
	g.Detach(func(n name) bool { return n == "a" })
	next, role := g.Join(start("a"), true)
	if role != Leads || next == old {
		t.Fatalf("role %d", role)
	}
	if f, role := g.Join(start("bb"), false); role != Busy || f != other {
		t.Errorf("another key: role %d", role)
	}
	g.Complete(old, func() int { return 1 })
	if got := g.Await(t.Context(), old, time.Now().Add(time.Minute)); got != Completed {
		t.Errorf("the waiter of before: outcome %d", got)
	}
	if f, role := g.Join(start("a"), true); role != Waits || f != next {
		t.Errorf("role %d", role)
	}
	g.Complete(next, func() int { return 2 })
	if g.Await(t.Context(), next, time.Now().Add(time.Minute)); *next.Value() != 2 {
		t.Errorf("value %d", *next.Value())
	}
	for _, f := range []*Flight[name, int]{old, next, other} {
		g.Back(f, nil)
	}
	nothingIsLeft(t, g)
}

func TestEachFlightIsShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(1)
		first, _ := g.Join(start("a"), true)
		g.Join(start("a"), true)
		time.Sleep(time.Second)
		second, _ := g.Join(start("a"), true) // in the place of the first one, which is full
		other, _ := g.Join(start("bb"), true)
		g.Detach(func(n name) bool { return n == "bb" })
		var all []string
		g.Each(func(n name, s State) {
			all = append(all, fmt.Sprintf("%s %d %d %v %v", n, s.Leaders, s.Waiters, s.Detached, time.Since(s.Begun)))
		})
		slices.Sort(all)
		if want := []string{"a 1 0 false 0s", "a 1 1 false 1s", "bb 1 0 true 0s"}; !slices.Equal(all, want) {
			t.Errorf("%q", all)
		}
		g.Complete(second, func() int { return 1 })
		g.Await(t.Context(), first, time.Now().Add(time.Minute))
		for _, f := range []*Flight[name, int]{first, second, other} {
			g.Back(f, nil)
		}
		g.Each(func(n name, s State) { t.Errorf("%s %+v is over", n, s) })
		nothingIsLeft(t, g)
	})
}
