// Package reply makes the reply to a question from a stored answer: as bytes for the socket, or as a message for outer plugins.
// Both become the same packet.
//
// Whether a hit leaves as bytes or as a message is decided by the caller.
package reply

import (
	"encoding/binary"
	"math/rand/v2"
	"strings"

	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// Answer is an answer that was copied from the store, and the question that it is for. It owns the bytes of both, and of the
// reply. One request uses it at a time.
type Answer struct {
	record.Buffer
	Query   query.Query
	extents []extent // of the records of one section; used by Rotate
	sorted  []extent // the same in the new order
}

// Codes of Extended DNS Errors (RFC 8914 section 4).
const (
	NoEDE             = 0 // no Extended DNS Error; its meaning in the RFC, "Other Error", is never needed
	StaleEDE          = dns.ExtendedErrorCodeStaleAnswer
	edeStaleNameError = dns.ExtendedErrorCodeStaleNXDOMAINAnswer
	edeCachedFailure  = dns.ExtendedErrorCodeCachedError
)

// Explain returns the Extended DNS Error that the reply has at now, in ns on the store's clock. It is NoEDE if there is
// nothing to explain, if the client has no EDNS, or if the option does not fit into the reply.
func (s *Answer) Explain(now int64) uint16 {
	e := &s.Entry
	stale := e.Remaining(now) <= 0
	switch {
	case !s.Query.EDNS || !stale && !e.ServerFailure() || s.Length(StaleEDE) > s.Query.Space():
		return NoEDE
	case !stale:
		return edeCachedFailure
	case e.Flags&record.FlagRcode == dns.RcodeNameError:
		return edeStaleNameError
	}
	return StaleEDE
}

// EDE returns an OPT record with an Extended DNS Error. The server copies its options to the reply's own OPT.
func EDE(code uint16) *dns.OPT {
	return &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}, Option: []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: code}}}
}

// Length returns the length in bytes that CoreDNS assumes for the reply as a message, when it decides whether the reply fits.
// It may be larger than the packet.
func (s *Answer) Length(ede uint16) int {
	n := s.Body + s.Entry.BodyLen + s.Entry.Excess()
	if s.Query.EDNS {
		n += wire.OPTLen
	}
	if ede != NoEDE {
		n += wire.EDELen
	}
	return n
}

// Packet makes the whole reply as bytes. All TTLs are ttl, in seconds. The packet is part of s.Out, and valid until s gets
// another answer. The answer must be neither compressed (record.FlagCompressed) nor for messages only (record.FlagMessage).
func (s *Answer) Packet(ttl uint32, ede uint16) []byte {
	e, q := &s.Entry, &s.Query
	bits := wire.FlagQR | uint16(e.Flags&record.FlagRcode) | q.Bits&(wire.FlagRD|wire.FlagCD)
	bits |= wire.FlagIf(e.Flags&record.FlagAA != 0, wire.FlagAA) | wire.FlagIf(e.Flags&record.FlagRA != 0, wire.FlagRA)
	bits |= wire.FlagIf(e.Flags&record.FlagAD != 0 && q.WantsAD(), wire.FlagAD)

	additional := e.Counts[2]
	n := s.Body + e.BodyLen
	if q.EDNS {
		additional++
		// These flags of the request CoreDNS repeats in the reply: the whole byte with DO, or only DO if the reply has an OPT
		// record of its own, for an option.
		keep := uint16(0xff00)
		if ede != NoEDE {
			keep = wire.FlagDO
		}
		wire.PutOPT(s.Out[n:], q.Buffer, q.OPTFlags&keep)
		n += wire.OPTLen
		if ede != NoEDE {
			wire.AddEDE(s.Out[n-wire.OPTLen:], ede)
			n += wire.EDELen
		}
	}
	wire.PutHeader(s.Out, q.ID, bits, 1, e.Counts[0], e.Counts[1], additional)
	binary.BigEndian.PutUint16(s.Out[s.Body-4:], q.Qtype)
	binary.BigEndian.PutUint16(s.Out[s.Body-2:], q.Qclass)
	s.PatchTTL(ttl)
	if s.Key.Mixed { // the stored names are in lower case
		wire.RespellOwners(s.Out[s.Body:][:e.BodyLen], e.Records(), s.Out[wire.HeaderLen:s.Body-wire.QuestionTail])
	}
	return s.Out[:n]
}

// Reply makes the reply as bytes, as it leaves to the client: rotated, if rotate is true, and compressed and cut as CoreDNS's
// server does with a message. Otherwise it is as Packet. ok is false if it has records that must be compressed as a message;
// then Message still makes one.
func (s *Answer) Reply(ttl uint32, ede uint16, rotate bool) (packet []byte, ok bool) {
	packet = s.Packet(ttl, ede)
	if rotate && s.Entry.Flags&record.FlagRcode == dns.RcodeSuccess {
		s.Rotate()
	}
	if s.Length(ede) <= s.Query.PlainSpace() {
		return packet, true
	}
	return s.fit(packet, s.Length(ede))
}

