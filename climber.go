package optcache

import (
	"sync"
	"sync/atomic"
)

// This file finds the size of the window. How much recency should count beside frequency depends
// on the traffic: cluster DNS does best with a window of a fifth, a network's forwarder with
// more than half. A hill climber (Einziger, Eytan, Friedman, Manes: Adaptive software cache
// management, 2018) moves the size by a step, looks at the hit ratio of the next sample of
// requests, and goes on or turns round. There is one for the whole store, for the shards see
// too little traffic each: on DNS traces, climbers of their own lost 0.8 to 1.7 points.

const (
	// firstShare is the window's share of the capacity to begin with, per mille.
	firstShare = 250

	leastShare, mostShare = 10, 800

	// leastSample is the number of requests between two steps. It is the number of entries
	// where that is more.
	leastSample = 50_000

	// firstStep is a step of the climb, per mille of the capacity. Each one is a little
	// smaller than the one before, until the hit ratio changes so much that the traffic must
	// have.
	firstStep, stepDecay = 100, 0.98
	restartChange        = 0.05

	// noteEvery is how many requests are counted apart, by whoever serves them, before the
	// climber hears of them.
	noteEvery = 64
)

// climber moves the size of the window. Its methods are safe for concurrent use.
type climber struct {
	share atomic.Int64 // the window's share of the capacity, per mille

	requests, hits atomic.Uint64
	nextStep       atomic.Uint64 // the number of requests at which the next step is due

	// mu guards what follows. It is never waited for: who finds it taken leaves the step to
	// who took it.
	mu           sync.Mutex
	sample       uint64
	seenRequests uint64
	seenHits     uint64
	ratio        float64 // of the sample before; negative when there is none
	step         float64 // per mille; the sign is the direction
	at           float64 // share, with its fraction
}

func newClimber(entries int) *climber {
	c := &climber{sample: uint64(max(entries, leastSample)), ratio: -1, step: firstStep, at: firstShare}
	c.share.Store(firstShare)
	c.nextStep.Store(c.sample)
	return c
}

// windowShare returns the window's share of the capacity, per mille.
func (c *climber) windowShare() int { return int(c.share.Load()) }

// note counts requests, and hits among them.
func (c *climber) note(requests, hits uint32) {
	c.hits.Add(uint64(hits))
	if c.requests.Add(uint64(requests)) >= c.nextStep.Load() && c.mu.TryLock() {
		c.climb()
		c.mu.Unlock()
	}
}

// climb ends a sample and takes a step.
func (c *climber) climb() {
	requests, hits := c.requests.Load(), c.hits.Load()
	if requests < c.nextStep.Load() {
		return // somebody else was quicker
	}
	ratio := float64(hits-c.seenHits) / float64(requests-c.seenRequests)
	change := ratio - c.ratio
	first := c.ratio < 0
	c.seenRequests, c.seenHits, c.ratio = requests, hits, ratio
	c.nextStep.Store(requests + c.sample)
	if first {
		return
	}
	if change < 0 {
		c.step = -c.step
	}
	c.at = min(max(c.at+c.step, leastShare), mostShare)
	c.share.Store(int64(c.at))
	switch {
	case change < restartChange && change > -restartChange:
		c.step *= stepDecay
	case c.step < 0:
		c.step = -firstStep
	default:
		c.step = firstStep
	}
}
