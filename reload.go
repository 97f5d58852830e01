package optcache

import (
	"iter"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"

	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/backoff"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/popularity"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file passes the answers of one generation of the Corefile on to the next.
//
// A reload makes new instances while the previous ones serve. The previous ones stop after the new ones have started.
// A new instance is the successor of the instance that served the same server block, its predecessor. If nothing has
// changed that the store depends on, the successor uses the predecessor's store. Otherwise it makes a new store, and
// the answers move there. Until all have moved, a look-up that finds nothing in the new store searches the old one.
// Moving begins when the predecessor stops, so that a reload that fails has changed nothing.

// identity is a server block's identity: what a reload recognizes the block by.
type identity struct {
	keys []string // zones, each with protocol and port
	at   string   // view and listen addresses
}

// identityOf returns the identity of the server block that is being started.
func identityOf(c *caddy.Controller, cfg *dnsserver.Config) identity {
	hosts := slices.Sorted(slices.Values(cfg.ListenHosts))
	return identity{keys: c.ServerBlockKeys, at: cfg.ViewName + "@" + strings.Join(hosts, ",")}
}

// same reports whether the blocks of two generations are the same block. Its zones may have changed, but one must be
// left.
func (p *identity) same(other *identity) bool {
	return p.at == other.at && slices.ContainsFunc(p.keys, func(key string) bool { return slices.Contains(other.keys, key) })
}

// sameAnswers reports whether both options keep the same answers, for the same time.
func (o *options) sameAnswers(other *options) bool {
	return o.servfail == other.servfail && o.servfailMost == other.servfailMost && o.withoutSOA == other.withoutSOA && o.ecs == other.ecs &&
		slices.EqualFunc(o.ttls, other.ttls, sameTTLs) && slices.EqualFunc(o.staleFor, other.staleFor, sameSwitch) && slices.Equal(o.zones, other.zones) &&
		o.success.same(&other.success) && o.denial.same(&other.denial)
}

func sameTTLs(a, b admit.TTLs) bool {
	return a.Same(&b.Selector) && a.Class == b.Class && a.Max == b.Max && a.Min == b.Min
}

func sameSwitch(a, b admit.Switch) bool { return a.Same(&b.Selector) && a.On == b.On }

// takeOver gives the instance its store: the predecessor's, or a new one that the predecessor's answers will move to,
// or an empty one where there is no predecessor.
func (o *Optcache) takeOver() error {
	var in *pool // nil: of its own
	if o.member != nil {
		var err error
		if in, err = o.member.open(); err != nil {
			return err
		}
	}
	from := instances.predecessor(o)
	if o.limit = o.upstream.limiter(); from != nil && from.limit != nil && from.upstream == o.upstream {
		o.limit = from.limit // a reload brings no new tokens, and both have the same ones while both serve
	}
	o.hadPredecessor = from != nil
	o.unwarmed = from == nil || from.neighbours.isUnread()
	o.fileUnread = from == nil || from.snapshotter.isReading(o.file.path)
	z := plan(&o.options)
	if in != nil {
		z = in.sizes
	}
	same := in != nil && o.pooled.same
	switch {
	case same && o.member.common != nil:
		o.store = o.member.common
		o.store.users.Add(1)
		return nil
	case from != nil && (in == nil || in == from.store.pool) && from.keepsFor(o, o.pooled.name, z):
		o.store = from.store
		o.store.users.Add(1)
		o.store.kept.Store(o.store.total())
		if same {
			o.member.common = o.store
		}
		return nil
	}
	var st *store
	if in != nil {
		st = in.newStore(z.traitsOf(&o.options))
	}
	if st == nil {
		var err error
		if st, err = newStore(plan(&o.options)); err != nil {
			return err
		}
	}
	o.store = st
	if same {
		o.member.common = st
	}
	if from != nil && (from.store.pool == st.pool || instances.heir(from.store) != nil) {
		log.Info("Starts with an empty cache: another server block goes on with the answers that both had")
		from = nil
	}
	least, most := o.servfail.Truncate(time.Second), o.servfailMost.Truncate(time.Second)
	if st.failures > 0 {
		st.failing = backoff.New(st.failures, least, most)
	}
	st.made = o.clock()
	st.first = st.made
	if from != nil {
		st.first = from.store.first
		st.top.Store(from.store.top.Load())
		st.seed = from.store.seed.Of(st.seed.Owner()) // a key then has the same hash in both stores, but for the owner
		st.flushes = from.store.flushes
		if st.scopes != nil && from.store.scopes != nil {
			st.scopes.Take(from.store.scopes, st.seed.Own) // what has not moved yet is looked for, too
		}
		if last := from.store.failing; last.Is(st.failures, least, most) {
			st.failing = last
		}
		rules := o.rules // a copy: the store may outlive the instance, and must not keep it alive
		st.rules = &rules
		if st.seed.Owner() == 0 {
			st.climber.StartFrom(from.store.climber)
		}
		if o.fileUnread || o.unwarmed {
			st.ended.Store(from.store.ended.Load())
		}
		st.from.Store(from.store)
	} else if o.generation > 0 && !o.hadPredecessor {
		log.Info("Starts with an empty cache: before the reload, this server block had none of this kind")
	}
	return nil
}

// handOver ends the instance's use of its store. If the successor has a store of its own, the answers move there.
// Otherwise the store's memory is freed when no other instance uses it. successor is nil where there is none.
func (o *Optcache) handOver(successor *Optcache) {
	last := o.store.users.Add(-1) == 0
	heir := instances.heir(o.store)
	if successor != nil && successor.control.Address == "" && !successor.pooled.same {
		successor.store.top.Store(nil)
	}
	switch {
	case heir != nil && !last: // the last one that uses the store moves its answers
		return
	case heir != nil:
		// Locked before the goroutine starts: the next reload must not move the answers on before all of them are
		// here.
		heir.store.moving.Lock()
		o.store.to.Store(heir.store)
		go func() {
			n := heir.store.moveIn(heir)
			heir.store.moving.Unlock()
			log.Infof("The reload has kept %d answers, and moved them to a cache of another make", n)
			heir.snapshotter.wake()
		}()
		return
	case successor != nil && successor.store == o.store:
		if o.store.from.Load() == nil { // while answers still move in, the goroutine that moves them logs the number
			log.Infof("The reload has kept %d answers", o.store.total())
		}
		successor.snapshotter.wake()
	case successor != nil:
		log.Infof("%d answers are dropped: their server block has those of another one now", o.store.total())
	case instances.reloading(o):
		log.Infof("%d answers are dropped: their server block has no %s any more", o.store.total(), pluginName)
	}
	if last {
		o.store.close()
	}
}

// findFrom is find for an answer that may still be in from, the store whose answers are moving here.
func (st *store) findFrom(from *store, s *scratch, now int64) bool {
	s.Key.Rehash(from.seed)
	found := from.findOrigin(s, now)
	s.Key.Rehash(st.seed)
	if !found {
		return st.find(s, now) // it may have moved since the caller searched st
	}
	return st.rules.Again(&s.Entry, &s.Key) && s.Entry.Servable(now, st.stale)
}

// moveIn moves the answers of the predecessor's store here, and returns how many were kept. The least valuable ones
// move first: if there is no room for all, they give way to the later ones. The old store gives memory back after
// each shard. The caller holds st.moving.
func (st *store) moveIn(o *Optcache) (n int64) {
	from := st.from.Load()
	// A move into the old store must end first.
	from.moving.Lock()
	defer from.moving.Unlock()
	s := newScratch()
	defer func() { st.kept.Store(n) }()
	for i := range from.shards {
		sh := &from.shards[i]
		sh.moveOut(s, from.seed.Owner(), o.clock, func(e *record.Entry, was policyState) {
			s.Key.Rehash(st.seed)
			e.Hash = s.Key.Hash
			if st.rules.Again(e, &s.Key) && st.insertMoved(s, e, was, o.clock(), st.flushes.HasMoving) {
				n++
			}
			o.addEvictions(s)
		})
		from.discard(sh)
	}
	st.from.Store(nil)
	from.close()
	return n
}

// policyState is what the policy, the index and the popularity table know about an entry. It moves with the entry.
type policyState struct {
	segment   segment
	hot       bool
	accesses  uint32 // the index's access count
	frequency int    // the sketch's estimate
	state     popularity.State
}

// moveBatch is how many entries are moved while the lock of their shard is held.
const moveBatch = 64

// moveOut removes all entries of one store from the shard, the least valuable first. It passes each to take, with the record in
// s.Words and the key in s.Key. take runs under the shard's lock, which is released after each moveBatch entries.
// When moveOut returns, the shard takes no more entries of the store.
func (sh *shard) moveOut(s *scratch, owner int, clock func() int64, take func(*record.Entry, policyState)) {
	for {
		sh.lock(s, clock())
		ids := slices.DeleteFunc(sh.policy.order(nil), func(id uint32) bool { return sh.ownerOf(id) != owner })
		sh.held[owner].closed = len(ids) == 0
		sh.unlock()
		if len(ids) == 0 {
			return
		}
		for batch := range slices.Chunk(ids, moveBatch) {
			sh.lock(s, clock())
			for _, id := range batch {
				if sh.ownerOf(id) != owner {
					continue // evicted since order
				}
				e, was := sh.copyOut(s, id)
				take(&e, was)
				sh.drop(id) // after take, so that at any time the entry is in one of the stores
			}
			sh.unlock()
		}
	}
}

// copyOut copies the record of a node to s.Words, its key to s.Key, and returns its header and policy state. The
// caller holds the shard's lock.
func (sh *shard) copyOut(s *scratch, id uint32) (e record.Entry, was policyState) {
	n := &sh.policy.nodes[id]
	slot := sh.index.Load(int(n.slot))
	w, _ := sh.record(slot)
	e = record.LoadEntry(w)
	s.Words = slices.Grow(s.Words[:0], e.Size)[:e.Size]
	copy(s.Words, w[:e.Size]) // a plain copy: only a holder of the lock writes records
	e.LoadUntil(s.Words)
	s.Key.Load(&e, s.Words)
	was = policyState{segment: n.segment, hot: n.hot, accesses: slot.Count(), frequency: sh.policy.classes[n.class].sketch.Estimate(n.hash)}
	was.state = sh.states.Load(id)
	return e, was
}

// insertMoved inserts the entry in s.Words with the policy state that it had in another store or in a snapshot. It
// returns false, and inserts nothing, if the entry has expired, if a newer answer or ending has come since, or if
// there is no room, or if flushed says that the entry has been flushed; it is called under the lock of the shard.
func (st *store) insertMoved(s *scratch, e *record.Entry, was policyState, now int64, flushed func(*record.Key, *record.Entry) bool) bool {
	ok := st.insertMovedHere(s, e, was, now, flushed)
	if ok {
		st.reached(s, e, now)
	}
	return ok
}

// insertMovedHere is insertMoved without a note of the prefix.
func (st *store) insertMovedHere(s *scratch, e *record.Entry, was policyState, now int64, flushed func(*record.Key, *record.Entry) bool) bool {
	defer runtime.KeepAlive(st) // see findOrigin
	sh := st.shard(s.Key.Hash)
	sh.lock(s, now)
	defer sh.unlock()
	if sh.holding(e.Hash).closed || sh.newer(s, e) || st.ended.Load().after(e) || flushed(&s.Key, e) || !e.Servable(now, st.stale) {
		return false
	}
	sh.policy.frozen = true
	defer func() { sh.policy.frozen = false }()
	e.StoreHeader(s.Words)
	if !sh.insert(s, e, st.stale, now) {
		return false
	}
	st.note(&s.Key, e, now)
	slot, ok := sh.locate(&s.Key, e.Flags.Kind())
	if !ok {
		return false
	}
	id, _ := sh.at(slot)
	n := &sh.policy.nodes[id]
	n.expires = expiry(e, e.Stored, st.stale)
	switch {
	case n.segment != heavy && (was.segment == protected || was.hot):
		sh.policy.protect(id)
	case n.segment != heavy && was.segment != heavy && n.segment != was.segment:
		sh.policy.move(id, was.segment)
	}
	sh.policy.classes[n.class].sketch.Add(n.hash, max(was.frequency-1, 0)) // insert has added one
	sh.index.SetCount(slot, was.accesses)
	sh.states.Store(id, was.state)
	if was.hot {
		sh.heat(&s.Key, slot, now)
	}
	return true
}

// newer reports whether the shard has an answer for s.Key that replaces e, which is about to be inserted. The caller
// holds the shard's lock.
func (sh *shard) newer(s *scratch, e *record.Entry) bool {
	var cur index.Cursor
	for {
		_, other, ok := sh.next(&cur, &s.Key)
		if !ok || other.Replaces(e) {
			return ok
		}
	}
}

// hasNewer reports whether the store has an answer for s.Key that would replace e if e had come at since, in ns on
// the store's clock.
func (st *store) hasNewer(s *scratch, e record.Entry, since, now int64) bool {
	defer runtime.KeepAlive(st) // see findOrigin
	sh := st.shard(s.Key.Hash)
	sh.lock(s, now)
	defer sh.unlock()
	e.Stored = since
	return sh.newer(s, &e)
}

// corefileGeneration is what the Corefile's controller has when the end of its generation is seen to.
const corefileGeneration = pluginName + " generation"

// nextGeneration begins a new generation: a Corefile is being loaded. Instances that start from now on belong to it.
func (s *instanceSet) nextGeneration() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation++
	return nil
}