// fit returns the packet compressed, and cut to the client's space. length is that of the packet, as CoreDNS assumes it.
func (s *Answer) fit(packet []byte, length int) (fitted []byte, ok bool) {
	opt := packet[s.Body+s.Entry.BodyLen:]
	limit := s.Query.Space()
	if limit > wire.MaxFit {
		if length > wire.MaxFit {
			return nil, false
		}
		limit = wire.MaxFit // nothing will be cut
	}
	if cap(s.Packed) < limit {
		s.Packed = make([]byte, limit)
	}
	counts := s.Entry.Counts
	n, cut, ok := wire.Fit(s.Packed[:limit], packet[:s.Body+s.Entry.BodyLen], &counts, limit-len(opt))
	if !ok {
		return nil, false
	}
	n += copy(s.Packed[n:limit], opt)
	fitted = s.Packed[:n]
	additional := counts[2]
	if len(opt) > 0 {
		additional++
	}
	bits := binary.BigEndian.Uint16(fitted[2:]) | wire.FlagIf(cut, wire.FlagTC)
	wire.PutHeader(fitted, s.Query.ID, bits, 1, counts[0], counts[1], additional)
	return fitted, true
}

// Recorded returns the length that recorders of outer plugins, such as those of prometheus and log, note for the reply as a
// message. CoreDNS's server compresses and cuts the message, and adds an OPT record without options, only after the recorder.
func (s *Answer) Recorded(ede uint16) int {
	n := s.Length(ede)
	if s.Query.EDNS && ede == NoEDE {
		n -= wire.OPTLen
	}
	return n
}

// Message makes the reply to r as a message, without OPT. All TTLs are ttl, in seconds. The message shares no memory with s. An
// error says that the DNS library cannot unpack the answer.
func (s *Answer) Message(r *dns.Msg, ttl uint32) (*dns.Msg, error) {
	e := &s.Entry
	m := new(dns.Msg)
	m.SetReply(r)
	m.Rcode = int(e.Flags & record.FlagRcode)
	m.Authoritative = e.Flags&record.FlagAA != 0
	m.RecursionAvailable = e.Flags&record.FlagRA != 0
	m.AuthenticatedData = e.Flags&record.FlagAD != 0 && s.Query.WantsAD()

	msg, off := s.Out[:s.Body+e.BodyLen], s.Body
	if e.Flags&record.FlagCompressed != 0 {
		// Compression pointers are offsets in a message without a question section.
		msg, off = msg[s.Body-wire.HeaderLen:], wire.HeaderLen
	}
	for i, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
		rrs := make([]dns.RR, 0, e.Counts[i])
		for range e.Counts[i] {
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
	Respell(m, r.Question[0].Name)
	return m, nil
}

// Summary returns a message that has what the plugin log reads of the reply to r: the header, the question, and enough records
// to tell what kind of response it is (response.Typify). packet is what Reply has made for r. The records of the message are
// shared, and must not be changed. As CoreDNS's server does when it sends a message, Summary takes options out of r that the
// server does not support: outer plugins count the size of a request without them.
func (s *Answer) Summary(r *dns.Msg, packet []byte, ede uint16) *dns.Msg {
	bits := binary.BigEndian.Uint16(packet[2:])
	m := &dns.Msg{Question: r.Question}
	m.Id, m.Response, m.Rcode = r.Id, true, int(s.Entry.Flags&record.FlagRcode)
	m.Authoritative, m.Truncated, m.RecursionDesired = bits&wire.FlagAA != 0, bits&wire.FlagTC != 0, bits&wire.FlagRD != 0
	m.RecursionAvailable, m.AuthenticatedData, m.CheckingDisabled = bits&wire.FlagRA != 0, bits&wire.FlagAD != 0, bits&wire.FlagCD != 0
	if s.Query.EDNS {
		if ede != NoEDE {
			m.Extra = []dns.RR{EDE(ede)}
		}
		state := request.Request{Req: r}
		state.SizeAndDo(m)
	}
	if binary.BigEndian.Uint16(packet[6:]) > 0 {
		m.Answer = anyAnswer
	}
	signed := s.Query.DO() // then Typify looks at signatures
	if !signed && len(m.Answer) > 0 && m.Rcode == dns.RcodeSuccess {
		return m // Typify looks no further
	}
	body, at := s.Out[s.Body:][:s.Entry.BodyLen], 0
	for section := range s.Entry.Counts {
		kept := binary.BigEndian.Uint16(packet[6+2*section:])
		if section == 2 && s.Query.EDNS {
			kept--
		}
		for range kept {
			x := extentAt(body, at)
			at = x.end
			switch {
			case x.rtype == dns.TypeRRSIG && signed:
				const expirationAt, inceptionAt = 8, 12 // RFC 4034 section 3.1
				if rdata := body[x.rdata:x.end]; len(rdata) >= inceptionAt+4 {
					m.Extra = append(m.Extra, &dns.RRSIG{
						Hdr:        dns.RR_Header{Rrtype: dns.TypeRRSIG},
						Expiration: binary.BigEndian.Uint32(rdata[expirationAt:]), Inception: binary.BigEndian.Uint32(rdata[inceptionAt:]),
					})
				}
			case section != 1:
			case x.rtype == dns.TypeSOA:
				m.Ns = append(m.Ns, anySOA)
			case x.rtype == dns.TypeNS:
				m.Ns = append(m.Ns, anyNS)
			}
		}
		if kept < s.Entry.Counts[section] {
			break // nothing of the sections behind was kept
		}
	}
	return m
}

// Records for Summary, of which only the type counts.
var (
	anyAnswer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Rrtype: dns.TypeA}}}
	anySOA    = &dns.SOA{Hdr: dns.RR_Header{Rrtype: dns.TypeSOA}}
	anyNS     = &dns.NS{Hdr: dns.RR_Header{Rrtype: dns.TypeNS}}
)

