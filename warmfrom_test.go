package optcache

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
)

// dumping is a neighbour's control interface. dump writes what it holds.
type dumping struct {
	*httptest.Server
	asked  atomic.Int64           // how often for its status
	before func()                 // in the middle of a dump; nil: nothing
	clock  func() time.Time       // of the neighbour
	answer []*snapshot.Record     // of the dump
	busy   func(n int64) (b bool) // whether it is, when it is asked for the nth time; nil: never
}

func newDumping(t *testing.T, records ...*snapshot.Record) *dumping {
	d := &dumping{answer: records, clock: time.Now}
	d.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/status" {
			n := d.asked.Add(1)
			if d.busy != nil && d.busy(n) {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(api.StatusReply{Blocks: []api.BlockStatus{{}}})
			return
		}
		w.Header().Set("Content-Type", api.SnapshotForm)
		snapshot.WriteTo(w, snapshot.Header{Written: d.clock()}, func(yield func(*snapshot.Record) bool) {
			for i, r := range d.answer {
				if i == len(d.answer)/2 && d.before != nil {
					w.(http.Flusher).Flush()
					d.before()
				}
				if !yield(r) {
					return
				}
			}
		})
	}))
	t.Cleanup(d.Close)
	return d
}

// warmFrom are options with these neighbours.
func warmFrom(o options, all ...*dumping) options {
	for _, d := range all {
		o.warmFrom.from = append(o.warmFrom.from, neighboursAt(d.URL)...)
	}
	return o
}

// ended waits until no neighbour is asked any more.
func ended(t *testing.T, h *Optcache) {
	t.Helper()
	eventually(t, "the neighbours have been asked", func() bool { return !h.neighbours.isUnread() })
}

// A neighbour's answers are admitted as from a snapshot, with the age that they had there, whatever its clock says.
func TestWarmFromANeighbour(t *testing.T) {
	for name, skew := range map[string]time.Duration{"its clock is right": 0, "its clock is fast": time.Hour, "its clock is slow": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			r := snapshotOf(t, 20*time.Second-skew, false, oldRecord)
			n := newDumping(t, r, &snapshot.Record{Response: []byte("no message"), Stored: r.Stored})
			n.clock = func() time.Time { return time.Now().Add(skew) }
			up := new(upstream)
			h := startNamed(t, t.Name(), warmFrom(stockOptions(), n), up)
			ended(t, h)
			got := client(t, h)
			if got.first() != oldData || got.ttl() > 40 || got.ttl() < 25 || len(up.queries()) != 0 {
				t.Errorf("%v", got)
			}
			if h.neighbours.loaded.Load() != 1 || h.neighbours.refused[refusedMalformed].Load() != 1 || h.neighbours.failed.Load() != 0 {
				t.Errorf("%d loaded, %d refused", h.neighbours.loaded.Load(), h.neighbours.allRefused())
			}
			if h.store.ended.Load() != nil || h.store.reading.Load() != 0 {
				t.Error("it seems to be read still")
			}
		})
	}
}

// What was flushed since the start is gone: before the neighbour was asked, and while its dump came.
func TestWarmFromBringsNothingBackThatWasFlushed(t *testing.T) {
	for _, when := range []string{"before", "meanwhile", "not at all"} {
		t.Run(when, func(t *testing.T) {
			r := snapshotOf(t, 20*time.Second, false, oldRecord)
			n := newDumping(t, r, r)
			reached, goOn := make(chan bool), make(chan bool)
			if when == "before" {
				n.busy = func(nth int64) bool {
					if nth == 1 {
						close(reached)
						<-goOn
					}
					return false
				}
			} else {
				n.before = func() {
					close(reached)
					<-goOn
				}
			}
			h := startNamed(t, t.Name(), warmFrom(stockOptions(), n), new(upstream))
			<-reached
			want := 0
			if when == "not at all" {
				want = 1
			} else if _, err := (controlBlock{h}).Flush(control.Filter{Name: "host.example.org."}); err != nil {
				t.Fatal(err)
			}
			close(goOn)
			ended(t, h)
			found, err := (controlBlock{h}).Lookup("host.example.org.", dns.TypeA)
			if err != nil || len(found) != want {
				t.Errorf("%v: %v", err, found)
			}
		})
	}
}

