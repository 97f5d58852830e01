package popularity

import (
	"sync"
	"testing"
	"time"
)

// These tests are about counts and retry times. Times are numbers that the tests choose.

// Two requests may read the clock at different times, and the one with the later time may be counted first.
func TestCountBearsClocksThatDiffer(t *testing.T) {
	table := make(Table, 2*WordsPerEntry)
	const begin, tick = int64(1e12), int64(20e6)
	const id, most = 1, 100
	for i, now := range []int64{begin, begin + tick, begin, begin, begin + 2*tick, begin + tick} {
		if n := table.Add(id, now, time.Minute, most); n != uint32(1+i) {
			t.Errorf("request %d: counted %d", 1+i, n)
		}
	}
	// The gap is counted from the latest time.
	for ago, want := range map[int64]uint32{int64(time.Minute): 7, int64(time.Minute) + 1e6: 1} {
		was := table.Load(id)
		if n := table.Add(id, begin+2*tick+ago, time.Minute, most); n != want {
			t.Errorf("after %d ns: %d, want %d", ago, n, want)
		}
		table.Store(id, was)
	}
	if s := table.Load(0); s != (State{}) {
		t.Errorf("the neighbour has %v", s)
	}
}

func TestCountStops(t *testing.T) {
	table := make(Table, WordsPerEntry)
	for range 10 {
		if n := table.Add(0, 1e9, time.Minute, 3); n > 3 {
			t.Fatalf("counted %d", n)
		}
	}
	table.Store(0, NewState(Most, 1e9))
	if n := table.Add(0, 1e9, time.Minute, Most); n != Most {
		t.Errorf("counted %d, want %d", n, Most)
	}
}

func TestStateComesBack(t *testing.T) {
	s := NewState(5, int64(100*time.Second))
	if s.Count() != 5 || s.Since(int64(103*time.Second)) != 3*time.Second {
		t.Errorf("count %d, since %v", s.Count(), s.Since(int64(103*time.Second)))
	}
	if s := NewState(0, 5e9); s != (State{}) {
		t.Errorf("never asked for: %v", s)
	}
}

func TestRetry(t *testing.T) {
	table := make(Table, WordsPerEntry)
	if !table.MayRetry(0, 5) {
		t.Error("a new entry may not be refreshed")
	}
	table.Postpone(0, 10)
	if table.MayRetry(0, 9) || !table.MayRetry(0, 10) {
		t.Error("not until then, or not from then on")
	}
}

func TestEmptyTable(t *testing.T) {
	var none Table
	none.Postpone(3, 10)
	none.Store(3, NewState(5, 5))
	if none.Add(3, 1, time.Minute, 9) != 0 || !none.MayRetry(3, 0) || none.Load(3) != (State{}) {
		t.Error("an empty table counts")
	}
}

func TestConcurrentCounts(t *testing.T) {
	table := make(Table, WordsPerEntry)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 1000 {
				table.Add(0, 1e9, time.Minute, Most)
			}
		})
	}
	all.Wait()
	if s := table.Load(0); s.Count() != 8000 {
		t.Errorf("counted %d", s.Count())
	}
}
