//go:build linux && !race

package optcache

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/arena"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file holds what the series say of memory against what the kernel says of the process.

// residentSet returns the process's resident memory in bytes, after what Go can give back has been given back.
func residentSet(t *testing.T) int64 {
	t.Helper()
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

func TestMemoryInUseIsWhatIsResident(t *testing.T) {
	if !arena.ResidentIsKnown() {
		t.Skip("this machine does not say what is resident")
	}
	large := min(10_000_000, int(mostMemory/4096))
	// What else the process does meanwhile is small beside this.
	const slack = 12 << 20
	for _, tc := range []struct {
		name   string
		change func(*options)
		fill   int // entries
	}{
		{"large and empty", func(o *options) { o.success.capacity = large }, 0},
		{"a few in a large one", func(o *options) { o.success.capacity = large }, 10_000},
		{"half filled", func(o *options) {}, 100_000},
		{"filled", func(o *options) {}, 400_000},
		{"filled, with states", func(o *options) { o.prefetch.amount = 1 }, 400_000},
		{"filled, within a bound", func(o *options) { o.maxMemory = 64 << 20 }, 400_000},
		{"filled, on small pages", func(o *options) { o.maxMemory = 6 << 20 }, 100_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := benchOptions(200_000)
			tc.change(&o)
			before := residentSet(t)
			st, err := newStore(plan(&o))
			if err != nil {
				t.Fatal(err)
			}
			expect := func(when string) {
				t.Helper()
				u, resident := st.usage(), residentSet(t)-before
				if u.used < resident-slack-resident/20 || u.used > resident+slack+resident/20 {
					t.Errorf("%s: %d MB are in use, the process has %d MB more than before", when, u.used>>20, resident>>20)
				}
				if u.used > u.reserved || u.reserved > st.bound() {
					t.Errorf("%s: %d bytes in use, %d reserved, the limit is %d", when, u.used, u.reserved, st.bound())
				}
			}
			expect("empty")
			s := newScratch()
			for n := range tc.fill {
				ask1(st, s, n, 0)
				a := plainSample(record.Success, 60+n%200, 0)
				insertSample(st, s, &a, 0)
			}
			expect("filled")
			full := st.usage().used
			st.close()
			expect("closed")
			// The policy's memory is Go's; the rest is gone.
			var mapped int64
			for _, n := range st.usage().mapped {
				mapped += n
			}
			if tc.fill > 0 && full < 1<<20 || mapped != 0 {
				t.Errorf("%d bytes were in use, and %d bytes are still mapped when it has closed", full, mapped)
			}
		})
	}
}

// The old instance's memory is gone when its answers have moved, and not before that out of sight.
func TestMemoryInUseAfterAReload(t *testing.T) {
	if !arena.ResidentIsKnown() {
		t.Skip("this machine does not say what is resident")
	}
	h := firstOf(t, benchOptions(100_000), addressUpstream)
	s := newScratch()
	for n := range 100_000 {
		ask1(h.store, s, n, 0)
		a := plainSample(record.Success, 200, 0)
		insertSample(h.store, s, &a, 0)
	}
	next := nextOf(t, h, benchOptions(50_000))
	empty := next.store.usage().used
	h.stop()
	settled(next)
	var left int64
	for _, n := range h.store.usage().mapped {
		left += n
	}
	if left != 0 {
		t.Errorf("%d bytes of the old instance are left", left)
	}
	if u := next.store.usage(); u.used < empty+20_000*200 || u.used > next.store.bound() {
		t.Errorf("%d bytes in use for %d answers, before the move %d", u.used, next.store.total(), empty)
	}
}
