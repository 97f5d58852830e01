// Package optcache is a CoreDNS plugin that answers repeated questions from memory.
//
// It stands where the cache plugin stands in the chain and takes its place word for word in
// the Corefile. Popular names are served from a hot tier, the others from a segmented LRU;
// readers reach both without a lock, and the garbage collector never sees an entry.
//
// The way of a request: ServeDNS (this file) makes the key and asks the store (store.go), which
// looks into the hot tier (hotcache.go), then through the index into the arena (shard.go), where
// the records are (entry.go). A hit is turned into a reply (reply.go), as bytes where nothing in
// front needs a message (neutral.go). A miss goes on to the next plugin with a writer (writer.go)
// that decides what of the response is kept (admit.go) and inserts it; requests for the same miss
// wait for one (flight.go). What expires is refreshed in refresh.go. The policy (slru.go,
// climber.go) says what goes for it. A reload hands the store on (reload.go),
// a restart finds it in a file (persist.go).
package optcache

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// options is what one optcache block of a Corefile asks for.
type options struct {
	zones []string // normalized origins this instance caches for

	success classOptions // positive answers
	denial  classOptions // NXDOMAIN, NODATA and failures

	servfail time.Duration // how long a failure is cached, 0 to 5m; 0: never
	keepTTL  bool          // show the original TTL instead of the remaining one

	prefetch prefetchOptions
	stale    staleOptions
	coalesce coalesceOptions
	fast     fastOptions
	file     fileOptions
	explain  bool // ede: say in the reply why an answer is stale or a failure

	hotPercentage      int   // share of the capacity for the hot tier, 0 to 50, or hotAuto
	promotionThreshold int   // accesses before promotion, 1 to 255
	lineAligned        bool  // cache_line_optimization: records start on a 64-byte line
	maxMemory          int64 // bytes over everything the instance holds; 0: derived from the capacities
}

// classOptions bounds one class of answers.
type classOptions struct {
	capacity int           // entries
	maxTTL   time.Duration // cap on the TTL of an answer
	minTTL   time.Duration // floor under it
	except   []string      // normalized zones whose answers of this class are not cached
}

// coalesceOptions bound how requests with the same key wait for each other.
type coalesceOptions struct {
	waiters int           // requests that may wait for one query; 0: none
	wait    time.Duration // how long each of them waits, 1 ms or more
}

// Optcache is the plugin's handler. Its methods are safe for concurrent use once it has been
// started.
type Optcache struct {
	Next plugin.Handler
	options

	zoneNames zoneSet          // zones
	except    [classes]zoneSet // zones whose answers are not cached
	bypass    zoneSet          // zones that some plugin wants to be asked for each time

	place      place // of the server block; start, stop and reload go by it
	generation int   // of the Corefile
	of         *caddy.Instance
	forerunner bool // another instance's answers have been taken over
	unread     bool // nobody has read all that is in the file
	successor  *Optcache
	stopped    atomic.Bool
	keeper     *keeper    // nil: no file
	block      *fastBlock // nil: no fast path

	store   *store
	flights flights
	view    string
	front   front // what stands in front of this plugin
	servers atomic.Pointer[[]*server]
	pool    sync.Pool // of *scratch

	clock func() int64     // ns on a monotonic clock, only differences count; start sets it
	ticks bool             // the clock is the ticking one, and unclock releases it
	wall  func() time.Time // for the validity of signatures

	// unclock releases the clock when nobody calls stop, as after a reload that failed.
	unclock runtime.Cleanup
}

func newOptcache(o options) *Optcache {
	h := &Optcache{
		options:   o,
		zoneNames: newZoneSet(o.zones),
		except:    [classes]zoneSet{success: newZoneSet(o.success.except), denial: newZoneSet(o.denial.except)},
		wall:      time.Now,
	}
	h.flights.coalesceOptions = o.coalesce
	h.pool.New = func() any { return newScratch() }
	return h
}

// zoneBypasser is implemented by plugins whose zones change behind the cache's back; the
// built-in cache asks for the same interface.
type zoneBypasser interface {
	CacheBypassZones() []string
}

// start gives the instance its store. It runs once the server block is complete: view is the block's
// view, handlers are its plugins in the order in which they are called.
func (o *Optcache) start(view string, handlers []plugin.Handler) error {
	var bypass []string
	for _, h := range handlers {
		if b, ok := h.(zoneBypasser); ok {
			bypass = append(bypass, b.CacheBypassZones()...)
		}
	}
	o.bypass = newZoneSet(bypass)
	o.front = inspect(handlers)
	o.view = view
	if o.clock == nil {
		coarse.acquire()
		o.clock = coarse.read
		o.unclock = runtime.AddCleanup(o, (*tickingClock).release, &coarse)
		o.ticks = true
	}
	if err := o.takeOver(); err != nil {
		return err
	}
	instances.add(o)
	if o.file.path != "" {
		o.startKeeping()
	}
	return nil
}

// stop hands the store over to the instance that a reload has put in place of this one, or gives its memory
// back. Requests that are still under way may then find nothing. It is harmless when start was not called.
func (o *Optcache) stop() error {
	if o.store == nil || o.stopped.Swap(true) {
		return nil
	}
	closeLanes(o)
	instances.remove(o)
	heir := instances.heir(o)
	if o.keeper != nil {
		o.keeper.stop(heir)
	}
	o.handOver(heir)
	if o.ticks {
		o.ticks = false
		o.unclock.Stop()
		coarse.release()
	}
	return nil
}

