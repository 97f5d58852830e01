package optcache

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/optcache/optcache/plugin/pkg/arena"
	"github.com/optcache/optcache/plugin/pkg/backoff"
	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/cut"
	"github.com/optcache/optcache/plugin/pkg/flushed"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/sketch"
	"github.com/optcache/optcache/plugin/pkg/subnet"
)

// This file is the store, which holds the answers of an instance, and the pool, which has the memory for them: it joins the
// shards and the hill climber. A pool has one store, or those of several blocks of the Corefile (option pool). The file states the
// rules between readers and writers. What a writer does inside a shard is in shard.go. How answers move
// from one store to another after a reload is in reload.go.
//
// The pool is cut into shards by hash. A writer holds its shard's lock. A reader takes no lock:
//
//  1. The reader finds a slot of the index whose tag fits, and the record that the slot points at.
//  2. The reader compares the full key, and copies the answer out, word by word.
//  3. The reader loads the slot again, and then the record's seq. If both are as before, the record did not change while
//     it was copied, and the copy is good. Otherwise the reader starts over.
//
// This is correct because a writer never changes a record in place. It writes a new answer elsewhere. It also writes a
// record elsewhere when it moves the record to make room. Then it repoints the slot in one store, and only after that it
// frees the old record's memory. So a reader of memory that was used again sees that the slot has changed. The slot may
// point to the same place again by then. In that case the record there has another seq, because each write in a shard has
// a seq of its own.

// maxRetries is how often a reader starts over. It starts over when a writer has written to the place that it was
// reading. After that many times the request is a miss.
const maxRetries = 16

// tier is where a hit was found.
type tier uint8

const (
	tierHot tier = iota
	tierProtected
	tierProbationary
	tiers
)

var tierNames = [tiers]string{"hot", "protected", "probationary"}

// events counts what the policy did during one request.
type events struct {
	evicted  [record.Classes]uint32
	promoted [tiers]uint32 // by the tier entered
	demoted  [tiers]uint32 // by the tier left
}

// pool is the memory that stores share, and the policy that says what stays in it: any of them may have all of the room. All
// methods are safe for concurrent use.
type pool struct {
	sizes
	name    string // in the Corefile; "" for the pool of one block
	shards  []shard
	climber *climber.Climber

	mu     sync.Mutex   // guards stores
	stores []*store     // by the owner of their seed
	living atomic.Int32 // stores that are not closed

	// These keep the memories reachable: the words of a memory that is not reachable are unmapped.
	data, slots, hot, states *arena.Memory
}

// store holds the answers of one instance, or of several that share them. All methods are safe for concurrent use.
type store struct {
	*pool
	traits
	seed   record.Seed
	closed atomic.Bool // close has been called

	// These are for reloads: see reload.go.
	users   atomic.Int32            // instances that use the store
	from    atomic.Pointer[store]   // the predecessor's store, while its answers move here; otherwise nil
	to      atomic.Pointer[store]   // the successor's store, once this store's answers move there
	rules   rules                   // decide which of the predecessor's answers may stay, and for how long
	moving  sync.Mutex              // held while answers move here
	kept    atomic.Int64            // number of answers that the last reload has kept
	ended   atomic.Pointer[endings] // while a snapshot is read: keys whose answers in it have ended; otherwise nil
	reading atomic.Int32            // instances that read a snapshot

	top         atomic.Pointer[tops] // what comes most often; nil: without the control interface
	first, made int64                // when the first store in the line of those before this one was made, and when this one was

	cuts *cut.Table // names that are known to exist or not; nil: without nxdomain_cut

	scopes *subnet.Table // which prefixes names have answers for; nil: without ecs scoped

	failing *backoff.Table // names and zones that have failed; shared with stores that it fits; nil: without MAX of servfail

	flushes *flushed.Log // what has been flushed; shared with the stores before and after this one
}

// rules decide on records that were admitted by other rules.
type rules interface {
	// Again makes e, the header of a record of k, what these rules would have made of it. It reports false when they would
	// not have admitted the record.
	Again(e *record.Entry, k *record.Key) bool
}

// newStore allocates a store with a pool of its own. It fails when the system does not have the memory.
func newStore(z sizes) (*store, error) {
	p, err := newPool(z)
	if err != nil {
		return nil, err
	}
	return p.newStore(z.traits), nil
}