// What has come from upstream meanwhile is newer, even if it is not kept.
func TestWarmFromReplacesNothing(t *testing.T) {
	for name, m := range ends {
		t.Run(name, func(t *testing.T) {
			r := snapshotOf(t, 20*time.Second, false, oldRecord)
			n := newDumping(t, r)
			reached, goOn := make(chan bool), make(chan bool)
			n.before = func() {
				close(reached)
				<-goOn
			}
			o := stockOptions()
			o.success.minTTL, o.denial.minTTL = 0, 0
			up := new(upstream)
			h := startNamed(t, t.Name(), warmFrom(o, n), up)
			<-reached
			up.responds(0, m)
			client(t, h)
			close(goOn)
			ended(t, h)
			if h.neighbours.loaded.Load() != 0 || h.neighbours.refused[refusedRoom].Load() != 1 {
				t.Errorf("%d loaded, %d refused", h.neighbours.loaded.Load(), h.neighbours.allRefused())
			}
		})
	}
}

// Neighbours are asked where there is no snapshot, or none of use; after a reload only if the last generation was still asking.
func TestWarmFromIsForAnEmptyStart(t *testing.T) {
	r := snapshotOf(t, 20*time.Second, false, oldRecord)
	t.Run("snapshot", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "answers")
		write := func(r *snapshot.Record) {
			if _, err := snapshot.Write(path, snapshot.Header{Written: time.Now()}, slices.Values([]*snapshot.Record{r})); err != nil {
				t.Fatal(err)
			}
		}
		write(r)
		n := newDumping(t, r)
		h := started(t, warmFrom(inFile(path), n), new(upstream), identity{})
		ended(t, h)
		if n.asked.Load() != 0 || h.snapshotter.loaded.Load() != 1 {
			t.Error("a neighbour is asked beside a snapshot")
		}
		h.stop()
		write(snapshotOf(t, time.Hour, false, oldRecord))
		h = started(t, warmFrom(inFile(path), n), new(upstream), identity{})
		ended(t, h)
		if n.asked.Load() != 1 || h.neighbours.loaded.Load() != 1 {
			t.Error("no neighbour is asked beside a snapshot that is too old")
		}
	})
	t.Run("reload", func(t *testing.T) {
		n := newDumping(t, r)
		var reloaded atomic.Bool
		n.busy = func(int64) bool { return !reloaded.Load() }
		o := warmFrom(roomFor(roomyOptions()), n)
		h := firstOf(t, o, new(upstream))
		eventually(t, "the neighbour is asked", func() bool { return h.neighbours.failed.Load() > 0 })
		next := nextOf(t, h, o)
		h.stop()
		reloaded.Store(true)
		ended(t, next)
		asked := n.asked.Load()
		if next.neighbours.loaded.Load() != 1 || next.store.ended.Load() != nil || next.store.reading.Load() != 0 {
			t.Errorf("%d loaded after a reload", next.neighbours.loaded.Load())
		}
		last := nextOf(t, next, o)
		next.stop()
		if last.neighbours != nil || n.asked.Load() != asked {
			t.Error("a neighbour is asked for what is there")
		}
	})
	t.Run("end", func(t *testing.T) {
		n := newDumping(t, r)
		n.busy = func(int64) bool { return true }
		h := startNamed(t, t.Name(), warmFrom(stockOptions(), n), new(upstream))
		eventually(t, "the neighbour is asked", func() bool { return h.neighbours.failed.Load() > 0 })
		begun := time.Now()
		h.stop()
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("it ends after %v", took)
		}
	})
}

// A file that cannot be read is an error at the start, with its place.
func TestWarmFromFiles(t *testing.T) {
	b := &corefileBlock{at: map[string]string{"warm_from": "Testfile:3"}}
	if err := b.checkWarmFrom(); err != nil {
		t.Errorf("without warm_from: %v", err)
	}
	for what, o := range map[string]warmFromOptions{
		"token": {from: neighboursAt("https://h"), tokenFile: "/none/token"},
		"ca":    {from: neighboursAt("https://h"), caFile: "/none/ca"},
		"http":  {from: neighboursAt("http://127.0.0.1:1"), caFile: "/none/ca"},
		"no":    {from: neighboursAt("https://h"), tokenFile: "/dev/null"},
	} {
		b.warmFrom = o
		if err := b.checkWarmFrom(); err == nil || !strings.HasPrefix(err.Error(), "Testfile:3 - warm_from: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
