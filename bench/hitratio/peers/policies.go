package main

import (
	"os"
	"path/filepath"
	"time"

	"github.com/Yiling-J/theine-go"
	"github.com/coredns/coredns/plugin/pkg/cache"
	"github.com/hashicorp/golang-lru/arc/v2"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/maypok86/otter/v2"

	"github.com/optcache/optcache"
)

// This file drives the caches that are compared. Each is what its library offers, with the
// library's defaults; none is written here again.
//
// All follow one rule: an answer that is there and alive is a hit; anything else is a miss, and
// the answer is stored with the request's TTL. A hit does not prolong it.

// policy is a way to decide who stays.
type policy struct {
	name string
	// random is true when two runs differ: keys are hashed with a seed of the process's, or the
	// victim is drawn by lot, and no library lets us say how.
	random bool
	// hits returns how many requests of a trace a cache of size answers has served.
	hits func(t *trace, size int) (int, error)
}

// policies is all of them, in the order in which they are printed.
var policies = []policy{
	{"optcache", true, online(newOptcache)},
	{"cache", true, online(newStock)},
	{"lru", false, online(newLRU)},
	{"2q", false, online(new2Q)},
	{"arc", false, online(newARC)},
	{"otter", true, online(newOtter)},
	{"theine", true, online(newTheine)},
	{"limit", false, limit},
}

// restarts are what -restart prints: what a trace's second half finds in a cache that was never restarted, in
// one that was restarted after the first half, and in one that has lost everything then.
var restarts = []policy{
	{"optcache", true, online(newOptcache)},
	{"optcache-restarted", true, online(newRestarted)},
	{"optcache-emptied", true, online(newEmptied)},
}

// bounds are what -memory prints: sizes are in megabytes then.
var bounds = []policy{
	{"optcache", true, online(func(_ *trace, size int) (driver, error) {
		s, err := optcache.NewBoundSimulation(int64(size) << 20)
		return engine{s}, err
	})},
}

// driver is a cache that is asked one request after the other.
type driver interface {
	// request asks for a key and stores the answer on a miss.
	request(r request) (hit bool)
	close()
}

// interrupted is a driver to which something happens before the first request that counts.
type interrupted interface{ interrupt() error }

// online makes a policy out of a cache that does not know the future.
func online(open func(t *trace, size int) (driver, error)) func(*trace, int) (int, error) {
	return func(t *trace, size int) (hits int, err error) {
		d, err := open(t, size)
		if err != nil {
			return 0, err
		}
		defer d.close()
		for i, r := range t.requests {
			if x, ok := d.(interrupted); ok && i == t.first {
				if err := x.interrupt(); err != nil {
					return 0, err
				}
			}
			if d.request(r) && i >= t.first {
				hits++
			}
		}
		return hits, nil
	}
}

// engine is the real one, with its shards, its memory and the default hot tier.
type engine struct{ *optcache.Simulation }

const defaultHotPercentage = 10 // hot_cache_percentage where the Corefile does not say

func openEngine(size int) (engine, error) {
	s, err := optcache.NewSimulation(size, defaultHotPercentage)
	return engine{s}, err
}

func newOptcache(_ *trace, size int) (driver, error) { return openEngine(size) }

func (e engine) request(r request) bool { return e.Request(uint64(r.key), r.ttl, int(r.bytes), r.at) }
func (e engine) close()                 { e.Close() }

// restarted is the engine as a restart leaves it that has kept the answers in a file.
type restarted struct{ engine }

func newRestarted(_ *trace, size int) (driver, error) {
	e, err := openEngine(size)
	return restarted{e}, err
}

func (r restarted) interrupt() error {
	dir, err := os.MkdirTemp("", "hitratio")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return r.Restart(filepath.Join(dir, "answers"))
}

// emptied is the engine as any other restart leaves it.
type emptied struct {
	*engine
	size int
}

func newEmptied(_ *trace, size int) (driver, error) {
	e, err := openEngine(size)
	return emptied{&e, size}, err
}

func (e emptied) interrupt() (err error) {
	e.close()
	*e.engine, err = openEngine(e.size)
	return err
}

// stock is what CoreDNS's cache plugin keeps its answers in. It is 256 shards, so that it holds
// the next lower multiple of 256, and evicts what Go's map gives it first.
type stock struct{ *cache.Cache[time.Duration] }

