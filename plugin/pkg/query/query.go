// Package query reads the question of one request and the traits of its client. There are two sources: a message, as plugins
// get it, and the bytes of a packet, as the fast path gets it.
//
// The key that an answer is stored under is made of a query in package record.
package query

import (
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/subnet"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// network is the transport that a request came by.
type network uint8

const (
	OverOther network = iota // neither UDP nor TCP, or unknown
	overUDP
	overTCP
)

// Query is the question of one request, and all that its reply depends on.
type Query struct {
	ID            uint16
	Bits          uint16 // of the header, see wire.FlagRD and others; FromMsg sets RD, CD and AD only
	Qtype, Qclass uint16

	EDNS     bool   // there is an OPT record
	Buffer   uint16 // the size of the client's UDP buffer by its OPT record, in bytes
	OPTFlags uint16 // of the OPT record
	Options  bool   // the OPT record has options

	Over network
	IPv4 bool // the client has an IPv4 address; FromMsg sets it over UDP only
}

// FromMsg returns the query of the message r, which must have a question; further questions are ignored. opt is the OPT record
// of r, or nil. from is the client's address.
func FromMsg(r *dns.Msg, opt *dns.OPT, from net.Addr) (q Query) {
	q.ID, q.Qtype, q.Qclass = r.Id, r.Question[0].Qtype, r.Question[0].Qclass
	q.Bits = wire.FlagIf(r.RecursionDesired, wire.FlagRD) | wire.FlagIf(r.CheckingDisabled, wire.FlagCD) | wire.FlagIf(r.AuthenticatedData, wire.FlagAD)
	if opt != nil {
		q.EDNS, q.Buffer, q.OPTFlags = true, opt.UDPSize(), uint16(opt.Hdr.Ttl)
		q.Options = len(opt.Option) > 0
	}
	switch a := from.(type) {
	case *net.UDPAddr:
		q.Over, q.IPv4 = overUDP, a.IP.To4() != nil
	case *net.TCPAddr:
		q.Over = overTCP
	}
	return q
}

// RD, CD and DO report whether the bits of these names are set.
func (q *Query) RD() bool { return q.Bits&wire.FlagRD != 0 }
func (q *Query) CD() bool { return q.Bits&wire.FlagCD != 0 }
func (q *Query) DO() bool { return q.EDNS && q.OPTFlags&wire.FlagDO != 0 }

// WantsAD reports whether the reply may have AD=1: the client has set AD or DO (RFC 6840 sections 5.7 and 5.8).
func (q *Query) WantsAD() bool { return q.Bits&wire.FlagAD != 0 || q.DO() }

// Space returns the size in bytes of the largest reply that the client accepts.
func (q *Query) Space() int {
	if q.Over == overTCP {
		return dns.MaxMsgSize
	}
	if !q.EDNS {
		return dns.MinMsgSize
	}
	return max(dns.MinMsgSize, int(q.Buffer))
}

// PlainSpace returns the size in bytes of the largest reply that CoreDNS sends uncompressed and whole. Over UDP, CoreDNS has a
// limit of its own, below that of clients with a large buffer (request.Request.Scrub).
func (q *Query) PlainSpace() int {
	switch {
	case q.Over == overTCP:
		return dns.MaxMsgSize
	case q.IPv4:
		return min(q.Space(), 1480)
	}
	return min(q.Space(), 1220)
}

// Traits are what upstreams may make their response depend on, beside the key. They are comparable.
type Traits struct {
	TCP     bool
	space   int // see Query.Space
	EDNS    bool
	Options bool   // there are EDNS options
	Subnet  string // see SubnetOf
}

// Traits returns the traits of a query.
func (q *Query) Traits() Traits {
	return Traits{TCP: q.Over == overTCP, space: q.Space(), EDNS: q.EDNS, Options: q.Options}
}

// Parse reads a plain query from the bytes p, which came over UDP; see ByTCP. A plain query has one question of class IN, and at most one
// more record: an OPT of version 0, with no options but those in Ignored. ok is false for all other packets, which may be valid
// queries all the same. name is the qname in wire format, and is part of p. Parse does not set IPv4.
func (q *Query) Parse(p []byte) (name []byte, ok bool) {
	if len(p) < wire.HeaderLen {
		return nil, false
	}
	*q = Query{ID: binary.BigEndian.Uint16(p), Bits: binary.BigEndian.Uint16(p[2:]), Over: overUDP}
	const opcode = 0xf << 11
	additional := binary.BigEndian.Uint16(p[10:])
	if q.Bits&(wire.FlagQR|opcode|wire.FlagTC) != 0 || binary.BigEndian.Uint16(p[4:]) != 1 ||
		binary.BigEndian.Uint32(p[6:]) != 0 || additional > 1 {
		return nil, false
	}
	end := wire.SkipName(p, wire.HeaderLen)
	if end < 0 || len(p) < end+wire.QuestionTail {
		return nil, false
	}
	q.Qtype, q.Qclass = binary.BigEndian.Uint16(p[end:]), binary.BigEndian.Uint16(p[end+2:])
	name, p = p[wire.HeaderLen:end], p[end+wire.QuestionTail:]
	if q.Qclass != dns.ClassINET || !fastType(q.Qtype) {
		return nil, false
	}
	if additional == 1 {
		if p, ok = q.parseOPT(p); !ok {
			return nil, false
		}
	}
	return name, len(p) == 0
}

// ByTCP says that the query, which Parse has read, came over TCP or TLS.
func (q *Query) ByTCP() { q.Over = overTCP }

// OverTCP reports whether the query came over TCP or TLS.
func (q *Query) OverTCP() bool { return q.Over == overTCP }

// fastType reports whether queries of a type may be plain. A query for DS belongs to the parent's zone (RFC 4035 section
// 3.1.4.1), and CoreDNS's server treats it so. OPT, and the range from TKEY to ANY, are not types of data.
func fastType(qtype uint16) bool {
	meta := dns.TypeTKEY <= qtype && qtype <= dns.TypeANY
	return !meta && qtype != dns.TypeDS && qtype != dns.TypeOPT && qtype != dns.TypeNone
}

// Ignored are the EDNS options that a cache may ignore, unless CoreDNS repeats them in replies (edns.SupportedOption).
var Ignored = [...]uint16{dns.EDNS0COOKIE, dns.EDNS0PADDING}

// parseOPT reads an OPT record (RFC 6891 section 6.1.2) at the start of p, and returns the bytes behind it.
func (q *Query) parseOPT(p []byte) (rest []byte, ok bool) {
	if len(p) < wire.OPTLen || p[0] != 0 || binary.BigEndian.Uint16(p[1:]) != dns.TypeOPT {
		return nil, false
	}
	q.EDNS, q.Buffer = true, binary.BigEndian.Uint16(p[3:])
	q.OPTFlags = binary.BigEndian.Uint16(p[7:])
	if p[5] != 0 || p[6] != 0 { // extended rcode and version
		return nil, false
	}
	options := int(binary.BigEndian.Uint16(p[9:]))
	p = p[wire.OPTLen:]
	if len(p) < options {
		return nil, false
	}
	rest, p = p[options:], p[:options]
	for len(p) > 0 {
		if len(p) < 4 {
			return nil, false
		}
		n := 4 + int(binary.BigEndian.Uint16(p[2:]))
		if code := binary.BigEndian.Uint16(p); len(p) < n || !slices.Contains(Ignored[:], code) {
			return nil, false
		}
		q.Options = true
		p = p[n:]
	}
	return rest, true
}

// EDNS client subnet (RFC 7871): an answer whose SCOPE is above 0 is for some clients only. An answer with SCOPE 0, or without the
// option, is for all clients.

func isSubnet(o dns.EDNS0) bool { return o.Option() == dns.EDNS0SUBNET }

// Scoped reports whether a response is for one subnet only. An option that cannot be read counts as such.
func Scoped(m *dns.Msg) bool {
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			opt, ok := rr.(*dns.OPT)
			if ok && slices.ContainsFunc(opt.Option, func(o dns.EDNS0) bool {
				subnet, known := o.(*dns.EDNS0_SUBNET)
				return isSubnet(o) && (!known || subnet.SourceScope > 0)
			}) {
				return true
			}
		}
	}
	return false
}

