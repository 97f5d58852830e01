package optcache

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/pkg/response"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// writer passes a response on to the client and keeps what may be kept of it. It belongs to one
// request, or to a refresh, which has no client.
type writer struct {
	dns.ResponseWriter
	o       *Optcache
	ctx     context.Context
	server  *server
	key     key     // of the request
	manner  manner  // in which it asks
	ad      bool    // the client wants to know what is authenticated
	purpose purpose // what the response is for

	own    flight  // what others wait for, if this request takes off
	flight *flight // what waits for the response: own, another's, or nothing

	// A refresh in the background.
	detached bool   // there is no client
	counted  bool   // as a prefetch
	hits     uint32 // what the new entry inherits: how often the old one was asked for,
	hitsAt   int64  // and until when

	served recordFlags // kind of the stale entry that is refreshed

	silent    bool // keep, but do not write
	wrote     bool // there was a response
	unshared  bool // it is not for others
	refreshed bool // it is better than the stale entry
	replaced  bool // it has taken the place of the stale entry
}

func (o *Optcache) newWriter(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, srv *server, p purpose) *writer {
	rw := &writer{ResponseWriter: w, o: o, ctx: ctx, server: srv, key: s.key, ad: wantsAD(r, opt), purpose: p}
	rw.own.key = &rw.key
	rw.manner = mannerOf(w, r, opt)
	if p == forStale {
		rw.served = s.entry.flags.kind()
	}
	return rw
}

// wantsAD reports whether the client wants to know what the upstream has validated (RFC 6840
// sections 5.7 and 5.8).
func wantsAD(r *dns.Msg, opt *dns.OPT) bool {
	return r.AuthenticatedData || opt != nil && opt.Do()
}