func newStock(_ *trace, size int) (driver, error) { return stock{cache.New[time.Duration](size)}, nil }

func (s stock) request(r request) bool {
	hash := spread(uint64(r.key))
	if expires, ok := s.Get(hash); ok && r.at < expires {
		return true
	}
	s.Add(hash, r.expires())
	return false
}

func (s stock) close() {}

// spread stands in for the hash of a name: it puts keys into shards at random, as names go there.
// FNV, which the plugin hashes names with, would deal out dense numbers to the shards in turn, and
// so flatter (`loop` at 1,024: 99.8 % instead of some 67). It is the finalizer of SplitMix64 (Steele,
// Lea and Flood 2014), which gives no two keys one hash.
func spread(key uint64) uint64 {
	key = (key ^ key>>30) * 0xbf58476d1ce4e5b9
	key = (key ^ key>>27) * 0x94d049bb133111eb
	return key ^ key>>31
}

// keeper is a cache that knows no expiry. The time is kept as the value instead; an expired
// answer is found, counts as an access and is overwritten in its place.
type keeper struct {
	get  func(key uint32) (expires time.Duration, ok bool)
	add  func(key uint32, expires time.Duration)
	done func()
}

func (k keeper) request(r request) bool {
	if expires, ok := k.get(r.key); ok && r.at < expires {
		return true
	}
	k.add(r.key, r.expires())
	return false
}

func (k keeper) close() {
	if k.done != nil {
		k.done()
	}
}

func newLRU(_ *trace, size int) (driver, error) {
	c, err := lru.New[uint32, time.Duration](size)
	if err != nil {
		return nil, err
	}
	return keeper{get: c.Get, add: func(k uint32, v time.Duration) { c.Add(k, v) }}, nil
}

func new2Q(_ *trace, size int) (driver, error) {
	c, err := lru.New2Q[uint32, time.Duration](size)
	if err != nil {
		return nil, err
	}
	return keeper{get: c.Get, add: c.Add}, nil
}

func newARC(_ *trace, size int) (driver, error) {
	c, err := arc.NewARC[uint32, time.Duration](size)
	if err != nil {
		return nil, err
	}
	return keeper{get: c.Get, add: c.Add}, nil
}

// newTheine returns theine with the expiry in the value: its own follows the system's clock and
// cannot be told another. Writes reach its policy through a channel and a goroutine, so each is
// waited for. Reads it applies in batches of 16 in the caller, and loses none.
func newTheine(_ *trace, size int) (driver, error) {
	c, err := theine.NewBuilder[uint32, time.Duration](int64(size)).Build()
	if err != nil {
		return nil, err
	}
	add := func(k uint32, v time.Duration) {
		c.Set(k, v, 1)
		c.Wait()
	}
	return keeper{get: c.Get, add: add, done: c.Close}, nil
}

// native is otter with its own expiry, per entry, on the trace's clock. Maintenance runs in the
// caller, within the write or the full read buffer that asks for it, and nowhere else: the
// executor calls what it is given, and the clock has no ticks. What is left of chance is the seed
// of its hash, which decides who collides in its sketch and so which way its climber goes: up to a
// point between runs.
type native struct {
	*otter.Cache[uint32, uint32]
	clock *traceClock
}

// traceClock is the time of the request under way. It implements otter.Clock.
type traceClock struct{ now time.Duration }

func (c *traceClock) NowNano() int64                      { return int64(c.now) }
func (c *traceClock) Tick(time.Duration) <-chan time.Time { return nil }

func newOtter(t *trace, size int) (driver, error) {
	clock := &traceClock{}
	o := otter.Options[uint32, uint32]{
		MaximumSize: size,
		Executor:    func(task func()) { task() },
		Clock:       clock,
	}
	if t.timed {
		// The value is the TTL.
		o.ExpiryCalculator = otter.ExpiryWritingFunc(func(e otter.Entry[uint32, uint32]) time.Duration {
			return time.Duration(e.Value) * time.Second
		})
	}
	c, err := otter.New(&o)
	if err != nil {
		return nil, err
	}
	return native{c, clock}, nil
}

func (n native) request(r request) bool {
	n.clock.now = r.at
	if _, ok := n.GetIfPresent(r.key); ok {
		return true
	}
	n.Set(r.key, r.ttl)
	return false
}

func (n native) close() { n.StopAllGoroutines() }
