package optcache

import (
	"context"
	"errors"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/response"

	"github.com/miekg/dns"
	"github.com/opentracing/opentracing-go"

	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/backoff"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/flight"
	"github.com/optcache/optcache/plugin/pkg/flushed"
	"github.com/optcache/optcache/plugin/pkg/limit"
	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/reply"
	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file is the fetch: it asks the next plugin. There are three reasons to ask. A request is a miss; then it asks alone, or
// for all requests that wait for the same answer (coalescing). An entry is popular and about to expire (prefetch). An entry has
// expired and may still be served (serve_stale, RFC 8767).
//
// The response comes back through the writer, at the end of this file: from there into the store, to the waiters of the flight,
// and to the client. Package admit has the rules for what is kept. Package flight knows how requests wait for each other.

// coalesceOptions bound how requests with the same key wait for each other.
type coalesceOptions struct {
	waiters int           // requests that may wait for one fetch; 0: no coalescing
	wait    time.Duration // how long each of them waits, 1 ms or more
}

// defaultCoalesce is coalescing as it is without the directive.
var defaultCoalesce = coalesceOptions{waiters: 1000, wait: 2 * time.Second}

// prefetchOptions say when an entry is refreshed before it expires.
type prefetchOptions struct {
	amount     uint32        // requests that make an entry popular; 0: no prefetch
	gap        time.Duration // the longest time between two of them
	percentage int           // of the TTL that is left when the refresh starts
}

// staleOptions say how entries are served that have expired.
type staleOptions struct {
	upTo           time.Duration // how long after its expiry an entry may be served; 0: never
	verify         bool          // ask the next plugin first
	timeout        time.Duration // with verify, the wait before the stale answer is served; 0: until the next plugin returns
	ttl            time.Duration // TTL of stale answers
	recheck        time.Duration // pause after a refresh that has failed; 0 to 5m
	preferPositive bool          // prefer an answer to a denial, even if the answer is stale
}

// upstreamOptions bound how many questions per second the next plugin is asked.
type upstreamOptions struct {
	perSecond int           // 0: no bound
	burst     int           // so many at once
	wait      time.Duration // how long a request waits for its turn
	group     string        // blocks of a group share the bound; "": this block has its own
}

func (u *upstreamOptions) limiter() *limit.Limiter {
	switch {
	case u.perSecond == 0:
		return nil
	case u.group != "":
		return limit.Shared(u.group, u.perSecond, u.burst)
	}
	return limit.New(u.perSecond, u.burst)
}

// purpose is the reason for which the next plugin is asked.
type purpose uint8

const (
	forMiss purpose = iota
	forPrefetch
	forStale // the response replaces the entry that has expired only if it is good enough; see writer.accept
)

// call is the key of a flight. At first it is a question only, and the traits are zero. When an answer turns out to depend on
// the query traits, requests join another flight, whose key has their traits.
type call struct {
	key    *record.Key
	traits query.Traits

	purpose purpose // of the request that has begun the flight; it makes no difference between flights
}

var traitsSeed = maphash.MakeSeed()

// Hash implements flight.Key.
func (c call) Hash() uint64 {
	if c.traits == (query.Traits{}) {
		return c.key.Hash
	}
	return c.key.Hash ^ maphash.Comparable(traitsSeed, c.traits)
}

// Equal implements flight.Key.
func (c call) Equal(other call) bool { return c.key.Equal(other.key) && c.traits == other.traits }

// shared is the value of a flight, which its waiters share. It is one of three:
//
//   - An answer. Each waiter makes a reply of it for its own header bits, case of the qname, size and transport. An answer that
//     upstreams give only to some query traits, such as one that is truncated or REFUSED, is for waiters with the leader's
//     traits only.
//   - A failure. All waiters fail with it, so that no flood of retries follows.
//   - Neither. Each waiter asks for itself.
//
// Waiters read it concurrently and do not change it.
type shared struct {
	answer *dns.Msg // without OPT, and with ttl in all records; nil: a failure, or neither

	by        *writer       // the writer that the answer came through; nil: no answer
	ttl       uint32        // of all its records, in seconds
	stored    int64         // when the answer came, in ns on the store's clock; set if it is kept
	kept      bool          // the answer is in the store
	refreshed bool          // the answer may be served instead of a stale entry
	wildcard  string        // the wildcard name that the answer was made from, or ""
	only      *query.Traits // the leader's, if the answer is for these traits only; else nil
	reach     reach         // which clients the answer is for
	subnet    string        // the leader's, as in query.Traits; "" if the leader sent none

	verdict verdict // on the answer, for operators who ask

	failed bool  // it is a failure
	rcode  int   // of the failure
	err    error // of the failure; may be nil
}

type (
	flights    = flight.Group[call, shared]
	flightCall = flight.Flight[call, shared]
)

// isFor reports whether the client of a request may get the answer.
func (a *shared) isFor(w *writer) bool {
	if a.reach.narrow && (a.subnet == "" || a.subnet != w.traits.Subnet) && !a.reach.at.Covers(w.asker.prefix) {
		return false
	}
	return a.only == nil || *a.only == w.traits && !w.traits.Options
}

// goesAlone reports whether a request must reach the next plugin itself, and not wait for a flight. There are two cases:
//
//   - Plugins send look-ups of their own to the server that they are part of. Such a look-up may be part of the very fetch that
//     it would wait for, and neither would end. It has a depth above 0.
//   - The plugin loop detects a loop when its own queries, of type HINFO, come back.
func goesAlone(ctx context.Context, r *dns.Msg) bool {
	depth, _ := ctx.Value(dnsserver.LoopKey{}).(int)
	return depth > 0 || r.Question[0].Qtype == dns.TypeHINFO
}

// miss asks the next plugin for a request, alone or for all requests that wait for the same answer. s has the key that the
// response is kept under. miss releases s.
//
// If the answer has come into the store meanwhile, miss returns it in found, with the time of the look-up in now. The caller
// then owns found, and has to reply. Otherwise found is nil, and the request is done.
func (o *Optcache) miss(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server) (found *scratch, now int64, rcode int, err error) {
	rw := o.newWriter(ctx, w, r, s, srv, forMiss)
	rw.watch = watchOf(ctx)
	rw.watch.missed(o, &s.Key)
	rw.through = s.through
	stripe := s.stripe
	o.release(s)
	o.setStatus(ctx, statusMiss)
	if o.coalesce.waiters > 0 && !goesAlone(ctx, r) {
		return o.coalesced(ctx, rw, r, stripe)
	}
	rcode, err = o.alone(ctx, rw, r, stripe)
	return nil, 0, rcode, err
}

// alone is miss for a request that waits for no other, and no other waits for it.
func (o *Optcache) alone(ctx context.Context, rw *writer, r *dns.Msg, stripe uint32) (rcode int, err error) {
	o.missed(rw.server, stripe, &rw.key)
	begun := o.clock()
	defer func() { rw.timed(begun, rcode, err) }()
	rcode = dns.RcodeServerFailure // if ask panics
	return o.ask(ctx, rw, r)
}

// coalesced is miss for a request that may wait for a flight, or lead one.
func (o *Optcache) coalesced(ctx context.Context, rw *writer, r *dns.Msg, stripe uint32) (found *scratch, now int64, rcode int, err error) {
	srv, begun := rw.server, o.clock()
	defer func() {
		if found == nil {
			o.missed(srv, stripe, &rw.key)
			rw.timed(begun, rcode, err)
		}
	}()
	rcode = dns.RcodeServerFailure // if ask panics
	rw.own.Key.traits = o.flightOf(rw)
	var deadline time.Time // of the request, for its waits in one flight or several
	for {
		f, role := o.flights.Join(&rw.own, true)
		switch role {
		case flight.Leads:
			rw.flight = f
			// The last flight may have ended between the look-up and Join. Then the answer may be in the store.
			s, _ := o.scratchFor(r, rw.RemoteAddr())
			s.Key, now = rw.key, o.clock()
			search := o.search
			if s.asker.prefix.Is() {
				search = o.lookupSubnet
			}
			if search(s, now) && !(rw.through && s.Entry.Failure()) {
				o.flights.Back(f, nil)
				return s, now, 0, nil
			}
			o.release(s)
			rcode, err = o.lead(ctx, rw, r)
			return nil, 0, rcode, err
		case flight.Alone:
			rcode, err = o.ask(ctx, rw, r)
			return nil, 0, rcode, err
		case flight.Refused:
			rw.outcome = outcomeLetGo
			srv.add(stripe, countLetGo, 1)
			return nil, 0, dns.RcodeServerFailure, nil
		}

		if deadline.IsZero() {
			srv.add(stripe, countCoalesced, 1)
			deadline = time.Now().Add(2 * o.coalesce.wait)
		}
		switch o.flights.Await(ctx, f, deadline) {
		case flight.Completed:
			switch a := f.Value(); {
			case a.failed:
				rw.watch.shared(a)
				return nil, 0, a.rcode, a.err
			case a.answer != nil && a.isFor(rw):
				o.setStatus(ctx, statusCoalesced)
				if rw.outcome = outcomeCoalesced; a.answer.Rcode == dns.RcodeServerFailure {
					rw.outcome = outcomeFailed
				}
				rw.watch.shared(a)
				rcode, err = o.share(ctx, rw.ResponseWriter, r, rw, a)
				return nil, 0, rcode, err
			case a.answer == nil || rw.own.Key.traits == rw.traits:
				rcode, err = o.ask(ctx, rw, r)
				return nil, 0, rcode, err
			}
			rw.own.Key.traits = rw.traits // the answer depends on them: join a flight for the same traits
		case flight.Gone:
			return nil, 0, dns.RcodeServerFailure, ctx.Err()
		case flight.TooLate:
			rw.outcome = outcomeLetGo
			srv.add(stripe, countLetGo, 1)
			return nil, 0, dns.RcodeServerFailure, nil
		case flight.Relaunched:
			rw.flight = f
			rcode, err = o.lead(ctx, rw, r)
			return nil, 0, rcode, err
		}
	}
}

// lead asks the next plugin as a leader of rw.flight, and always calls Back. If the writer has not completed the flight, the
// waiters share its failure, or get no value.
func (o *Optcache) lead(ctx context.Context, rw *writer, r *dns.Msg) (rcode int, err error) {
	var brought *shared // nil after a panic, when the client has gone away, and for a stale entry: waiters get no value
	defer func() { o.flights.Back(rw.flight, brought) }()
	rcode, err = o.ask(ctx, rw, r)
	switch {
	case ctx.Err() != nil || rw.purpose == forStale:
	case rw.unshared:
		brought = new(shared)
	default:
		brought = &shared{failed: true, rcode: rcode, err: err}
	}
	return rcode, err
}

// share sends the client of a waiter, rw, the answer a of a flight. The reply is a copy.
func (o *Optcache) share(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, rw *writer, a *shared) (int, error) {
	if a.wildcard != "" {
		setWildcard(ctx, a.wildcard)
	}
	ttl := int64(a.ttl)
	if a.kept && !o.keepTTL {
		ttl = max(ttl-(o.clock()-a.stored)/1e9, 0)
	}
	m := new(dns.Msg)
	m.SetReply(r)
	m.Rcode, m.Authoritative, m.RecursionAvailable, m.Truncated = a.answer.Rcode, a.answer.Authoritative, a.answer.RecursionAvailable, a.answer.Truncated
	m.AuthenticatedData = a.answer.AuthenticatedData && rw.ad
	for _, section := range [][2]*[]dns.RR{{&m.Answer, &a.answer.Answer}, {&m.Ns, &a.answer.Ns}, {&m.Extra, &a.answer.Extra}} {
		rrs := make([]dns.RR, len(*section[1]))
		for i, rr := range *section[1] {
			rrs[i] = dns.Copy(rr)
			rrs[i].Header().Ttl = uint32(ttl)
		}
		*section[0] = rrs
	}
	reply.Respell(m, r.Question[0].Name)
	rw.asker.tellScope(m, a.reach.scope)
	if err := w.WriteMsg(m); err != nil {
		return dns.RcodeServerFailure, err
	}
	return dns.RcodeSuccess, nil
}

// due counts a request for the entry in s, which has not expired, and reports whether a prefetch should start now.
func (o *Optcache) due(s *scratch, now int64) bool {
	p := &o.prefetch
	return p.amount > 0 && s.in.countRequest(s, now, p.gap, p.amount) >= p.amount && s.Entry.Remaining(now) <= p.threshold(s.Entry.TTL) && o.rules.Prefetches(&s.Key)
}

// threshold returns how many seconds of a TTL, in seconds, are left when a prefetch starts.
func (p *prefetchOptions) threshold(ttl uint32) int64 {
	return int64(math.Ceil(float64(p.percentage) / 100 * float64(ttl)))
}

// revalidate refreshes the entry in s, which has expired: before the reply if the option verify is on, beside it otherwise. It
// does nothing during the pause after a refresh that has failed, which is FAILURE_RECHECK or the name's hold, whichever is longer.
// done is true when the client has got a new answer, and false when the caller should send the stale one.
func (o *Optcache) revalidate(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server, now int64) (done bool, rcode int, err error) {
	if !s.in.mayRetry(s, now) || !o.mayRefresh(s, now) {
		return false, 0, nil
	}
	if !o.stale.verify {
		o.refresh(ctx, r, s, srv, now, forStale)
		return false, 0, nil
	}
	if done, rcode, err = o.verify(ctx, w, r, s, srv); done {
		o.setStatus(ctx, statusVerified)
		watchOf(ctx).found(o, s, statusVerified, now)
		srv.add(s.stripe, countHit(s.Entry.Flags.Class(), s.tier, wayVerified), 1)
	}
	return done, rcode, err
}

// verify asks the next plugin for a new answer before the entry in s, which has expired, is served. done is true when the
// client has got the new answer, and false when the caller should send the stale one.
func (o *Optcache) verify(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server) (done bool, rcode int, err error) {
	rw := o.newWriter(ctx, w, r, s, srv, forStale)
	rw.watch = watchOf(ctx)
	deadline := time.Now().Add(o.stale.timeout)
	if o.stale.timeout == 0 {
		deadline = deadline.Add(o.flights.Wait) // waiters of another request's flight wait no longer than this
	}
	// With recheck, one failure counts for all requests. With a timeout, a refresh may outlive its request, and the next
	// request must not start a second one. So both need a flight, even without coalescing.
	if !rw.key.Subnet().Is() {
		rw.own.Key.traits = o.flightOf(rw)
	}
	single, nested := o.stale.recheck > 0 || o.stale.timeout > 0, goesAlone(ctx, r)
	f := &rw.own
	for waited := false; ; waited = true {
		role := flight.Alone
		if single || o.coalesce.waiters > 0 && !nested {
			f, role = o.flights.Join(&rw.own, !nested)
		}
		if role == flight.Busy || role == flight.Refused {
			return false, 0, nil
		}
		if role == flight.Alone {
			f = &rw.own
			f.Lone()
		}
		if role != flight.Waits {
			break
		}
		if !waited {
			srv.add(s.stripe, countCoalesced, 1)
		}
		if o.flights.AwaitOnce(ctx, f, time.Until(deadline)) != flight.Completed || !f.Value().refreshed {
			return false, 0, nil
		}
		if f.Value().isFor(rw) {
			rcode, err = o.share(ctx, w, r, rw, f.Value())
			return true, rcode, err
		}
		if rw.own.Key.traits == rw.traits {
			f = &rw.own
			f.Lone()
			break
		}
		rw.own.Key.traits = rw.traits // the answer depends on them: join a flight for the same traits
	}

	rw.flight = f
	if o.limit != nil && !o.limit.Take(o.clock()) {
		srv.add(s.stripe, countLimitStale, 1)
		o.flights.Back(f, nil)
		return false, 0, nil
	}
	if o.stale.timeout == 0 {
		rcode, err = o.lead(ctx, rw, r)
		return rw.refreshed, rcode, err
	}
	// The refresh gets a goroutine and a context of its own, and goes on after the client has got the stale answer.
	o.flights.Watch(f)
	rw.ResponseWriter, rw.detached = detached{local: w.LocalAddr(), remote: w.RemoteAddr()}, true
	fresh := metadata.ContextWithMetadata(context.WithoutCancel(ctx))
	for label, f := range metadata.ValueFuncs(ctx) {
		metadata.SetValueFunc(fresh, label, f)
	}
	go o.background(fresh, rw, r.Copy())
	if o.flights.AwaitOnce(ctx, f, time.Until(deadline)) != flight.Completed {
		return false, 0, nil
	}
	// If another flight has replaced this one, the value is from that flight, and may be for other traits.
	if a := f.Value(); a.refreshed && (a.by == rw || a.isFor(rw)) {
		rcode, err = o.share(ctx, w, r, rw, a)
		return true, rcode, err
	}
	return false, 0, nil
}

// refresh starts a fetch for the entry in s in the background, unless there is one already. The client gets the entry
// meanwhile.
func (o *Optcache) refresh(ctx context.Context, r *dns.Msg, s *scratch, srv *server, now int64, p purpose) (started bool) {
	asked := s.Query
	defer func() { s.Query = asked }()
	if o.ecs.mode == ecsStrict {
		r = query.WithoutSubnet(r) // the new entry is for all clients, not for this one's subnet
	} else {
		r = r.Copy()
	}
	s.Query = query.FromMsg(r, r.IsEdns0(), noAddr)
	rw := o.newWriter(ctx, detached{local: noAddr, remote: noAddr}, r, s, srv, p)
	if !o.leadsAlone(rw) {
		return false
	}
	rw.ad, rw.counted = true, true
	rw.hits, rw.hitsAt = s.in.requests(s), now
	if left := s.Entry.Remaining(now); left < 0 {
		rw.hitsAt += left * 1e9 // requests are counted only until the entry expires
	}
	// The refresh gets an empty metadata map. The one in ctx belongs to the request, which may still write to it.
	go o.background(metadata.ContextWithMetadata(context.WithoutCancel(ctx)), rw, r)
	return true
}

// leadsAlone has a request without a client lead a flight, and reports whether it does: not if the same is being asked, nor if
// upstream_limit has no token to spare.
func (o *Optcache) leadsAlone(rw *writer) bool {
	if _, role := o.flights.Join(&rw.own, false); role != flight.Leads {
		return false
	}
	rw.flight, rw.detached = &rw.own, true
	if !o.spares(rw.server) {
		o.flights.Back(&rw.own, nil)
		return false
	}
	return true
}

// background leads rw.flight in a goroutine of its own. It recovers from panics, because CoreDNS's server does so only in its
// own goroutines.
func (o *Optcache) background(ctx context.Context, rw *writer, r *dns.Msg) {
	defer func() {
		if err := recover(); err != nil {
			vars.Panic.Inc()
			log.Errorf("A refresh of %q panicked: %v\n%s", r.Question[0].Name, err, debug.Stack())
		}
	}()
	// The request's span ends with the request.
	if span := o.span(ctx); span != nil {
		own := span.Tracer().StartSpan(pluginName+" refresh", opentracing.FollowsFrom(span.Context()))
		defer own.Finish()
		ctx = opentracing.ContextWithSpan(ctx, own)
	}
	rw.ctx = ctx
	if rw.counted {
		rw.server.add(0, countPrefetch, 1)
	}
	o.lead(ctx, rw, r)
	if !rw.truncated {
		return
	}
	// The response over UDP was truncated. A client that waited for it asks again over TCP, but one that has got the stale
	// answer does not. So the refresh asks again over TCP, for the whole answer, which later requests get.
	again := &writer{
		ResponseWriter: detached{local: noAddr, remote: noAddr}, o: o, ctx: ctx, server: rw.server,
		key: rw.key, qname: rw.qname, traits: rw.traits, asker: rw.asker, ad: rw.ad, rd: rw.rd, purpose: rw.purpose, served: rw.served,
		counted: rw.counted, hits: rw.hits, hitsAt: rw.hitsAt,
	}
	again.traits.TCP, again.own.Key.key = true, &again.key
	if o.leadsAlone(again) {
		o.lead(ctx, again, r)
	}
}

// ask sends a copy of a request to the next plugin, unless the second level has the answer. If that fails, ask keeps the failure
// of a miss, and starts the pause after the refresh of a stale entry.
func (o *Optcache) ask(ctx context.Context, rw *writer, r *dns.Msg) (int, error) {
	if o.second != nil && o.askSecond(ctx, rw, r) {
		return dns.RcodeSuccess, nil
	}
	if rw.purpose == forMiss && !rw.detached && !o.awaitTurn(ctx, rw.server) {
		return dns.RcodeServerFailure, errLimited
	}
	// Plugins may change the request, so they get a copy. AD=1 makes the upstream say whether it has validated the answer
	// (RFC 6840 section 5.7). The entry needs this for all later clients, whether or not this one has set AD.
	req := r.Copy()
	req.AuthenticatedData = true
	req.RecursionDesired = rw.key.RD() // because the response is kept under this key
	rw.asked = o.clock()
	rcode, err := o.next(ctx, rw, req)
	if o.second != nil && rw.told {
		o.second.Upstream(time.Duration(o.clock() - rw.asked))
	}
	rw.watch.returned(rw.wrote, err)
	// The next plugin may fail without a response. A kept failure answers the client's retries for a while. A client that has
	// gone away is no failure of the upstream.
	failed := ctx.Err() == nil && !rw.wrote && !rw.told &&
		(err != nil && rcode == dns.RcodeServerFailure || o.upstreams != nil && !plugin.ClientWrite(rcode))
	if failed && rw.purpose != forMiss {
		rw.tell(new(dns.Msg).SetRcode(r, rcode), response.ServerError)
	}
	switch rw.purpose {
	case forMiss:
		if failed {
			rw.keepFailure(r, rcode)
		}
	case forStale:
		// Here, too, a client that has gone away is no failure. The result of an overtaken flight is ignored: a newer flight
		// knows more.
		if o.stale.recheck > 0 && !rw.refreshed && !rw.replaced && !rw.truncated && ctx.Err() == nil && !rw.overtaken() {
			o.store.postpone(&rw.key, rw.served, o.clock()+int64(o.stale.recheck))
		}
	}
	return rcode, err
}

// errLimited is the failure of a request that has not been let through by upstream_limit.
var errLimited = errors.New("upstream_limit: too many questions for the upstream")

// awaitTurn waits until upstream_limit lets a miss through, and reports whether it does.
func (o *Optcache) awaitTurn(ctx context.Context, srv *server) bool {
	if o.limit == nil {
		return true
	}
	waited, ok := o.limit.Await(ctx, o.clock(), o.upstream.wait)
	switch {
	case !ok:
		srv.add(0, countLimitRefused, 1)
	case waited > 0:
		srv.add(0, countLimitWaited, 1)
	}
	return ok
}

// spares reports whether upstream_limit lets a question in the background through.
func (o *Optcache) spares(srv *server) bool {
	if o.limit == nil || o.limit.Spare(o.clock()) {
		return true
	}
	srv.add(0, countLimitDeferred, 1)
	return false
}

// replyLimited sends the failure of a request that has not been let through, with the reason for clients with EDNS.
func (o *Optcache) replyLimited(w dns.ResponseWriter, r *dns.Msg) (int, error) {
	m := new(dns.Msg).SetRcode(r, dns.RcodeServerFailure)
	if o.explain && r.IsEdns0() != nil {
		opt := reply.EDE(dns.ExtendedErrorCodeOther)
		opt.Option[0].(*dns.EDNS0_EDE).ExtraText = "upstream_limit"
		m.Extra = append(m.Extra, opt)
	}
	w.WriteMsg(m)
	return dns.RcodeSuccess, nil
}

func (o *Optcache) next(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return plugin.NextOrFailure(o.Name(), o.Next, ctx, w, r)
}

// noAddr is the client's address in a refresh without a client. It is a TCP address, so that plugins do not truncate the
// response.
var noAddr net.Addr = &net.TCPAddr{}

// detached is the dns.ResponseWriter of a refresh. There is no client, so it drops all that is written.
type detached struct {
	local, remote net.Addr
}

func (d detached) LocalAddr() net.Addr         { return d.local }
func (d detached) RemoteAddr() net.Addr        { return d.remote }
func (d detached) WriteMsg(*dns.Msg) error     { return nil }
func (d detached) Write(b []byte) (int, error) { return len(b), nil }
func (d detached) Close() error                { return nil }
func (d detached) TsigStatus() error           { return nil }
func (d detached) TsigTimersOnly(bool)         {}
func (d detached) Hijack()                     {}

// setWildcard sets the metadata label by which CoreDNS's plugins name the wildcard that an answer was made from.
func setWildcard(ctx context.Context, name string) {
	metadata.SetValueFunc(ctx, "zone/wildcard", func() string { return name })
}

// writer is the dns.ResponseWriter that the next plugin gets. It keeps a response in the store if the rules allow it, completes
// the flight, and passes the response on to the client. It belongs to one request, or to one refresh in the background. It is
// not safe for concurrent use.
type writer struct {
	dns.ResponseWriter
	o       *Optcache
	ctx     context.Context
	server  *server
	key     record.Key   // of the request; the response is kept under it
	qname   string       // with the client's upper and lower case letters
	traits  query.Traits // of the client
	asker   asker        // likewise
	ad      bool         // the client wants to know whether the answer is authenticated
	rd      bool         // RD of the client's request; the next plugin is asked with the RD of key
	purpose purpose

	own    flightCall  // the flight that this request starts, if it leads one
	flight *flightCall // the flight that this request leads: own, or another's as its second leader; nil: none

	// Of a refresh in the background.
	detached bool   // there is no client
	counted  bool   // the metrics count it as a prefetch
	hits     uint32 // how often the old entry was asked for; the new one inherits it
	hitsAt   int64  // until when they were counted, in ns on the store's clock

	served record.Flags // kind of the stale entry that is refreshed
	watch  *watch       // of an operator's question; nil: nobody watches

	asked   int64  // when the next plugin was asked, in ns on the store's clock
	taken   *taken // from where the response comes, if not from the next plugin
	through bool   // a failure is kept for the request, and does not answer it

	told      bool // the upstream has answered or failed, and the zone knows; see tell
	silent    bool // keep the response, but do not send it
	wrote     bool // there was a response
	unshared  bool // the response is not for waiters
	refreshed bool // the response may be served instead of the stale entry
	replaced  bool // the response has replaced the stale entry in the store
	truncated bool // the response was truncated: the answer may be too large for UDP

	outcome outcome // of a miss, as far as the handler's result does not say it
}

// newWriter returns a writer for the request r. Its key and question are in s. If p is forStale, s has the expired entry, too.
func (o *Optcache) newWriter(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server, p purpose) *writer {
	rw := &writer{
		ResponseWriter: w, o: o, ctx: ctx, server: srv, key: s.Key, qname: r.Question[0].Name,
		traits: s.Query.Traits(), ad: s.Query.WantsAD(), rd: r.RecursionDesired, purpose: p,
	}
	rw.traits.Subnet = query.SubnetOf(r.IsEdns0())
	if rw.asker = s.asker; rw.asker.option != nil {
		rw.asker = o.askerOf(r) // r may be a copy
	}
	rw.own.Key.key, rw.own.Key.purpose = &rw.key, p
	if p != forMiss {
		rw.served = s.Entry.Flags.Kind()
	}
	return rw
}

// timed counts the time of a miss since begun, by its outcome. rcode and err are what the handler returns.
func (w *writer) timed(begun int64, rcode int, err error) {
	if w.outcome == outcomeAnswered && (err != nil || rcode == dns.RcodeServerFailure) {
		w.outcome = outcomeFailed
	}
	w.server.misses[w.outcome].Observe(uint64(max(w.o.clock()-begun, 0)))
}

// WriteMsg implements dns.ResponseWriter.
func (w *writer) WriteMsg(res *dns.Msg) error {
	if res == nil {
		return errors.New("optcache: response message is nil")
	}
	matches := w.matches(res)
	kind, rule, signed := w.judge(res)
	if res.Rcode == dns.RcodeServerFailure {
		w.outcome = outcomeFailed
	}
	var hold time.Duration // of a failure
	if matches && w.taken == nil {
		hold = w.tell(res, kind)
	}
	deliver, news := !w.silent, false
	// The leader of a miss decides this, too. A request that verifies a stale entry may be among its waiters.
	if w.purpose == forStale || w.flight != nil {
		keep, serve := false, false
		if matches {
			keep, serve = w.accept(res, kind)
		}
		news = keep && serve
		if w.purpose == forStale {
			if w.refreshed = news; !keep {
				w.watch.came(verdict{kind, admit.NotBetter, admit.Lifetime{}})
				return nil
			}
			deliver = news
		}
	}
	// An answer for one subnet that is not kept removes no entry.
	reach := w.reachOf(res)
	key := w.o.keyAt(w.key, &reach)
	if reach.narrow && !reach.kept && w.counted { // the entry that is refreshed is for all clients
		w.wrote, w.unshared, w.refreshed = true, true, false
		return nil
	}
	res = res.Copy() // the plugin that made the message may still use it

	// The first client gets the TTL that is kept. Later clients get what is left of it.
	life := w.lifetime(res, kind, signed, hold)
	ttl := uint32(life.TTL / time.Second)
	shown := ttl
	if w.taken != nil && !w.o.keepTTL {
		shown = uint32(max((life.TTL-w.taken.age)/time.Second, 0))
	}
	res.Answer = admit.Settle(res.Answer, shown)
	res.Ns = admit.Settle(res.Ns, shown)
	res.Extra = admit.Settle(res.Extra, shown)

	good := rule == admit.Keeps
	if matches { // the client gets its own spelling of the qname, even if the upstream has changed it
		res.Question[0].Name = w.qname
		reply.Respell(res, w.qname)
	}
	var kept bool
	var stored int64
	var wildcard string
	switch {
	case !matches:
		rule = admit.NotTheQuestion
		w.server.add(0, countDrop, 1)
	case !good:
	case !reach.kept:
		rule = admit.OneSubnet
	case !w.key.RD() && !admit.Conclusive(res, kind):
		rule = admit.Inconclusive
	case ttl == 0:
		rule = admit.ZeroTTL
	// As in CoreDNS's plugin cache, exceptions hold for misses only. A refresh is of an entry that was kept, and keeps its
	// response.
	case w.purpose == forMiss && w.o.rules.Excepts(admit.ClassOf(kind), w.key.Name()):
		rule = admit.Excepted
	default:
		wildcard, stored = w.wildcard(), w.o.clock()-w.taken.old()
		rule = w.keep(res, key, reach.flags, kind, ttl, signed, wildcard, stored)
		if kept = rule == admit.Keeps; kept && life.By == admit.ByJitter {
			w.server.add(0, countJittered, 1)
		}
	}
	w.watch.came(verdict{kind, rule, life})
	if matches && !kept && (!reach.narrow || reach.kept) && admit.Decisive(res, kind) && !w.overtaken() {
		w.end(key, admit.Answers(res, kind))
	}
	w.wrote = true
	if w.flight != nil && deliver {
		if matches && res.Rcode <= int(record.FlagRcode) {
			a := shared{
				by: w, ttl: shown, stored: stored, kept: kept, refreshed: news, wildcard: wildcard, reach: reach, subnet: w.traits.Subnet,
				verdict: verdict{kind, rule, life},
			}
			if !good {
				a.only = &w.traits
			}
			if kept {
				a.ttl = ttl
			}
			w.o.flights.Complete(w.flight, func() shared {
				a.answer = res.Copy()
				return a
			})
		} else if !matches {
			w.o.flights.Complete(w.flight, func() shared { return shared{failed: true, rcode: dns.RcodeServerFailure} })
		} else {
			w.unshared = true
		}
	}
	if !w.ad {
		res.AuthenticatedData = false
	}
	if !deliver || w.detached {
		return nil
	}
	if w.rd != w.key.RD() {
		res.RecursionDesired = w.rd
	}
	w.asker.tellScope(res, reach.scope)
	return w.ResponseWriter.WriteMsg(res)
}

// lifetime returns for how long the response res of that kind is kept, and what decides that. signed is for how many seconds its
// signatures are valid, and hold for how long it is kept as a failure, or 0. What other replicas have shortened is not shortened
// again, and nothing that they keep lives longer here.
func (w *writer) lifetime(res *dns.Msg, kind response.Type, signed int64, hold time.Duration) admit.Lifetime {
	life := w.o.rules.Lifetime(res, kind)
	if hold > 0 {
		life.TTL = hold
	}
	life = life.Until(signed)
	switch j := w.o.jitter; {
	case w.taken != nil:
		life.TTL = min(life.TTL, w.taken.ttl)
	case j > 0 && hold == 0:
		life = life.Shortened(rand.Float64() * float64(j) / 100)
	}
	return life
}

// judge returns the kind of the response res, the rule by which it is not kept, if its kind is not, and for how many seconds its
// signatures are valid. Signatures count only with DO. Then one signature that is not valid makes the whole response an error,
// which is not kept.
func (w *writer) judge(res *dns.Msg) (response.Type, admit.Rule, int64) {
	now, left := w.o.wall().UTC(), int64(record.Unsigned)
	if w.key.Bits()&record.KeyDO != 0 {
		if left = admit.SignedFor(res, now); left < 0 {
			return response.OtherError, admit.BadSignature, 0
		}
	}
	kind, rule := w.o.rules.Judge(res, now)
	if rule == admit.OtherRcode && w.refused(res) {
		kind, rule = response.ServerError, admit.Keeps
	}
	return kind, rule, left
}

// accept compares a response of that kind with a stale entry. keep says that the response may be kept, and serve that it may be
// served instead of the entry. serve is true for an answer, and for a denial unless prefer_positive protects the entry. It is
// true for a truncated response over UDP, too, which makes the client ask again over TCP.
func (w *writer) accept(res *dns.Msg, kind response.Type) (keep, serve bool) {
	prefer := w.o.stale.preferPositive
	hold := prefer && (w.purpose == forMiss || w.served&record.FlagAnswers != 0) // the stale entry is preferred to a denial
	switch {
	case res.Truncated:
		tell := !w.traits.TCP && (res.Rcode == dns.RcodeSuccess || res.Rcode == dns.RcodeNameError && !hold)
		w.truncated = w.truncated || tell
		return tell, tell
	case prefer:
		return true, admit.Answers(res, kind) || !hold && admit.Decisive(res, kind)
	}
	ok := admit.Decisive(res, kind)
	return ok, ok
}

// end removes the entries that a response has made invalid, although the response itself cannot be kept. answered says that the
// response answers the question.
func (w *writer) end(key record.Key, answered bool) {
	s := w.o.pool.Get().(*scratch)
	defer w.o.release(s)
	s.Key = key
	w.o.store.end(s, answered, w.o.clock())
	w.server.addEvents(s)
}

// Write implements dns.ResponseWriter.
func (w *writer) Write(b []byte) (int, error) {
	if w.purpose == forStale { // WriteMsg decides whether the client gets this response or the stale entry
		m := new(dns.Msg)
		if err := m.Unpack(b); err != nil {
			return 0, err
		}
		return len(b), w.WriteMsg(m)
	}
	log.Warning("A plugin wrote a response in bytes: not caching it")
	w.watch.bytes()
	w.wrote, w.unshared = true, true
	return w.ResponseWriter.Write(b)
}

// keepFailure keeps a failure of that rcode for the request r, to which the next plugin has written no response. It sends nothing:
// CoreDNS's server does so.
func (w *writer) keepFailure(r *dns.Msg, rcode int) {
	w.silent = true
	w.WriteMsg(new(dns.Msg).SetRcode(r, rcode))
}

// matches reports whether res is a response to the question of the request.
func (w *writer) matches(res *dns.Msg) bool {
	if !res.Response || res.Opcode != dns.OpcodeQuery || len(res.Question) != 1 {
		return false
	}
	var name [wire.MaxName]byte
	q := &res.Question[0]
	n, ok := wire.PackName(name[:], q.Name)
	if !ok {
		return false
	}
	wire.Lower(name[:n], name[:n])
	return string(name[:n]) == string(w.key.Name()) && q.Qtype == w.key.Qtype() && q.Qclass == w.key.Qclass()
}

// keep stores a response under a key, and returns admit.Keeps if it is in the store now, or else the reason. It came at stored, in ns
// on the store's clock. The TTL and the validity of the signatures are in seconds. flags are added to those of its record.
func (w *writer) keep(res *dns.Msg, key record.Key, flags record.Flags, kind response.Type, ttl uint32, signed int64, wildcard string, stored int64) admit.Rule {
	s := w.o.pool.Get().(*scratch)
	defer w.o.release(s)
	s.Key = key
	now := stored + w.taken.old()
	e, body, ok := w.o.rules.Record(&s.Buffer, res, kind, stored, ttl, signed)
	e.Asked = w.asked
	e.Flags |= flags
	if w.purpose == forPrefetch || w.refreshed {
		e.Hits, e.HitsAt = w.hits, w.hitsAt
	}
	switch {
	case !ok:
		return admit.TooLarge
	case w.overtaken() && w.o.store.hasNewer(s, e, w.asked, now):
		return admit.Overtaken
	}
	if ok = w.o.store.insert(s, &e, body, wildcard, now); ok {
		w.server.sizes.Observe(uint64(wire.HeaderLen + len(w.key.Name()) + wire.QuestionTail + len(body)))
	}
	w.replaced = ok && e.Flags.Kind() == w.served
	if w.o.second != nil && w.taken == nil {
		w.o.putSecond(s, &e, w)
	}
	if ok && w.purpose == forMiss && !w.detached && w.o.cut.probe && e.Denies() {
		w.o.probe(w.ctx, w.key, w.server)
	}
	w.server.addEvents(s)
	if !ok {
		return admit.NotAdmitted
	}
	return admit.Keeps
}

// overtaken reports whether the response comes late: another flight has replaced the request's one, or it has ended already.
func (w *writer) overtaken() bool { return w.flight != nil && w.o.flights.Overtaken(w.flight) }

// wildcard returns the name of the wildcard that the response was made from, by the metadata of other plugins, or "".
func (w *writer) wildcard() string {
	if w.taken != nil {
		return w.taken.wildcard
	}
	if f := metadata.ValueFunc(w.ctx, "zone/wildcard"); f != nil {
		return f()
	}
	return ""
}

// upstreams are what an instance knows of upstreams that fail. It does not change after newUpstreams; the zones do.
type upstreams struct {
	zones zones.Table[*backoff.Zone]
}

// newUpstreams returns the upstreams of an instance that has its store. Each zone of the block has one, and each zone of a plugin
// behind: *kubernetes* may answer while the upstream of *forward* is gone.
func newUpstreams(o *Optcache) *upstreams {
	names := slices.Concat(o.zones, chain.ZonesOf(o.Next))
	u := new(upstreams)
	for i, zone := range o.store.failing.Zones(names) {
		if name, ok := zones.Wire(names[i]); ok {
			u.zones.Add(name, zone)
		}
	}
	return u
}

// failingOf returns the zone of the question of k, and what its failures are known by. SERVFAIL and timeouts count for the name. An
// upstream may refuse one type alone, so that other rcodes count for name and type (own), and so do refreshes of an entry. There
// must be upstreams, and the block must serve the name.
func (o *Optcache) failingOf(k *record.Key, own bool) (zone *backoff.Zone, name uint64) {
	name = o.store.seed.Sum(k.Name())
	if own {
		name = backoff.Typed(name, k.Qtype())
	}
	return *o.upstreams.zones.Find(k.Name()), name
}

// search looks for an answer to the question of s under its key, and reports whether s has one that may be served now.
func (o *Optcache) search(s *scratch, now int64) bool {
	if !o.store.search(s, now) {
		return false
	}
	if o.upstreams == nil || !s.Entry.Failure() {
		return true
	}
	zone, name := o.failingOf(&s.Key, !s.Entry.ServerFailure())
	return zone.Stands(name, s.Entry.Stored, time.Duration(s.Entry.TTL)*time.Second, now)
}

// mayLetThrough reports whether letsThrough may return true for the question of s, which has a kept failure.
func (o *Optcache) mayLetThrough(s *scratch, now int64) bool {
	if o.upstreams == nil {
		return false
	}
	zone, _ := o.failingOf(&s.Key, false)
	return zone.Due(now)
}

// letsThrough reports whether the request goes to the next plugin, although a failure is kept for it: its upstream is gone, and
// may be back.
func (o *Optcache) letsThrough(s *scratch, now int64) bool {
	if o.upstreams == nil {
		return false
	}
	zone, _ := o.failingOf(&s.Key, false)
	return zone.TakeTurn(now)
}

// mayRefresh reports whether the next plugin may be asked for the entry in s, which is served meanwhile: not while it fails.
func (o *Optcache) mayRefresh(s *scratch, now int64) bool {
	if o.upstreams == nil {
		return true
	}
	zone, name := o.failingOf(&s.Key, true)
	return !zone.Gone() && !zone.Holds(name, now) || zone.TakeTurn(now)
}

// mayAskAgain reports whether the next plugin may be asked the question of k, which no client asks: not while the name, or the type
// of it, fails.
func (o *Optcache) mayAskAgain(k *record.Key, now int64) bool {
	if o.upstreams == nil {
		return true
	}
	zone, name := o.failingOf(k, false)
	return !zone.Gone() && !zone.Holds(name, now) && !zone.Holds(backoff.Typed(name, k.Qtype()), now) || zone.TakeTurn(now)
}

// refused reports whether res is of an rcode that counts as a failure with MAX of servfail, and without it is not kept. It must be
// what any client would get: an upstream may refuse what an EDNS option says, or not know EDNS.
func (w *writer) refused(res *dns.Msg) bool {
	switch {
	case w.o.upstreams == nil || w.traits.Options:
		return false
	case res.Rcode == dns.RcodeFormatError:
		return !w.traits.EDNS || res.IsEdns0() != nil
	}
	return res.Rcode == dns.RcodeRefused
}

// tell tells the zone whether the upstream has failed. res, a response of that kind to the question of the request, is what came.
// If it is a failure, tell returns for how long the failure is kept, or 0 for the time that servfail says.
func (w *writer) tell(res *dns.Msg, kind response.Type) (hold time.Duration) {
	w.told = true
	if w.o.upstreams == nil {
		return 0
	}
	own := w.purpose == forStale || res.Rcode != dns.RcodeServerFailure
	zone, name := w.o.failingOf(&w.key, own && kind == response.ServerError)
	switch {
	case kind == response.ServerError:
		// As in refused, what one client has brought about is not for all.
		if w.key.RD() && !res.Truncated && !w.traits.Options && !query.Scoped(res) && !w.o.rules.Excepts(record.Denial, w.key.Name()) {
			hold = zone.Failed(name, w.o.clock())
		}
	case res.Rcode == dns.RcodeSuccess || res.Rcode == dns.RcodeNameError:
		zone.Succeeded(name, w.key.Qtype(), w.o.clock())
	}
	return hold
}

// gone returns how many zones have an upstream that is gone.
func (o *Optcache) gone() (n int64) {
	if o.upstreams == nil {
		return 0
	}
	for i := range o.upstreams.zones.Entries {
		if o.upstreams.zones.Entries[i].Value.Gone() {
			n++
		}
	}
	return n
}

// forgive forgets the failures of names whose failures have been flushed.
func (o *Optcache) forgive(f *flushed.Filter) {
	switch {
	case o.upstreams == nil || f.Kinds&flushed.Failures == 0 || f.Expired:
	case f.Name != nil && !f.Subtree:
		name := o.store.seed.Sum(f.Name)
		o.store.failing.Forget(name)
		for qtype := range 1 << 16 {
			o.store.failing.Forget(backoff.Typed(name, uint16(qtype)))
		}
	default:
		o.store.failing.ForgetAll()
	}
}
