// Package histogram counts values for Prometheus. A scrape gets the counts in both forms: the classic one, with few buckets,
// and the native one, with many. One row of counters serves both, because each bound of the classic form is one of the native
// form. To count a value takes no lock and no look-up.
package histogram

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Shape says which buckets a histogram has. Values are counted as integers, and shown in another unit: as many ns as
// seconds, say. Bounds are in the unit that is shown, and upper bounds are part of their bucket.
//
// Bucket 0 is for values up to 2^Low. Each power of two from there to 2^High is divided into 2^Schema buckets, whose bounds
// have the same ratio. The last bucket is for what is larger.
type Shape struct {
	Unit      float64 // what 1 is, in the unit that is shown
	Low, High int     // High is above Low
	Schema    int     // 0 to 8
	Step      int     // every Step-th power of two from 2^Low on is a bound of the classic form
}

// Buckets is the number of buckets of a shape.
func (s *Shape) Buckets() int { return (s.High-s.Low)<<s.Schema + 2 }

// Bucket returns the bucket of a value, 0 to Buckets()-1.
func (s *Shape) Bucket(v uint64) int {
	shown := float64(v) * s.Unit
	if shown <= math.Ldexp(1, s.Low) {
		return 0
	}
	// Log2 is exact for powers of two.
	i := int(math.Ceil((math.Log2(shown) - float64(s.Low)) * float64(int(1)<<s.Schema)))
	return min(max(i, 1), s.Buckets()-1)
}

// Counts are values that have been counted.
type Counts struct {
	Buckets []uint64 // by Shape.Bucket
	Sum     uint64   // of all values
}

// Count returns the number of values.
func (c *Counts) Count() (n uint64) {
	for _, in := range c.Buckets {
		n += in
	}
	return n
}

// Powers returns the counts between powers of two, by their upper bound. What is larger than the last bound is at infinity.
func (s *Shape) Powers(c Counts) map[float64]uint64 {
	all := make(map[float64]uint64)
	for i, n := range c.Buckets {
		bound := math.Inf(1)
		if i < len(c.Buckets)-1 {
			bound = math.Ldexp(1, s.Low+(i+1<<s.Schema-1)>>s.Schema)
		}
		all[bound] += n
	}
	return all
}

// Metric returns the counts in both forms. since is when the counting began. labels are the values of desc's variable labels.
func (s *Shape) Metric(desc *prometheus.Desc, c Counts, since time.Time, labels ...string) prometheus.Metric {
	native := make(map[int]int64)
	var m both
	var below uint64
	for i, n := range c.Buckets {
		below += n
		if i > 0 && n > 0 {
			native[s.Low<<s.Schema+i] = int64(n)
		}
		if power := i >> s.Schema; i < len(c.Buckets)-1 && i == power<<s.Schema && power%s.Step == 0 {
			bound, n := math.Ldexp(1, s.Low+power), below
			m.classic = append(m.classic, &dto.Bucket{UpperBound: &bound, CumulativeCount: &n})
		}
	}
	m.Metric = prometheus.MustNewConstNativeHistogram(desc, below, float64(c.Sum)*s.Unit, native, nil, c.Buckets[0],
		int32(s.Schema), math.Ldexp(1, s.Low), since, labels...)
	return m
}

// both is a native histogram that has classic buckets, too.
type both struct {
	prometheus.Metric
	classic []*dto.Bucket
}

// Write implements prometheus.Metric.
func (b both) Write(out *dto.Metric) error {
	err := b.Metric.Write(out)
	if out.Histogram != nil {
		out.Histogram.Bucket = b.classic
	}
	return err
}

// Histogram is a histogram that is safe for concurrent use. All cores write to the same counters, so it is for what is rare
// beside hits. It is made by New.
type Histogram struct {
	shape   *Shape
	buckets []atomic.Uint64
	sum     atomic.Uint64
}

// New returns an empty histogram.
func New(s *Shape) Histogram { return Histogram{shape: s, buckets: make([]atomic.Uint64, s.Buckets())} }

// Observe counts a value.
func (h *Histogram) Observe(v uint64) {
	h.buckets[h.shape.Bucket(v)].Add(1)
	h.sum.Add(v)
}

// Counts returns what has been counted.
func (h *Histogram) Counts() (c Counts) {
	c.Buckets = make([]uint64, len(h.buckets))
	for i := range h.buckets {
		c.Buckets[i] = h.buckets[i].Load()
	}
	c.Sum = h.sum.Load()
	return c
}
