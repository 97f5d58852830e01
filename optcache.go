// Package optcache is a CoreDNS plugin that answers repeated questions from memory.
//
// It replaces CoreDNS's plugin cache: it stands in the same place in the chain, and takes the same words in the Corefile.
// Popular answers are served from a hot tier, the others from a segmented LRU. A look-up in either takes no lock, and the
// garbage collector scans no entry.
//
// The way of a request:
//
//   - ServeDNS (this file) reads the question (package query).
//   - It looks the key up in the store (store.go): first in the hot tier (hotcache.go), then in the index, which points to the
//     records in the arena (shard.go, package record).
//   - A hit becomes a reply (package reply). The reply is sent as bytes, unless an outer plugin needs a message (package
//     chain).
//   - A miss goes to the next plugin (fetch.go). Other requests for the same answer wait for the first one (package flight).
//   - The response comes back through a writer (fetch.go). The writer admits it by the rules (package admit), and inserts it
//     into the store.
//
// Entries that are about to expire, or have expired, are refreshed in fetch.go. The eviction policy (slru.go) chooses the entry
// that makes room for a new one. A reload hands the store to the successor (reload.go). A restart reads the answers from a
// snapshot (persist.go). The fast path (fastpath.go) takes the same steps with packets, without CoreDNS's server and chain.
//
// This file holds the handler, the look-up, the decision between hit, stale and miss, and the ways in which a hit is sent.
package optcache

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/edns"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/clock"
	"github.com/optcache/optcache/plugin/pkg/limit"
	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/reply"
	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// options are the settings of one optcache block in a Corefile. Setup fills them in, and they do not change afterwards.
type options struct {
	zones []string // normalized origins this instance caches for

	success classOptions // positive answers
	denial  classOptions // NXDOMAIN, NODATA and failures

	servfail     time.Duration  // how long a failure is kept, 0 to 5m; 0: never
	servfailMost time.Duration  // the most that further failures double it to; up to servfail: they do not
	withoutSOA   time.Duration  // how long a denial without an SOA is kept; 0: as without the option
	ttls         []admit.TTLs   // bounds of TTLs for some zones and types
	staleFor     []admit.Switch // of serve_stale, for some zones and types
	prefetchFor  []admit.Switch // of prefetch, likewise
	jitter       int            // by how much a TTL is shortened at most, in per cent, 0 to 25
	keepTTL      bool           // show the original TTL instead of the remaining one

	prefetch prefetchOptions
	stale    staleOptions
	coalesce coalesceOptions
	cut      cutOptions
	ecs      ecsOptions
	upstream upstreamOptions
	warm     warmOptions
	warmFrom warmFromOptions
	fast     fastOptions
	file     fileOptions
	control  control.Options // empty: no control interface
	shared   sharedOptions   // the second level
	clients  prefixes        // top_clients
	explain  bool            // ede: an Extended DNS Error in the reply says that the answer is stale, or a cached failure

	hotPercentage      int   // share of the capacity for the hot tier, 0 to 50, or hotAuto
	promotionThreshold int   // accesses before promotion to the hot tier, 1 to 255
	lineAligned        bool  // cache_line_optimization: records start on a 64-byte line
	maxMemory          int64 // bytes for all that the instance holds; 0: derived from the capacities
	pooled             poolOptions
	memoryAuto         bool // maxMemory is only the most, and the capacities may ask for less
}

// classOptions bounds one class of answers.
type classOptions struct {
	capacity int           // entries
	maxTTL   time.Duration // cap on the TTL of an answer
	minTTL   time.Duration // floor under it
	except   []string      // normalized zones whose answers of this class are not cached
}

func (c *classOptions) same(other *classOptions) bool {
	return c.capacity == other.capacity && c.maxTTL == other.maxTTL && c.minTTL == other.minTTL && slices.Equal(c.except, other.except)
}

