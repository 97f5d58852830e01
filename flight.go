package optcache

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/metadata"

	"github.com/miekg/dns"
)

// This file makes one query of many. A request that has to go to the next plugin takes off as a
// flight; requests with the same key that come while it is under way wait for what it brings, each
// of them for a limited time and only so many of them. Refreshes are flights, too, which keeps them
// to one at a time for each key.
//
// What lands is one of: an answer, from which each waiter's reply is made for its own bits, letters,
// size and transport; a failure, which all share, so that it is not followed by a flood of retries;
// or nothing, when the leader was cancelled or panicked, upon which one of the waiters takes off. An answer
// that upstreams give or not by how they are asked, such as one that is cut off or a refusal, is only for those
// who ask in the same manner.

const (
	flightShards = 64

	// waitersInAll is how many requests may wait in all, as a multiple of those that may wait for
	// one flight. Beyond that each goes on its own.
	waitersInAll = 100
)

// flights are those that are under way in one instance.
type flights struct {
	coalesceOptions
	waiting atomic.Int64 // requests that wait
	shards  [flightShards]flightShard
}

type flightShard struct {
	mu sync.Mutex // guards m, and of the flights in it what is not part of the landing
	m  map[uint64]*flight
	_  [lineBytes]byte
}

// flight is one question that is on its way to the next plugin.
type flight struct {
	key     *key
	manner  manner        // if it is for those only who ask so; otherwise zero
	leaders int           // requests that brought it to the next plugin and are not back
	waiters int           // requests that wait for it
	again   bool          // there has been a second leader, because the first one took too long
	landed  bool          // the landing has been decided on
	done    chan struct{} // closed when landing may be read; nil as long as nobody waits
	landing
}

// landing is how a flight has ended. It does not change once done is closed.
type landing struct {
	outcome   outcome
	answer    *dns.Msg // as it came, without OPT, its TTLs settled
	ttl       uint32   // of all its records, in seconds
	stored    int64    // when it came, in ns on the store's clock
	kept      bool     // it is in the store
	refreshed bool     // a stale entry was verified, and this is better
	wildcard  string   // the name that it was made from
	only      *manner  // if it is for those only who ask like the leader
	rcode     int      // of a failure
	err       error
}

// manner is how a question is asked, as far as the key does not say so and upstreams may care.
type manner struct {
	tcp     bool
	space   int // the size of the largest reply that the client takes, in bytes
	rd      bool
	edns    bool
	options bool // there are EDNS options
}

func mannerOf(w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT) manner {
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	return manner{
		tcp: tcp, space: replySpace(w, opt), rd: r.RecursionDesired,
		edns: opt != nil, options: opt != nil && len(opt.Option) > 0,
	}
}

// replySpace is the size in bytes of the largest reply that a client takes.
func replySpace(w dns.ResponseWriter, opt *dns.OPT) int {
	if _, tcp := w.RemoteAddr().(*net.TCPAddr); tcp {
		return maxMessage
	}
	if opt == nil {
		return dns.MinMsgSize
	}
	return max(dns.MinMsgSize, int(opt.UDPSize()))
}

// isFor reports whether the answer is one for who asks in that manner.
func (l *landing) isFor(m manner) bool {
	return l.only == nil || *l.only == m && !m.options
}

// id is what flights are known by. Few that are under way at the same time have the same one.
func (f *flight) id() uint64 {
	m := &f.manner
	bits := uint64(m.space) << 4
	for i, set := range [...]bool{m.tcp, m.rd, m.edns, m.options} {
		if set {
			bits |= 1 << i
		}
	}
	return f.key.hash ^ bits*0x9e3779b97f4a7c15 // 2^64 over the golden ratio
}

// goesAlone reports whether a request has to reach the next plugin itself. Plugins look things up in the server
// that they are part of: who is asked on behalf of another request may be asked for what that one, or one that
// waits for it, is to bring. And the plugin loop finds a loop by its own queries, of type HINFO, coming back.
func goesAlone(ctx context.Context, r *dns.Msg) bool {
	depth, _ := ctx.Value(dnsserver.LoopKey{}).(int)
	return depth > 0 || r.Question[0].Qtype == dns.TypeHINFO
}

