package histogram

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

var shapes = map[string]*Shape{
	"seconds of ns": {Unit: 1e-9, Low: -14, High: 4, Schema: 3, Step: 2},
	"bytes":         {Unit: 1, Low: 6, High: 14, Schema: 3, Step: 1},
	"seconds":       {Unit: 1, Low: 0, High: 18, Schema: 0, Step: 3},
}

// A value is in the bucket that its bounds say: above the bound of the bucket before, and not above its own.
func TestBucketsHaveTheirBounds(t *testing.T) {
	for name, s := range shapes {
		bound := func(i int) float64 { return math.Exp2(float64(s.Low) + float64(i)/float64(int(1)<<s.Schema)) }
		rnd := rand.New(rand.NewPCG(1, 2))
		last, seen := s.Buckets()-1, make(map[int]bool)
		check := func(v uint64) {
			shown, i := float64(v)*s.Unit, s.Bucket(v)
			seen[i] = true
			const off = 1e-12 // of the computed bounds
			if i < 0 || i > last || i > 0 && shown < bound(i-1)*(1-off) || i < last && shown > bound(i)*(1+off) {
				t.Fatalf("%s: %v is in bucket %d", name, shown, i)
			}
		}
		for _, v := range []uint64{0, 1, math.MaxUint64} {
			check(v)
		}
		for range 100_000 {
			check(uint64(math.Exp2(float64(s.Low-1)+rnd.Float64()*float64(s.High-s.Low+2)) / s.Unit))
		}
		for power := s.Low; power <= s.High; power++ {
			if v := math.Ldexp(1, power) / s.Unit; v == math.Trunc(v) && v*s.Unit == math.Ldexp(1, power) {
				if i := s.Bucket(uint64(v)); i != (power-s.Low)<<s.Schema {
					t.Errorf("%s: 2^%d is in bucket %d", name, power, i)
				}
			}
		}
		for i := range s.Buckets() {
			// Between 1 and 2, there is no integer.
			if !seen[i] {
				t.Errorf("%s: no value is in bucket %d", name, i)
			}
		}
	}
}

// What is shown, in both forms, agrees with the client library's own histogram of the same bounds.
func TestMetricIsThatOfTheLibrary(t *testing.T) {
	for name, s := range shapes {
		t.Run(name, func(t *testing.T) {
			h := New(s)
			var classic []float64
			for power := s.Low; power <= s.High; power += s.Step {
				classic = append(classic, math.Ldexp(1, power))
			}
			own := prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "h", Buckets: classic, NativeHistogramZeroThreshold: math.Ldexp(1, s.Low),
				NativeHistogramBucketFactor: math.Exp2(1/float64(int(1)<<s.Schema)) + 1e-9,
			})
			rnd := rand.New(rand.NewPCG(3, 4))
			var wg sync.WaitGroup
			for range 4 {
				var values []uint64
				for range 1000 {
					values = append(values, uint64(math.Exp2(float64(s.Low-1)+rnd.Float64()*float64(s.High-s.Low+1))/s.Unit))
				}
				wg.Go(func() {
					for _, v := range values {
						h.Observe(v)
						own.Observe(float64(v) * s.Unit)
					}
				})
			}
			wg.Wait()
			if c := h.Counts(); c.Count() != 4000 {
				t.Errorf("%d values", c.Count())
			}
			since := time.Unix(1_700_000_000, 0)
			desc := prometheus.NewDesc("h", "help", []string{"label"}, nil)
			var got, want dto.Metric
			if err := s.Metric(desc, h.Counts(), since, "value").Write(&got); err != nil {
				t.Fatal(err)
			}
			if err := own.Write(&want); err != nil {
				t.Fatal(err)
			}
			if l := got.GetLabel(); len(l) != 1 || l[0].GetName() != "label" || l[0].GetValue() != "value" {
				t.Errorf("labels %v", l)
			}
			g, w := got.GetHistogram(), want.GetHistogram()
			if !g.GetCreatedTimestamp().AsTime().Equal(since) {
				t.Errorf("since %v", g.GetCreatedTimestamp())
			}
			if off := math.Abs(g.GetSampleSum()/w.GetSampleSum() - 1); off > 1e-9 {
				t.Errorf("the sum is %v, want %v", g.GetSampleSum(), w.GetSampleSum())
			}
			g.SampleSum, g.CreatedTimestamp, w.SampleSum, w.CreatedTimestamp = nil, nil, nil, nil
			if g.String() != w.String() {
				t.Errorf("got\n%v\nwant\n%v", g, w)
			}
		})
	}
}

// Counting allocates nothing.
func BenchmarkObserve(b *testing.B) {
	h := New(shapes["seconds of ns"])
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		h.Observe(uint64(i) * 1000)
	}
}

// A value is counted at the smallest power of two that is not below it, and once.
func TestPowers(t *testing.T) {
	t.Parallel()
	s := Shape{Unit: 1, Low: 1, High: 4, Schema: 2, Step: 1}
	c := Counts{Buckets: make([]uint64, s.Buckets())}
	values := map[float64][]uint64{2: {0, 1, 2}, 4: {3, 4}, 8: {5, 7, 8}, 16: {9, 15, 16}, math.Inf(1): {17, 1000}}
	for _, of := range values {
		for _, v := range of {
			c.Buckets[s.Bucket(v)]++
		}
	}
	got := s.Powers(c)
	for bound, of := range values {
		if got[bound] != uint64(len(of)) {
			t.Errorf("%v: %d, and %d is expected", bound, got[bound], len(of))
		}
	}
	if len(got) != len(values) {
		t.Errorf("%v", got)
	}
}
