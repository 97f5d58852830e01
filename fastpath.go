package optcache

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file decides which server blocks may have a fast path, and answers the hits among the packets that listeners receive.
// Package fastpath has the listeners, the workers and the slow path. Package chain knows what the outer plugins do.

// fastMode says whether a server block has a fast path.
type fastMode uint8

const (
	fastAuto fastMode = iota // where it can have one
	fastOn                   // in any case: a server that cannot have one does not start
	fastOff                  // in no case
)

// fastModes are the modes by their words in the Corefile.
var fastModes = map[string]fastMode{"auto": fastAuto, "on": fastOn, "off": fastOff}

// fastOptions say whether there is a fast path.
type fastOptions struct {
	mode    fastMode
	workers int    // 0: a number that suits the system
	at      string // where the Corefile says so: FILE:LINE
}

// err returns an error that names the line of the directive fastpath, or of the block if there is no such directive.
func (o *fastOptions) err(format string, args ...any) error {
	return plugin.Error(pluginName, fmt.Errorf("%s - fastpath: %s", o.at, fmt.Sprintf(format, args...)))
}

// fallback is the reason why a server block has no fast path, although the Corefile does not say off. Its values are those of
// the label reason of the metric fastpath_fallback_info, beside those of fastpath.Off.
type fallback string

const (
	unfitSystem    fallback = "system"    // the system lacks something
	unfitPlugin    fallback = "plugin"    // an outer plugin would be passed by
	unfitServer    fallback = "server"    // a plugin of another block, on the same address, changes the server
	unfitTransport fallback = "transport" // the block does not serve plain DNS
	unfitPort      fallback = "port"      // the kernel chooses the port
	unfitAddresses fallback = "addresses" // there are too many
)

// unfit is an error that says why a server block cannot have a fast path.
type unfit struct {
	fallback
	error
}

func unfitf(why fallback, format string, args ...any) error {
	return unfit{why, fmt.Errorf(format, args...)}
}

// fallback returns why the block has no fast path on a server, as in the metrics' label reason. It is "" if it has one, or if
// the Corefile says off.
func (o *Optcache) fallback(server string) string {
	switch {
	case o.fast.mode == fastOff:
		return ""
	case o.unfit != "":
		return string(o.unfit)
	case o.block == nil: // in tests
		return ""
	}
	return fastpath.Off(server)
}

// fastBlock is what the fast path knows of a server block. The block need not have a fast path.
type fastBlock struct {
	o       *Optcache
	workers int
	effects chain.Effects
	report  *chain.Report // nil if there is no plugin prometheus
	noticed atomic.Int64  // time of the last call of fastpath.Realign, in ns since began; 0: none
}

var began = time.Now() // the start of the process

// notice looks at a request that has reached the chain. The kernel should give each plain query over UDP to the listener. If
// CoreDNS's own socket has received one, another process has opened or closed sockets on the address, and the kernel's choice
// is no longer what this process has set. Then notice has the listener checked. There is no other sign of such a change.
// Without queries, there is nothing to repair.
func (b *fastBlock) notice(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) {
	if fastpath.BySlowPath(ctx) || len(r.Question) != 1 || len(r.Answer) > 0 || len(r.Ns) > 0 || len(r.Extra) > 1 {
		return
	}
	if _, ok := w.RemoteAddr().(*net.UDPAddr); !ok {
		return
	}
	s, ok := ctx.Value(dnsserver.Key{}).(*dnsserver.Server)
	last, now := b.noticed.Load(), int64(time.Since(began))
	if ok && (last == 0 || now-last >= int64(fastpath.NoticeEvery)) && b.noticed.CompareAndSwap(last, now) {
		go fastpath.Realign(s.Addr)
	}
}