// SubnetState says what a message has of client subnets.
type SubnetState uint8

const (
	NoSubnet       SubnetState = iota
	OneSubnet                  // that can be read
	BadSubnet                  // that a query may not have, or a response that cannot be read
	SeveralSubnets             // of which one cannot say which counts
)

// optionIn returns the client subnet in an OPT record, and whether there is one. opt may be nil.
func optionIn(opt *dns.OPT) (o *dns.EDNS0_SUBNET, state SubnetState) {
	if opt == nil {
		return nil, NoSubnet
	}
	for _, each := range opt.Option {
		switch read, ok := each.(*dns.EDNS0_SUBNET); {
		case !isSubnet(each):
		case state != NoSubnet:
			return nil, SeveralSubnets
		case !ok:
			state = BadSubnet
		default:
			o, state = read, OneSubnet
		}
	}
	return o, state
}

// prefixOf returns the prefix of an option, by its SOURCE. ok is false if there is no such prefix.
func prefixOf(o *dns.EDNS0_SUBNET) (p subnet.Prefix, exact, ok bool) {
	addr := o.Address.To4()
	switch {
	case o.Family == 0 && o.SourceNetmask == 0, o.Family == subnet.IPv4 && o.SourceNetmask == 0 && len(o.Address) == 0: // as dig sends it
		addr = make([]byte, 4)
	case o.Family == subnet.IPv6:
		addr = o.Address.To16()
	case o.Family != subnet.IPv4:
		return p, false, false
	}
	return subnet.Of(addr, o.SourceNetmask)
}