// outcome says what a waiter has to do.
type outcome uint8

const (
	abandoned  outcome = iota // look again: nobody knows
	answered                  // take the answer
	failed                    // fail in the same way
	unshared                  // ask for itself: what came cannot be shared
	gone                      // the waiter's client has gone away
	tooLate                   // the waiter's time is up
	relaunched                // the waiter's time is up, and it is the first: ask again for all
)

// role is what a request becomes by joining.
type role uint8

const (
	leads role = iota // it has taken off: it must land
	waits             // it waits, and must leave
	busy              // somebody else is under way, and it did not want to wait
	alone             // it goes without a flight
)

func (fs *flights) shard(f *flight) *flightShard { return &fs.shards[f.id()>>32%flightShards] }

// join takes off with f, unless there is such a flight already, which it returns.
func (fs *flights) join(f *flight, mayWait bool) (*flight, role) {
	sh := fs.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	other := sh.m[f.id()]
	switch {
	case other != nil && (!other.key.equal(f.key) || other.manner != f.manner):
		return nil, alone
	case other != nil && !mayWait:
		return other, busy
	case other == nil || other.waiters >= fs.waiters:
		if sh.m == nil {
			sh.m = make(map[uint64]*flight)
		}
		sh.m[f.id()] = f
		f.leaders = 1
		return f, leads
	case fs.waiting.Load() >= int64(fs.waiters)*waitersInAll:
		return nil, alone
	}
	fs.waiting.Add(1)
	other.waiters++
	if other.done == nil {
		other.done = make(chan struct{})
	}
	return other, waits
}

// leave is called by each waiter when it waits no longer.
func (fs *flights) leave(f *flight) {
	sh := fs.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	fs.waiting.Add(-1)
	f.waiters--
}

// relaunch makes a waiter the second leader of a flight that takes long, and reports whether it did:
// there is one at the most.
func (fs *flights) relaunch(f *flight) bool {
	sh := fs.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if f.landed || f.again {
		return false
	}
	f.again = true
	f.leaders++
	return true
}

// land ends a flight with an answer, of which waiters get a copy.
func (fs *flights) land(f *flight, l landing) {
	if waited := fs.end(f, true); waited != nil {
		l.answer = l.answer.Copy()
		f.landing = l
		close(waited)
	}
}

// back tells that a leader is back. If it was the last one, and there was no answer, the flight ends
// with what it says.
func (fs *flights) back(f *flight, l landing) {
	if waited := fs.end(f, false); waited != nil {
		f.landing = l
		close(waited)
	}
}

// end makes f a flight that nobody can join any more, with an answer or because its last leader is
// back. It returns the channel to close if somebody waits and has not been told.
func (fs *flights) end(f *flight, answer bool) chan struct{} {
	sh := fs.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if !answer {
		f.leaders--
	}
	if f.landed || !answer && f.leaders > 0 {
		return nil
	}
	f.landed = true
	if sh.m[f.id()] == f { // a flight that was full has a successor
		delete(sh.m, f.id())
	}
	return f.done
}

// await waits for a flight to end, up to the deadline. When it takes as long as the options say, one of those that
// wait asks again for all of them.
func (fs *flights) await(ctx context.Context, f *flight, deadline time.Time) outcome {
	defer fs.leave(f)
	timer := time.NewTimer(min(fs.wait, time.Until(deadline)))
	defer timer.Stop()
	for {
		select {
		case <-f.done:
			return f.outcome
		case <-ctx.Done():
			return gone
		case <-timer.C:
			if !time.Now().Before(deadline) {
				return tooLate
			}
			if fs.relaunch(f) {
				return relaunched
			}
			timer.Reset(time.Until(deadline))
		}
	}
}

// watch makes the leader of a flight, which has just taken off, one that waits for it, too.
func (fs *flights) watch(f *flight) {
	sh := fs.shard(f)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	fs.waiting.Add(1)
	f.waiters++
	if f.done == nil {
		f.done = make(chan struct{})
	}
}

// awaitOnce waits for a flight to end, for a limited time.
func (fs *flights) awaitOnce(ctx context.Context, f *flight, most time.Duration) outcome {
	defer fs.leave(f)
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-f.done:
		return f.outcome
	case <-ctx.Done():
		return gone
	case <-timer.C:
		return tooLate
	}
}