// setupFast prepares the fast path of a server block, unless the Corefile says off. At this time the block's server does not
// exist yet; serves does the rest.
func setupFast(c *caddy.Controller, o *Optcache) {
	cfg := dnsserver.GetConfig(c)
	b := &fastBlock{o: o}
	if cfg.UDPDecorateWriterFunc == nil {
		cfg.UDPDecorateWriterFunc = b.serves
	}
	if o.fast.mode == fastOff {
		return
	}
	cfg.Plugin = slices.Insert(cfg.Plugin, 0, b.door)
	c.OnStartup(func() error {
		if o.store == nil { // it was not started
			return nil
		}
		err := cmp.Or(b.inspectServers(c.Context()), b.inspect(cfg))
		var why unfit
		switch {
		case err == nil:
			o.block = b
			for _, addr := range o.addrs {
				if strings.HasPrefix(addr, transport.DNS+"://") {
					fastpath.ExpectStreams(addr, o.generation)
				}
			}
		case o.fast.mode == fastAuto && errors.As(err, &why):
			o.unfit = why.fallback
			log.Infof("%s - fastpath: off: %v", o.fast.at, err)
		default:
			return o.fast.err("%v", err)
		}
		return nil
	})
	// Other plugins, such as multisocket, read GOMAXPROCS while the next generation is set up. The workers must not count.
	c.OnRestart(func() error { runtime.GOMAXPROCS(fastpath.OwnProcs()); return nil })
	c.OnRestartFailed(func() error {
		fastpath.ForgetExpected()
		fastpath.RaiseProcs()
		fastpath.RealignAll() // a reload may fail after it has opened or closed sockets of CoreDNS
		return nil
	})
	// Registering a hook twice panics. Some reloads have removed all hooks by now, others none.
	if !slices.Contains(caddy.ListPlugins()["event_hooks"], pluginName) {
		caddy.RegisterEventHook(pluginName, func(event caddy.EventName, _ any) error {
			switch event {
			case caddy.InstanceStartupEvent: // the servers of the last generation have closed their sockets by now
				fastpath.RealignAll()
			case caddy.ShutdownEvent:
				fastpath.End()
			}
			return nil
		})
	}
}

// serves opens the fast path for a server, if a server block there has one. CoreDNS calls it as a decorator of the server's UDP
// writer, just before the server reads its first packet. By now the new generation is sure to serve. Earlier, a reload could
// still fail, and a reload that fails must change nothing.
//
// If several blocks share an address, CoreDNS calls the function of one of them. So serves returns what another plugin's function
// returns, if there is one, and else chain.Roomy.
func (b *fastBlock) serves(s *dnsserver.Server) dns.DecorateWriter {
	if err := fastpath.Open(s, b, func() (fastpath.Service, error) { return newRoutes(s) }); err != nil {
		log.Errorf("%v", b.o.fast.err("%s: %v; all queries go the slow path", s.Addr, err))
	}
	if err := fastpath.OpenStreams(s, b.o.generation, func() (fastpath.Service, error) { return newRoutes(s) }); err != nil {
		log.Errorf("%v", b.o.fast.err("%s: %v; queries over TCP go the slow path", s.Addr, err))
	}
	if f, _ := decoratorOf(s); f != nil {
		return f(s)
	}
	return chain.Roomy
}

// door is the outermost handler of a server block with a fast path. It has the fast path take over the connection of each request
// that came by TCP or TLS.
type door struct {
	of   *fastBlock
	next plugin.Handler
}

func (b *fastBlock) door(next plugin.Handler) plugin.Handler { return door{b, next} }

// Name implements plugin.Handler. There is no directive of that name.
func (door) Name() string { return pluginName + " door" }

// ServeDNS implements plugin.Handler.
func (d door) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	done := d.take(ctx, w)
	if done == nil {
		return d.next.ServeDNS(ctx, w, r)
	}
	defer done()
	rcode, err := d.next.ServeDNS(ctx, w, r)
	if plugin.ClientWrite(rcode) {
		return rcode, err
	}
	// The server would send this answer only after done, when the connection may be closed.
	answer := new(dns.Msg).SetRcode(r, rcode)
	state := request.Request{W: w, Req: r}
	state.SizeAndDo(answer)
	w.WriteMsg(answer)
	return dns.RcodeSuccess, err
}

// take has the fast path take over the connection of a request. It returns nil if that is not done.
func (d door) take(ctx context.Context, w dns.ResponseWriter) (done func()) {
	o := d.of.o
	if _, ok := w.RemoteAddr().(*net.TCPAddr); !ok || o.block == nil || fastpath.BySlowPath(ctx) {
		return nil
	}
	s, ok := ctx.Value(dnsserver.Key{}).(*dnsserver.Server)
	if !ok {
		return nil
	}
	done, err := fastpath.Take(s, w, o.generation, func() (fastpath.Service, error) { return newRoutes(s) })
	if err != nil {
		log.Errorf("%v", o.fast.err("%s: %v; queries over TCP go the slow path", s.Addr, err))
	}
	return done
}