// WriteMsg implements dns.ResponseWriter.
func (w *writer) WriteMsg(res *dns.Msg) error {
	deliver := !w.silent
	if w.purpose == forStale {
		var keep bool
		if keep, w.refreshed = w.accept(res); !keep {
			return nil
		}
		deliver = w.refreshed
	}
	if res == nil {
		return errors.New("optcache: response message is nil")
	}
	// Whoever made the message may go on using it.
	res = res.Copy()
	kind := classify(res, w.o.wall().UTC())
	d := w.o.ttl(res, kind)

	// The first client sees the TTL that later ones will see counting down.
	ttl := uint32(d / time.Second)
	res.Answer = settle(res.Answer, ttl)
	res.Ns = settle(res.Ns, ttl)
	res.Extra = settle(res.Extra, ttl)

	matches, good := w.matches(res), keepable(res, kind)
	var kept bool
	var stored int64
	var wildcard string
	if !matches {
		w.server.add(0, countDrop, 1)
	} else if ttl > 0 && good {
		// As in the built-in cache, a refresh keeps what it gets for an entry that was kept.
		if c := classOf(kind); w.purpose != forMiss || !w.o.except[c].contain(w.key.name()) {
			wildcard, stored = w.wildcard(), w.o.clock()
			kept = w.keep(res, c, ttl, wildcard, stored)
		}
	}
	w.wrote = true
	if w.flight != nil && deliver {
		if matches && res.Rcode <= int(flagRcode) {
			l := landing{
				outcome: answered, answer: res, ttl: ttl, stored: stored, kept: kept,
				refreshed: w.refreshed, wildcard: wildcard,
			}
			if !good {
				l.only = &w.manner
			}
			w.o.flights.land(w.flight, l)
		} else if !matches {
			w.o.flights.land(w.flight, landing{outcome: failed, answer: res, rcode: dns.RcodeServerFailure})
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
	return w.ResponseWriter.WriteMsg(res)
}

// accept says of a response to a request for a stale entry whether it may be kept, and whether it is
// good enough to be served instead: if it is no failure, cut off, or for another question; with
// prefer_positive, if it answers the question.
func (w *writer) accept(res *dns.Msg) (keep, serve bool) {
	if res == nil || res.Truncated || !w.matches(res) {
		return false, false
	}
	now := w.o.wall().UTC()
	if w.o.stale.preferPositive {
		return true, answers(res, classify(res, now))
	}
	switch kind, _ := response.Typify(res, now); kind {
	case response.OtherError, response.Meta, response.Update:
		return false, false
	}
	ok := res.Rcode == dns.RcodeSuccess || res.Rcode == dns.RcodeNameError
	return ok, ok
}

// Write implements dns.ResponseWriter.
func (w *writer) Write(b []byte) (int, error) {
	log.Warning("A plugin wrote a response in bytes: not caching it")
	w.wrote, w.unshared = true, true
	return w.ResponseWriter.Write(b)
}

// keepFailure keeps a SERVFAIL for the request r, which got no response at all.
func (w *writer) keepFailure(r *dns.Msg) {
	w.silent = true
	w.WriteMsg(new(dns.Msg).SetRcode(r, dns.RcodeServerFailure))
}

// matches reports whether res is a response to the question that was asked.
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
	return string(name[:n]) == string(w.key.name()) && q.Qtype == w.key.qtype() && q.Qclass == w.key.qclass()
}

// settle removes OPT, which is between two servers (RFC 6891 section 6.2.1), and sets the TTL
// of the other records.
func settle(rrs []dns.RR, ttl uint32) []dns.RR {
	kept := rrs[:0]
	for _, rr := range rrs {
		if rr.Header().Rrtype != dns.TypeOPT {
			rr.Header().Ttl = ttl
			kept = append(kept, rr)
		}
	}
	return kept
}

// keep stores a response under the key of the request. A response that cannot be stored is
// served all the same.
func (w *writer) keep(res *dns.Msg, c class, ttl uint32, wildcard string, now int64) bool {
	s := w.o.pool.Get().(*scratch)
	defer w.o.release(s)
	s.key = w.key
	e := entry{stored: now, ttl: ttl, flags: flagsOf(res, c)}
	if w.purpose == forPrefetch || w.refreshed {
		e.hits, e.hitsAt = w.hits, w.hitsAt
	}
	e.supersedes = w.detached
	if w.o.stale.preferPositive {
		e.supersedes = c == success && answersQuestion(res)
	}
	e.flags |= w.o.marks(res, c)
	body, ok := s.pack(res, &e)
	if !ok {
		return false
	}
	ok = w.o.store.insert(s, &e, body, wildcard, now)
	w.replaced = ok && e.flags.kind() == w.served
	w.server.addEvents(s)
	return ok
}

// marks returns flagAnswers for a response that goes before all others.
func (o *Optcache) marks(res *dns.Msg, c class) recordFlags {
	if o.stale.preferPositive && o.stale.upTo >= time.Second && c == success && answersQuestion(res) {
		return flagAnswers
	}
	return 0
}

// wildcard returns the name of the wildcard that the response was made from, if a plugin says so.
func (w *writer) wildcard() string {
	if f := metadata.ValueFunc(w.ctx, "zone/wildcard"); f != nil {
		return f()
	}
	return ""
}

func flagsOf(res *dns.Msg, c class) recordFlags {
	f := recordFlags(res.Rcode) & flagRcode
	if res.Authoritative {
		f |= flagAA
	}
	if res.RecursionAvailable {
		f |= flagRA
	}
	if res.AuthenticatedData {
		f |= flagAD
	}
	if c == denial {
		f |= flagDenial
	}
	if res.IsTsig() != nil {
		f |= flagMessage // signed by the server, message by message
	}
	return f
}

// pack puts the sections of a response in wire format and notes in e how many records they have
// and in s.ttlAt where their TTLs are. The body is part of s.
func (s *scratch) pack(res *dns.Msg, e *entry) (body []byte, ok bool) {
	if max(len(res.Answer), len(res.Ns), len(res.Extra)) > maxSection {
		return nil, false
	}
	e.counts = [3]uint16{uint16(len(res.Answer)), uint16(len(res.Ns)), uint16(len(res.Extra))}
	s.ttlAt = s.ttlAt[:0]
	defer func(compress bool, q []dns.Question) { res.Compress, res.Question = compress, q }(res.Compress, res.Question)
	res.Compress = false
	length := res.Len()
	for _, res.Compress = range []bool{false, true} {
		if res.Compress {
			res.Question = nil // so that no pointer points into it
		} else if length > maxMessage {
			continue // names that take 64 KiB with compression may take megabytes without
		}
		b, err := res.PackBuffer(s.packed[:cap(s.packed)])
		if err != nil {
			return nil, false
		}
		if cap(b) > cap(s.packed) {
			s.packed = b
		}
		if len(b) > maxMessage {
			continue
		}
		if res.Compress {
			e.flags |= flagCompressed
			return b[wire.HeaderLen:], true
		}
		off := wire.SkipName(b, wire.HeaderLen)
		if off < 0 {
			return nil, false
		}
		body = b[off+questionTail:]
		// CoreDNS decides by Msg.Len whether a reply fits. It counts some records too long.
		if excess := length - len(b); 0 <= excess && excess <= math.MaxUint16 {
			e.link = makeLink(0, 0, excess)
		} else {
			e.flags |= flagMessage
		}
		s.ttlAt, ok = wire.TTLOffsets(s.ttlAt, body, e.records())
		return body, ok
	}
	return nil, false
}
