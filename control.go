package optcache

import (
	"container/heap"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/dumptext"
	"github.com/optcache/optcache/plugin/pkg/flight"
	"github.com/optcache/optcache/plugin/pkg/flushed"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file shows an instance to operators and does what they ask. Package control brings their requests.

// controlBlock is an instance as the control interface sees it. It implements control.Block.
type controlBlock struct{ o *Optcache }

// corefileToken stands for a Corefile. It is kept in the Corefile's controller, and refers to nothing of it.
type corefileToken struct{ _ byte }

func (corefileToken) key() string { return pluginName + " control" }

// listenForControl puts the instance behind the control interface, together with all others that name the same address.
func (o *Optcache) listenForControl(c *caddy.Controller) error {
	token, _ := c.Get(corefileToken{}.key()).(*corefileToken)
	if token == nil {
		token = new(corefileToken)
		c.Set(token.key(), token)
	}
	address := o.control.Address
	if err := control.Listen(o.control, token, func() []control.Block { return blocksAt(address) }); err != nil {
		return err
	}
	// If a reload fails and the previous Corefile has no optcache, nothing stops the instance. It is released when it is garbage.
	release := runtime.AddCleanup(o, func(token *corefileToken) { control.Release(token) }, token)
	o.store.countTop(o.clients)
	o.endControl = sync.OnceFunc(func() {
		release.Stop()
		control.Release(token)
	})
	return nil
}

// blocksAt returns the blocks that name a control address. While a Corefile starts, some of its blocks have an instance already.
// For the other blocks, blocksAt returns the instances of the previous Corefile.
func blocksAt(address string) (blocks []control.Block) {
	seen := make(map[*Optcache]bool)
	for _, o := range instances.all() {
		if o.control.Address != address || !o.runs() {
			continue
		}
		if o = instances.last(o); !seen[o] && !o.stopped.Load() {
			seen[o] = true
			blocks = append(blocks, controlBlock{o})
		}
	}
	return blocks
}

// lookupClasses are the classes of the DNS that there are (RFC 6895 section 3.2).
var lookupClasses = [...]uint16{dns.ClassINET, dns.ClassCHAOS, dns.ClassHESIOD, dns.ClassNONE, dns.ClassANY}

var (
	segmentNames = [segments]string{free: "", window: "window", probationary: "probationary", protected: "protected", heavy: "heavy"}

	kindNames = map[string]flushed.Kinds{"success": flushed.Successes, "denial": flushed.Denials, "failure": flushed.Failures}
)

// filterOf reads a filter.
func filterOf(f *control.Filter) (to flushed.Filter, err error) {
	to = flushed.Filter{Subtree: f.Subtree, Qtype: f.Type, Expired: f.Stale, Kinds: flushed.AllKinds}
	if f.Name != "" {
		name, ok := zones.Wire(f.Name)
		if !ok {
			return to, fmt.Errorf("%q is not a domain name", f.Name)
		}
		to.Name = name
	} else if f.Subtree {
		return to, errors.New("a subtree needs a name")
	}
	if len(f.Kinds) > 0 {
		to.Kinds = 0
	}
	for _, k := range f.Kinds {
		kind, ok := kindNames[k]
		if !ok {
			return to, fmt.Errorf("%q is no kind of answers: success, denial and failure are", k)
		}
		to.Kinds |= kind
	}
	return to, nil
}

// Status implements control.Block.
func (b controlBlock) Status() (st control.Status) {
	o := b.o
	st = control.Status{
		Zones: o.zones, View: o.view, Servers: slices.Clone(o.addrs), Generation: o.generation,
		Entries: make(map[string]int64), Hits: make(map[string]uint64), Sent: make(map[string]uint64),
		WindowShare: float64(o.store.climber.WindowShare()) / 1000, Climber: climberOf(o.store.climber), Waiting: o.flights.Waiting(),
		Flights: int64(o.flights.UnderWay()), Kept: o.store.kept.Load(), FastPath: make(map[string]control.FastPathStatus),
	}
	if p := o.store.status(); o.store.pool.name == "" {
		st.Capacity, st.Segments, st.HotEntries, st.Memory, st.Parts, st.MemoryLimit, st.HotCapacity =
			p.Capacity, p.Segments, p.HotEntries, p.Memory, p.Parts, p.MemoryLimit, p.HotCapacity
	} else {
		p.Same = o.pooled.same
		st.Pools = map[string]control.PoolStatus{o.store.pool.name: p}
		st.Capacity, st.Segments, st.Parts = map[string]int64{}, map[string]int64{}, map[string]int64{}
		st.Memory = o.store.bytes(record.Success) + o.store.bytes(record.Denial)
	}
	for _, addr := range o.addrs {
		if c, ok := fastpath.CountsOf(addr); ok {
			at := control.FastPathStatus{Workers: c.Workers, Packets: c.Packets, Hits: c.Hits, Dropped: c.Dropped, Batches: make(map[string]uint64)}
			for most, n := range c.Batches {
				at.Batches[strconv.Itoa(most)] = n
			}
			st.FastPath[addr] = at
		}
	}
	for c, name := range classNames {
		st.Entries[name] = o.store.len(record.Class(c))
	}
	st.MissTimes = make(map[string]uint64)
	if known := o.servers.Load(); known != nil {
		for _, srv := range *known {
			for _, how := range []outcome{outcomeAnswered, outcomeFailed} {
				for bound, n := range missShape.Powers(srv.misses[how].Counts()) {
					if n > 0 {
						st.MissTimes[strconv.FormatFloat(bound, 'g', 4, 64)] += n
					}
				}
			}
		}
	}
	all := o.sums()
	for t, name := range tierNames {
		st.Hits[name] = all.hits(func(_ record.Class, of tier, _ way) bool { return of == tier(t) })
	}
	for w := range ways {
		name := wayNames[w]
		switch w {
		case wayBytes:
			name = "bytes"
		case wayFast:
			name = "fastpath"
		}
		st.Sent[name] += all.hits(func(_ record.Class, _ tier, of way) bool { return of == w })
	}
	hits := all.hits(func(record.Class, tier, way) bool { return true })
	st.Misses, st.Stale, st.Prefetch = all[countMiss], all[countStale], all[countPrefetch]
	st.Requests = hits + st.Misses + all[countCut]
	for c := range record.Classes {
		st.Evicted += all[countEvicted+counter(c)]
	}
	st.Upstream = control.UpstreamStatus{
		Synthesized: all[countCut], Probes: all[countProbe], KeptWarm: all[countKeptWarm], Jittered: all[countJittered],
		Limited: make(map[string]uint64), Gone: o.gone(),
	}
	for i, name := range limitNames {
		st.Upstream.Limited[name] = all[countLimitDeferred+counter(i)]
	}
	if o.ecs.mode == ecsScoped {
		st.Subnets = &control.SubnetStatus{Most: o.ecs.most, Evicted: make(map[string]uint64)}
		st.Subnets.Names, st.Subnets.Answers = o.store.subnetLens()
		for why, name := range narrowNames {
			st.Subnets.Evicted[name] = all[countNarrowed+counter(why)]
		}
	}
	if k := o.snapshotter; k != nil {
		st.Snapshot = &control.SnapshotStatus{Path: k.file.path, Entries: k.entries.Load(), Bytes: k.bytes.Load(), Writes: k.writes.Load(), Failures: k.failed.Load()}
		if written := k.written.Load(); written > 0 {
			st.Snapshot.Written = time.Unix(0, written)
		}
	}
	st.Shared = o.second.status()
	return st
}

// status describes the pool.
func (p *pool) status() (st control.PoolStatus) {
	used, stores := p.usage(), p.all()
	st = control.PoolStatus{
		Blocks: len(stores), Entries: make(map[string]int64), Capacity: make(map[string]int64), Segments: make(map[string]int64),
		HotEntries: p.hotEntries(), Memory: used.used, Parts: p.parts(&used), MemoryLimit: p.bound(), HotCapacity: p.hotCapacity(),
	}
	for s := window; s < segments; s++ {
		st.Segments[segmentNames[s]] = used.segments[s]
	}
	for c, name := range classNames {
		st.Capacity[name] = int64(p.capacity[c])
		for _, each := range stores {
			st.Entries[name] += each.len(record.Class(c))
		}
	}
	return st
}

// climberOf describes where a climber stands.
func climberOf(c *climber.Climber) control.Climber {
	s := c.State()
	hill := func(h climber.Hill) control.Hill {
		shown := control.Hill{Share: h.At / 1000, Step: h.Step / 1000}
		if h.Begun {
			shown.Value = &h.Value
		}
		return shown
	}
	all := control.Climber{Sample: int64(s.Sample), Left: int64(s.Left), Window: hill(s.Window)}
	if s.Hot != nil {
		hot := hill(*s.Hot)
		all.Hot = &hot
	}
	return all
}

// parts divides the memory in use.
func (p *pool) parts(u *usage) map[string]int64 {
	all := map[string]int64{"hot": 0, "index": 0}
	other := u.used
	part := func(name string, bytes int64) {
		all[name] = bytes
		other -= bytes
	}
	for c, name := range classNames {
		part(name, u.records[c])
	}
	for i, m := range p.memories() {
		switch m {
		case p.hot:
			part("hot", u.mapped[i])
		case p.slots:
			part("index", u.mapped[i])
		}
	}
	all["other"] = max(other, 0) // records may lie on pages that the kernel has swapped out
	return all
}

// heldAnswer is an answer as it has been found in the store. It has its own memory.
type heldAnswer struct {
	key   record.Key
	entry record.Entry
	was   policyState
	asked uint32   // how often, as far as it is counted
	words []uint64 // of the record; nil where the records are not shown
}

// find gives the answers of a store in a shard that are meant to yield, from a node on, until yield says no. next is the node to go on
// from; none at the end.
func (b controlBlock) find(s *scratch, st *store, sh *shard, f *flushed.Filter, from uint32, records bool, yield func(*heldAnswer) bool) (next uint32) {
	now := b.o.clock()
	return sh.walk(s, st.seed.Owner(), from, now, func(id uint32, e *record.Entry) bool {
		if !f.Has(&s.Key, e, now) {
			return true
		}
		h := &heldAnswer{}
		h.asked = sh.accesses(id)
		h.entry, h.was = sh.copyOut(s, id)
		h.key = s.Key
		if records {
			h.words = slices.Clone(s.Words)
		}
		return yield(h)
	})
}

// Lookup implements control.Block.
func (b controlBlock) Lookup(name string, qtype uint16) (answers []control.Answer, err error) {
	f, err := filterOf(&control.Filter{Name: name, Type: qtype})
	if err != nil {
		return nil, err
	}
	if f.Name == nil {
		return nil, errors.New("there is no name to look up")
	}
	s := newScratch()
	var found []*heldAnswer
	take := func(h *heldAnswer) bool {
		found = append(found, h)
		return len(found) < control.MaxPage
	}
	for _, st := range b.o.store.line() {
		if qtype == 0 || st.scopes != nil { // the types or prefixes are not known, nor where they are
			for i := range st.shards {
				b.find(s, st, &st.shards[i], &f, 0, true, take)
			}
			continue
		}
		looked := make(map[*shard]bool)
		for bits := range 8 * len(lookupClasses) {
			s.Key.Set(st.seed, f.Name, qtype, lookupClasses[bits/8], bits&record.KeyDO != 0, bits&record.KeyCD != 0)
			s.Key.SetRD(st.seed, bits&record.KeyNoRD == 0)
			if sh := st.shard(s.Key.Hash); !looked[sh] {
				looked[sh] = true
				b.find(s, st, sh, &f, 0, true, take)
			}
		}
	}
	for _, h := range found {
		answers = append(answers, b.answer(s, h))
	}
	return answers, nil
}

// List implements control.Block.
func (b controlBlock) List(q control.Filter) (page control.Page, err error) {
	f, err := filterOf(&q)
	if err != nil {
		return page, err
	}
	if q.Limit < 1 || q.Limit > control.MaxPage {
		return page, fmt.Errorf("%d is not between 1 and %d", q.Limit, control.MaxPage)
	}
	var storeAt, shardAt int
	var node uint32
	if q.After != "" {
		if n, err := fmt.Sscanf(q.After, "%d.%d.%d", &storeAt, &shardAt, &node); err != nil || n != 3 || storeAt < 0 || shardAt < 0 {
			return page, fmt.Errorf("%q: %w", q.After, control.ErrCursor)
		}
	}
	s := newScratch()
	line := b.o.store.line()
	var found []*heldAnswer
	if q.Sort != "" {
		if found, err = b.sorted(s, &f, &q); err != nil {
			return page, err
		}
		for _, h := range found {
			page.Answers = append(page.Answers, b.answer(s, h))
		}
		return page, nil
	}
	for ; storeAt < len(line); storeAt, shardAt, node = storeAt+1, 0, 0 {
		for ; shardAt < len(line[storeAt].shards); shardAt, node = shardAt+1, 0 {
			next := b.find(s, line[storeAt], &line[storeAt].shards[shardAt], &f, node, q.Records, func(h *heldAnswer) bool {
				if q.Hot && !h.was.hot {
					return true
				}
				found = append(found, h)
				return len(found) < q.Limit
			})
			if len(found) == q.Limit {
				page.Next = fmt.Sprintf("%d.%d.%d", storeAt, shardAt, next)
				if next == none {
					page.Next = fmt.Sprintf("%d.%d.0", storeAt, shardAt+1)
				}
				break
			}
		}
		if page.Next != "" {
			break
		}
	}
	for _, h := range found {
		page.Answers = append(page.Answers, b.answer(s, h))
	}
	return page, nil
}

// ranked is an answer and its place in an order: what comes first has the least rank, or the first name.
type ranked struct {
	*heldAnswer
	rank int64
	name string
}

func (r ranked) before(other ranked) bool {
	return r.rank < other.rank || r.rank == other.rank && r.name < other.name
}

// firsts are the first answers in an order, as a heap (package heap) with the last of them on top.
type firsts []ranked

func (f firsts) Len() int           { return len(f) }
func (f firsts) Less(i, j int) bool { return f[j].before(f[i]) }
func (f firsts) Swap(i, j int)      { f[i], f[j] = f[j], f[i] }
func (f *firsts) Push(x any)        { *f = append(*f, x.(ranked)) }
func (f *firsts) Pop() any {
	last := (*f)[len(*f)-1]
	*f = (*f)[:len(*f)-1]
	return last
}

// sorted returns the first answers in an order that a filter fits, in no order. It looks at all answers, a few at a time, and
// keeps no more of them than it returns.
func (b controlBlock) sorted(s *scratch, f *flushed.Filter, q *control.Filter) (found []*heldAnswer, err error) {
	rankOf := map[string]func(sh *shard, id uint32, e *record.Entry, now int64) int64{
		"ttl":      func(_ *shard, _ uint32, e *record.Entry, now int64) int64 { return e.Remaining(now) },
		"age":      func(_ *shard, _ uint32, e *record.Entry, _ int64) int64 { return e.Stored },
		"accesses": func(sh *shard, id uint32, _ *record.Entry, _ int64) int64 { return -int64(sh.accesses(id)) },
		"bytes":    func(_ *shard, _ uint32, e *record.Entry, _ int64) int64 { return -int64(e.Size) },
		"name":     func(*shard, uint32, *record.Entry, int64) int64 { return 0 },
	}[q.Sort]
	if rankOf == nil {
		return nil, fmt.Errorf("%q is no order", q.Sort)
	}
	var best firsts
	for _, st := range b.o.store.line() {
		for i := range st.shards {
			sh, now := &st.shards[i], b.o.clock()
			sh.walk(s, st.seed.Owner(), 0, now, func(id uint32, e *record.Entry) bool {
				if q.Hot && !sh.policy.nodes[id].hot || !f.Has(&s.Key, e, now) {
					return true
				}
				r := ranked{rank: rankOf(sh, id, e, now)}
				if q.Sort == "name" {
					r.name, _, _ = dns.UnpackDomainName(s.Key.Name(), 0)
				}
				if len(best) == q.Limit && !r.before(best[0]) {
					return true
				}
				h := &heldAnswer{asked: sh.accesses(id)}
				h.entry, h.was = sh.copyOut(s, id)
				h.key = s.Key
				if q.Records {
					h.words = slices.Clone(s.Words)
				}
				if r.heldAnswer = h; len(best) < q.Limit {
					heap.Push(&best, r)
				} else {
					best[0] = r
					heap.Fix(&best, 0)
				}
				return true
			})
		}
	}
	for _, r := range best {
		found = append(found, r.heldAnswer)
	}
	return found, nil
}

var reasonNames = [...]string{forMiss: "miss", forPrefetch: "prefetch", forStale: "stale"}

// UnderWay implements control.Block.
func (b controlBlock) UnderWay(name string, qtype uint16) (all []control.UnderWay, err error) {
	f, err := filterOf(&control.Filter{Name: name, Type: qtype})
	if err != nil {
		return nil, err
	}
	for _, o := range instances.all() { // a flight of before a reload may still bring an answer
		if o != b.o && !o.identity.same(&b.o.identity) {
			continue
		}
		o.flights.Each(func(c call, state flight.State) {
			if !f.HasKey(c.key) {
				return
			}
			bits := c.key.Bits()
			all = append(all, control.UnderWay{
				Type: dns.Type(c.key.Qtype()).String(), Class: dns.Class(c.key.Qclass()).String(), DO: bits&record.KeyDO != 0, CD: bits&record.KeyCD != 0,
				Reason: reasonNames[c.purpose], Seconds: time.Since(state.Begun).Seconds(), Asking: state.Leaders, Waiting: state.Waiters,
				Detached: state.Detached,
			})
		})
	}
	return all, nil
}

// answer describes an answer. s is memory for it.
func (b controlBlock) answer(s *scratch, h *heldAnswer) (a control.Answer) {
	o, e, now := b.o, &h.entry, b.o.clock()
	name, _, err := dns.UnpackDomainName(h.key.Name(), 0)
	if err != nil {
		name = fmt.Sprintf("\\# %x", h.key.Name()) // cannot be: a packed name was kept
	}
	bits := h.key.Bits()
	a = control.Answer{
		Name: name, Type: dns.Type(h.key.Qtype()).String(), Class: dns.Class(h.key.Qclass()).String(),
		DO: bits&record.KeyDO != 0, CD: bits&record.KeyCD != 0, NoRD: !h.key.RD(),
		Rcode: dns.RcodeToString[int(e.Flags&record.FlagRcode)], Segment: segmentNames[h.was.segment], Hot: h.was.hot,
		Hits: h.asked, Source: o.store.source(e), TTL: e.TTL, Left: e.Remaining(now),
		Stored: o.wall().Add(time.Duration(e.Stored - now)).UTC().Truncate(time.Millisecond), Bytes: e.Size * record.WordBytes,
	}
	a.Subnet = h.key.Subnet().String()
	a.Stale = a.Left <= 0 && e.Servable(now, o.store.stale)
	for k, kind := range kindNames {
		if kind == flushed.KindOf(e.Flags) {
			a.Kind = k
		}
	}
	if h.words == nil {
		return a
	}
	s.Key, s.Entry = h.key, h.entry
	s.Body = wire.HeaderLen + len(h.key.Name()) + wire.QuestionTail
	s.Grow(s.Body, 0)
	copy(s.Out[wire.HeaderLen:], h.key.Name())
	s.CopyAnswer(h.words)
	r := &dns.Msg{Question: []dns.Question{{Name: name, Qtype: h.key.Qtype(), Qclass: h.key.Qclass()}}}
	m, err := s.Message(r, uint32(max(a.Left, 0)))
	if err != nil {
		return a
	}
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			a.Records = append(a.Records, rr.String())
		}
	}
	return a
}