// decorates reports whether f is another plugin's decorator of the UDP writer, and not serves.
func decorates(f func(*dnsserver.Server) dns.DecorateWriter) bool {
	return f != nil && !chain.SameCode(f, new(fastBlock).serves)
}

// decoratorOf returns another plugin's decorator of the server's UDP writer, or nil. The plugin may be in any server block on the
// address. If several blocks have one, that of the last zone by name counts. ok is false if CoreDNS does not tell.
func decoratorOf(s *dnsserver.Server) (f func(*dnsserver.Server) dns.DecorateWriter, ok bool) {
	served, ok := chain.Zones(s)
	for _, zone := range slices.Sorted(maps.Keys(served)) {
		for _, cfg := range served[zone] {
			if decorates(cfg.UDPDecorateWriterFunc) {
				f = cfg.UDPDecorateWriterFunc
			}
		}
	}
	return f, ok
}

// inspect checks the outer plugins of the server block, when all of them are set up. It returns an error if one of them does
// what the fast path can neither bypass nor emulate.
func (b *fastBlock) inspect(cfg *dnsserver.Config) (err error) {
	if err = fastpath.Supported(); err != nil {
		return unfitf(unfitSystem, "%w", err)
	}
	if b.effects, b.report, err = chain.EffectsOf(cfg, pluginName); err != nil {
		return unfitf(unfitPlugin, "%w", err)
	}
	return nil
}

// inspectServers checks the servers of b's block, and the other server blocks that share them. It decides on the number of
// workers.
func (b *fastBlock) inspectServers(corefile caddy.Context) error {
	auto := b.o.fast.mode == fastAuto
	all, ok := chain.Configs(corefile)
	if !ok {
		return unfitf(unfitSystem, "this version of CoreDNS does not say what is in a Corefile")
	}
	plain, secure := 0, 0              // keys of the block that serve plain DNS, and DNS over TLS
	addresses := make(map[string]bool) // of all blocks with this plugin
	for _, own := range all {          // one for each key of a block
		if o, ok := own.Handler(pluginName).(*Optcache); ok && own.Transport == transport.DNS && o.fast.mode != fastOff {
			for _, addr := range chain.ServerAddrs([]string{own.Transport + "://" + own.Zone + ":" + own.Port}, own.ListenHosts) {
				addresses[addr] = true
			}
		}
		if own.Handler(pluginName) != plugin.Handler(b.o) {
			continue
		}
		secured := own.Transport == transport.TLS
		switch {
		case secured:
		case own.Transport != transport.DNS && auto:
			continue // CoreDNS's own server has this key
		case own.Transport != transport.DNS:
			return unfitf(unfitTransport, "it is for plain DNS and DNS over TLS, and the server block serves %s://", own.Transport)
		case own.Port == "0" && auto:
			return unfitf(unfitPort, "it needs a port that is known, and the server block has port 0; write a number")
		}
		if secured {
			secure++
		} else {
			plain++
		}
		for _, other := range all {
			switch {
			case !chain.SameServer(own, other):
			case other.ProxyProtoConnPolicy != nil:
				return unfitf(unfitServer, "it cannot stand beside the plugin proxyproto, which server block %s:%s has on the same address",
					other.Zone, other.Port)
			case !secured && decorates(other.UDPDecorateWriterFunc):
				return unfitf(unfitServer, "it cannot stand beside a plugin that puts a writer of its own under the server, such as shed, which server block %s:%s has on the same address",
					other.Zone, other.Port)
			}
		}
	}
	switch {
	case plain+secure == 0:
		return unfitf(unfitTransport, "it is for plain DNS and DNS over TLS, and the server block serves neither")
	case auto && b.o.fast.workers == 0 && len(addresses) > maxAutoAddresses:
		return unfitf(unfitAddresses, "the Corefile has %d addresses, and by itself it serves %d at the most; write fastpath on 1",
			len(addresses), maxAutoAddresses)
	}
	switch b.workers = b.o.fast.workers; {
	case b.workers > 0:
	case auto:
		b.workers = autoWorkers(fastpath.OwnProcs(), runtime.NumCPU(), len(addresses))
	default:
		b.workers = fastpath.OwnProcs()
	}
	return nil
}