// newStore gives the pool one more store, or returns nil if it has as many as it has owners.
func (p *pool) newStore(t traits) *store {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.stores) == len(p.shards[0].held) {
		return nil
	}
	st := &store{pool: p, traits: t, seed: record.MakeSeed(len(p.stores)), flushes: new(flushed.Log)}
	st.users.Store(1)
	if t.cuts > 0 {
		st.cuts = cut.New(t.cuts)
	}
	st.scopes = st.newSubnets()
	p.stores = append(p.stores, st)
	p.living.Add(1)
	return st
}

// newPool allocates a pool without stores. It fails when the system does not have the memory.
func newPool(z sizes) (*pool, error) {
	p := &pool{sizes: z, shards: make([]shard, z.shards)}
	p.climber = climber.New(z.entries(), z.autoHot)
	dataPieces := z.shards * (z.pieces[record.Success] + z.pieces[record.Denial])
	slotWords := z.buckets * index.SlotsPerBucket
	hotWords := z.hotSets * hotSetBytes / record.WordBytes
	var err error
	if p.data, err = arena.NewMemory(int64(dataPieces) * pieceBytes); err != nil {
		return nil, err
	}
	if p.slots, err = arena.NewMemory(int64(z.shards) * int64(slotWords) * record.WordBytes); err != nil {
		return nil, err
	}
	var hot []uint64
	if hotWords > 0 {
		if p.hot, err = arena.NewMemory(int64(z.shards) * int64(hotWords) * record.WordBytes); err != nil {
			return nil, err
		}
		hot = p.hot.Words()
	}
	stateWords := z.stateWords()
	var states []uint64
	if stateWords > 0 {
		if p.states, err = arena.NewMemory(int64(z.shards) * int64(stateWords) * record.WordBytes); err != nil {
			return nil, err
		}
		states = p.states.Words()
	}
	data, slots := p.data.Words(), p.slots.Words()
	for i := range p.shards {
		sh := &p.shards[i]
		var capacity [record.Classes]int
		for c := range capacity {
			capacity[c] = share(z.most(record.Class(c)), z.shards, i)
			sh.own[c] = share(z.capacity[c], z.shards, i)
			sh.region.share[c] = z.pieces[c] * z.pieceGranules()
		}
		sh.region.words = data[:dataPieces*pieceWords]
		sh.region.first, sh.region.stride = i*pieceWords, z.shards*pieceWords
		sh.region.alloc = arena.NewSpannedAllocator(sh.region.share[record.Success]+sh.region.share[record.Denial], z.pieceGranules())
		sh.index = index.New(slots[i*slotWords:][:slotWords:slotWords])
		if z.hotSets > 0 {
			// The slots of all shards come before the tags of all shards, so that each slot starts on a line.
			n := z.hotSets * hotWays * hotSlotWords
			sh.hot.slots = hot[i*n:][:n:n]
			sh.hot.tags = hot[z.shards*n+i*z.hotSets:][:z.hotSets:z.hotSets]
			sh.hot.sets.Store(uint64(p.climber.HotSets(z.hotSets)))
		}
		sh.held = make([]holding, max(z.owners, 1))
		if stateWords > 0 {
			sh.states = states[i*stateWords:][:stateWords:stateWords]
		}
		sh.policy = newSLRU(capacity, sh, p.climber)
		sh.policy.most = sh.own[record.Success] + sh.own[record.Denial]
		for c := range record.Classes {
			sh.policy.classes[c].room = sh.own[c]
		}
		sh.seq = rand.Uint64() >> 1 // a random start: a client must not be able to guess what the words hold
		sh.granule, sh.hotAfter = z.granuleWords, z.hotAfter
		// The policy tells counts of 0 to 3 apart. Promotion needs counts up to hotAfter.
		sh.saturate = max(z.hotAfter, 3)
	}
	return p, nil
}