// Flush implements control.Block.
func (b controlBlock) Flush(q control.Filter) (n int, err error) {
	f, err := filterOf(&q)
	if err != nil {
		return 0, err
	}
	o := instances.last(b.o)
	tell, err := o.second.begin(&f)
	if err != nil {
		return 0, err
	}
	if n, err = o.flush(f, o.wall()); err != nil {
		return n, err
	}
	if err := tell(); err != nil {
		return n, fmt.Errorf("%d answers are gone here, but not all of the group knows: %w", n, err)
	}
	return n, nil
}

// flush removes what a filter says: what this replica had at a moment of the wall clock.
func (o *Optcache) flush(f flushed.Filter, at time.Time) (n int, err error) {
	if k := o.snapshotter; k != nil {
		name := ""
		if f.Name != nil {
			if name, _, err = dns.UnpackDomainName(f.Name, 0); err != nil {
				return 0, err
			}
		}
		done, err := snapshot.AddMark(k.file.path, snapshot.Mark{Name: name, Subtree: f.Subtree, Type: f.Qtype, Kinds: uint8(f.Kinds), Expired: f.Expired, At: at})
		if err != nil {
			return 0, fmt.Errorf("the snapshot would bring back what is flushed: %w", err)
		}
		defer func() {
			done()
			k.wake()
		}()
	}
	// The answers of flights under way are for the requests that wait for them already, not for later ones.
	for _, each := range instances.all() {
		if each == o || each.identity.same(&o.identity) {
			each.flights.Detach(func(c call) bool { return f.HasKey(c.key) })
		}
	}
	n = o.store.flush(newScratch(), f, o.clock)
	if o.store.cuts != nil && f.Name != nil && f.Kinds&flushed.Denials != 0 && !f.Expired {
		o.store.cuts.Exist(f.Name, false) // the next question for it is asked, whatever is known of the names above
		o.store.cuts.Exist(f.Name, true)
	}
	o.addFlush(n)
	o.forgive(&f)
	return n, nil
}

