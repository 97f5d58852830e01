package control

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// counting is a block that gets so many requests a second, of which a share are hits, since the bubble's start.
type counting struct {
	begun    time.Time
	qps, hit float64
}

func (c counting) status() Status {
	n := time.Since(c.begun).Seconds() * c.qps
	hits := math.Round(n * c.hit)
	return Status{
		Zones: []string{"example.org."}, Servers: []string{"dns://:53"}, Requests: uint64(n), Misses: uint64(n - hits),
		Hits: map[string]uint64{"hot": uint64(hits) / 2, "protected": uint64(hits) - uint64(hits)/2}, Entries: map[string]int64{"success": 7},
	}
}

// The ratios are those of the last 1, 5 and 60 minutes, and not of the whole life. A listener that is younger says so.
func TestRecent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newHistory()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := counting{time.Now(), 100, 0.5}
		go h.run(ctx, sampleEvery, func() []Status { return []Status{c.status()} })
		want := func(after time.Duration, all ...api.Recent) {
			t.Helper()
			time.Sleep(after)
			st := c.status()
			got := h.recent(&st, time.Now())
			ok := slices.EqualFunc(got, all, func(a, b api.Recent) bool {
				return a.Minutes == b.Minutes && math.Abs(a.Seconds-b.Seconds) <= sampleEvery.Seconds() && math.Abs(a.QPS-b.QPS) < 2 &&
					a.HitRatio != nil && math.Abs(*a.HitRatio-*b.HitRatio) < 0.02
			})
			if !ok {
				t.Errorf("after %v: %s", after, shown(got))
			}
		}
		ratio := func(f float64) *float64 { return &f }
		synctest.Wait()
		st := c.status()
		if got := h.recent(&st, time.Now()); len(got) != 0 {
			t.Errorf("at once: %s", shown(got))
		}
		want(2*time.Second, api.Recent{Minutes: 1, Seconds: 2, QPS: 100, HitRatio: ratio(0.5)})
		want(118*time.Second, api.Recent{Minutes: 1, Seconds: 60, QPS: 100, HitRatio: ratio(0.5)}, api.Recent{Minutes: 5, Seconds: 120, QPS: 100, HitRatio: ratio(0.5)})
		want(2*time.Hour, api.Recent{Minutes: 1, Seconds: 60, QPS: 100, HitRatio: ratio(0.5)}, api.Recent{Minutes: 5, Seconds: 300, QPS: 100, HitRatio: ratio(0.5)},
			api.Recent{Minutes: 60, Seconds: 3600, QPS: 100, HitRatio: ratio(0.5)})

		cancel()
		synctest.Wait()
		// Five minutes later, with all of them hits: each window sees its own part.
		before := c.status()
		rest := counting{time.Now(), 100, 1}
		statusOf := func() Status {
			s := rest.status()
			s.Requests += before.Requests
			s.Hits["hot"] += before.Hits["hot"]
			s.Hits["protected"] += before.Hits["protected"]
			return s
		}
		for range 60 {
			time.Sleep(sampleEvery)
			h.add(time.Now(), []Status{statusOf()})
		}
		st = statusOf()
		got := h.recent(&st, time.Now())
		if len(got) != 3 || *got[0].HitRatio < 0.99 || *got[1].HitRatio < 0.97 || math.Abs(*got[2].HitRatio-(0.5*55+5)/60) > 0.02 {
			t.Errorf("%s", shown(got))
		}
	})
}

func shown(all []api.Recent) (text string) {
	for _, r := range all {
		text += fmt.Sprintf("%+v", r)
		if r.HitRatio != nil {
			text += fmt.Sprintf("(%v)", *r.HitRatio)
		}
	}
	return text
}