// close ends the store: it takes no more answers. With the last store of a pool, close empties the pool for good and gives its
// memory back. Requests that are still under way may use the store meanwhile and afterwards: then they find nothing and store
// nothing. A second call does no harm.
func (st *store) close() {
	for i := range st.shards {
		sh := &st.shards[i]
		sh.mu.Lock()
		sh.held[st.seed.Owner()].closed = true
		sh.mu.Unlock()
	}
	if st.closed.Swap(true) || st.living.Add(-1) > 0 {
		return
	}
	st.slots.Zero()
	for _, m := range []*arena.Memory{st.hot, st.states} {
		if m != nil {
			m.Zero()
		}
	}
	st.data.Zero()
	for i := range st.shards {
		sh := &st.shards[i]
		for owner := range sh.held {
			for c := range record.Classes {
				sh.held[owner].entries[c].Store(0)
			}
		}
		// Requests that wait for an upstream may refer to the store for long after.
		sh.mu.Lock()
		sh.policy.drop()
		sh.mu.Unlock()
	}
}

// discard gives the memory of a shard's records back, if the shard is empty, and closed for all stores.
func (p *pool) discard(sh *shard) {
	sh.mu.Lock()
	over := sh.region.alloc.Used() == 0
	for i := range sh.held {
		over = over && sh.held[i].closed
	}
	sh.mu.Unlock()
	if !over {
		return
	}
	r := &sh.region
	for at := r.first; at < len(r.words); at += r.stride {
		p.data.ZeroPart(at, pieceWords)
	}
}

// len returns the number of entries of a class. It takes no lock.
func (st *store) len(c record.Class) (n int64) {
	for i := range st.shards {
		n += st.shards[i].held[st.seed.Owner()].entries[c].Load()
	}
	return n
}

// total returns the number of entries.
func (st *store) total() int64 { return st.len(record.Success) + st.len(record.Denial) }

// all returns the stores of the pool.
func (p *pool) all() []*store {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.stores)
}

// bytes returns the memory that the records of a class have, in bytes. It takes each shard's lock in turn.
func (st *store) bytes(c record.Class) (n int64) {
	for i := range st.shards {
		sh := &st.shards[i]
		sh.mu.Lock()
		n += int64(sh.held[st.seed.Owner()].granules[c]) * int64(sh.granule) * record.WordBytes
		sh.mu.Unlock()
	}
	return n
}

// usage is how much memory a pool takes, in bytes.
type usage struct {
	used     int64   // memory that the kernel has given
	reserved int64   // addresses that are set aside
	huge     int64   // the part of used that is on huge pages; usage leaves it at 0
	mapped   []int64 // the part of used that lies in each of memories()

	records  [record.Classes]int64 // what records have, by class
	segments [segments]int64       // entries, and not bytes
}

// usage adds up how much memory of each part the kernel has given. Where the kernel does not say, usage counts the granules
// of records, and takes all other parts as used in full. It takes each shard's lock in turn. In a store with room for ten
// million answers it takes some ten milliseconds.
func (p *pool) usage() (u usage) {
	add := func(used, reserved int64) {
		u.used += used
		u.reserved += reserved
	}
	for _, m := range p.memories() {
		u.mapped = append(u.mapped, m.Resident())
		add(u.mapped[len(u.mapped)-1], m.Bytes())
	}
	known := arena.ResidentIsKnown()
	if !known {
		u.used -= p.data.Bytes()
	}
	for i := range p.shards {
		sh := &p.shards[i]
		sh.mu.Lock()
		nodes, states, alloc := sh.policy.nodes, sh.policy.classes, sh.region.alloc
		if !known {
			u.used += int64(alloc.Used()) * int64(sh.granule) * record.WordBytes
		}
		for c := range states {
			u.records[c] += int64(sh.region.used[c]) * int64(sh.granule) * record.WordBytes
			for s := range states[c].segments {
				u.segments[s] += int64(states[c].segments[s].n)
			}
		}
		sh.mu.Unlock() // the slice headers are copied: what follows needs addresses and lengths, not contents
		add(arena.Resident(nodes), int64(cap(nodes))*nodeBytes)
		for c := range states {
			d := &states[c]
			if d.sketch == nil { // the pool is closed
				continue
			}
			counters := d.sketch.Memory()
			add(arena.Resident(counters), int64(len(counters))*sketch.LineBytes)
			add(arena.Resident(d.ghost), int64(len(d.ghost))*ghostBytes)
		}
		add(alloc.Resident(), alloc.Bytes())
	}
	for _, each := range p.all() {
		tables := backoff.Bytes(each.failures)
		if each.scopes != nil {
			tables += subnet.Memory(each.prefixes())
		}
		if each.cuts != nil {
			tables += each.cuts.Bytes()
		}
		add(tables, tables)
	}
	add(arena.Resident(p.shards), int64(len(p.shards))*int64(unsafe.Sizeof(shard{})))
	runtime.KeepAlive(p)
	return u
}

