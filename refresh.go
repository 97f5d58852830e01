package optcache

import (
	"context"
	"math"
	"net"
	"runtime/debug"
	"time"

	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/metrics/vars"

	"github.com/miekg/dns"
)

// This file brings new answers for entries that are there: before they expire, when they are popular
// (prefetch), or after, while the old answer still may be served (serve_stale, RFC 8767).

// prefetchOptions say when an entry is refreshed before it expires.
type prefetchOptions struct {
	amount     uint32        // requests that make an entry popular; 0: no prefetch
	gap        time.Duration // the longest time between two of them
	percentage int           // of the TTL: how much of it is left when the refresh begins
}

// staleOptions say what becomes of entries that have expired.
type staleOptions struct {
	upTo           time.Duration // how long they may be served; 0: never
	verify         bool          // ask the next plugin first
	timeout        time.Duration // for how long, before the old answer is served; 0: as it takes
	ttl            time.Duration // TTL of stale answers
	recheck        time.Duration // after a refresh has failed, how long until the next one; 0 to 5m
	preferPositive bool          // an answer to the question goes before anything else
}

// purpose is what a request is sent to the next plugin for.
type purpose uint8

const (
	forMiss purpose = iota
	forPrefetch
	forStale // the response must be better than the entry that has expired
)

// due counts a request for the entry in s, which is alive, and reports whether it should be
// refreshed by now.
func (o *Optcache) due(s *scratch, now int64) bool {
	p := &o.prefetch
	return o.store.countRequest(s, now, p.gap, p.amount) >= p.amount && s.entry.remaining(now) <= p.threshold(s.entry.ttl)
}

// threshold is how many seconds of a TTL are left when a refresh begins.
func (p *prefetchOptions) threshold(ttl uint32) int64 {
	return int64(math.Ceil(float64(p.percentage) / 100 * float64(ttl)))
}

// countUnlessDue is due for the fast path: it counts the request unless the entry should be refreshed by
// now, which the chain has to count then.
func (o *Optcache) countUnlessDue(s *scratch, now int64) bool {
	p := &o.prefetch
	if s.entry.remaining(now) <= p.threshold(s.entry.ttl) && o.store.popularity(s, now, p.gap, p.amount) >= p.amount {
		return false
	}
	o.store.countRequest(s, now, p.gap, p.amount)
	return true
}

// serveStale serves the entry in s, which has expired, or a new answer if that can be had first.
func (o *Optcache) serveStale(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, srv *server, now int64) (int, error) {
	if o.store.mayRetry(s, now) {
		if !o.stale.verify {
			o.refresh(ctx, r, s, srv, now, forStale)
		} else if done, rcode, err := o.verify(ctx, w, r, opt, s, srv); done {
			srv.add(s.stripe, countHit(s.entry.flags.class(), s.tier, wayVerified), 1)
			return rcode, err
		}
	}
	srv.add(s.stripe, countStale, 1)
	ttl := uint32(o.stale.ttl / time.Second)
	if ttl == 0 && o.keepTTL {
		ttl = s.entry.ttl
	}
	return o.reply(ctx, w, r, opt, s, srv, ttl, true)
}

// verify asks the next plugin whether the entry in s, which has expired, is still right. done is
// false when the old answer should be served.
func (o *Optcache) verify(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, srv *server) (done bool, rcode int, err error) {
	rw := o.newWriter(ctx, w, r, opt, s, srv, forStale)
	// One refresh at a time, if failures are remembered or nobody waits long.
	single := o.stale.recheck > 0 || o.stale.timeout > 0
	f, role := &rw.own, alone
	if single || o.coalesce.waiters > 0 && !goesAlone(ctx, r) {
		f, role = o.flights.join(&rw.own, !single)
	}
	switch role {
	case busy:
		return false, 0, nil
	case waits:
		srv.add(s.stripe, countCoalesced, 1)
		if o.flights.awaitOnce(ctx, f, o.coalesce.wait) != answered || !f.refreshed {
			return false, 0, nil
		}
		rcode, err = o.share(ctx, w, r, opt, &f.landing)
		return true, rcode, err
	case alone:
		rcode, err = o.ask(ctx, rw, r)
		return rw.refreshed, rcode, err
	}

	rw.flight = f
	if o.stale.timeout == 0 {
		rcode, err = o.lead(ctx, rw, r)
		return rw.refreshed, rcode, err
	}
	// The refresh goes on when the client has got the old answer.
	o.flights.watch(f)
	rw.ResponseWriter, rw.detached = detached{local: w.LocalAddr(), remote: w.RemoteAddr()}, true
	fresh := metadata.ContextWithMetadata(context.WithoutCancel(ctx))
	for label, f := range metadata.ValueFuncs(ctx) {
		metadata.SetValueFunc(fresh, label, f)
	}
	go o.background(fresh, rw, r.Copy())
	if o.flights.awaitOnce(ctx, f, o.stale.timeout) != answered || !f.refreshed {
		return false, 0, nil
	}
	if f.kept {
		rcode, err = o.share(ctx, w, r, opt, &f.landing)
		return true, rcode, err
	}
	m := f.answer.Copy()
	m.AuthenticatedData = m.AuthenticatedData && wantsAD(r, opt)
	if err := w.WriteMsg(m); err != nil {
		return true, dns.RcodeServerFailure, err
	}
	return true, dns.RcodeSuccess, nil
}

// refresh brings a new answer for the entry in s, while the client gets the old one, unless somebody
// else is at it.
func (o *Optcache) refresh(ctx context.Context, r *dns.Msg, s *scratch, srv *server, now int64, p purpose) {
	rw := o.newWriter(ctx, detached{local: noAddr, remote: noAddr}, r, r.IsEdns0(), s, srv, p)
	if _, role := o.flights.join(&rw.own, false); role != leads {
		return
	}
	rw.flight, rw.detached = &rw.own, true
	rw.ad, rw.counted = true, true
	rw.hits, rw.hitsAt = o.store.requests(s), now
	if left := s.entry.remaining(now); left < 0 {
		rw.hitsAt += left * 1e9 // they ended when it expired
	}
	// Metadata is the request's own: its map may be written to until it is over.
	go o.background(metadata.ContextWithMetadata(context.WithoutCancel(ctx)), rw, r.Copy())
}

// background asks the next plugin when no client waits for it. A panic there is not caught by the
// server.
func (o *Optcache) background(ctx context.Context, rw *writer, r *dns.Msg) {
	defer func() {
		if err := recover(); err != nil {
			vars.Panic.Inc()
			log.Errorf("A refresh of %q panicked: %v\n%s", r.Question[0].Name, err, debug.Stack())
		}
	}()
	rw.ctx = ctx
	if rw.counted {
		rw.server.add(0, countPrefetch, 1)
	}
	o.lead(ctx, rw, r)
}

// noAddr is whom a refresh is for. Over TCP, there is no limit to the size of its response.
var noAddr net.Addr = &net.TCPAddr{}

// detached is the writer under a refresh: there is no client.
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
