// Package climber finds two sizes of a cache by trying: that of the window, and that of the hot tier. It knows neither
// entries nor memory. The caller reports counts of requests, and reads the sizes as shares.
package climber

import (
	"sync"
	"sync/atomic"
)

// The best size of the window depends on the traffic: a large window favours recency, a small one frequency. Cluster DNS
// does best with a window of a fifth, a network's forwarder with more than half. The climber maximizes the hit ratio.
//
// The best size of the hot tier depends on how many entries are popular enough to be worth a copy. The climber looks for it
// with `hot_cache_percentage auto`. It maximizes the share of requests that the hot tier answers, less a price for its size.
//
// A hill climber (Einziger, Eytan, Friedman, Manes: Adaptive software cache management, 2018) moves the size by a step. It
// looks at the next sample of requests, and then goes on or turns round. There is one climber for the whole store, because
// a shard sees too little traffic: on DNS traces, a climber for each shard lost 0.8 to 1.7 points of hit ratio.

const (
	// FirstWindow is the window's first share of the capacity, per mille. LeastWindow and MostWindow are its limits. All
	// three were measured on three DNS traces, at 1,024 to 49,664 entries. A first share of 200 or 400 costs up to half a
	// point of hit ratio on one of the traces.
	FirstWindow, LeastWindow, MostWindow = 250, 10, 800

	// These are the hot tier's first share of the capacity and its limits, per mille, when the climber finds its size.
	firstHot, leastHot, mostHot = 100, 10, 10 * AutoHotPercentage

	// AutoHotPercentage is the hot tier's largest share of the capacity, per cent, when the climber finds its size.
	AutoHotPercentage = 25

	// hotPrice is what the hot tier must gain from another per mille of the capacity: a share of all requests that it
	// answers in addition.
	hotPrice = 0.0005

	// leastSample is the number of requests between two steps. If the store has more entries than that, it is their
	// number.
	leastSample = 50_000

	// firstStep is the first step of a climb, per mille of the capacity. Each step is stepDecay times the step before.
	// When the value changes by restartChange or more, the traffic must have changed, and steps start at firstStep again.
	firstStep, stepDecay = 100, 0.98
	restartChange        = 0.05

	// NoteEvery is how many requests a caller should count in a Tally before it calls Note. All cores share the climber's
	// counters, so each Note moves a cache line.
	NoteEvery = 1024
)

// Tally counts requests, the hits among the requests, and the hits in the hot tier among the hits.
type Tally struct {
	Requests, Hits, Hot uint32
}

// Climber moves the sizes. Its methods are safe for concurrent use.
type Climber struct {
	Window atomic.Int64 // the window's share of the capacity, per mille
	Hot    atomic.Int64 // the part of its memory that the hot tier uses, per mille; 1000 if its size is fixed

	requests, hits, hotHits atomic.Uint64
	nextStep                atomic.Uint64 // the number of requests at which the next step is due

	// mu guards the fields below. A request never waits for mu: if another request holds it, that one takes the step.
	mu         sync.Mutex
	sample     uint64    // requests between two steps
	seen       [3]uint64 // requests, hits and hotHits at the last step
	windowHill hill
	hotHill    *hill // nil if the hot tier's size is fixed
}

// New returns a climber for a store with that many entries. With autoHot it finds the size of the hot tier, too.
func New(entries int, autoHot bool) *Climber {
	c := &Climber{
		sample:     uint64(max(entries, leastSample)),
		windowHill: hill{at: FirstWindow, least: LeastWindow, most: MostWindow, step: firstStep},
	}
	c.Window.Store(FirstWindow)
	c.Hot.Store(1000)
	c.nextStep.Store(c.sample)
	if autoHot {
		c.hotHill = &hill{at: firstHot, least: leastHot, most: mostHot, step: firstStep / 2}
		c.Hot.Store(firstHot * 1000 / mostHot)
	}
	return c
}

// StartFrom sets the window's share to that of another climber, and continues from there.
func (c *Climber) StartFrom(other *Climber) {
	other.mu.Lock()
	at := other.windowHill.at
	other.mu.Unlock()
	c.GoOnFrom(at)
}

// GoOnFrom sets the window's share, per mille, within its limits, and continues from there.
func (c *Climber) GoOnFrom(at float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.windowHill.at = min(max(at, LeastWindow), MostWindow)
	c.Window.Store(int64(c.windowHill.at))
}

// WindowShare returns the window's share of the capacity, per mille.
func (c *Climber) WindowShare() int { return int(c.Window.Load()) }

// HotSets returns how many sets of its hot tier a shard should use, 1 or more. most is how many it has memory for.
func (c *Climber) HotSets(most int) int { return max(most*int(c.Hot.Load())/1000, 1) }

// State is where a climber stands.
type State struct {
	Sample, Left uint64 // requests between two steps, and until the next one
	Window       Hill
	Hot          *Hill // nil if the size of the hot tier is fixed
}

// Hill is where one of its climbs stands. Sizes are in per mille of the capacity.
type Hill struct {
	At, Step float64 // the size, and by how much the next step changes it, unless the value falls: then it turns round
	Value    float64 // of the last sample
	Begun    bool    // there was a sample
}

// State returns where the climber stands.
func (c *Climber) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := State{Sample: c.sample, Window: c.windowHill.state()}
	if due, now := c.nextStep.Load(), c.requests.Load(); due > now {
		s.Left = due - now
	}
	if c.hotHill != nil {
		hot := c.hotHill.state()
		s.Hot = &hot
	}
	return s
}

// Note adds a tally to the counts. If a step is due, Note takes it. It never waits.
func (c *Climber) Note(t Tally) {
	c.hits.Add(uint64(t.Hits))
	c.hotHits.Add(uint64(t.Hot))
	if c.requests.Add(uint64(t.Requests)) >= c.nextStep.Load() && c.mu.TryLock() {
		c.climb()
		c.mu.Unlock()
	}
}

// climb takes a step if one is due. The caller holds mu.
func (c *Climber) climb() {
	now := [3]uint64{c.requests.Load(), c.hits.Load(), c.hotHits.Load()}
	if now[0] < c.nextStep.Load() {
		return // another request has taken this step
	}
	requests := float64(now[0] - c.seen[0])
	hits, hot := float64(now[1]-c.seen[1])/requests, float64(now[2]-c.seen[2])/requests
	c.seen = now
	c.nextStep.Store(now[0] + c.sample)
	c.windowHill.climb(hits)
	c.Window.Store(int64(c.windowHill.at))
	if c.hotHill != nil {
		c.hotHill.climb(hot - hotPrice*c.hotHill.at)
		c.Hot.Store(int64(c.hotHill.at * 1000 / mostHot))
	}
}

// hill is a climb: it moves a number between two limits, to where a value is highest.
type hill struct {
	at, least, most float64
	step            float64 // the sign is the direction
	value           float64 // of the sample before
	begun           bool    // there was a sample before
}

func (h *hill) state() Hill { return Hill{h.at, h.step, h.value, h.begun} }

// climb takes a step. value is the value of the last sample, in which the number was at.
func (h *hill) climb(value float64) {
	change := value - h.value
	h.value = value
	if !h.begun {
		h.begun = true
		return
	}
	if change < 0 {
		h.step = -h.step
	}
	h.at = min(max(h.at+h.step, h.least), h.most)
	switch {
	case change < restartChange && change > -restartChange:
		h.step *= stepDecay
	case h.step < 0:
		h.step = -firstStep
	default:
		h.step = firstStep
	}
}