// memories returns the mapped memories that the pool has.
func (p *pool) memories() []*arena.Memory {
	return slices.DeleteFunc([]*arena.Memory{p.data, p.slots, p.hot, p.states}, func(m *arena.Memory) bool { return m == nil })
}

// bound returns the most bytes that the pool can ever use.
func (p *pool) bound() int64 { return p.fixed() + p.data.Bytes() }

// hotCapacity returns how many entries the hot tier has room for.
func (p *pool) hotCapacity() (n int64) {
	for i := range p.shards {
		n += int64(p.shards[i].hot.sets.Load()) * hotWays
	}
	return n
}

// hotEntries returns how many entries have a copy in the hot tier.
func (p *pool) hotEntries() (n int64) {
	for i := range p.shards {
		n += p.shards[i].hot.entries()
	}
	return n
}

// fixed returns the most bytes that everything but the records can use.
func (p *pool) fixed() int64 {
	granules := (p.pieces[record.Success] + p.pieces[record.Denial]) * p.pieceGranules()
	return int64(p.sizes.shards) * (p.overhead() + int64(granules)/64*allocatorBytes)
}

func (p *pool) shard(hash uint64) *shard { return &p.shards[hash&uint64(len(p.shards)-1)] }

// lookup fills s with the answer for s.Key that may be served at now, and reports whether there is one. It never waits for
// a lock. It allocates nothing, unless the answer is larger than the buffers of s. The access that makes an entry popular
// tries to take the shard's lock, and then promotes the entry.
func (st *store) lookup(s *scratch, now int64) bool {
	hit := st.search(s, now)
	st.counted(s, hit, now)
	return hit
}

// search is find in all stores that the answer may be in while answers move from one store to another. The successors'
// stores are among them: a request of an old generation may look for its answer after the answer has moved on.
func (st *store) search(s *scratch, now int64) bool {
	if st.findOrigin(s, now) && (st.to.Load() == nil || !st.mayYield(&s.Entry)) {
		return true
	}
	for to := st.to.Load(); to != nil; to = to.to.Load() {
		s.Key.Rehash(to.seed)
		found := to.findOrigin(s, now)
		s.Key.Rehash(st.seed)
		if found {
			return true
		}
	}
	return false
}

// findOrigin is find in this store and in the stores that answers are moving from.
//
// Like each method that loads or stores mapped words, findOrigin keeps the store reachable to its end (runtime.KeepAlive).
// The words of a store that is no longer reachable are unmapped.
func (st *store) findOrigin(s *scratch, now int64) bool {
	from := st.from.Load() // loaded before the search: an answer that arrives during the search would be missed otherwise
	found := st.find(s, now)
	if from != nil && (!found || st.mayYield(&s.Entry)) {
		own := s.Entry
		if st.findFrom(from, s, now) && (!found || !own.Replaces(&s.Entry)) {
			found = true
		} else if found {
			found = st.find(s, now)
		}
	}
	runtime.KeepAlive(st)
	return found
}

// mayYield reports whether an answer that would be served instead of e may be in another store, because answers are moving
// to or from this one.
func (st *store) mayYield(e *record.Entry) bool {
	rank := e.Rank()
	return (rank == record.RankVoid || st.preferPositive && rank != record.RankAnswer) && (st.from.Load() != nil || st.to.Load() != nil)
}

// end removes the records of s.Key that have expired at now, and those that neither answer nor deny (record.FlagVoid). It
// does so in this store and in all stores that answers are moving from or to. A record that prefer_positive prefers
// (record.FlagAnswers) stays, unless answered says that a newer answer has come. end takes one shard's lock in each store,
// one at a time. Afterwards s.Key is good for no store.
func (st *store) end(s *scratch, answered bool, now int64) {
	for to := st.to.Load(); to != nil; to = st.to.Load() {
		st = to
	}
	s.Key.Rehash(st.seed)
	st.ended.Load().add(s.Key.Hash, now)
	st.endFrom(s, answered, now)
}