// SubnetIn returns the prefix of the client subnet in the OPT record of a request, which may be nil, and the option. A request must
// have SCOPE 0, and no bits beyond SOURCE (RFC 7871 section 6).
func SubnetIn(opt *dns.OPT) (p subnet.Prefix, o *dns.EDNS0_SUBNET, state SubnetState) {
	o, state = optionIn(opt)
	if state != OneSubnet {
		return p, nil, state
	}
	p, exact, ok := prefixOf(o)
	if !ok || !exact || o.SourceScope != 0 {
		return subnet.Prefix{}, nil, BadSubnet
	}
	return p, o, OneSubnet
}

// ScopeIn returns the client subnet of a response: the prefix that the question must have had, and SCOPE. The response has it in the
// OPT record, or in several.
func ScopeIn(m *dns.Msg) (p subnet.Prefix, scope uint8, state SubnetState) {
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			opt, ok := rr.(*dns.OPT)
			if !ok {
				continue
			}
			o, is := optionIn(opt)
			switch {
			case is == NoSubnet:
				continue
			case state != NoSubnet:
				return p, 0, SeveralSubnets
			}
			if state = is; is != OneSubnet {
				return p, 0, is
			}
			scope = o.SourceScope
			if p, _, ok = prefixOf(o); !ok || p.Family == subnet.IPv4 && scope > 32 || scope > 128 {
				return p, 0, BadSubnet
			}
		}
	}
	return p, scope, state
}

// SubnetOf returns the client subnets in the OPT record of a request as text. Requests with the same subnets have the same
// text. It is "" if there is none. opt may be nil.
func SubnetOf(opt *dns.OPT) string {
	if opt == nil || !slices.ContainsFunc(opt.Option, isSubnet) {
		return ""
	}
	var b strings.Builder
	for _, o := range opt.Option {
		if !isSubnet(o) {
			continue
		}
		if subnet, ok := o.(*dns.EDNS0_SUBNET); ok {
			fmt.Fprintf(&b, "%d ", subnet.Family)
		}
		fmt.Fprintf(&b, "%s\n", o)
	}
	return b.String()
}

// WithoutSubnet returns a deep copy of a request without client subnets.
func WithoutSubnet(r *dns.Msg) *dns.Msg {
	r = r.Copy()
	if opt := r.IsEdns0(); opt != nil {
		opt.Option = slices.DeleteFunc(opt.Option, isSubnet)
	}
	return r
}