// Optcache is the plugin's handler: one instance for each optcache block of a Corefile. ServeDNS is safe for concurrent use
// after start has returned.
type Optcache struct {
	Next plugin.Handler
	options

	rules admit.Rules // which responses are kept, and for how long

	identity       identity        // of the server block; a reload finds the predecessor by it
	addrs          []string        // of its servers, so that its series exist before the first query
	generation     int             // of the Corefile; guarded by instances.mu until start has returned
	of             *caddy.Instance // the instance of caddy that the server block belongs to; nil in tests
	hadPredecessor bool            // the store has, or will get, a predecessor's answers
	fileUnread     bool            // the snapshot may have answers that no instance has read
	unwarmed       bool            // no instance has got a neighbour's answers
	successor      *Optcache       // guarded by instances.mu
	stopped        atomic.Bool     // stop has been called
	member         *poolMember     // nil: the block has its memory for itself
	snapshotter    *snapshotter    // nil: no snapshots
	neighbours     *neighbours     // nil: no warm_from
	endWarm        func()          // ends keep_warm; nil: there is none
	endControl     func()          // takes the instance away from the control interface, after requests under way; nil: it is not there
	block          *fastBlock      // nil: no fast path
	cutter         *cutter         // nil: no nxdomain_cut
	upstreams      *upstreams      // nil: without MAX of servfail
	second         *secondLevel    // nil: none
	limit          *limit.Limiter  // of questions to the next plugin; nil: none
	unfit          fallback        // why there is no fast path; "" if there is one, or if the Corefile says off

	store   *store
	flights flights
	view    string
	outer   chain.Outer               // what the outer plugins do to a reply
	servers atomic.Pointer[[]*server] // the servers that have passed requests to this instance; see addServer
	pool    sync.Pool                 // of *scratch

	clock func() int64     // ns on a monotonic clock; only differences count
	wall  func() time.Time // for the validity periods of signatures
}

// backsOff reports whether further failures double the time for which they are kept.
func (o *options) backsOff() bool { return o.servfailMost-o.servfail >= time.Second }

func newOptcache(o options) *Optcache {
	h := &Optcache{options: o, wall: time.Now}
	h.rules = admit.Rules{
		Zones: zones.NewSet(o.zones), Servfail: o.servfail, DenialWithoutSOA: o.withoutSOA, TTLs: o.ttls, StaleFor: o.staleFor, PrefetchFor: o.prefetchFor, Subnets: o.ecs.mode == ecsScoped, SubnetsForAll: o.ecs.mode == ecsOff, PreferPositive: o.stale.preferPositive && o.stale.upTo >= time.Second,
	}
	for c, of := range [record.Classes]*classOptions{record.Success: &o.success, record.Denial: &o.denial} {
		h.rules.Except[c], h.rules.MaxTTL[c], h.rules.MinTTL[c] = zones.NewSet(of.except), of.maxTTL, of.minTTL
	}
	bounds := o.coalesce
	if bounds.waiters == 0 { // without coalescing, refreshes are flights all the same
		bounds = defaultCoalesce
	}
	h.flights.Waiters, h.flights.Wait = bounds.waiters, bounds.wait
	h.pool.New = func() any { return newScratch() }
	return h
}

// zoneBypasser is implemented by plugins with zones that must not be cached, because they change without notice. CoreDNS's
// plugin cache looks for the same interface.
type zoneBypasser interface {
	CacheBypassZones() []string
}

// start gives the instance its store. It is called when the server block is complete. view is the block's view, and handlers
// are its plugins in the order in which they are called.
func (o *Optcache) start(view string, handlers []plugin.Handler) error {
	var bypass []string
	for _, h := range handlers {
		if b, ok := h.(zoneBypasser); ok {
			bypass = append(bypass, b.CacheBypassZones()...)
		}
	}
	o.rules.Bypass = zones.NewSet(bypass)
	o.outer = chain.OuterOf(handlers, pluginName)
	if o.cut.on {
		o.cutter = newCutter(&o.options, o.Next)
	}
	o.view = view
	if o.clock == nil {
		o.clock = clock.Now
	}
	if err := o.takeOver(); err != nil {
		return err
	}
	if o.store.failing != nil {
		o.upstreams = newUpstreams(o)
	}
	if o.shared.on() {
		if err := o.startSecond(); err != nil {
			o.stop() // it uses a store
			return err
		}
	}
	if o.file.path != "" {
		o.startSnapshots()
	}
	if o.warmFrom.on() && !o.shared.on() && o.unwarmed {
		if err := o.startNeighbours(); err != nil {
			o.stop()
			return err
		}
	}
	instances.add(o) // from now on, the metrics read the store and the snapshotter
	if o.warm.on() {
		o.endWarm = o.keepWarm()
	}
	return nil
}

