package limit

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const second = int64(time.Second)

func TestSpareLeavesAFifth(t *testing.T) {
	l := New(100, 50)
	n := 0
	for l.Spare(0) {
		n++
	}
	if n != 41 { // the last one leaves less than a fifth
		t.Errorf("the background takes %d of 50", n)
	}
	for range 9 {
		if !l.Take(0) {
			t.Fatal("nothing is left for requests")
		}
	}
	if l.Take(0) || l.Spare(0) {
		t.Error("there are more tokens than the burst")
	}
	if !l.Take(second / 100) {
		t.Error("no token after a hundredth of a second")
	}
}

func TestABurstOfOne(t *testing.T) {
	l := New(1, 1)
	if !l.Spare(0) || l.Spare(0) || l.Take(second/2) || !l.Spare(2*second) {
		t.Error("a burst of one is not one")
	}
}

func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(10, 1)
		now := func() int64 { return time.Now().UnixNano() }
		ctx, cancel := context.WithCancel(t.Context())
		begun := time.Now()
		took := make(chan time.Duration)
		for range 5 {
			go func() {
				if _, ok := l.Await(ctx, now(), time.Second); !ok {
					t.Error("refused")
				}
				took <- time.Since(begun)
			}()
		}
		for i := range 5 {
			if d, want := <-took, time.Duration(i)*100*time.Millisecond; d < want || d > want+time.Millisecond {
				t.Errorf("no. %d has waited for %v, want %v", i, d, want)
			}
		}
		if _, ok := l.Await(ctx, now(), 99*time.Millisecond); ok {
			t.Error("it waits longer than it may")
		}
		done := make(chan bool)
		go func() {
			_, ok := l.Await(ctx, now(), time.Second)
			done <- ok
		}()
		synctest.Wait()
		cancel()
		if <-done {
			t.Error("it goes on when nobody waits any more")
		}
	})
}

func TestShared(t *testing.T) {
	a, b := Shared("x", 10, 10), Shared("x", 20, 5)
	if a != b || Shared("y", 10, 10) == a {
		t.Error("a group does not share a limiter, or two do")
	}
	if a.bucket.Limit() != 20 || a.bucket.Burst() != 5 {
		t.Errorf("%v, %d", a.bucket.Limit(), a.bucket.Burst())
	}
}

// A flood of refusals loses no token, and calls that come out of order make none.
func TestTokensAreExact(t *testing.T) {
	l := New(100, 10)
	for range 10 {
		l.Take(0)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 2000 {
				if _, ok := l.Await(context.Background(), 0, 0); ok {
					t.Error("a token from nowhere")
				}
			}
		})
	}
	all.Wait()
	n := 0
	for l.Take(second / 20) {
		n++
	}
	if n != 5 {
		t.Errorf("%d tokens in a twentieth of a second, want 5", n)
	}
	for range 100 {
		if l.Take(0) || l.Take(second/20) {
			t.Fatal("time goes back, and brings tokens")
		}
	}
}

func TestSharedKeepsItsBucket(t *testing.T) {
	l := Shared("kept", 1, 10)
	for range 10 {
		l.Take(second)
	}
	if Shared("kept", 1, 10).Take(second) {
		t.Error("a reload has filled the bucket")
	}
}
