package optcache

import (
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Requests are counted by clocks that may be a tick apart: the later one may be faster.
func TestPopularityBearsClocksThatDiffer(t *testing.T) {
	t.Parallel()
	o := stockOptions()
	o.prefetch = prefetchOptions{amount: 100, gap: time.Minute, percentage: 10}
	h := startNamed(t, t.Name(), o, addressUpstream)
	answer(t, serverContext(t), h, asking("www.example.org.", dns.TypeA))
	s, _ := h.scratchFor(asking("www.example.org.", dns.TypeA), nil)
	if !h.store.find(s, h.clock()) {
		t.Fatal("it is not there")
	}
	const begin, tick = int64(1e12), int64(tick)
	for i, now := range []int64{begin, begin + tick, begin, begin, begin + 2*tick, begin + tick} {
		if n := h.store.countRequest(s, now, time.Minute, 100); n != uint32(1+i) {
			t.Errorf("request %d: counted %d", 1+i, n)
		}
	}
	// The latest time is what counts for the gap.
	if n := h.store.popularity(s, begin+2*tick+int64(time.Minute), time.Minute, 100); n != 7 {
		t.Errorf("within the gap: %d", n)
	}
	if n := h.store.popularity(s, begin+2*tick+int64(time.Minute)+1e6, time.Minute, 100); n != 1 {
		t.Errorf("after the gap: %d", n)
	}
}
