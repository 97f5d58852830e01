package optcache

import (
	"math"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/index"
)

// This file hands the answers of one generation of the Corefile to the next.
//
// A reload makes new instances while the old ones serve, and stops the old ones once the new ones do. The
// new instance of a server block that was there before takes over the old one's store: as it is, when nothing
// has changed that the store depends on; otherwise it makes a store of its own and moves the answers there, and
// until all of them have arrived, looks for what is missing in the old one. The moving begins when the old
// instance stops: a reload that fails has changed nothing.

// place is what a server block is recognized by after a reload.
type place struct {
	keys []string // zones, with protocol and port
	at   string   // the addresses that it listens on, and its view
}

// placeOf returns the place of the server block that is being started.
func placeOf(c *caddy.Controller, cfg *dnsserver.Config) place {
	hosts := slices.Sorted(slices.Values(cfg.ListenHosts))
	return place{keys: c.ServerBlockKeys, at: cfg.ViewName + "@" + strings.Join(hosts, ",")}
}

// same reports whether two generations' blocks are the same one, whose zones may have changed.
func (p *place) same(other *place) bool {
	return p.at == other.at && slices.ContainsFunc(p.keys, func(key string) bool { return slices.Contains(other.keys, key) })
}

// sameAnswers reports whether both options let the same answers into the cache, for the same time.
func (o *options) sameAnswers(other *options) bool {
	return o.servfail == other.servfail && slices.Equal(o.zones, other.zones) &&
		reflect.DeepEqual(o.success, other.success) && reflect.DeepEqual(o.denial, other.denial)
}

// takeOver gives the instance its store: that of its forerunner, a new one that the forerunner's answers will
// move to, or just a new one.
func (o *Optcache) takeOver() error {
	z := plan(&o.options)
	from := instances.forerunner(o)
	o.forerunner = from != nil
	o.unread = from == nil || from.keeper.isReading(o.file.path)
	if from != nil && from.store.sizes == z && from.sameAnswers(&o.options) {
		o.store = from.store
		o.store.users.Add(1)
		o.store.kept.Store(o.store.total())
		return nil
	}
	st, err := newStore(z)
	if err != nil {
		return err
	}
	o.store = st
	if from != nil {
		st.seed = from.store.seed // so that one key serves for both
		st.rules = rulesOf(o)
		st.climber.startFrom(from.store.climber)
		st.from.Store(from.store)
	} else if o.generation > 0 {
		log.Info("Starts with an empty cache: before the reload, this server block had none of this kind")
	}
	return nil
}

// handOver ends the instance's use of its store. If a reload has put another instance in its place, the answers
// go there; otherwise, when nobody else uses the store, its memory is given back.
func (o *Optcache) handOver(heir *Optcache) {
	last := o.store.users.Add(-1) == 0
	switch {
	case heir != nil && heir.store == o.store:
		if o.store.from.Load() == nil { // otherwise it is said when they have moved
			log.Infof("The reload has kept %d answers", o.store.total())
		}
		heir.keeper.wake()
	case heir != nil && heir.store.from.Load() == o.store && last:
		// From now on: whoever wants to move them further has to wait.
		heir.store.moving.Lock()
		o.store.to.Store(heir.store)
		go func() {
			n := heir.store.moveIn(heir.clock)
			heir.store.moving.Unlock()
			log.Infof("The reload has kept %d answers, and moved them to a cache of another make", n)
			heir.keeper.wake()
		}()
		return
	case instances.reloading(o):
		log.Infof("%d answers are dropped: their server block has no %s any more", o.store.total(), pluginName)
	}
	if last {
		o.store.close()
	}
}

// rules say which of another store's answers are good, and for how long.
type rules struct {
	zones  zoneSet
	except [classes]zoneSet
	most   [classes]uint32 // seconds
	fail   uint32          // of a failure
	prefer bool            // answers that answer their question are marked
}

