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
	ways
)

var wayNames = [ways]string{"", "plugin", "transport", "request", "edns", "size", "answer", "recorder", "verified"}

const (
	// questionTail is what follows the name in a question: qtype and qclass.
	questionTail = 4

	// The largest replies that CoreDNS sends over UDP without compressing them, whatever the
	// client's buffer (request.Request.Scrub).
	udp4Plain = 1480
	udp6Plain = 1220
)

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
	if o.explain && opt != nil && (stale || e.failure()) && s.body+e.bodyLen+e.excess()+wire.OPTLen+wire.EDELen <= replySpace(w, opt) {
		ede = edeFor(e, stale)
	}
	how, rec := o.way(w, r, opt, s, srv, ede)
	srv.add(s.stripe, countHit(e.flags.class(), s.tier, how), 1)
	srv.addEvents(s)
	if how == wayBytes {
		o.writeBytes(w, r, opt, s, ttl, ad, ede, rec)
		return dns.RcodeSuccess, nil
	}
	m, err := s.message(r, ttl, ad)
	if err != nil {
		return dns.RcodeServerFailure, err
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

	size, n := dns.MinMsgSize, s.body+s.entry.bodyLen+s.entry.excess()
	if opt != nil {
		n += wire.OPTLen
		if ede != edeNone {
			n += wire.EDELen
		}
		size = max(size, int(opt.UDPSize()))
		for _, option := range opt.Option {
			if code := option.Option(); code == dns.EDNS0NSID || edns.SupportedOption(code) {
				return wayEDNS, nil
			}
		}
	}
	switch a := w.RemoteAddr().(type) {
	case *net.UDPAddr:
		plain := udp6Plain
		if a.IP.To4() != nil {
			plain = udp4Plain
		}
		size = min(size, plain)
	case *net.TCPAddr:
		size = maxMessage
	default:
		return wayTransport, nil
	}
	if n > size {
		return waySize, nil
	}
	if o.front.recorder && (opt != nil || s.entry.flags&flagRcode != 0 || s.entry.excess() != 0) {
		if rec = recorder(w); rec == nil {
			return wayRecorder, nil
		}
	}
	return wayBytes, rec
}

// writeBytes patches the answer in s.out and writes it.
func (o *Optcache) writeBytes(w dns.ResponseWriter, r *dns.Msg, opt *dns.OPT, s *scratch, ttl uint32, ad bool, ede uint16, rec *metrics.Recorder) {
	e := &s.entry
	bits := wire.FlagQR | uint16(e.flags&flagRcode)
	bits |= flagIf(e.flags&flagAA != 0, wire.FlagAA) | flagIf(e.flags&flagRA != 0, wire.FlagRA)
	bits |= flagIf(ad, wire.FlagAD)
	bits |= flagIf(r.RecursionDesired, wire.FlagRD) | flagIf(r.CheckingDisabled, wire.FlagCD)

	additional := e.counts[2]
	n := s.body + e.bodyLen
	if opt != nil {
		additional++
		// The flags that CoreDNS keeps of the request's: DO and what may come beside it.
		wire.PutOPT(s.out[n:], opt.UDPSize(), uint16(opt.Hdr.Ttl)&0xff00)
		n += wire.OPTLen
		if ede != edeNone {
			wire.AddEDE(s.out[n-wire.OPTLen:], ede)
			n += wire.EDELen
		}
	}
	wire.PutHeader(s.out, r.Id, bits, 1, e.counts[0], e.counts[1], additional)
	binary.BigEndian.PutUint16(s.out[s.body-4:], r.Question[0].Qtype)
	binary.BigEndian.PutUint16(s.out[s.body-2:], r.Question[0].Qclass)
	s.patchTTL(ttl)

	w.Write(s.out[:n])
	if rec != nil {
		// What the recorder's WriteMsg would have noted: the rcode, and the length before the
		// server adds OPT, if it has none with an option.
		rec.Rcode = int(e.flags & flagRcode)
		rec.Len += e.excess()
		if opt != nil && ede == edeNone {
			rec.Len -= wire.OPTLen
		}
	}
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
