package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// parsed returns the trace of the lines, which may be separated by commas.
func parsed(t *testing.T, lines string) *trace {
	t.Helper()
	tr, line, err := parseTrace(strings.NewReader(strings.ReplaceAll(lines, ",", "\n")))
	if err != nil {
		t.Fatalf("line %d: %v", line, err)
	}
	return tr
}

// hits runs a trace through the policy of that name.
func hits(t *testing.T, name string, tr *trace, size int) int {
	t.Helper()
	chosen, err := parsePolicies(name)
	if err != nil {
		t.Fatal(err)
	}
	n, err := chosen[0].hits(tr, size)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLRUByHand(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		lines string
		size  int
		want  int
	}{
		{"0,0,0", 1, 2},
		{"0,1,0,1", 1, 0},
		{"0,1,0,2,0,1", 2, 2},                   // 0 hits twice; 1 went for 2
		{"0,1,2,0,1,2", 2, 0},                   // a loop larger than the cache
		{"0 0 5,4 0 5,5 0 5,9 0 5", 1, 2},       // 5 is too late; the fetch at 5 is good at 9
		{"0 0 5,1 1 9,6 0 5,7 1 9,8 2 9", 2, 1}, // 0 expires, and is refreshed in its place
		{"0 0 5,0 1 9,6 0 5,7 2 9,8 0 5", 2, 1}, // looking for an expired answer is a use of it
		{"0 0 0,0 0 0", 1, 0},                   // a TTL of 0 is never good
	} {
		if got := hits(t, "lru", parsed(t, tc.lines), tc.size); got != tc.want {
			t.Errorf("%s at %d: got %d hits, want %d", tc.lines, tc.size, got, tc.want)
		}
	}
}

func TestLimitByHand(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		lines string
		size  int
		want  int
	}{
		{"0,0,0", 1, 2},
		{"0,1,0,1", 1, 1},       // 1 is turned away for 0
		{"0,1,2,0,1,2", 2, 2},   // where LRU has none
		{"0,1,2,3,0,1", 1, 1},   // what never comes again does not get in
		{"0,1,0,1,0,1,0", 1, 3}, // one of the two is kept throughout
		{"0 0 5,4 0 5,5 0 5,9 0 5", 1, 2},
		// 0 will have expired at its next use, so 1 has the place although it is used later.
		{"0 0 3,1 1 60,5 0 3,9 1 60", 1, 1},
		// The same with a TTL that lasts: either has one hit, and there is one place.
		{"0 0 60,1 1 60,5 0 60,9 1 60", 1, 1},
		{"0 0 60,1 1 60,5 0 60,9 1 60", 2, 2},
		// A hit does not prolong: good at 4, no longer at 7.
		{"0 0 5,4 0 5,7 0 5", 1, 1},
		{"0 0 0,0 0 0", 1, 0},
	} {
		if got := hits(t, "limit", parsed(t, tc.lines), tc.size); got != tc.want {
			t.Errorf("%s at %d: got %d hits, want %d", tc.lines, tc.size, got, tc.want)
		}
	}
}

// best tries everything a cache could do, for traces of a few requests.
func best(tr *trace, size int) int {
	type state struct {
		at      int
		fetched string // by key, the request that brought what is held; 0 when nothing is
	}
	known := map[state]int{}
	var from func(at int, fetched []byte) int
	from = func(at int, fetched []byte) int {
		if at == len(tr.requests) {
			return 0
		}
		s := state{at, string(fetched)}
		if most, ok := known[s]; ok {
			return most
		}
		r, most, hit := tr.requests[at], 0, 0
		if f := fetched[r.key]; f > 0 && r.at < tr.requests[f-1].expires() {
			hit = 1
		} else {
			fetched = []byte(s.fetched)
			fetched[r.key] = byte(at + 1)
		}
		// Any part of what is now there may be kept.
		for set := range 1 << tr.keys {
			kept, held := []byte(string(fetched)), 0
			for k := range kept {
				if set>>k&1 == 0 {
					kept[k] = 0
				}
				if kept[k] > 0 {
					held++
				}
			}
			if held <= size {
				most = max(most, hit+from(at+1, kept))
			}
		}
		known[s] = most
		return most
	}
	return from(0, make([]byte, tr.keys))
}

// randomTrace draws requests from Zipf's distribution; with TTLs a key has always the same one.
func randomTrace(t *testing.T, rng *rand.Rand, requests, keys int, timed bool) *trace {
	t.Helper()
	zipf := rand.NewZipf(rng, 1.1, 2, uint64(keys-1))
	number, ttls := map[uint64]int{}, make([]int, keys)
	for k := range ttls {
		ttls[k] = 1 + rng.IntN(requests/2)
	}
	var lines strings.Builder
	now := 0
	for range requests {
		k := zipf.Uint64()
		if _, ok := number[k]; !ok {
			number[k] = len(number)
		}
		if timed {
			now += rng.IntN(3)
			fmt.Fprintf(&lines, "%d %d %d\n", now, number[k], ttls[number[k]])
		} else {
			fmt.Fprintln(&lines, number[k])
		}
	}
	return parsed(t, lines.String())
}

func TestLimitIsTheBestThereIs(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		tr := randomTrace(t, rng, 14, 5, false)
		for size := 1; size <= 3; size++ {
			if got, want := hits(t, "limit", tr, size), best(tr, size); got != want {
				t.Errorf("trace %d %v at %d: got %d hits, want %d", i, tr.requests, size, got, want)
			}
		}
	}
}

func TestLimitIsNearTheBestWithTTLs(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	var sum, most int
	for i := range 200 {
		tr := randomTrace(t, rng, 14, 5, true)
		for size := 1; size <= 3; size++ {
			got, want := hits(t, "limit", tr, size), best(tr, size)
			if got > want {
				t.Errorf("trace %d %v at %d: got %d hits, and %d are possible", i, tr.requests, size, got, want)
			}
			sum, most = sum+got, most+want
		}
	}
	t.Logf("%d of %d possible hits", sum, most)
	if sum*100 < most*99 {
		t.Errorf("got %d of %d possible hits, want 99 %%", sum, most)
	}
}

func TestNobodyBeatsTheLimit(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(5, 6))
	for i := range 6 {
		tr := randomTrace(t, rng, 20_000, 8_000, i%2 == 0)
		most := hits(t, "limit", tr, minSize)
		for _, p := range policies {
			got := hits(t, p.name, tr, minSize)
			if got == 0 || got > most {
				t.Errorf("trace %d: %s has %d hits, the limit %d", i, p.name, got, most)
			}
		}
	}
}

// What fits is a hit whenever it is asked for again in time, whatever the policy.
func TestAllKeepWhatFits(t *testing.T) {
	t.Parallel()
	timed := parsed(t, "0 0 5,0 1 9,4 0 5,5 0 5,8 1 9,9 1 9,9 0 5,10 0 5,11 1 9,20 0 5")
	const inTime = 4 // 0 at 4 and 9, 1 at 8 and 11; 0 at 5, 10 and 20 and 1 at 9 have expired
	plain := parsed(t, "0,1,2,0,1,2,2,1,0")
	for _, p := range policies {
		if got := hits(t, p.name, timed, minSize); got != inTime {
			t.Errorf("%s: got %d hits with TTLs, want %d", p.name, got, inTime)
		}
		if got := hits(t, p.name, plain, minSize); got != 6 {
			t.Errorf("%s: got %d hits without, want 6", p.name, got)
		}
	}
}