// stop hands the store to the successor. Without a successor it gives the memory back, and requests that are still under way
// find nothing. stop does nothing when it is called again, or without start.
func (o *Optcache) stop() error {
	if o.store == nil || o.stopped.Swap(true) {
		return nil
	}
	if o.endControl != nil {
		o.endControl()
	}
	if o.endWarm != nil {
		o.endWarm()
	}
	if o.neighbours != nil {
		o.neighbours.end()
	}
	if o.second != nil {
		o.second.end()
	}
	closeFast(o)
	instances.remove(o)
	successor := instances.successorOf(o)
	if o.snapshotter != nil {
		o.snapshotter.stop(successor)
	}
	o.handOver(successor)
	return nil
}

// Name implements plugin.Handler.
func (o *Optcache) Name() string { return pluginName }

// ServeDNS implements plugin.Handler.
func (o *Optcache) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if r.Opcode != dns.OpcodeQuery {
		return o.next(ctx, w, r)
	}
	if o.block != nil {
		o.block.notice(ctx, w, r)
	}
	// Plugins behind may change the request. They get a copy, because the server and the outer plugins may still need the
	// request as it was.
	if !cacheable(r) {
		watchOf(ctx).passed(o, "a zone transfer is not answered from the cache")
		return o.next(ctx, w, r.Copy())
	}
	s, ok := o.scratchFor(r, w.RemoteAddr())
	if !ok || !o.rules.Serves(s.Key.Name()) {
		o.release(s)
		watchOf(ctx).passed(o, "the name is in no zone of the block, or in one that another plugin keeps from being cached")
		return o.next(ctx, w, r.Copy())
	}
	if s.asker.state >= query.BadSubnet {
		state := s.asker.state
		o.release(s)
		if state == query.BadSubnet {
			watchOf(ctx).passed(o, "the client subnet is malformed")
			return dns.RcodeFormatError, nil // RFC 7871 section 6; the server sends it
		}
		watchOf(ctx).passed(o, "there are several client subnets")
		return o.next(ctx, w, r.Copy())
	}
	srv, now := o.server(ctx), o.clock()
	hit := o.lookup(s, now)
	if s.through = hit && s.Entry.Failure() && o.letsThrough(s, now); s.through {
		hit = false
	}
	o.store.counted(s, hit, now)
	if s.sampling.weight != 0 {
		o.countClient(s, w.RemoteAddr())
	}
	if !hit {
		if !s.through && o.findCut(s, now) {
			return o.replyCut(ctx, w, r, s, srv, now)
		}
		var rcode int
		var err error
		if s, now, rcode, err = o.miss(ctx, w, r, s, srv); s == nil {
			if errors.Is(err, errLimited) {
				return o.replyLimited(w, r)
			}
			return rcode, err
		}
	}
	return o.hit(ctx, w, r, s, srv, now)
}

// hit serves the entry in s, and releases s.
func (o *Optcache) hit(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server, now int64) (int, error) {
	defer o.release(s)
	status := statusHit
	if s.Entry.Remaining(now) <= 0 {
		if done, rcode, err := o.revalidate(ctx, w, r, s, srv, now); done {
			return rcode, err
		}
		srv.addStale(s.stripe, uint64(-s.Entry.Remaining(now)))
		status = statusStale
	} else if o.due(s, now) && o.mayRefresh(s, now) && o.refresh(ctx, r, s, srv, now, forPrefetch) {
		status = statusPrefetch
	}
	if o.outer.Listens() {
		o.describeHit(ctx, s, status, now)
	}
	if watching.Load() > 0 {
		watchOf(ctx).found(o, s, status, now)
	}
	return o.reply(ctx, w, r, s, srv, now)
}

// cacheable reports whether a query may be answered from the cache at all.
func cacheable(r *dns.Msg) bool { return len(r.Question) > 0 && !admit.IsTransfer(r.Question[0].Qtype) }

