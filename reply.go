package optcache

import (
	"context"
	"encoding/binary"
	"net"

	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/edns"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file makes a reply of a hit, in one of two ways that put the same packet on the wire:
// the stored bytes, patched, straight to the socket, or a message through the writers of the
// plugins in front. The second one is always right; the first one is taken when nobody in
// front would notice.

// way is how a hit was sent: as bytes, or as a message for one reason.
type way uint8

const (
	wayBytes     way = iota
	wayPlugin        // a plugin in front may change the reply
	wayTransport     // not plain DNS over UDP or TCP
	wayRequest       // records in the request beside one OPT: TSIG, or something odd
	wayEDNS          // an EDNS option that the reply must carry
	waySize          // the reply must be compressed or cut to fit
	wayAnswer        // the answer cannot be sent as it is stored
	wayRecorder      // the metrics would not be told
	wayVerified      // another answer, from the next plugin, was better
	wayFast          // as bytes, by the fast path
	ways
)

var wayNames = [ways]string{"", "plugin", "transport", "request", "edns", "size", "answer", "recorder", "verified", ""}

// plainSize is the largest reply, in bytes, that CoreDNS sends over UDP without compressing it,
// whatever the client's buffer (request.Request.Scrub).
func plainSize(ipv4 bool) int {
	if ipv4 {
		return 1480
	}
	return 1220
}

// questionTail is what follows the name in a question: qtype and qclass.
const questionTail = 4

// What an Extended DNS Error says (RFC 8914 section 4).
const (
	edeNone           = 0 // "other", which has nothing to say
	edeStale          = dns.ExtendedErrorCodeStaleAnswer
	edeStaleNameError = dns.ExtendedErrorCodeStaleNXDOMAINAnswer
	edeCachedFailure  = dns.ExtendedErrorCodeCachedError
)

// edeFor returns what there is to explain about the entry.
func edeFor(e *entry, stale bool) uint16 {
	switch {
	case stale && e.flags&flagRcode == dns.RcodeNameError:
		return edeStaleNameError
	case stale && !e.failure():
		return edeStale
	case e.failure():
		return edeCachedFailure
	}
	return edeNone
}

// reply sends the answer in s with that TTL to the client. opt is the request's OPT or nil.
func (o *Optcache) reply(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, srv *server, ttl uint32, stale bool) (int, error) {
	e := &s.entry
	if len(s.wildcard) > 0 {
		setWildcard(ctx, string(s.wildcard))
	}

	ad := e.flags&flagAD != 0 && wantsAD(r, opt)
	var ede uint16
	if o.explain && opt != nil && (stale || e.failure()) && s.length(true, edeStale) <= replySpace(w, opt) {
		ede = edeFor(e, stale)
	}
	how, rec := o.way(w, r, opt, s, srv, ede)
	srv.addEvents(s)
	var m *dns.Msg
	if how != wayBytes {
		var err error
		if m, err = s.message(r, ttl, ad); err != nil {
			// The library has packed what it does not unpack, such as a name with 127 pointers.
			srv.add(s.stripe, countMiss, 1)
			return o.ask(ctx, o.newWriter(ctx, w, r, opt, s, srv, forMiss), r)
		}
	}
	srv.add(s.stripe, countHit(e.flags.class(), s.tier, how), 1)
	if how == wayBytes {
		q := queryOf(r, opt)
		packet := s.packet(&q, ttl, ad, ede)
		w.Write(packet)
		if rec != nil { // it has not seen more than the length
			rec.Rcode = int(e.flags & flagRcode)
			rec.Len = s.recorded(len(packet), q.edns, ede)
		}
		return dns.RcodeSuccess, nil
	}
	if ede != edeNone {
		m.Extra = append(m.Extra, &dns.OPT{
			Hdr:    dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT},
			Option: []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: ede}},
		})
	}
	w.WriteMsg(m)
	return dns.RcodeSuccess, nil
}

// way decides how the answer in s is sent. rec is the recorder to be told of bytes, if any.
func (o *Optcache) way(w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, srv *server, ede uint16) (how way, rec *metrics.Recorder) {
	switch {
	case o.front.changes:
		return wayPlugin, nil
	case !srv.plain:
		return wayTransport, nil
	case len(r.Question) != 1 || len(r.Extra) > 1 || len(r.Extra) == 1 && opt == nil:
		return wayRequest, nil
	case s.entry.flags&(flagCompressed|flagMessage) != 0:
		return wayAnswer, nil
	}

	size := dns.MinMsgSize
	if opt != nil {
		size = max(size, int(opt.UDPSize()))
		for _, option := range opt.Option {
			if code := option.Option(); code == dns.EDNS0NSID || edns.SupportedOption(code) {
				return wayEDNS, nil
			}
		}
	}
	switch a := w.RemoteAddr().(type) {
	case *net.UDPAddr:
		size = min(size, plainSize(a.IP.To4() != nil))
	case *net.TCPAddr:
		size = maxMessage
	default:
		return wayTransport, nil
	}
	if s.length(opt != nil, ede) > size {
		return waySize, nil
	}
	if o.front.recorder && (opt != nil || s.entry.flags&flagRcode != 0 || s.entry.excess() != 0) {
		if rec = recorder(w); rec == nil {
			return wayRecorder, nil
		}
	}
	return wayBytes, rec
}