// A history is bounded, has every number of the status, and goes on where another instance of the same block speaks.
func TestHistoryOfAnHour(t *testing.T) {
	t.Parallel()
	h := newHistory()
	now := time.Now()
	st := Status{Zones: []string{"."}, View: "v", Hits: map[string]uint64{"hot": 0}, Snapshot: &SnapshotStatus{Path: "/f"}, WindowShare: 0.25}
	more := h.more()
	for i := range 2 * mostSamples {
		st.Requests, st.Hits["hot"], st.Snapshot.Bytes = uint64(i), uint64(2*i), int64(i)
		st.Generation = i / 100 // a reload
		h.add(now.Add(time.Duration(i)*sampleEvery), []Status{st, {Zones: []string{"other."}}})
	}
	select {
	case <-more:
	default:
		t.Error("nobody is told of samples")
	}
	now = now.Add(time.Duration(2*mostSamples-1) * sampleEvery)
	got := h.of(&st, now.Add(-historyKept))
	if len(got.At) != mostSamples || math.Abs(got.At[mostSamples-1]-float64(now.UnixMilli())/1000) > 1e-6 {
		t.Fatalf("%d samples, until %v", len(got.At), got.At[len(got.At)-1])
	}
	for name, last := range map[string]float64{"requests": float64(2*mostSamples - 1), "hits.hot": float64(4*mostSamples - 2), "snapshot.bytes": float64(2*mostSamples - 1), "window_share": 0.25, "generation": float64(st.Generation)} {
		if s := got.Series[name]; len(s) != mostSamples || s[mostSamples-1] != last {
			t.Errorf("%s: %v", name, s)
		}
	}
	if s := got.Series["requests"]; s[0] != float64(mostSamples) || !slices.IsSorted(s) {
		t.Errorf("%v", s)
	}
	if part := h.of(&st, now.Add(-time.Minute)); len(part.At) != 13 || len(part.Series["requests"]) != 13 {
		t.Errorf("of a minute: %d", len(part.At))
	}
	if none := h.of(&Status{Zones: []string{"elsewhere."}}, time.Time{}); none.At == nil || none.Series == nil || len(none.At) > 0 {
		t.Errorf("%+v", none)
	}
	// A block that has gone is forgotten after an hour.
	h.add(now.Add(historyKept+sampleEvery), []Status{st})
	if len(h.blocks) != 1 {
		t.Errorf("%d blocks", len(h.blocks))
	}
}

func TestHistoriesAreBounded(t *testing.T) {
	t.Parallel()
	h := newHistory()
	now := time.Now()
	for i := range 3 * mostHistories {
		h.add(now.Add(time.Duration(i)*time.Second), []Status{{Zones: []string{fmt.Sprint(i)}}})
	}
	if len(h.blocks) != mostHistories || h.blocks[identity(&Status{Zones: []string{fmt.Sprint(3*mostHistories - 1)}})] == nil {
		t.Errorf("%d histories", len(h.blocks))
	}
}

// A listener looks at its blocks by itself, tells of it over HTTP, goes on over a reload, and stops at its end.
func TestListenerKeepsAHistory(t *testing.T) {
	t.Parallel()
	var looks atomic.Int64
	b := &fakeBlock{status: Status{Zones: []string{"."}, Requests: 5}, before: func() { looks.Add(1) }}
	s, c := started(t, func(s *server) { s.every = 20 * time.Millisecond }, b) // an hour of samples takes 14 s
	reply := func() api.HistoryReply {
		return decoded[api.HistoryReply](t, mustGet(t, c, "http://x/v1/history?minutes=1&block=0", 200))
	}
	eventually(t, "there are samples", func() bool { return len(reply().Blocks[0].At) > 3 })
	a := decoded[statusAnswer](t, mustGet(t, c, "http://x/v1/status", 200))
	if r := a.Blocks[0].Recent; len(r) != 1 || r[0].Minutes != 1 || r[0].Requests != 0 || r[0].HitRatio != nil {
		t.Errorf("%s", shown(r))
	}
	h := newHold(s.now.Load().opts, "next", blocksOf(&fakeBlock{status: Status{Zones: []string{"."}, Requests: 7, Generation: 1}}))
	s.now.Store(h)
	eventually(t, "the next generation is in the same history", func() bool {
		series := reply().Blocks[0].Series["requests"]
		return slices.Contains(series, 5) && slices.Contains(series, 7)
	})
	s.end()
	n := looks.Load()
	time.Sleep(3 * s.every)
	if looks.Load() != n {
		t.Error("it looks on after its end")
	}
}

func TestBadHistory(t *testing.T) {
	t.Parallel()
	for target, detail := range map[string]string{
		"/v1/history?minutes=0": "minutes", "/v1/history?minutes=61": "60", "/v1/history?minutes=x": "minutes", "/v1/history?block=3": "block", "/v1/history?x": `"x"`,
	} {
		w := request{target: target}.do(t, &fakeBlock{})
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 400, detail)
	}
}
