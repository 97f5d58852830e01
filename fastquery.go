package optcache

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file answers a hit from the bytes of a packet, past the server and the chain: the reply is what
// the chain would have sent for the same query at the same time. Whatever is not plain goes the long
// way, through the server and the chain; see fastpath.go.

// pass is why a packet goes the long way.
type pass uint8

const (
	passNot      pass = iota
	passPacket        // it is no plain query
	passZone          // its zone is not served by the fast path
	passMiss          // there is no answer
	passStale         // the answer has expired
	passPrefetch      // the answer is to be refreshed
	passAnswer        // the answer cannot be sent as it is stored
	passSize          // the reply must be compressed or cut to fit
	passes
)

var passNames = [passes]string{"", "packet", "zone", "miss", "stale", "prefetch", "answer", "size"}

// route says who serves a zone.
type route struct {
	zone   []byte    // lower-cased wire name
	o      *Optcache // nil: the long way
	server *server
	index  int // among the routes
	front  mirror

	report *reportOptions // nil if there is no plugin prometheus
}

// mirror is what the plugins in front do to a hit, for a route.
type mirror struct {
	rotate      bool   // loadbalance round_robin
	space       uint16 // bufsize; 0: none
	options     bool   // replies repeat some of the options that are ignored otherwise
	local       bool   // local has names of its own
	localPrefix bool   // and those that begin with localhost.
}

// fastQuery is one packet on its way through the fast path. It belongs to one worker.
type fastQuery struct {
	query
	s     *scratch
	route *route
	ipv4  bool // the client's address
	reply []byte
	ede   uint16
	size  int // of the request
}

// parse reads a plain query: a header with one question, nothing else but at most one OPT record of
// version 0, and options that a cache may ignore. It returns the qname, which is part of p. The rest is
// left to a server that knows all about it.
func (q *query) parse(p []byte) (name []byte, ok bool) {
	if len(p) < wire.HeaderLen {
		return nil, false
	}
	*q = query{id: binary.BigEndian.Uint16(p), bits: binary.BigEndian.Uint16(p[2:])}
	const opcode = 0xf << 11
	additional := binary.BigEndian.Uint16(p[10:])
	if q.bits&(wire.FlagQR|opcode|wire.FlagTC) != 0 || binary.BigEndian.Uint16(p[4:]) != 1 ||
		binary.BigEndian.Uint32(p[6:]) != 0 || additional > 1 {
		return nil, false
	}
	end := wire.SkipName(p, wire.HeaderLen)
	if end < 0 || len(p) < end+questionTail {
		return nil, false
	}
	q.qtype, q.qclass = binary.BigEndian.Uint16(p[end:]), binary.BigEndian.Uint16(p[end+2:])
	name, p = p[wire.HeaderLen:end], p[end+questionTail:]
	if q.qclass != dns.ClassINET || !fastType(q.qtype) {
		return nil, false
	}
	if additional == 1 {
		if p, ok = q.parseOPT(p); !ok {
			return nil, false
		}
	}
	return name, len(p) == 0
}

// fastType reports whether queries of a type are for the fast path. The others have rules of their own:
// DS is for the parent's zone, and TKEY to ANY are no types of records.
func fastType(qtype uint16) bool {
	meta := dns.TypeTKEY <= qtype && qtype <= dns.TypeANY
	return !meta && qtype != dns.TypeDS && qtype != dns.TypeOPT && qtype != dns.TypeNone
}

// ignored are the EDNS options that a cache may ignore.
var ignored = [...]uint16{dns.EDNS0COOKIE, dns.EDNS0PADDING}

// parseOPT reads an OPT record (RFC 6891 section 6.1.2) and returns what comes behind.
func (q *query) parseOPT(p []byte) (rest []byte, ok bool) {
	if len(p) < wire.OPTLen || p[0] != 0 || binary.BigEndian.Uint16(p[1:]) != dns.TypeOPT {
		return nil, false
	}
	q.edns, q.space = true, binary.BigEndian.Uint16(p[3:])
	q.optFlags = binary.BigEndian.Uint16(p[7:])
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
		if code := binary.BigEndian.Uint16(p); len(p) < n || !slices.Contains(ignored[:], code) {
			return nil, false
		}
		q.options = true
		p = p[n:]
	}
	return rest, true
}

// do reports whether DO is set.
func (q *query) do() bool { return q.edns && q.optFlags&wire.FlagDO != 0 }