// mark is a flush since the snapshot that is read. at is its time, in ns on the store's clock.
type mark struct {
	flushed.Filter
	at int64
}

// marks is what has been flushed since a snapshot. It is read-only.
type marks []mark

// marks returns what has been flushed since the snapshot that is about to be read. now and wall are one moment on the store's
// clock and the wall's.
func (o *Optcache) marks(now int64, wall time.Time) (since marks) {
	all, err := snapshot.Marks(o.file.path)
	if err != nil {
		log.Warningf("Takes all that the snapshot has as flushed: %v", err)
	}
	for _, m := range all {
		f, err := filterOf(&control.Filter{Name: m.Name, Subtree: m.Subtree, Type: m.Type, Stale: m.Expired})
		if f.Kinds = flushed.Kinds(m.Kinds); err != nil {
			f = flushed.Filter{Kinds: flushed.AllKinds}
		}
		since = append(since, mark{f, now - int64(wall.Sub(m.At))})
	}
	return since
}

// has reports whether an answer of the snapshot has been flushed since. It compares no times: a snapshot that was begun after
// a flush has no mark of the flush, so every answer in the file that fits the filter is older than the flush.
func (since marks) has(k *record.Key, e *record.Entry) bool {
	return slices.ContainsFunc(since, func(m mark) bool { return m.Has(k, e, m.at) })
}