// rollBack runs in o, an instance of the previous generation, when caddy reports that a reload has failed. It stops
// the instances that are younger than o. caddy also reports a failure if the new generation serves and the previous
// one could not be stopped properly. Then o's caddy instance no longer runs, and rollBack stops the instances that do
// not run either.
func (s *instanceSet) rollBack(o *Optcache) error {
	if o.store == nil { // o was not started
		return nil
	}
	late := !o.runs()
	for _, other := range s.all() {
		if late && !other.runs() || !late && other.generation > o.generation {
			other.stop()
		}
	}
	left := s.all()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation = 0
	for _, other := range left {
		s.generation = max(s.generation, other.generation)
		if !slices.Contains(left, other.successor) { // it has been stopped, or its start has failed
			other.successor = nil
		}
	}
	return nil
}

// predecessor returns the predecessor of o, and makes o its successor. It returns nil where there is none. It also
// sets o's generation.
func (s *instanceSet) predecessor(o *Optcache) *Optcache {
	all := s.all()
	s.mu.Lock()
	defer s.mu.Unlock()
	o.generation = s.generation
	for _, other := range slices.Backward(all) {
		if other.generation < o.generation && other.successor == nil && other.identity.same(&o.identity) {
			other.successor = o
			return other
		}
	}
	return nil
}