// endFrom is end in this store and in the stores that answers are moving from. It begins with the oldest store: a record
// that leaves a store before endFrom gets there is found in the next one.
func (st *store) endFrom(s *scratch, answered bool, now int64) {
	defer runtime.KeepAlive(st) // see findOrigin
	if from := st.from.Load(); from != nil {
		from.endFrom(s, answered, now)
	}
	s.Key.Rehash(st.seed)
	sh := st.shard(s.Key.Hash)
	sh.lock(s, now)
	defer sh.unlock()
	if sh.holding(s.Key.Hash).closed {
		return
	}
	sh.dropRecords(&s.Key, func(e *record.Entry) bool {
		return (e.Remaining(now) <= 0 || e.Flags&record.FlagVoid != 0) && (answered || e.Flags&record.FlagAnswers == 0)
	})
}

// counted counts a lookup in the request's tally. Some requests are samples (top.go). The climber is told of every NoteEvery
// lookups at once, because all cores share the climber's counters.
func (st *store) counted(s *scratch, hit bool, now int64) {
	if hit {
		s.tally.Hits++
		if s.tier == tierHot {
			s.tally.Hot++
		}
	}
	if s.tally.Requests++; s.tally.Requests >= s.sampling.pause {
		st.pause(s, hit, now)
	}
}

// touch loads the words that a lookup of that hash loads first. They are then in the CPU's cache when the lookup needs them.
func (p *pool) touch(hash uint64) {
	sh := p.shard(hash)
	sh.index.Touch(hash)
	if len(sh.hot.tags) > 0 {
		atomic.LoadUint64(&sh.hot.tags[sh.hot.home(hash)])
	}
	runtime.KeepAlive(p)
}

// find is lookup in this store alone, without a note to the climber.
func (st *store) find(s *scratch, now int64) bool {
	sh := st.shard(s.Key.Hash)
	s.in = st
	if sh.hot.lookup(s, now) {
		s.tier = tierHot
		return true
	}
	for range maxRetries {
		slot, seen, rec, again := sh.find(s, st.stale, now)
		if again {
			continue
		}
		if rec == nil {
			return false
		}
		s.CopyAnswer(rec)
		// The slot must be loaded first and the seq last: see the top of this file.
		if !sh.index.Load(slot).Same(seen) || atomic.LoadUint64(&rec[record.WordSeq]) != s.Entry.Seq {
			continue
		}
		s.tier = tierProbationary
		if seen.Marked() {
			s.tier = tierProtected
		}
		if n := seen.Count(); n < sh.saturate {
			if n+1 == sh.hotAfter {
				if !sh.promote(s, slot, seen, now) {
					return true // the next access tries again
				}
				// promote may have marked the slot, and another writer may have changed it since.
				if s := sh.index.Load(slot); s.Same(seen) && s.Count() == n {
					seen = s
				}
			}
			sh.index.Bump(slot, seen)
		}
		return true
	}
	return false
}

// insert stores an answer under s.Key. e is the answer's header, s.TTLAt has the TTL offsets of the body, and wildcard is
// the name of the wildcard that the answer was made from, or "". insert copies the body. It takes the lock of one shard.
//
// insert reports false when the answer is too large, or when the policy keeps the entries that it would displace.
//
// A response may arrive after a reload has moved the store's answers to the successor's store. The answer is then stored
// there, if the successor's rules allow it. s.Key is then the key in that store.
func (st *store) insert(s *scratch, e *record.Entry, body []byte, wildcard string, now int64) bool {
	for {
		stored, closed := st.insertHere(s, e, body, wildcard, now)
		if stored {
			st.reached(s, e, now)
		}
		if !closed {
			return stored
		}
		if st = st.to.Load(); st == nil || !st.rules.Again(e, &s.Key) {
			return false
		}
		s.Key.Rehash(st.seed)
	}
}

// insertHere is insert into this store alone. closed is true when the store takes no more answers.
func (st *store) insertHere(s *scratch, e *record.Entry, body []byte, wildcard string, now int64) (stored, closed bool) {
	defer runtime.KeepAlive(st) // see findOrigin
	s.BuildRecord(e, body, wildcard)
	sh := st.shard(s.Key.Hash)
	sh.lock(s, now)
	defer sh.unlock()
	if sh.holding(s.Key.Hash).closed {
		return false, true
	}
	if st.flushes.Has(&s.Key, e, e.Asked) {
		return false, false
	}
	if st.autoHot {
		if sets := st.climber.HotSets(st.hotSets); uint64(sets) != sh.hot.sets.Load() {
			sh.resizeHot(sets)
		}
	}
	if !sh.insert(s, e, st.stale, now) {
		return false, false
	}
	st.note(&s.Key, e, now)
	return true, false
}