// query is what a reply in bytes needs to know of its request.
type query struct {
	id            uint16
	bits          uint16 // of the header
	qtype, qclass uint16
	edns          bool
	space         uint16 // the client's buffer, by its OPT
	optFlags      uint16
	options       bool // there are EDNS options; for the fast path
}

func queryOf(r *dns.Msg, opt *dns.OPT) (q query) {
	q.id, q.qtype, q.qclass = r.Id, r.Question[0].Qtype, r.Question[0].Qclass
	q.bits = flagIf(r.RecursionDesired, wire.FlagRD) | flagIf(r.CheckingDisabled, wire.FlagCD)
	if opt != nil {
		q.edns, q.space, q.optFlags = true, opt.UDPSize(), uint16(opt.Hdr.Ttl)
	}
	return q
}

// length returns how long CoreDNS takes a reply in bytes for, when it decides on whether it fits.
func (s *scratch) length(edns bool, ede uint16) int {
	n := s.body + s.entry.bodyLen + s.entry.excess()
	if edns {
		n += wire.OPTLen
	}
	if ede != edeNone {
		n += wire.EDELen
	}
	return n
}

// packet makes a reply of the answer in s. It is part of s.out.
func (s *scratch) packet(q *query, ttl uint32, ad bool, ede uint16) []byte {
	e := &s.entry
	bits := wire.FlagQR | uint16(e.flags&flagRcode) | q.bits&(wire.FlagRD|wire.FlagCD)
	bits |= flagIf(e.flags&flagAA != 0, wire.FlagAA) | flagIf(e.flags&flagRA != 0, wire.FlagRA)
	bits |= flagIf(ad, wire.FlagAD)

	additional := e.counts[2]
	n := s.body + e.bodyLen
	if q.edns {
		additional++
		// The flags that CoreDNS keeps of the request's: DO, and beside it what may come in the same byte unless
		// the reply has an OPT record of its own, for an option.
		keep := uint16(0xff00)
		if ede != edeNone {
			keep = wire.FlagDO
		}
		wire.PutOPT(s.out[n:], q.space, q.optFlags&keep)
		n += wire.OPTLen
		if ede != edeNone {
			wire.AddEDE(s.out[n-wire.OPTLen:], ede)
			n += wire.EDELen
		}
	}
	wire.PutHeader(s.out, q.id, bits, 1, e.counts[0], e.counts[1], additional)
	binary.BigEndian.PutUint16(s.out[s.body-4:], q.qtype)
	binary.BigEndian.PutUint16(s.out[s.body-2:], q.qclass)
	s.patchTTL(ttl)
	return s.out[:n]
}

// recorded returns the length that the recorder's WriteMsg would have noted of a packet of n bytes:
// that before the server adds OPT, if it has none with an option.
func (s *scratch) recorded(n int, edns bool, ede uint16) int {
	n += s.entry.excess()
	if edns && ede == edeNone {
		n -= wire.OPTLen
	}
	return n
}

func flagIf(on bool, flag uint16) uint16 {
	if on {
		return flag
	}
	return 0
}

// message makes a message of the answer in s, as a reply to r. Nothing in it is part of s.
func (s *scratch) message(r *dns.Msg, ttl uint32, ad bool) (*dns.Msg, error) {
	e := &s.entry
	m := new(dns.Msg)
	m.SetReply(r)
	m.Rcode = int(e.flags & flagRcode)
	m.Authoritative = e.flags&flagAA != 0
	m.RecursionAvailable = e.flags&flagRA != 0
	m.AuthenticatedData = ad

	msg, off := s.out[:s.body+e.bodyLen], s.body
	if e.flags&flagCompressed != 0 {
		// The pointers count from a message without question.
		msg, off = msg[s.body-wire.HeaderLen:], wire.HeaderLen
	}
	for i, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
		rrs := make([]dns.RR, 0, e.counts[i])
		for range e.counts[i] {
			rr, next, err := dns.UnpackRR(msg, off)
			if err != nil {
				return nil, err
			}
			rr.Header().Ttl = ttl
			rrs = append(rrs, rr)
			off = next
		}
		*section = rrs
	}
	return m, nil
}