// coalesced brings a miss to the next plugin, or makes it wait for one that is there. s is
// released.
func (o *Optcache) coalesced(ctx context.Context, rw *writer, r *dns.Msg, s *scratch, srv *server) (int, error) {
	opt := r.IsEdns0()
	stripe, hit := s.stripe, false
	defer func() {
		if !hit {
			srv.add(stripe, countMiss, 1)
		}
	}()
	var deadline time.Time // of all its waiting, for one flight or several
	for {
		f, role := o.flights.join(&rw.own, true)
		if role == leads {
			rw.flight = f
			// The answer may have come between the look into the store and the take-off.
			if s == nil {
				s, _ = o.scratchFor(r, opt)
			}
			if now := o.clock(); o.store.find(s, now) {
				o.flights.back(f, landing{})
				hit = true
				return o.hit(ctx, rw.ResponseWriter, r, opt, s, srv, now)
			}
		}
		if s != nil {
			o.release(s)
			s = nil
		}
		switch role {
		case leads:
			return o.lead(ctx, rw, r)
		case alone:
			return o.ask(ctx, rw, r)
		}

		srv.add(stripe, countCoalesced, 1)
		if deadline.IsZero() {
			deadline = time.Now().Add(2 * o.coalesce.wait)
		}
		switch o.flights.await(ctx, f, deadline) {
		case answered:
			if !f.isFor(rw.manner) {
				if rw.own.manner == rw.manner {
					return o.ask(ctx, rw, r)
				}
				rw.own.manner = rw.manner // from now on, for its like only
				continue
			}
			return o.share(ctx, rw.ResponseWriter, r, opt, &f.landing)
		case failed:
			return f.rcode, f.err
		case unshared:
			return o.ask(ctx, rw, r)
		case gone:
			return dns.RcodeServerFailure, ctx.Err()
		case tooLate:
			srv.add(stripe, countLetGo, 1)
			return dns.RcodeServerFailure, nil
		case relaunched:
			rw.flight = f
			return o.lead(ctx, rw, r)
		}
	}
}

// lead asks the next plugin with a flight and makes sure that it ends.
func (o *Optcache) lead(ctx context.Context, rw *writer, r *dns.Msg) (rcode int, err error) {
	var l landing // stays abandoned in a panic
	defer func() { o.flights.back(rw.flight, l) }()
	rcode, err = o.ask(ctx, rw, r)
	switch {
	case ctx.Err() != nil || rw.purpose == forStale:
	case rw.unshared:
		l.outcome = unshared
	default:
		l = landing{outcome: failed, rcode: rcode, err: err}
	}
	return rcode, err
}

// share sends a waiter what a flight has brought.
func (o *Optcache) share(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, l *landing) (int, error) {
	if l.wildcard != "" {
		setWildcard(ctx, l.wildcard)
	}
	ttl := int64(l.ttl)
	if l.kept && !o.keepTTL {
		ttl = max(ttl-(o.clock()-l.stored)/1e9, 0)
	}
	m := new(dns.Msg)
	m.SetReply(r)
	a := l.answer
	m.Rcode, m.Authoritative, m.RecursionAvailable, m.Truncated = a.Rcode, a.Authoritative, a.RecursionAvailable, a.Truncated
	m.AuthenticatedData = a.AuthenticatedData && wantsAD(r, opt)
	for _, section := range [][2]*[]dns.RR{{&m.Answer, &a.Answer}, {&m.Ns, &a.Ns}, {&m.Extra, &a.Extra}} {
		rrs := make([]dns.RR, len(*section[1]))
		for i, rr := range *section[1] {
			rrs[i] = dns.Copy(rr)
			rrs[i].Header().Ttl = uint32(ttl)
		}
		*section[0] = rrs
	}
	if err := w.WriteMsg(m); err != nil {
		return dns.RcodeServerFailure, err
	}
	return dns.RcodeSuccess, nil
}

func setWildcard(ctx context.Context, name string) {
	metadata.SetValueFunc(ctx, "zone/wildcard", func() string { return name })
}