// note remembers what the answer e to the question of k says of names that exist, or do not.
func (st *store) note(k *record.Key, e *record.Entry, now int64) {
	const classIN = 1
	if st.cuts == nil || k.Qclass() != classIN || e.Flags&record.FlagVoid != 0 || e.Remaining(now) <= 0 {
		return
	}
	do, cd := k.Bits()&record.KeyDO != 0, k.Bits()&record.KeyCD != 0
	switch {
	case !e.Denies():
		st.cuts.Exist(k.Name(), cd)
	case k.RD() && !k.Subnet().Is():
		st.cuts.Deny(k.Name(), cd, do, k.Qtype())
	}
}

// countRequest counts a request for the entry in s. It returns how many requests for the entry came without a longer pause
// than gap between two of them, up to most.
func (st *store) countRequest(s *scratch, now int64, gap time.Duration, most uint32) uint32 {
	defer runtime.KeepAlive(st) // see findOrigin
	return st.shard(s.Entry.Hash).states.Add(s.Entry.Node(), now, gap, most)
}

// requests returns the number of requests for the entry in s that countRequest has counted.
func (st *store) requests(s *scratch) uint32 {
	defer runtime.KeepAlive(st) // see findOrigin
	state := st.shard(s.Entry.Hash).states.Load(s.Entry.Node())
	return state.Count()
}

// mayRetry reports whether a refresh of the entry in s may be tried.
func (st *store) mayRetry(s *scratch, now int64) bool {
	defer runtime.KeepAlive(st) // see findOrigin
	return st.shard(s.Entry.Hash).states.MayRetry(s.Entry.Node(), now)
}

// postpone forbids refreshes of the entry of k and kind before until, a time in ns on the store's clock. While answers
// move, an entry leaves its old store only after it has arrived in the new one. So postpone looks into the oldest store
// first. It takes one shard's lock at a time.
func (st *store) postpone(k *record.Key, kind record.Flags, until int64) {
	own := *k
	for _, st := range st.line() {
		own.Rehash(st.seed)
		if st.postponeHere(&own, kind, until) {
			return
		}
	}
}

// postponeHere is postpone in this store alone. It reports whether the store has the entry.
func (st *store) postponeHere(k *record.Key, kind record.Flags, until int64) bool {
	defer runtime.KeepAlive(st) // see findOrigin
	sh := st.shard(k.Hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.holding(k.Hash).closed {
		return false
	}
	slot, ok := sh.locate(k, kind)
	if !ok {
		return false
	}
	id, _ := sh.at(slot)
	sh.states.Postpone(id, until)
	return true
}

// source says whence an answer came, as far as its age does: upstream, from a store of before a reload, or from a snapshot.
func (st *store) source(e *record.Entry) string {
	switch {
	case e.Stored < st.first:
		return "snapshot"
	case e.Stored < st.made:
		return "reload"
	}
	return "upstream"
}

// line returns the stores that answers move through, the oldest first.
func (st *store) line() (all []*store) {
	for from := st; from != nil; from = from.from.Load() {
		all = append(all, from)
	}
	slices.Reverse(all)
	for to := st.to.Load(); to != nil; to = to.to.Load() {
		all = append(all, to)
	}
	return all
}

// flush removes what a filter says from all stores that answers move through, and returns the number of removed answers. When it
// returns, no answer to a question that was asked before is there or comes back. An insert looks into the log under the lock of
// its shard. So either the insert finds the flush in the log, or the flush finds the answer in the shard.
func (st *store) flush(s *scratch, f flushed.Filter, clock func() int64) (n int) {
	at := clock()
	defer st.flushes.Add(f, at)()
	for _, each := range st.line() { // a move that begins now finds the flush in the log
		for i := range each.shards {
			n += each.shards[i].flush(s, each.seed.Owner(), &f, clock())
		}
		runtime.KeepAlive(each) // see findOrigin
	}
	// The clock is coarse. A question that is asked when flush has returned must have a later time than the flush.
	for range 100 {
		if clock() > at {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return n
}