// scratchFor returns a scratch with the question of a request and its key with RD=1. ok is false when the qname is not a valid
// name. The caller releases s in both cases.
func (o *Optcache) scratchFor(r *dns.Msg, from net.Addr) (s *scratch, ok bool) {
	s = o.pool.Get().(*scratch)
	n, ok := wire.PackName(s.Out[wire.HeaderLen:], r.Question[0].Name)
	if !ok {
		return s, false
	}
	s.Query = query.FromMsg(r, r.IsEdns0(), from)
	s.Key.Set(o.store.seed, s.Out[wire.HeaderLen:wire.HeaderLen+n], s.Query.Qtype, s.Query.Qclass, s.Query.DO(), s.Query.CD())
	switch {
	case s.Query.Options:
		s.asker = o.askerOf(r)
	case s.asker.state != query.NoSubnet: // of the last request
		s.asker = asker{}
	}
	s.Body = wire.HeaderLen + n + wire.QuestionTail
	return s, true
}

// lookup looks for an answer to the question of s, and reports whether s has one now. The key of s must be the one with RD=1.
//
// Answers that were fetched with RD=1 and with RD=0 have different keys. A question with RD=0 may get either. It prefers the
// answer that was fetched with RD=1, unless that one is stale or void and the other one is not. When lookup finds nothing,
// the key of s is the one that the response will be kept under.
func (o *Optcache) lookup(s *scratch, now int64) bool {
	if s.asker.prefix.Is() {
		return o.lookupSubnet(s, now)
	}
	hit := o.search(s, now)
	if s.Query.RD() || hit && s.Entry.Good(now) {
		return hit
	}
	s.Key.SetRD(o.store.seed, false)
	own := o.search(s, now)
	if !hit || own && s.Entry.Good(now) {
		return own
	}
	s.Key.SetRD(o.store.seed, true)
	if o.search(s, now) {
		return true
	}
	s.Key.SetRD(o.store.seed, false)
	return false
}

// shownTTL returns the TTL in seconds that the client gets for the answer e at now.
func (o *Optcache) shownTTL(e *record.Entry, now int64) uint32 {
	left, stale := e.Remaining(now), uint32(o.stale.ttl/time.Second)
	switch {
	case left > 0 && !o.keepTTL:
		return uint32(left)
	case left <= 0 && (stale > 0 || !o.keepTTL):
		return e.Shown(stale, now)
	}
	return e.Shown(e.TTL, now)
}

// scratch is the memory that serving one request needs. It is pooled, so that a hit allocates nothing. One request owns it at
// a time.
type scratch struct {
	_ [2 * record.LineBytes]byte // padding, so that other cores do not write to the lines of this scratch
	reply.Answer
	tier     tier                    // where the answer was found
	in       *store                  // the store in which it was found: while answers move after a reload, there are two
	events   events                  // what the policy did in this request; not in the counters yet
	narrowed [narrowEvictions]uint32 // those of events.evicted that were for a prefix, by why
	tally    climber.Tally           // look-ups that the hill climber has not been told of
	stripe   uint32                  // the stripe of the counters that this scratch uses

	asker   asker // of a request through the chain
	through bool  // the request is let through to the upstream, although a failure is kept for it

	sampling sampling
	_        [2 * record.LineBytes]byte
}

// way is how a hit was sent. There are two ways, which put the same packet on the wire. As bytes, the stored answer is patched
// and written to the socket. As a message, it goes through the writers of the outer plugins. A message is always correct. Bytes
// are faster, and are sent when no outer plugin would notice. All values but wayBytes and wayFast are reasons for a message.
type way uint8

const (
	wayBytes     way = iota
	wayPlugin        // an outer plugin may change the reply
	wayTransport     // the transport is not DNS over UDP, TCP or TLS
	wayRequest       // the request has several questions, or records besides one OPT, such as TSIG
	wayEDNS          // the request has an EDNS option that the reply must repeat
	waySize          // the reply must be compressed or truncated to fit, and has records that only the message can do that with
	wayAnswer        // the answer cannot be sent as it is stored
	wayRecorder      // an outer plugin has a writer that is not known, and would miss the reply
	wayVerified      // the entry was stale, and the client got a better answer from the next plugin
	wayFast          // as bytes, by the fast path
	ways
)