func rulesOf(o *Optcache) *rules {
	cap := func(d time.Duration) uint32 { return uint32(min(d/time.Second, math.MaxUint32)) }
	return &rules{
		zones: o.zoneNames, except: o.except, prefer: o.store.preferPositive,
		most: [classes]uint32{cap(o.success.maxTTL), cap(o.denial.maxTTL)}, fail: cap(o.servfail),
	}
}

// apply makes e, found under k, what it would be if it had come under these rules. It reports false when it would
// not have been kept.
func (r *rules) apply(e *entry, k *key) bool {
	c := e.flags.class()
	if !r.zones.contain(k.name()) || r.except[c].contain(k.name()) {
		return false
	}
	most := r.most[c]
	switch e.flags & flagRcode {
	case dns.RcodeServerFailure, dns.RcodeNotImplemented: // kept as failures: see classify
		most = r.fail
	}
	e.ttl = min(e.ttl, most)
	e.flags &^= flagAnswers
	if r.prefer && c == success && e.flags&flagRcode == 0 && e.counts[0] > 0 {
		e.flags |= flagAnswers // what is kept as a success and has an answer answers its question: see keepable
	}
	return e.ttl > 0
}

// findFrom is find for what may not have arrived yet from another store.
func (st *store) findFrom(from *store, s *scratch, now int64) bool {
	if !from.findOrigin(s, now) {
		return st.find(s, now) // it may have moved meanwhile
	}
	return st.rules.apply(&s.entry, &s.key) && s.entry.servable(now, st.stale)
}

// moveIn moves the answers of the store's forerunner here, those that matter least first, so that what has no
// room makes room for what matters more. Memory that becomes free there is given back shard by shard. It returns
// how many answers have been taken over. The caller holds st.moving.
func (st *store) moveIn(clock func() int64) (n int64) {
	from := st.from.Load()
	// What is still on its way there has to arrive there first.
	from.moving.Lock()
	defer from.moving.Unlock()
	s := newScratch()
	defer func() { st.kept.Store(n) }()
	for i := range from.shards {
		sh := &from.shards[i]
		sh.moveOut(s, clock, func(e *entry, was standing) {
			if st.rules.apply(e, &s.key) && st.settle(s, e, was, clock()) {
				n++
			}
		})
		from.discard(sh)
	}
	st.from.Store(nil)
	from.close()
	return n
}

// standing is what an entry is to the policy.
type standing struct {
	segment   segment
	hot       bool
	accesses  uint32 // by the index's counter
	frequency int    // by the sketch
	state     [stateWords]uint64
}

// moveBatch is how many entries are moved while the lock of their shard is held.
const moveBatch = 64

// moveOut takes the shard's entries out, those that matter least first, after having given each to take, in s.record
// and s.key. Nobody inserts any more when it returns.
func (sh *shard) moveOut(s *scratch, clock func() int64, take func(*entry, standing)) {
	for {
		sh.lock(s, clock())
		ids := sh.policy.order(nil)
		sh.closed = len(ids) == 0
		sh.unlock()
		if len(ids) == 0 {
			return
		}
		for batch := range slices.Chunk(ids, moveBatch) {
			sh.lock(s, clock())
			for _, id := range batch {
				if sh.policy.nodes[id].segment == free {
					continue // evicted meanwhile
				}
				e, was := sh.copyOut(s, id)
				take(&e, was)
				sh.drop(id) // at no time is it in neither store
			}
			sh.unlock()
		}
	}
}

// copyOut copies the record of a node to s.record and its key to s.key.
func (sh *shard) copyOut(s *scratch, id uint32) (e entry, was standing) {
	n := &sh.policy.nodes[id]
	slot := sh.index.Load(int(n.slot))
	w, _ := sh.record(slot)
	e = loadEntry(w)
	s.record = slices.Grow(s.record[:0], e.size)[:e.size]
	copy(s.record, w[:e.size]) // its only writer holds the lock
	loadBytes(s.key.bytes[:], s.record[headerWords:][:words(e.keyLen)])
	s.key.n, s.key.hash = e.keyLen, e.hash
	was = standing{segment: n.segment, hot: n.hot, accesses: slot.Count(), frequency: sh.policy.classes[n.class].sketch.Estimate(n.hash)}
	for i := range was.state {
		if word := sh.word(id, i); word != nil {
			was.state[i] = atomic.LoadUint64(word)
		}
	}
	return e, was
}

