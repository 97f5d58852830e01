package optcache

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/coredns/coredns/plugin/metadata"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// writer passes the response to a miss on to the client and keeps what may be kept of it.
type writer struct {
	dns.ResponseWriter
	o      *Optcache
	ctx    context.Context
	server *server
	key    key  // of the request
	ad     bool // the client wants to know what is authenticated
	silent bool // keep, but do not write
	wrote  bool
}

// WriteMsg implements dns.ResponseWriter.
func (w *writer) WriteMsg(res *dns.Msg) error {
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

	if !w.matches(res) {
		w.server.add(0, countDrop, 1)
	} else if ttl > 0 && keepable(res, kind) {
		if c := classOf(kind); !w.o.except[c].contain(w.key.name()) {
			w.keep(res, c, ttl)
		}
	}

	if w.key.bits()&keyDO == 0 && !w.ad {
		res.AuthenticatedData = false
	}
	w.wrote = true
	if w.silent {
		return nil
	}
	return w.ResponseWriter.WriteMsg(res)
}

// Write implements dns.ResponseWriter.
func (w *writer) Write(b []byte) (int, error) {
	log.Warning("A plugin wrote a response in bytes: not caching it")
	w.wrote = true
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
func (w *writer) keep(res *dns.Msg, c class, ttl uint32) {
	now := w.o.clock()
	s := w.o.pool.Get().(*scratch)
	s.key = w.key
	e := entry{stored: now, ttl: ttl, flags: flagsOf(res, c)}
	body, ok := s.pack(res, &e)
	if ok {
		w.o.store.insert(s, &e, body, w.wildcard(), now)
		w.server.addEvents(s)
	}
	w.o.release(s)
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
	for _, res.Compress = range []bool{false, true} {
		if res.Compress {
			res.Question = nil // so that no pointer points into it
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
		if excess := res.Len() - len(b); 0 <= excess && excess <= math.MaxUint16 {
			e.link = makeLink(0, 0, excess)
		} else {
			e.flags |= flagMessage
		}
		s.ttlAt, ok = wire.TTLOffsets(s.ttlAt, body, e.records())
		return body, ok
	}
	return nil, false
}