// prepare reads a packet and touches the memory where its answer may be, so that it is in the CPU's cache
// when answer needs it.
func (f *fastQuery) prepare(p []byte, routes []route) pass {
	name, ok := f.parse(p)
	if !ok {
		return passPacket
	}
	s := f.s
	f.size = len(p)
	wire.Lower(s.key.bytes[:], name)
	lower := s.key.bytes[:len(name)]
	f.route = nil
	for i := range routes {
		if wire.InZone(lower, routes[i].zone) {
			f.route = &routes[i]
			break
		}
	}
	if f.route == nil || f.route.o == nil {
		return passZone
	}
	o, front := f.route.o, &f.route.front
	if !o.zoneNames.contain(lower) || o.bypass.contain(lower) || front.local && isLocal(lower, front.localPrefix) {
		return passZone
	}
	if front.options && f.options {
		return passPacket
	}
	if front.space > 0 && f.edns {
		f.space = min(f.space, front.space)
	}
	s.key.seal(o.store.seed, len(name), f.qtype, f.qclass, f.do(), f.bits&wire.FlagCD != 0)
	copy(s.out[wire.HeaderLen:], name)
	s.body = wire.HeaderLen + len(name) + questionTail
	o.store.touch(s.key.hash)
	return passNot
}

var (
	localhost  = []byte("\x09localhost\x00")
	localZones = [][]byte{localhost, []byte("\x010\x07in-addr\x04arpa\x00"), []byte("\x03127\x07in-addr\x04arpa\x00"), []byte("\x03255\x07in-addr\x04arpa\x00")}
)

// isLocal reports whether the plugin local, in front, would answer a lower-cased name by itself.
func isLocal(name []byte, prefix bool) bool {
	if prefix && len(name) > len(localhost) && string(name[:len(localhost)-1]) == string(localhost[:len(localhost)-1]) {
		return true
	}
	for _, zone := range localZones {
		if wire.InZone(name, zone) {
			return true
		}
	}
	return false
}

// answer makes the reply to what has been prepared, in f.reply.
func (f *fastQuery) answer(now int64) pass {
	o, s := f.route.o, f.s
	if !o.store.find(s, now) {
		return passMiss
	}
	e := &s.entry
	left := e.remaining(now)
	if left <= 0 {
		return passStale
	}
	if e.flags&(flagCompressed|flagMessage) != 0 {
		return passAnswer
	}
	space := dns.MinMsgSize
	if f.edns {
		space = max(space, int(f.space))
	}
	f.ede = edeNone
	if o.explain && f.edns && e.failure() && s.length(true, edeCachedFailure) <= space {
		f.ede = edeFor(e, false)
	}
	if s.length(f.edns, f.ede) > min(space, plainSize(f.ipv4)) {
		return passSize
	}
	if o.prefetch.amount > 0 && !o.countUnlessDue(s, now) {
		return passPrefetch
	}
	ttl := e.ttl
	if !o.keepTTL {
		ttl = uint32(left)
	}
	ad := e.flags&flagAD != 0 && (f.bits&wire.FlagAD != 0 || f.do())
	o.store.counted(s, true)
	srv := f.route.server
	srv.add(s.stripe, countHit(e.flags.class(), s.tier, wayFast), 1)
	srv.addEvents(s)
	f.reply = s.packet(&f.query, ttl, ad, f.ede)
	if f.route.front.rotate && e.flags&flagRcode == dns.RcodeSuccess {
		s.rotate()
	}
	return passNot
}

// extent is where a record is in a body, and which of loadbalance's groups it belongs to.
type extent struct {
	start, end int
	group      uint8
}

// Groups of records in the order in which loadbalance sorts them. The order is kept within the first
// two.
const (
	groupAlias = iota
	groupRest
	groupAddress
	groupMX
	groups
)

// rotate does to the reply in s.out what the plugin loadbalance does with round_robin: in each section,
// aliases come first, and addresses and mail exchanges last, shuffled.
func (s *scratch) rotate() {
	body := s.out[s.body:][:s.entry.bodyLen]
	at := 0
	for _, n := range s.entry.counts {
		s.extents = s.extents[:0]
		var count [groups]int
		for range n {
			x := extent{start: at, group: groupRest}
			fixed := wire.SkipName(body, at)
			switch binary.BigEndian.Uint16(body[fixed:]) {
			case dns.TypeCNAME:
				x.group = groupAlias
			case dns.TypeA, dns.TypeAAAA:
				x.group = groupAddress
			case dns.TypeMX:
				x.group = groupMX
			}
			count[x.group]++
			const lengthAt, fixedLen = 8, 10 // of RDLENGTH, and of all in front of RDATA
			at = fixed + fixedLen + int(binary.BigEndian.Uint16(body[fixed+lengthAt:]))
			x.end = at
			s.extents = append(s.extents, x)
		}
		if n > 1 {
			s.reorder(body, count)
		}
	}
}

// reorder puts the records of s.extents, which are all of a section of body, in order.
func (s *scratch) reorder(body []byte, count [groups]int) {
	start, end := s.extents[0].start, s.extents[len(s.extents)-1].end
	if cap(s.packed) < len(body) {
		s.packed = make([]byte, len(body))
	}
	old := s.packed[:end-start]
	copy(old, body[start:end])
	// Sort by group, which there are few of.
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

// shuffle draws an order by chance, each as likely as in loadbalance.
func shuffle(xs []extent) {
	for i := range len(xs) - 1 {
		k := i + rand.IntN(len(xs)-i)
		xs[i], xs[k] = xs[k], xs[i]
	}
}