// Limits of a fast path that nobody has asked for. Each worker has a thread, and one more P of the Go scheduler.
const (
	maxAutoWorkers   = 16 // of one address; a worker answers more than 100,000 queries per second
	maxAutoAddresses = 16
)

// autoWorkers returns the number of workers for each of a number of addresses. procs is how many CPUs Go uses, cpus how many
// there are. If Go uses fewer than there are, the process has a limit of CPU time as a rule, which the workers share with all
// else that the process does.
func autoWorkers(procs, cpus, addresses int) int {
	if procs < cpus {
		procs /= 2
	}
	return min(max(procs/max(addresses, 1), 1), maxAutoWorkers)
}

// routes say which instance answers which queries, for one address and one generation of the Corefile. They implement
// fastpath.Service, and do not change after newRoutes.
type routes struct {
	server  *dnsserver.Server
	zones   zones.Table[*route] // the first route of each zone
	all     []*route
	workers int
	asked   bool // a server block says that it wants a fast path
}

// route says which instance serves a zone, or a view of it.
type route struct {
	view *chain.View // nil: all queries that come here are for this route
	or   *route      // for those that are not; nil: the server refuses them

	o       *Optcache // nil: queries go the slow path
	server  *server
	index   int // in routes.all
	effects chain.Effects
	report  *chain.Report // nil if there is no plugin prometheus
}

// newRoutes returns the routes of a server. It reads the server's zones, which CoreDNS does not export.
func newRoutes(s *dnsserver.Server) (*routes, error) {
	r := &routes{server: s}
	served, ok := chain.Zones(s)
	if !ok {
		return nil, errors.New("this version of CoreDNS does not say which zones a server has")
	}
	ends := make(map[*route][]byte) // routes of which none follows in their zone, which is the value
	for zone, configs := range served {
		name, ok := zones.Wire(zone)
		if !ok {
			return nil, fmt.Errorf("%q is not a zone", zone)
		}
		var last *route
		for _, cfg := range configs { // several are views. The server asks them in this order
			rt := r.newRoute(s, cfg)
			if last == nil {
				r.zones.Add(name, rt)
			} else {
				last.or = rt
			}
			last = rt
		}
		if last != nil {
			ends[last] = name
		}
	}
	for end, zone := range ends { // what no view of a zone takes belongs to the zone around it
		if len(zone) > 1 {
			if around := r.zones.Find(zone[1+zone[0]:]); around != nil {
				end.or = *around
			}
		}
	}
	return r, nil
}

// newRoute returns the route of a server block. Its field or is nil.
func (r *routes) newRoute(s *dnsserver.Server, cfg *dnsserver.Config) *route {
	rt := &route{index: len(r.all)}
	r.all = append(r.all, rt)
	rt.view, _ = chain.ViewOf(cfg) // a view that is not known decides nothing
	if o, ok := cfg.Handler(pluginName).(*Optcache); ok && o.block != nil {
		b := o.block
		rt.o, rt.effects, rt.report, rt.server = o, b.effects, b.report, o.serverOf(s)
		r.workers = max(r.workers, b.workers)
		r.asked = r.asked || o.fast.mode == fastOn
	}
	return rt
}

// Workers implements fastpath.Service.
func (r *routes) Workers() int { return r.workers }

// Asked implements fastpath.Service.
func (r *routes) Asked() bool { return r.asked }

// Generation implements fastpath.Service.
func (r *routes) Generation() (n int) {
	r.some(func(o *Optcache) bool {
		n = max(n, o.generation)
		return false
	})
	return n
}

// Over implements fastpath.Service.
func (r *routes) Over() bool { return r.some(func(o *Optcache) bool { return o.stopped.Load() }) }

// some reports whether yes returns true for one of the instances.
func (r *routes) some(yes func(*Optcache) bool) bool {
	return slices.ContainsFunc(r.all, func(rt *route) bool { return rt.o != nil && yes(rt.o) })
}

// closeFast closes the listeners and connections that use o, and waits until none uses o.
func closeFast(o *Optcache) {
	uses := func(s fastpath.Service) bool {
		return s.(*routes).some(func(other *Optcache) bool { return other == o })
	}
	fastpath.CloseStreams(uses)
	fastpath.Close(uses)
}

