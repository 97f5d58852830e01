package optcache

import (
	"sync"
	"sync/atomic"
)

// This file finds two sizes by trying.
//
// The window: how much recency should count beside frequency depends on the traffic. Cluster DNS
// does best with a window of a fifth, a network's forwarder with more than half. What is looked
// at is the hit ratio.
//
// The hot tier, with `hot_cache_percentage auto`: how many entries are popular enough to be worth
// a copy. What is looked at is the share of requests that it answers, less a price for its size.
//
// A hill climber (Einziger, Eytan, Friedman, Manes: Adaptive software cache management, 2018)
// moves the size by a step, looks at the next sample of requests, and goes on or turns round.
// There is one for the whole store, for the shards see too little traffic each: on DNS traces,
// climbers of their own lost 0.8 to 1.7 points.

const (
	// The window's share of the capacity, per mille: to begin with and its limits. Measured on
	// three DNS traces at 1,024 to 49,664 entries; a first share of 200 or 400 costs up to
	// half a point on one or another.
	firstWindow, leastWindow, mostWindow = 250, 10, 800

	// The hot tier's share, likewise, when it is looked for.
	firstHot, leastHot, mostHot = 100, 10, 10 * autoHotPercentage

	// autoHotPercentage is the hot tier's largest share, in per cent, when it is looked for.
	autoHotPercentage = 25

	// hotPrice is what one per mille of the capacity must bring the hot tier: the share of all
	// requests that it answers beside those it answered before.
	hotPrice = 0.0005

	// leastSample is the number of requests between two steps. It is the number of entries
	// where that is more.
	leastSample = 50_000

	// firstStep is a step of the climb, per mille of the capacity. Each one is a little
	// smaller than the one before, until the value changes so much that the traffic must have.
	firstStep, stepDecay = 100, 0.98
	restartChange        = 0.05

	// noteEvery is how many requests are counted apart, by whoever serves them, before the
	// climber hears of them: its totals are on a line that all cores share.
	noteEvery = 1024
)

// tally counts requests, the hits among them, and the hits in the hot tier among those.
type tally struct {
	requests, hits, hot uint32
}

// climber moves the sizes. Its methods are safe for concurrent use.
type climber struct {
	window atomic.Int64 // the window's share of the capacity, per mille
	hot    atomic.Int64 // the hot tier's share of its memory, per mille; 1000 unless looked for

	requests, hits, hotHits atomic.Uint64
	nextStep                atomic.Uint64 // the number of requests at which the next step is due

	// mu guards what follows. It is never waited for: who finds it taken leaves the step to
	// who took it.
	mu         sync.Mutex
	sample     uint64
	seen       [3]uint64 // requests, hits, hotHits at the last step
	windowHill hill
	hotHill    *hill // nil: the hot tier has the size it was given
}

func newClimber(entries int, autoHot bool) *climber {
	c := &climber{
		sample:     uint64(max(entries, leastSample)),
		windowHill: hill{at: firstWindow, least: leastWindow, most: mostWindow, step: firstStep},
	}
	c.window.Store(firstWindow)
	c.hot.Store(1000)
	c.nextStep.Store(c.sample)
	if autoHot {
		c.hotHill = &hill{at: firstHot, least: leastHot, most: mostHot, step: firstStep / 2}
		c.hot.Store(firstHot * 1000 / mostHot)
	}
	return c
}

// startFrom makes the climb go on from where another one has come to.
func (c *climber) startFrom(other *climber) {
	other.mu.Lock()
	at := other.windowHill.at
	other.mu.Unlock()
	c.goOnFrom(at)
}

// goOnFrom makes the climb go on from a share of the window.
func (c *climber) goOnFrom(at float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.windowHill.at = min(max(at, leastWindow), mostWindow)
	c.window.Store(int64(c.windowHill.at))
}

// windowShare returns the window's share of the capacity, per mille.
func (c *climber) windowShare() int { return int(c.window.Load()) }

// hotSets returns how many of the sets that a shard has memory for it should use, 1 or more.
func (c *climber) hotSets(most int) int { return max(most*int(c.hot.Load())/1000, 1) }

// note takes over a tally.
func (c *climber) note(t tally) {
	c.hits.Add(uint64(t.hits))
	c.hotHits.Add(uint64(t.hot))
	if c.requests.Add(uint64(t.requests)) >= c.nextStep.Load() && c.mu.TryLock() {
		c.climb()
		c.mu.Unlock()
	}
}

// climb ends a sample and takes a step.
func (c *climber) climb() {
	now := [3]uint64{c.requests.Load(), c.hits.Load(), c.hotHits.Load()}
	if now[0] < c.nextStep.Load() {
		return // somebody else was quicker
	}
	requests := float64(now[0] - c.seen[0])
	hits, hot := float64(now[1]-c.seen[1])/requests, float64(now[2]-c.seen[2])/requests
	c.seen = now
	c.nextStep.Store(now[0] + c.sample)
	c.windowHill.climb(hits)
	c.window.Store(int64(c.windowHill.at))
	if c.hotHill != nil {
		c.hotHill.climb(hot - hotPrice*c.hotHill.at)
		c.hot.Store(int64(c.hotHill.at * 1000 / mostHot))
	}
}

// hill is a number that is moved between two limits to where a value is highest.
type hill struct {
	at, least, most float64
	step            float64 // the sign is the direction
	value           float64 // of the sample before, if there was one
	begun           bool
}

// climb takes a step: value is what at brought since the last one.
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
