package control

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// This file keeps what blocks have said of themselves in the last hour. A listener looks at its blocks every few seconds, as
// long as it lives. So the history goes on over reloads, and costs nothing where there is no listener.
//
// A sample has every number of a block's Status. A number is called by its members in JSON, with dots: requests, hits.hot,
// sent.fastpath, entries.success, snapshot.bytes. A number that is added to Status is in the history, too.

const (
	sampleEvery = 5 * time.Second
	historyKept = time.Hour
	mostSamples = int(historyKept/sampleEvery) + 1 // of a block; a number of a block takes 8 bytes in each

	// mostHistories bounds the blocks that are remembered. Beyond, those go that were seen last the longest ago, but none that
	// was seen just now. A Corefile may be reloaded with other blocks every few seconds.
	mostHistories = 256
)

// history has the samples of a listener's blocks. It is safe for concurrent use.
type history struct {
	mu     sync.Mutex // guards what follows
	blocks map[string]*samples
	next   chan struct{} // closed when there is another sample of each block
}

// samples are those of one block. They are columns, which are rings: the sample n is at n%mostSamples.
type samples struct {
	end     int // the number of samples that were taken
	at      [mostSamples]time.Time
	columns map[string]*[mostSamples]float64
}

func newHistory() *history {
	return &history{blocks: make(map[string]*samples), next: make(chan struct{})}
}

// identity is the same for the instances of a block before and after a reload.
func identity(s *Status) string {
	return strings.Join(s.Zones, " ") + "\n" + s.View + "\n" + strings.Join(s.Servers, " ")
}

// run adds a sample at once, and then another one every so often, until the context ends. look returns how the blocks are.
func (h *history) run(ctx context.Context, every time.Duration, look func() []Status) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		h.add(time.Now(), look())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// add adds a sample of each block.
func (h *history) add(now time.Time, blocks []Status) {
	h.mu.Lock()
	defer h.mu.Unlock()
	seen := make(map[string]bool)
	for i := range blocks {
		key := identity(&blocks[i])
		if seen[key] {
			continue // a block that cannot be told from another one
		}
		seen[key] = true
		s := h.blocks[key]
		if s == nil {
			s = &samples{columns: make(map[string]*[mostSamples]float64)}
			h.blocks[key] = s
		}
		s.add(now, numbers(&blocks[i]))
	}
	for key, s := range h.blocks {
		if now.Sub(s.last()) > historyKept {
			delete(h.blocks, key)
		}
	}
	for len(h.blocks) > max(mostHistories, len(seen)) {
		oldest := ""
		for key, s := range h.blocks {
			if !seen[key] && (oldest == "" || s.last().Before(h.blocks[oldest].last())) {
				oldest = key
			}
		}
		delete(h.blocks, oldest)
	}
	close(h.next)
	h.next = make(chan struct{})
}

// more returns a channel that is closed when there is another sample of each block.
func (h *history) more() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.next
}

// of returns the samples of a block since a time, the oldest first. There is none of a block that has not been seen yet.
func (h *history) of(block *Status, since time.Time) api.History {
	all := api.History{At: []float64{}, Series: map[string][]float64{}}
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.blocks[identity(block)]
	if s == nil {
		return all
	}
	from := s.begin()
	for from < s.end && s.at[from%mostSamples].Before(since) {
		from++
	}
	for n := from; n < s.end; n++ {
		all.At = append(all.At, float64(s.at[n%mostSamples].UnixMilli())/1000)
	}
	for name, column := range s.columns {
		values := make([]float64, 0, s.end-from)
		for n := from; n < s.end; n++ {
			values = append(values, column[n%mostSamples])
		}
		all.Series[name] = values
	}
	return all
}

// windows are the times, in minutes, over which status says how many requests came and were hits.
var windows = []int{1, 5, 60}