// Respell gives the owner names in m that equal qname the upper and lower case letters of qname. Clients that use the case as a
// nonce (draft-vixie-dnsext-dns0x20) compare them, and so do some other clients.
func Respell(m *dns.Msg, qname string) {
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if h := rr.Header(); len(h.Name) == len(qname) && strings.EqualFold(h.Name, qname) {
				h.Name = qname
			}
		}
	}
}

// extent says where a record is in a body, in bytes from its start, and of which type.
type extent struct {
	start, rdata, end int
	rtype             uint16
	group             uint8 // of loadbalance
}

// extentAt returns the extent of the record at body[at:].
func extentAt(body []byte, at int) extent {
	const lengthAt, fixedLen = 8, 10 // offset of RDLENGTH, and length of TYPE to RDLENGTH (RFC 1035 section 3.2.1)
	fixed := wire.SkipName(body, at)
	rdata := fixed + fixedLen
	return extent{
		start: at, rdata: rdata, end: rdata + int(binary.BigEndian.Uint16(body[fixed+lengthAt:])),
		rtype: binary.BigEndian.Uint16(body[fixed:]), group: groupRest,
	}
}

// Groups of records, in the order in which loadbalance sorts them. Records of the first two keep their order.
const (
	groupAlias = iota
	groupRest
	groupAddress
	groupMX
	groups
)

// Rotate changes the reply that Packet has made as the plugin loadbalance does with round_robin: in each section, aliases come
// first. Addresses and then mail exchanges come last, each group shuffled.
func (s *Answer) Rotate() {
	body := s.Out[s.Body:][:s.Entry.BodyLen]
	at := 0
	for _, n := range s.Entry.Counts {
		s.extents = s.extents[:0]
		var count [groups]int
		for range n {
			x := extentAt(body, at)
			at = x.end
			switch x.rtype {
			case dns.TypeCNAME:
				x.group = groupAlias
			case dns.TypeA, dns.TypeAAAA:
				x.group = groupAddress
			case dns.TypeMX:
				x.group = groupMX
			}
			count[x.group]++
			s.extents = append(s.extents, x)
		}
		if n > 1 {
			s.reorder(body, count)
		}
	}
}

// reorder sorts the records of one section of body by group. s.extents has all of them.
func (s *Answer) reorder(body []byte, count [groups]int) {
	start, end := s.extents[0].start, s.extents[len(s.extents)-1].end
	if cap(s.Packed) < len(body) {
		s.Packed = make([]byte, len(body))
	}
	old := s.Packed[:end-start]
	copy(old, body[start:end])
	// One pass for each group: there are few.
	s.sorted = s.sorted[:0]
	for g := range uint8(groups) {
		if count[g] == 0 {
			continue
		}
		first := len(s.sorted)
		for _, x := range s.extents {
			if x.group == g {
				s.sorted = append(s.sorted, x)
			}
		}
		if g == groupAddress || g == groupMX {
			shuffle(s.sorted[first:])
		}
	}
	at := start
	for _, x := range s.sorted {
		at += copy(body[at:], old[x.start-start:x.end-start])
	}
}

// shuffle puts xs in a random order, with the same probabilities as loadbalance.
func shuffle(xs []extent) {
	for i := range len(xs) - 1 {
		k := i + rand.IntN(len(xs)-i)
		xs[i], xs[k] = xs[k], xs[i]
	}
}