// Name implements plugin.Handler.
func (o *Optcache) Name() string { return pluginName }

// ServeDNS implements plugin.Handler.
func (o *Optcache) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if r.Opcode != dns.OpcodeQuery {
		return o.next(ctx, w, r)
	}
	// From here on, what plugins behind do to a request is not seen in front: the server may still need it
	// as it was.
	if !cacheable(r) {
		return o.next(ctx, w, r.Copy())
	}
	opt := r.IsEdns0()
	s, ok := o.scratchFor(r, opt)
	if !ok || !o.zoneNames.contain(s.key.name()) || o.bypass.contain(s.key.name()) {
		o.release(s)
		return o.next(ctx, w, r.Copy())
	}

	srv := o.server(ctx)
	now := o.clock()
	if o.store.lookup(s, now) {
		return o.hit(ctx, w, r, opt, s, srv, now)
	}
	rw := o.newWriter(ctx, w, r, opt, s, srv, forMiss)
	if o.coalesce.waiters > 0 && !goesAlone(ctx, r) {
		return o.coalesced(ctx, rw, r, s, srv)
	}
	srv.add(s.stripe, countMiss, 1)
	o.release(s)
	return o.ask(ctx, rw, r)
}

// scratchFor returns a scratch with the key of a question. ok is false when its name is not one.
func (o *Optcache) scratchFor(r *dns.Msg, opt *dns.OPT) (s *scratch, ok bool) {
	s = o.pool.Get().(*scratch)
	q := &r.Question[0]
	n, ok := wire.PackName(s.out[wire.HeaderLen:], q.Name)
	if !ok {
		return s, false
	}
	do := opt != nil && opt.Do()
	s.key.set(o.store.seed, s.out[wire.HeaderLen:wire.HeaderLen+n], q.Qtype, q.Qclass, do, r.CheckingDisabled)
	s.body = wire.HeaderLen + n + questionTail
	return s, true
}

// hit serves the entry in s, which is released.
func (o *Optcache) hit(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, srv *server, now int64) (int, error) {
	defer o.release(s)
	left := s.entry.remaining(now)
	if left <= 0 {
		return o.serveStale(ctx, w, r, opt, s, srv, now)
	}
	if o.prefetch.amount > 0 && o.due(s, now) {
		o.refresh(ctx, r, s, srv, now, forPrefetch)
	}
	ttl := s.entry.ttl
	if !o.keepTTL {
		ttl = uint32(left)
	}
	return o.reply(ctx, w, r, opt, s, srv, ttl, false)
}

// cacheable reports whether a query is a question that may be answered from memory at all.
func cacheable(r *dns.Msg) bool {
	if len(r.Question) == 0 {
		return false
	}
	qtype := r.Question[0].Qtype
	return qtype != dns.TypeAXFR && qtype != dns.TypeIXFR
}

// ask hands a request to the next plugin.
func (o *Optcache) ask(ctx context.Context, rw *writer, r *dns.Msg) (int, error) {
	// Plugins may change what they get. AD asks the upstream to say what it has validated,
	// so that the entry can tell clients that want to know (RFC 6840 section 5.7).
	req := r.Copy()
	req.AuthenticatedData = true
	rcode, err := o.next(ctx, rw, req)
	switch rw.purpose {
	case forMiss:
		// The upstream may fail without a message. Clients that come back are then answered from
		// the cache for a while; but a client that went away is no failure of the upstream.
		if err != nil && rcode == dns.RcodeServerFailure && ctx.Err() == nil && !rw.wrote {
			rw.keepFailure(r)
		}
	case forStale:
		if o.stale.recheck > 0 && !rw.refreshed && !rw.replaced {
			o.store.postpone(&rw.key, rw.served, o.clock()+int64(o.stale.recheck))
		}
	}
	return rcode, err
}

func (o *Optcache) next(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return plugin.NextOrFailure(o.Name(), o.Next, ctx, w, r)
}

// release gives a scratch back, unless it has grown too large to keep.
func (o *Optcache) release(s *scratch) {
	if cap(s.out) > pooledMax || cap(s.packed) > pooledMax || cap(s.record) > pooledMax/wordBytes {
		return
	}
	o.pool.Put(s)
}

// server returns what is kept for the server that handles the request.
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

// zoneSet is a set of zones, as lower-cased wire names.
type zoneSet struct {
	all   bool // the root is among them
	names [][]byte
}

func newZoneSet(zones []string) (z zoneSet) {
	for _, zone := range zones {
		var buf [wire.MaxName]byte
		n, ok := wire.PackName(buf[:], dns.Fqdn(zone))
		if !ok {
			continue
		}
		name := append([]byte(nil), buf[:n]...)
		wire.Lower(name, name)
		z.names = append(z.names, name)
		z.all = z.all || n == 1
	}
	return z
}

// contain reports whether the lower-cased wire name is in one of the zones.
func (z *zoneSet) contain(name []byte) bool {
	if z.all {
		return true
	}
	for _, zone := range z.names {
		if wire.InZone(name, zone) {
			return true
		}
	}
	return false
}