// recent returns what a block has done in the last minutes, now that its status is that. A window that is longer than the
// history is as long as the history, and is the last one.
func (h *history) recent(block *Status, now time.Time) []api.Recent {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := []api.Recent{}
	s := h.blocks[identity(block)]
	if s == nil {
		return all
	}
	current := numbers(block)
	for _, minutes := range windows {
		r, whole := s.recent(current, now, time.Duration(minutes)*time.Minute)
		if r.Seconds <= 0 {
			break
		}
		r.Minutes = minutes
		if all = append(all, r); !whole {
			break
		}
	}
	return all
}

// recent compares a block's numbers with those of a sample that was taken a window ago, or of the oldest sample. whole says that
// there is one that old.
func (s *samples) recent(current map[string]float64, now time.Time, window time.Duration) (r api.Recent, whole bool) {
	from := s.begin()
	for n := from; n < s.end && now.Sub(s.at[n%mostSamples]) >= window; n++ {
		from, whole = n, true
	}
	elapsed := now.Sub(s.at[from%mostSamples])
	if elapsed <= 0 {
		return r, false
	}
	requests, hits := 0.0, 0.0
	for name, value := range current {
		was := 0.0
		if column := s.columns[name]; column != nil {
			was = column[from%mostSamples]
		}
		switch {
		case name == "requests":
			requests += max(value-was, 0)
		case strings.HasPrefix(name, "hits."):
			hits += max(value-was, 0)
		}
	}
	r.Seconds, r.Requests, r.QPS = elapsed.Seconds(), uint64(requests), requests/elapsed.Seconds()
	if requests > 0 {
		ratio := min(hits/requests, 1) // the counters are not read at one moment
		r.HitRatio = &ratio
	}
	return r, whole
}

func (s *samples) begin() int      { return max(s.end-mostSamples, 0) }
func (s *samples) last() time.Time { return s.at[(s.end+mostSamples-1)%mostSamples] }

func (s *samples) add(now time.Time, values map[string]float64) {
	at := s.end % mostSamples
	s.at[at] = now
	for _, column := range s.columns {
		column[at] = 0
	}
	for name, value := range values {
		column := s.columns[name]
		if column == nil {
			column = new([mostSamples]float64)
			s.columns[name] = column
		}
		column[at] = value
	}
	s.end++
}

// numbers returns every number of a status, by the names of its members.
func numbers(s *Status) map[string]float64 {
	text, err := json.Marshal(s)
	var tree map[string]any
	if err == nil {
		err = json.Unmarshal(text, &tree)
	}
	if err != nil {
		panic(err) // a number of a block that is none
	}
	all := make(map[string]float64)
	var walk func(prefix string, members map[string]any)
	walk = func(prefix string, members map[string]any) {
		for name, value := range members {
			switch value := value.(type) {
			case float64:
				all[prefix+name] = value
			case map[string]any:
				walk(prefix+name+".", value)
			}
		}
	}
	walk("", tree)
	return all
}

// --- the listener's part

type historyKey struct{}

// historyOf returns the history of the listener that a request has come to.
func historyOf(r *http.Request) *history { return r.Context().Value(historyKey{}).(*history) }

// look asks all blocks how they are. It returns none if the listener has none any more.
func (s *server) look() (all []Status) {
	s.inside("history", func(h *hold) {
		for _, b := range h.blocks() {
			all = append(all, b.Status())
		}
	})
	return all
}

// --- /v1/history

func historyRoute(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	values, err := parameters(r, []string{"minutes"}, []string{"block"})
	if err != nil {
		return nil, err
	}
	most := int(historyKept / time.Minute)
	minutes := most
	if values.Has("minutes") {
		if minutes, err = strconv.Atoi(values.Get("minutes")); err != nil || minutes < 1 || minutes > most {
			return nil, badRequest("minutes", "%q is no number from 1 to %d", values.Get("minutes"), most)
		}
	}
	all, err := chosenParameters(blocks, values)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		since := time.Now().Add(-time.Duration(minutes) * time.Minute)
		a := api.HistoryReply{Blocks: []api.BlockHistory{}}
		for _, b := range all {
			st := b.Status()
			a.Blocks = append(a.Blocks, api.BlockHistory{ID: b.id, History: historyOf(r).of(&st, since)})
		}
		return jsonAnswer(a), nil
	}, nil
}