// Snapshot implements control.Block.
func (b controlBlock) Snapshot() error {
	k := b.o.snapshotter
	if k == nil {
		return errors.New("the block has no cache_file_path")
	}
	return k.saveNow(b.o)
}

// Dump implements control.Block. Answers that move from one store to another while it writes may be in it twice; none is
// missing.
func (b controlBlock) Dump(w io.Writer, text bool) (n int, err error) {
	o := instances.last(b.o)
	line, wall := o.store.line(), o.wall()
	out := &cutWriter{to: w}
	records := func(yield func(*snapshot.Record) bool) {
		for r := range o.records(line, wall, func() time.Duration { return pause(nil) }) {
			if n++; !yield(r) {
				return
			}
		}
		// A reload may have taken the rest away. Then the end is not written, so that the dump does not look whole.
		if !line[len(line)-1].open() {
			out.err = errReplaced
		}
	}
	if text {
		err = dumptext.Write(out, o.header(wall), records)
		return n, err
	}
	_, err = snapshot.WriteTo(out, o.header(wall), records)
	return n, err
}

// cutWriter is a writer that fails once err is set.
type cutWriter struct {
	to  io.Writer
	err error
}

func (f *cutWriter) Write(b []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return f.to.Write(b)
}

var errReplaced = errors.New("a reload has replaced the block meanwhile")