// answerer answers the queries of one worker. It implements fastpath.Answerer.
type answerer struct {
	routes    *routes
	queries   [fastpath.BatchSize]fastQuery
	reporters []*chain.Reporter    // by route.index; nil for a route without the plugin prometheus
	allowed   []prometheus.Counter // by route.index; nil until a query is counted in it
	timed     bool                 // somebody must be told of the time

	batch fastpath.Batch // the last one
	begun time.Time      // when it came; set only if timed is true
}

// NewAnswerer implements fastpath.Service.
func (r *routes) NewAnswerer() fastpath.Answerer {
	a := &answerer{
		routes:    r,
		reporters: make([]*chain.Reporter, len(r.all)),
		allowed:   make([]prometheus.Counter, len(r.all)),
	}
	stripe := nextStripe.Add(1)
	for i := range a.queries {
		a.queries[i].s = newScratch()
		a.queries[i].s.stripe = stripe
	}
	made := make(map[*chain.Report]*chain.Reporter) // the zones of a block share one
	for _, rt := range r.all {
		a.timed = a.timed || rt.effects.Tapped()
		if rt.report == nil {
			continue
		}
		if made[rt.report] == nil {
			made[rt.report] = chain.NewReporter(r.server.Addr, rt.report)
		}
		a.reporters[rt.index] = made[rt.report]
		a.timed = true
	}
	return a
}

// Answer implements fastpath.Answerer. It replies to hits, with the packet that the chain would have sent at the same time. All
// other queries go the slow path.
func (a *answerer) Answer(b fastpath.Batch) {
	if a.batch = b; a.timed {
		a.begun = time.Now()
	}
	n, local, stream := b.Len(), b.Local(), b.Stream()
	// prepare touches memory that answer needs. Preparing all queries first lets their cache misses overlap.
	for i := range n {
		a.queries[i].why = a.queries[i].prepare(b.Packet(i), b.Client(i), local, stream, a.routes)
	}
	var now int64
	var clock *Optcache // whose clock now is from
	for i := range n {
		f := &a.queries[i]
		if f.why == fastpath.Answered {
			if f.route.o != clock {
				clock = f.route.o
				now = clock.clock()
			}
			f.why = f.answer(now)
		}
		if f.why == fastpath.Answered {
			if f.s.sampling.weight != 0 {
				f.route.o.countSample(f.s, b.Client(i).Addr())
			}
			b.Reply(i, f.reply)
		} else {
			b.Pass(i, f.why)
		}
	}
}

// Sent implements fastpath.Answerer. It reports the hits, after the replies are on their way.
func (a *answerer) Sent() {
	var took time.Duration
	if a.timed {
		took = time.Since(a.begun)
	}
	for i := range a.batch.Len() {
		f := &a.queries[i]
		if f.why == fastpath.Answered {
			if r := a.reporters[f.route.index]; r != nil {
				f.report(r, took)
			}
			if f.route.effects.Counted {
				a.allow(f.route)
			}
			if f.route.effects.Tapped() {
				reply := f.reply
				if a.batch.Lost(i) {
					reply = nil
				}
				f.route.effects.Tap(&f.asked, reply, a.begun)
			}
		}
		f.s.Shrink()
	}
}

// allow counts a hit that the plugin acl has allowed, as that plugin would.
func (a *answerer) allow(rt *route) {
	c := &a.allowed[rt.index]
	if *c == nil {
		*c = chain.AllowedBy(a.routes.server.Addr, rt.o.view)
	}
	(*c).Inc()
}

// fastQuery is one packet in the fast path. A worker uses it again in each batch.
type fastQuery struct {
	s     *scratch
	route *route
	why   fastpath.Reason // for the slow path, or fastpath.Answered
	asked chain.Asked     // what outer plugins go by, if there are any
	reply []byte          // part of s
	ede   uint16          // the reply's Extended DNS Error code, or reply.NoEDE
	size  int             // of the request, in bytes
}

