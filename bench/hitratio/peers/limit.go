package main

import "container/heap"

// This file is the limit: what a cache could do that knew the future.

// limit returns the hits of Belady's MIN made aware of TTLs: it keeps what is asked for again
// soonest, and nothing that has expired by the time it is asked for again. A newcomer competes
// like everybody else and may be turned away.
//
// Without TTLs no policy does better (Belady 1966, with bypass). With them it is a near-limit: to
// miss on purpose can pay, since the answer fetched then lives longer than the one given up.
// Which misses those are is a scheduling problem; on real traces it moves the figure little.
func limit(t *trace, size int) (hits int, err error) {
	const never = -1
	next := make([]int32, len(t.requests)) // request that asks for the same key next
	at := make([]int32, t.keys)
	for k := range at {
		at[k] = never
	}
	for i := len(t.requests) - 1; i >= 0; i-- {
		k := t.requests[i].key
		next[i], at[k] = at[k], int32(i)
	}

	// Who is in the cache is known by the request it is kept for.
	kept := make([]bool, len(t.requests))
	var held int
	var far farthest
	fetched := at // request that brought what is in the cache, by key; written before it is read
	for i, r := range t.requests {
		if kept[i] {
			hits++
			held--
		} else {
			fetched[r.key] = int32(i)
		}
		n := next[i]
		if n == never || t.requests[n].at >= t.requests[fetched[r.key]].expires() {
			continue
		}
		kept[n] = true
		held++
		heap.Push(&far, n)
		if held > size {
			kept[heap.Pop(&far).(int32)] = false
			held--
		}
		if len(far) > 2*size+1024 {
			far.forget(int32(i))
		}
	}
	return hits, nil
}

// farthest is a heap of the requests that something is kept for, the last one on top. Those that
// have come stay in it: they are before all others in time, so they never get to the top while
// there is anything to evict, and are swept out when they are many.
type farthest []int32

// forget sweeps out the requests up to i.
func (h *farthest) forget(i int32) {
	live := (*h)[:0]
	for _, n := range *h {
		if n > i {
			live = append(live, n)
		}
	}
	*h = live
	heap.Init(h)
}

func (h farthest) Len() int           { return len(h) }
func (h farthest) Less(i, j int) bool { return h[i] > h[j] }
func (h farthest) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *farthest) Push(x any)        { *h = append(*h, x.(int32)) }
func (h *farthest) Pop() any {
	last := len(*h) - 1
	n := (*h)[last]
	*h = (*h)[:last]
	return n
}