// open reports whether the store takes answers: a reload has not moved them elsewhere, nor dropped them.
func (st *store) open() bool {
	for i := range st.shards {
		sh := &st.shards[i]
		sh.mu.Lock()
		closed := sh.held[st.seed.Owner()].closed
		sh.mu.Unlock()
		if closed {
			return false
		}
	}
	return true
}

// Load implements control.Block. What has been flushed before Load is called may come back: that the dump has it, and that it is
// loaded, is what the operator wants. What is flushed while it loads does not come back.
func (b controlBlock) Load(from control.Rewinder, text bool) (done control.Loaded, err error) {
	o := instances.last(b.o)
	now, wall := o.clock(), o.wall() // in this order: see snapshotter.load
	var since time.Duration          // since the dump was written
	read := func(each func(*snapshot.Record) error) error {
		of := snapshot.ReadFrom
		if text {
			of = dumptext.Read
		}
		_, err := of(from, o.limits(), func(h *snapshot.Header) error {
			since = max(wall.Sub(h.Written), 0)
			return nil
		}, each)
		return err
	}
	if err := read(func(*snapshot.Record) error { return nil }); err != nil {
		return done, fmt.Errorf("%w: %w", control.ErrBadDump, err)
	}
	from.Rewind()
	var became [refusals]atomic.Int64
	err = o.admitAll(func(each func(*snapshot.Record) error) error {
		return read(func(r *snapshot.Record) error {
			r.HitsAge = agedBy(r.HitsAge, since)
			return each(r)
		})
	}, moment{now, now, wall}, nil, func(why refusal) { became[why].Add(1) })
	done = control.Loaded{Loaded: int(became[refusedNot].Load()), Refused: make(map[string]int)}
	for why := refusedNot + 1; why < refusals; why++ {
		if n := became[why].Load(); n > 0 {
			done.Refused[refusalNames[why]] = int(n)
		}
	}
	if err == nil && !o.store.open() {
		err = errReplaced
	}
	o.snapshotter.wake()
	return done, err
}