// foreseen yields instances that are about to start, each with what predecessor will return for it as things are.
func (s *instanceSet) foreseen(members []*poolMember) iter.Seq2[*poolMember, *Optcache] {
	all := s.all()
	return func(yield func(*poolMember, *Optcache) bool) {
		taken := make(map[*Optcache]bool)
		for _, m := range members {
			var from *Optcache
			s.mu.Lock()
			for _, other := range slices.Backward(all) {
				if other.generation < s.generation && other.successor == nil && !taken[other] && other.identity.same(&m.o.identity) {
					from = other
					taken[other] = true
					break
				}
			}
			s.mu.Unlock()
			if !yield(m, from) {
				return
			}
		}
	}
}

// heir returns an instance with a store that the answers of st move to, or will move to. It returns nil if there is none.
func (s *instanceSet) heir(st *store) *Optcache {
	for _, o := range s.all() {
		if !o.stopped.Load() && o.store.from.Load() == st {
			return o
		}
	}
	return nil
}

// successorOf returns the successor of o, or nil.
func (s *instanceSet) successorOf(o *Optcache) *Optcache {
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.successor
}

// youngerAt reports whether an instance of a later generation than o's keeps its answers in the file.
func (s *instanceSet) youngerAt(o *Optcache, path string) bool {
	return slices.ContainsFunc(s.all(), func(other *Optcache) bool {
		return other.generation > o.generation && other.file.path == path && !other.stopped.Load()
	})
}

// last returns the last running instance in the line of successors that begins with o.
func (s *instanceSet) last(o *Optcache) *Optcache {
	for {
		next := s.successorOf(o)
		if next == nil || next.stopped.Load() || !next.runs() {
			return o
		}
		o = next
	}
}

// runs reports whether caddy runs the Corefile of o, or starts it.
func (o *Optcache) runs() bool { return o.of == nil || slices.Contains(caddy.Instances(), o.of) }

// reloading reports whether a later Corefile than that of o has been loaded, or is being loaded.
func (s *instanceSet) reloading(o *Optcache) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.generation < s.generation
}