var wayNames = [ways]string{"", "plugin", "transport", "request", "edns", "size", "answer", "recorder", "verified", ""}

// explanation returns the Extended DNS Error code (RFC 8914) of the reply to the question of s, or reply.NoEDE.
func (o *Optcache) explanation(s *scratch, now int64) uint16 {
	if !o.explain {
		return reply.NoEDE
	}
	return s.Explain(now)
}

// reply sends the answer in s to the client. The answer may have expired.
func (o *Optcache) reply(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server, now int64) (int, error) {
	e := &s.Entry
	if len(s.Wildcard) > 0 {
		setWildcard(ctx, string(s.Wildcard))
	}
	ttl, ede := o.shownTTL(e, now), o.explanation(s, now)
	how, ws := o.way(w, r, s, srv, ede)
	srv.addEvents(s)
	var packet []byte
	if how == wayBytes {
		var ok bool
		if packet, ok = s.Reply(ttl, ede, o.outer.Rotates); !ok {
			how = waySize
		}
	}
	if watching.Load() > 0 {
		watchOf(ctx).sent(how)
	}
	var m *dns.Msg
	if how != wayBytes {
		var err error
		if m, err = s.Message(r, ttl); err != nil {
			// The DNS library does not unpack all that it packs: it refuses a name with 127 pointers. Then the hit becomes a
			// miss.
			return o.alone(ctx, o.newWriter(ctx, w, r, s, srv, forMiss), r, s.stripe)
		}
	}
	srv.add(s.stripe, countHit(e.Flags.Class(), s.tier, how), 1)
	if how == wayBytes {
		if !o.outer.Writers {
			w.Write(packet)
			return dns.RcodeSuccess, nil
		}
		sent := chain.Reply{Packet: packet, Rcode: int(e.Flags & record.FlagRcode), Len: s.Recorded(ede)}
		if o.outer.Reads {
			sent.Msg = s.Summary(r, packet, ede)
		}
		ws.Send(&sent)
		return dns.RcodeSuccess, nil
	}
	if ede != reply.NoEDE {
		m.Extra = append(m.Extra, reply.EDE(ede))
	}
	s.asker.tellScope(m, s.Key.Subnet().Scope)
	w.WriteMsg(m)
	return dns.RcodeSuccess, nil
}

// way decides how the answer in s is sent. ws are the writers of the outer plugins, if the answer is to be sent by them.
func (o *Optcache) way(w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server, ede uint16) (how way, ws chain.Writers) {
	q := &s.Query
	switch {
	case o.outer.Changes:
		return wayPlugin, ws
	case !srv.plain || q.Over == query.OverOther:
		return wayTransport, ws
	case len(r.Question) != 1 || len(r.Extra) > 1 || len(r.Extra) == 1 && !q.EDNS:
		return wayRequest, ws
	case s.Entry.Flags&(record.FlagCompressed|record.FlagMessage) != 0:
		return wayAnswer, ws
	}
	if s.asker.option != nil {
		return wayEDNS, ws
	}
	if q.Options {
		for _, option := range r.IsEdns0().Option {
			if code := option.Option(); code == dns.EDNS0NSID || edns.SupportedOption(code) {
				return wayEDNS, ws
			}
		}
	}
	if o.outer.Writers {
		var ok bool
		if ws, ok = o.outer.WritersOf(w); !ok {
			return wayRecorder, ws
		}
	} else if chain.IsInner(w) {
		return wayRecorder, ws
	}
	return wayBytes, ws
}

// release puts a scratch back into the pool, unless it has grown too large. The caller must not use it afterwards.
func (o *Optcache) release(s *scratch) {
	if !s.TooLarge() {
		o.pool.Put(s)
	}
}

// server returns the counters and properties of the server that handles the request of ctx.
func (o *Optcache) server(ctx context.Context) *server {
	srv, _ := ctx.Value(dnsserver.Key{}).(*dnsserver.Server)
	return o.serverOf(srv)
}

func (o *Optcache) serverOf(srv *dnsserver.Server) *server {
	if known := o.servers.Load(); known != nil {
		for _, s := range *known {
			if s.of == srv {
				return s
			}
		}
	}
	return o.addServer(srv)
}