// settle stores the entry in s.record, which has been elsewhere until now, as what it was there, unless something
// newer has come since.
func (st *store) settle(s *scratch, e *entry, was standing, now int64) bool {
	sh := st.shard(s.key.hash)
	sh.lock(s, now)
	defer sh.unlock()
	if sh.closed || sh.newer(s, e) || !e.servable(now, st.stale) {
		return false
	}
	if slot, ok := sh.locate(&s.key, flagDenial); ok {
		_, old := sh.at(slot)
		e.supersedes = old.stored < e.stored
	}
	sh.policy.still = true
	defer func() { sh.policy.still = false }()
	e.storeHeader(s.record)
	if !sh.insert(s, e, now) {
		return false
	}
	slot, ok := sh.locate(&s.key, e.flags.kind())
	if !ok {
		return false
	}
	id, _ := sh.at(slot)
	n := &sh.policy.nodes[id]
	n.expires = sh.expiry(e.stored, e.ttl)
	switch {
	case was.segment == protected || was.hot:
		sh.policy.protect(id)
	case n.segment != was.segment:
		sh.policy.move(id, was.segment)
	}
	sh.policy.classes[n.class].sketch.Add(n.hash, max(was.frequency-1, 0)) // one has been counted
	sh.index.SetCount(slot, was.accesses)
	for i, v := range was.state {
		if word := sh.word(id, i); word != nil {
			atomic.StoreUint64(word, v)
		}
	}
	if was.hot {
		sh.heat(&s.key, slot, now)
	}
	return true
}

// newer reports whether the shard has an answer for s.key that e, which is about to move in, would not have outlived: one
// that came later, of the same kind or of one that goes before.
func (sh *shard) newer(s *scratch, e *entry) bool {
	var cur index.Cursor
	kind := e.flags.kind()
	for {
		_, other, ok := sh.next(&cur, &s.key)
		if !ok {
			return false
		}
		replaces := other.flags.kind() == kind || kind == flagDenial || kind == 0 && other.flags.kind() == flagAnswers
		if replaces && other.stored >= e.stored {
			return true
		}
	}
}

// nextGeneration tells the instances that start from now on from those that run: a Corefile is being loaded.
func (s *instanceSet) nextGeneration() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation++
	return nil
}

// forget stops what a reload of o's Corefile that has failed leaves behind: the instances that are younger than o. But a
// reload fails, too, when the old generation cannot be stopped as it should, and then the new one serves all the same: what
// is stopped is all that does not run.
func (s *instanceSet) forget(o *Optcache) error {
	if o.store == nil { // it was not started
		return nil
	}
	running := caddy.Instances()
	gone := func(other *Optcache) bool { return other.of != nil && !slices.Contains(running, other.of) }
	late := gone(o)
	for _, other := range s.all() {
		if late && gone(other) || !late && other.generation > o.generation {
			other.stop()
		}
	}
	left := s.all()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation = 0
	for _, other := range left {
		s.generation = max(s.generation, other.generation)
		if other.successor != nil && other.successor.stopped.Load() {
			other.successor = nil
		}
	}
	return nil
}

// forerunner returns the instance that o takes the place of, or nil.
func (s *instanceSet) forerunner(o *Optcache) *Optcache {
	all := s.all()
	s.mu.Lock()
	defer s.mu.Unlock()
	o.generation = s.generation
	for _, other := range slices.Backward(all) {
		if other.generation < o.generation && other.successor == nil && other.place.same(&o.place) {
			other.successor = o
			return other
		}
	}
	return nil
}

// heir returns the instance that has taken the place of o, or nil.
func (s *instanceSet) heir(o *Optcache) *Optcache {
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.successor
}

// reloading reports whether a Corefile after that of o has been loaded.
func (s *instanceSet) reloading(o *Optcache) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.generation < s.generation
}