// prepare reads the packet p into f, and touches the memory where a look-up starts, so that answer finds it in the CPU's cache.
// It returns fastpath.Answered if answer should be called, or else the reason for the slow path. The rest is as in fastpath.Batch.
func (f *fastQuery) prepare(p []byte, client netip.AddrPort, local net.Addr, stream bool, routes *routes) fastpath.Reason {
	s := f.s
	q := &s.Query
	name, ok := q.Parse(p)
	if !ok {
		return fastpath.NotPlain
	}
	if q.IPv4 = client.Addr().Is4(); stream {
		q.ByTCP()
	}
	f.size = len(p)
	s.Key.Mixed = wire.Lower(s.Key.Bytes[:], name)
	lower := s.Key.Bytes[:len(name)]
	first := routes.zones.Find(lower)
	if first == nil {
		return fastpath.Zone
	}
	f.route = *first
	if f.route.view != nil || f.route.effects.Watched() {
		f.asked.Set(chain.Asked{
			Packet: p, Name: lower, Qtype: q.Qtype, DO: q.DO(), TCP: q.OverTCP(), Client: client, Local: local,
		})
	}
	for f.route != nil && f.route.view != nil {
		takes, known := f.route.view.Takes(&f.asked)
		if !known {
			return fastpath.View
		}
		if takes {
			break
		}
		f.route = f.route.or
	}
	if f.route == nil || f.route.o == nil {
		return fastpath.Zone
	}
	o, effects := f.route.o, &f.route.effects
	if !o.rules.Serves(lower) || effects.Answers(lower) {
		return fastpath.Zone
	}
	if effects.Options && q.Options {
		return fastpath.NotPlain
	}
	if effects.Acts(&f.asked) {
		return fastpath.Outer
	}
	if effects.Space > 0 && q.EDNS {
		q.Buffer = min(q.Buffer, effects.Space)
	}
	s.Key.Seal(o.store.seed, len(name), q.Qtype, q.Qclass, q.DO(), q.CD())
	copy(s.Out[wire.HeaderLen:], name)
	s.Body = wire.HeaderLen + len(name) + wire.QuestionTail
	o.store.touch(s.Key.Hash)
	return fastpath.Answered
}

// answer makes the reply to a query that prepare has accepted, in f.reply, and counts the hit. If it returns a reason for the
// slow path instead, the chain counts the query.
func (f *fastQuery) answer(now int64) fastpath.Reason {
	if why := f.look(now); why != fastpath.Answered {
		return why
	}
	o, s, srv := f.route.o, f.s, f.route.server
	if o.due(s, now) {
		return fastpath.Prefetch
	}
	o.store.counted(s, true, now)
	srv.add(s.stripe, countHit(s.Entry.Flags.Class(), s.tier, wayFast), 1)
	return fastpath.Answered
}

// look looks for the answer to a query that prepare has accepted, and makes the reply in f.reply. It returns fastpath.Answered,
// or else the reason for the slow path.
func (f *fastQuery) look(now int64) fastpath.Reason {
	o, s := f.route.o, f.s
	if !o.lookup(s, now) || s.Entry.Failure() && o.mayLetThrough(s, now) {
		return fastpath.Miss
	}
	f.route.server.addEvents(s) // the look-up may have promoted the entry
	if s.Entry.Remaining(now) <= 0 {
		return fastpath.Stale
	}
	if s.Entry.Flags&(record.FlagCompressed|record.FlagMessage) != 0 {
		return fastpath.Message
	}
	f.ede = o.explanation(s, now)
	var ok bool
	if f.reply, ok = s.Reply(o.shownTTL(&s.Entry, now), f.ede, f.route.effects.Rotate); !ok {
		return fastpath.Size
	}
	if logged := f.route.effects.Logged(s.Key.Name()); logged&f.classes(now) != 0 {
		return fastpath.Outer
	}
	return fastpath.Answered
}

// classes returns the classes that the reply may have for the plugin log.
func (f *fastQuery) classes(now int64) chain.Classes {
	e := &f.s.Entry
	c := chain.ClassesOf(int(e.Flags&record.FlagRcode), int(e.Counts[0]), !e.SignaturesGood(now))
	if binary.BigEndian.Uint16(f.reply[2:])&wire.FlagTC != 0 { // records that decide may have been cut off
		c |= chain.ClassesOf(int(e.Flags&record.FlagRcode), 0, false)
	}
	return c
}

// report counts a hit in the series of the plugin prometheus, as that plugin would.
func (f *fastQuery) report(r *chain.Reporter, took time.Duration) {
	r.Count(&chain.Hit{
		Name: f.s.Key.Name(), Query: &f.s.Query, Rcode: int(f.s.Entry.Flags & record.FlagRcode),
		Request: f.size, Response: f.s.Recorded(f.ede), Took: took,
	})
}
