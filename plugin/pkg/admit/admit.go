// Package admit decides which DNS responses are kept, as what kind, and for how long, and makes records of them.
// It does no I/O and keeps no responses.
package admit

import (
	"math"
	"slices"
	"strings"
	"time"

	"github.com/coredns/coredns/plugin/pkg/dnsutil"
	"github.com/coredns/coredns/plugin/pkg/response"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// Incomplete is the kind of a NOERROR response whose CNAME chain ends before the type that was asked for, is broken,
// or begins at another name, and that has no SOA which would make it NODATA.
const Incomplete = response.OtherError + 1

// Classify returns what kind of response m is. It differs from CoreDNS's response.Typify in this:
//
//   - NOERROR that neither answers nor denies is a Delegation, whether or not it names servers.
//   - A CNAME chain that ends before the type that was asked for is NODATA with an SOA (RFC 2308 section 2.2), and
//     Incomplete without one. NXDOMAIN behind a chain is NXDOMAIN (section 2.1, RFC 6604).
//   - Times of signatures are serial numbers (RFC 4034 section 3.1.5).
//
// A response with DO whose signatures are not all valid at now is an OtherError.
func Classify(m *dns.Msg, now time.Time) response.Type {
	kind, _ := classify(m, now)
	return kind
}

// Judge returns what kind of response m is, as Classify does, and the rule by which it is not kept: Keeps if it may be kept.
func Judge(m *dns.Msg, now time.Time) (response.Type, Rule) {
	kind, rule := classify(m, now)
	return kind, refused(m, kind, rule)
}

// classify is Classify. Of a kind that is never kept, it says by which rule m is of that kind.
func classify(m *dns.Msg, now time.Time) (response.Type, Rule) {
	switch {
	case m.Opcode == dns.OpcodeUpdate:
		return response.Update, NoQuery
	case m.Opcode == dns.OpcodeNotify, len(m.Question) > 0 && IsTransfer(m.Question[0].Qtype):
		return response.Meta, NoQuery
	}
	if opt := m.IsEdns0(); opt != nil && opt.Do() {
		if SignedFor(m, now) < 0 {
			return response.OtherError, BadSignature
		}
	}
	switch m.Rcode {
	case dns.RcodeServerFailure, dns.RcodeNotImplemented:
		return response.ServerError, Keeps
	case dns.RcodeNameError:
		if len(m.Answer) == 0 || aliased(m) {
			return response.NameError, Keeps
		}
		return response.OtherError, DenialWithAnswer
	case dns.RcodeSuccess:
		switch {
		case len(m.Answer) > 0 && !broken(m):
			return response.NoError, Keeps
		case soa(m) != nil:
			return response.NoData, Keeps
		case len(m.Answer) > 0:
			return Incomplete, IncompleteChain
		case len(m.Ns) == 0 && hasRecords(m.Extra):
			return response.NoError, Keeps // some plugins, such as whoami, answer in the additional section
		}
		return response.Delegation, Keeps
	}
	return response.OtherError, OtherRcode
}

// IsTransfer reports whether qtype asks for a zone transfer.
func IsTransfer(qtype uint16) bool { return qtype == dns.TypeAXFR || qtype == dns.TypeIXFR }

// hasRecords reports whether an additional section has records beside those that belong to the message: OPT, TSIG and
// SIG(0).
func hasRecords(extra []dns.RR) bool {
	return slices.ContainsFunc(extra, func(rr dns.RR) bool {
		t := rr.Header().Rrtype
		return t != dns.TypeOPT && t != dns.TypeTSIG && t != dns.TypeSIG
	})
}

// Void reports whether a response of that kind neither answers its question nor denies that there is an answer. It
// may be kept for a few seconds, but never hides a response that answers or denies.
func Void(kind response.Type) bool {
	return kind == response.ServerError || kind == response.Delegation
}

// Decisive reports whether m, a response of that kind, answers its question or denies with authority that there is an
// answer. It ends what was known before (RFC 8767 section 4), even if m itself cannot be kept. An Incomplete chain is
// decisive only from an authoritative server: that one does not follow the chain into other zones.
func Decisive(m *dns.Msg, kind response.Type) bool {
	switch kind {
	case response.NoError, response.NoData, response.NameError:
		return !m.Truncated
	case Incomplete:
		return !m.Truncated && m.Authoritative && aliased(m)
	}
	return false
}

// aliased reports whether the answer section of m is a sound CNAME chain that leads from the qname to another name,
// which has no record of the qtype.
func aliased(m *dns.Msg) bool {
	if len(m.Question) == 0 || m.Question[0].Qtype == dns.TypeCNAME || m.Question[0].Qtype == dns.TypeANY {
		return false
	}
	q := m.Question[0]
	end, ok := chainEnd(m.Answer, q)
	return ok && !strings.EqualFold(end, q.Name) && !owns(m.Answer, end, q)
}

// SignedFor returns for how many seconds from now all signatures in m are valid. It is negative if one has expired or
// is not valid yet, and record.Unsigned if there are none. The times of signatures are serial numbers, within 68
// years of now (RFC 4034 section 3.1.5).
func SignedFor(m *dns.Msg, now time.Time) int64 {
	left := int64(record.Unsigned)
	at := uint32(now.Unix())
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			sig, ok := rr.(*dns.RRSIG)
			if !ok {
				continue
			}
			if int32(at-sig.Inception) < 0 {
				return -1
			}
			left = min(left, int64(int32(sig.Expiration-at)))
		}
	}
	return left
}

// Keepable reports whether m, a response of that kind, may be kept.
func Keepable(m *dns.Msg, kind response.Type) bool { return refused(m, kind, OtherRcode) == Keeps }

// Keepable reports whether m, a response of that kind, may be kept by these rules.
func (r *Rules) Keepable(m *dns.Msg, kind response.Type) bool {
	return r.allows(refused(m, kind, OtherRcode)) == Keeps
}

// Judge returns what kind of response m is, as Classify does, and the rule by which these rules do not keep it: Keeps if they do.
func (r *Rules) Judge(m *dns.Msg, now time.Time) (response.Type, Rule) {
	kind, rule := Judge(m, now)
	return kind, r.allows(rule)
}

// allows returns Keeps if these rules keep what the rule would not, and else the rule.
func (r *Rules) allows(rule Rule) Rule {
	if rule == DenialWithoutSOA && r.DenialWithoutSOA > 0 {
		return Keeps
	}
	return rule
}

// silent reports whether m, a response of that kind, denies that there is an answer, and does not say for how long: NXDOMAIN
// without SOA, and NOERROR with neither answers nor servers (RFC 2308 sections 2.1.1 and 2.2, type 3).
func silent(m *dns.Msg, kind response.Type) bool {
	return kind == response.NameError && soa(m) == nil || kind == response.Delegation && len(m.Answer) == 0 && len(m.Ns) == 0
}

// refused returns the rule by which m, a response of that kind, is not kept, or Keeps. never is the rule for a kind that is never
// kept.
func refused(m *dns.Msg, kind response.Type, never Rule) Rule {
	switch {
	case m.Truncated:
		return Truncated
	case len(m.Question) == 0:
		return NoQuestion
	}
	switch kind {
	case response.OtherError, response.Meta, response.Update, Incomplete:
		return never
	case response.NameError:
		// Without an SOA there is no TTL for a denial (RFC 2308 section 5).
		if soa(m) == nil {
			return DenialWithoutSOA
		}
	}
	return Keeps
}

// ClassOf returns the class that a response of that kind is kept in.
func ClassOf(kind response.Type) record.Class {
	switch kind {
	case response.NameError, response.NoData, response.ServerError:
		return record.Denial
	}
	return record.Success
}

// Rules say which responses are kept, and for how long. They must not change once they are in use.
type Rules struct {
	Zones          zones.Set
	Bypass         zones.Set // zones for which every query goes to the next plugin
	Except         [record.Classes]zones.Set
	MaxTTL, MinTTL [record.Classes]time.Duration
	Servfail       time.Duration // the TTL of failures; 0: none is kept
	// The TTL of denials without an SOA, up to that of denials; 0: NXDOMAIN is not kept then.
	DenialWithoutSOA time.Duration
	TTLs             []TTLs   // for some zones and types, instead of MaxTTL and MinTTL
	StaleFor         []Switch // which answers may be served when they have expired; all that none is for
	PrefetchFor      []Switch // which answers may be refreshed before they expire; likewise
	Subnets          bool     // answers that are for a prefix are kept for it
	SubnetsForAll    bool     // answers that are for a prefix are kept for all
	PreferPositive   bool     // positive answers get FlagAnswers, and are preferred to denials
}

// Serves reports whether the cache may answer queries for name, a lower-cased wire name.
func (r *Rules) Serves(name []byte) bool { return r.Zones.Contains(name) && !r.Bypass.Contains(name) }

// Excepts reports whether answers of a class are not kept for name, a lower-cased wire name.
func (r *Rules) Excepts(c record.Class, name []byte) bool { return r.Except[c].Contains(name) }

// TTL returns for how long m, a response of that kind, is kept. It is the smallest TTL of the records, within MinTTL
// and MaxTTL of the class.
func (r *Rules) TTL(m *dns.Msg, kind response.Type) time.Duration { return r.Lifetime(m, kind).TTL }

// Lifetime returns for how long m, a response of that kind, is kept, and what decides that.
func (r *Rules) Lifetime(m *dns.Msg, kind response.Type) Lifetime {
	if kind == response.ServerError {
		return Lifetime{TTL: r.Servfail, By: ByServfail}
	}
	if r.DenialWithoutSOA > 0 && silent(m, kind) {
		_, most, _ := r.boundsOf(record.Denial, m)
		return Lifetime{TTL: min(r.DenialWithoutSOA, most), By: ByOption}
	}
	c := ClassOf(kind)
	least, most, own := r.boundsOf(c, m)
	byMin, byMax := ByMin, ByMax
	if own {
		byMin, byMax = ByOwnMin, ByOwnMax
	}
	if kind == response.Delegation || kind == Incomplete {
		least = min(least, dnsutil.MinimalDefaultTTL) // the option MINTTL is meant for answers
	}
	l := ownTTL(m, kind)
	if l.TTL = l.Own; l.TTL < least {
		l.TTL, l.By = least, byMin
	}
	if l.TTL > most {
		l.TTL, l.By = most, byMax
	}
	return l
}

// flags returns the flags of the record of a response of that kind.
func (r *Rules) flags(res *dns.Msg, kind response.Type) record.Flags {
	f := record.Flags(res.Rcode) & record.FlagRcode
	for _, set := range []struct {
		flag record.Flags
		on   bool
	}{
		{record.FlagVoid, Void(kind)},
		{record.FlagAnswers, r.PreferPositive && Answers(res, kind)}, // preferred to records without the flag
		{record.FlagAA, res.Authoritative},
		{record.FlagRA, res.RecursionAvailable},
		{record.FlagAD, res.AuthenticatedData},
		{record.FlagDenial, ClassOf(kind) == record.Denial},
		{record.FlagMessage, res.IsTsig() != nil}, // the server signs each message on its own
	} {
		if set.on {
			f |= set.flag
		}
	}
	return f
}

// Record makes the record of res, a response of that kind without OPT, all of whose TTLs are ttl, in seconds. stored
// is when the response came, in ns on the store's clock. Its signatures are valid for signed seconds from then on.
// Record returns the record's header and its body. The body and the offsets of its TTLs are part of b. ok is false if
// the record is too large; the header is valid all the same.
func (r *Rules) Record(b *record.Buffer, res *dns.Msg, kind response.Type, stored int64, ttl uint32, signed int64) (e record.Entry, body []byte, ok bool) {
	e = record.Entry{Stored: stored, TTL: ttl, Flags: r.flags(res, kind)}
	r.keepStale(&e, &b.Key)
	e.Sign(signed)
	body, ok = Pack(b, res, &e)
	return e, body, ok
}

// keepStale says in e, the header of a record of k, whether it is served when it has expired. If not, a denial is as good.
func (r *Rules) keepStale(e *record.Entry, k *record.Key) {
	if e.Flags &^= record.FlagNoStale; !r.ServesStale(k) {
		e.Flags = e.Flags&^record.FlagAnswers | record.FlagNoStale
	}
}

// Again applies these rules to e, the header of a record with the key k that other rules have admitted. It returns
// false if these rules would not keep the record.
func (r *Rules) Again(e *record.Entry, k *record.Key) bool {
	c := e.Flags.Class()
	if !r.Zones.Contains(k.Name()) || r.Excepts(c, k.Name()) || !r.Subnets && k.Subnet().Is() || !r.SubnetsForAll && e.Flags&record.FlagOneSubnet != 0 {
		return false
	}
	_, most, _ := r.bounds(c, k.Name(), k.Qtype())
	if c == record.Denial && e.Flags&record.FlagVoid != 0 {
		most = r.Servfail
	}
	if e.Counts[1] == 0 && e.Flags&record.FlagRcode == record.NameError || e.Counts == [3]uint16{} && e.Flags&(record.FlagRcode|record.FlagVoid) == record.FlagVoid {
		without := r.DenialWithoutSOA // e is silent, as far as its header says it
		if without == 0 && c == record.Success {
			without = dnsutil.MinimalDefaultTTL
		}
		most = min(most, without)
	}
	e.TTL = uint32(min(int64(e.TTL), int64(most/time.Second)))
	e.Flags &^= record.FlagAnswers
	if r.PreferPositive && c == record.Success && e.Counts[0] > 0 {
		e.Flags |= record.FlagAnswers // a success with records in the answer section is NoError: Keepable refuses Incomplete
	}
	r.keepStale(e, k)
	return e.TTL > 0
}

// SmallestTTL returns the lowest TTL of the records of m, and at most most. In an SOA that denies, MINIMUM counts as
// well (RFC 2308 section 5). Kinds that have no TTL of their own, and responses without records, get
// dnsutil.MinimalDefaultTTL.
func SmallestTTL(m *dns.Msg, kind response.Type, most time.Duration) time.Duration {
	l := ownTTL(m, kind)
	if l.By == ByDefault {
		return l.Own
	}
	return min(l.Own, most)
}

// ownTTL returns the TTL that m, a response of that kind, has by itself, and what it is from.
func ownTTL(m *dns.Msg, kind response.Type) Lifetime {
	negative := kind == response.NameError || kind == response.NoData
	none := Lifetime{Own: dnsutil.MinimalDefaultTTL, By: ByDefault}
	if kind != response.NoError && kind != Incomplete && !negative {
		return none
	}
	least, by, records := uint32(math.MaxUint32), ByRecords, 0
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype == dns.TypeOPT {
				continue // OPT has flags in the place of a TTL (RFC 6891 section 6.1.3)
			}
			records++
			if ttl := EffectiveTTL(rr.Header().Ttl); ttl < least {
				least, by = ttl, ByRecords
			}
			if soa, ok := rr.(*dns.SOA); ok && negative {
				if ttl := EffectiveTTL(soa.Minttl); ttl < least {
					least, by = ttl, ByMinimum
				}
			}
		}
	}
	if records == 0 {
		return none
	}
	return Lifetime{Own: time.Duration(least) * time.Second, By: by}
}

// EffectiveTTL returns ttl as a reader must take it: a TTL with the top bit set is zero (RFC 2181 section 8).
func EffectiveTTL(ttl uint32) uint32 {
	if ttl > 1<<31-1 {
		return 0
	}
	return ttl
}

// soa returns the SOA record of the authority section, or nil.
func soa(m *dns.Msg) dns.RR {
	for _, rr := range m.Ns {
		if rr.Header().Rrtype == dns.TypeSOA {
			return rr
		}
	}
	return nil
}

// broken reports whether the answer section of m has records that do not answer the question: the CNAME chain ends
// early, forks, runs in a circle, or begins at another name.
func broken(m *dns.Msg) bool {
	if len(m.Question) == 0 || len(m.Answer) == 0 {
		return len(m.Answer) > 0
	}
	q := m.Question[0]
	if q.Qtype == dns.TypeANY {
		return !owns(m.Answer, q.Name, q)
	}
	end, ok := chainEnd(m.Answer, q)
	return !ok || q.Qtype != dns.TypeCNAME && !owns(m.Answer, end, q)
}

// Answers reports whether m, a response of that kind, is not truncated and has an answer to its question in the
// answer section.
func Answers(m *dns.Msg, kind response.Type) bool {
	return kind == response.NoError && !m.Truncated && len(m.Question) > 0 && len(m.Answer) > 0
}

// Conclusive reports whether a response of that kind answers its question or denies that there is an answer. A server
// may give another response, such as a referral, to a query with RD=0, and an answer to the same query with RD=1.
func Conclusive(m *dns.Msg, kind response.Type) bool {
	return kind == response.NameError || kind == response.NoData || Answers(m, kind)
}

// owns reports whether name has a record of the type and class of q.
func owns(rrs []dns.RR, name string, q dns.Question) bool {
	for _, rr := range rrs {
		h := rr.Header()
		if (q.Qtype == dns.TypeANY || h.Rrtype == q.Qtype) && inClass(h, q) && strings.EqualFold(h.Name, name) {
			return true
		}
	}
	return false
}

func inClass(h *dns.RR_Header, q dns.Question) bool {
	return q.Qclass == dns.ClassANY || h.Class == q.Qclass
}

// chainEnd follows the CNAME chain from the qname, and returns the name that should have the answer. For the qtype
// CNAME it does not follow the chain, and ok says whether the qname has a CNAME. ok is false if a name has two
// targets (RFC 2181 section 10.1), or if the chain is a circle.
func chainEnd(rrs []dns.RR, q dns.Question) (name string, ok bool) {
	type alias struct {
		target string
		fork   bool
	}
	var aliases map[string]alias // by owner name in lower case; a map, because a message can have thousands
	for _, rr := range rrs {
		c, ok := rr.(*dns.CNAME)
		if !ok || !inClass(c.Header(), q) {
			continue
		}
		if aliases == nil {
			aliases = make(map[string]alias)
		}
		owner := strings.ToLower(c.Hdr.Name)
		a, known := aliases[owner]
		if !known {
			a.target = c.Target
		}
		a.fork = a.fork || !strings.EqualFold(a.target, c.Target)
		aliases[owner] = a
	}
	if aliases == nil {
		return q.Name, q.Qtype != dns.TypeCNAME
	}
	name = q.Name
	for range len(aliases) + 1 {
		a, more := aliases[strings.ToLower(name)]
		switch {
		case a.fork:
			return name, false
		case q.Qtype == dns.TypeCNAME:
			return name, more
		case !more:
			return name, true
		}
		name = a.target
	}
	return name, false // more steps than aliases: the chain is a circle
}

// Settle removes OPT, which is for one hop only (RFC 6891 section 6.2.1), and sets the TTL of all other records, in
// seconds. It changes rrs and its records in place.
func Settle(rrs []dns.RR, ttl uint32) []dns.RR {
	kept := rrs[:0]
	for _, rr := range rrs {
		if rr.Header().Rrtype != dns.TypeOPT {
			rr.Header().Ttl = ttl
			kept = append(kept, rr)
		}
	}
	return kept
}

// Pack puts the sections of a response in wire format without compression, and with compression if they are too long
// otherwise. s.Key must be the key of the response. Pack sets in e how many records each section has, and in s.TTLAt
// the offsets of their TTLs, except with compression. The body is part of s, up to the next call. ok is false if the
// response is too large or cannot be packed.
func Pack(s *record.Buffer, res *dns.Msg, e *record.Entry) (body []byte, ok bool) {
	if max(len(res.Answer), len(res.Ns), len(res.Extra)) > record.MaxSection {
		return nil, false
	}
	e.Counts = [3]uint16{uint16(len(res.Answer)), uint16(len(res.Ns)), uint16(len(res.Extra))}
	s.TTLAt = s.TTLAt[:0]
	defer func(compress bool, q []dns.Question) { res.Compress, res.Question = compress, q }(res.Compress, res.Question)
	res.Compress = false
	length := res.Len()
	for _, res.Compress = range []bool{false, true} {
		if res.Compress {
			res.Question = nil // no pointer of the body may point into the question
		} else if length > record.MaxMessage {
			continue // without compression, 64 KiB of names may become megabytes
		}
		b, err := res.PackBuffer(s.Packed[:cap(s.Packed)])
		if err != nil {
			return nil, false
		}
		if cap(b) > cap(s.Packed) {
			s.Packed = b
		}
		if len(b) > record.MaxMessage {
			continue
		}
		if res.Compress {
			e.Flags |= record.FlagCompressed
			return b[wire.HeaderLen:], true
		}
		off := wire.SkipName(b, wire.HeaderLen)
		if off < 0 {
			return nil, false
		}
		body = b[off+wire.QuestionTail:]
		// CoreDNS compares Msg.Len with the client's buffer. Msg.Len is too high for some records, and the reply must
		// be cut alike.
		if excess := length - len(b); 0 <= excess && excess <= math.MaxUint16 {
			e.Link = record.MakeLink(0, 0, excess)
		} else {
			e.Flags |= record.FlagMessage
		}
		// A query in lower case then gets the body as it is.
		wire.RespellOwners(body, e.Records(), s.Key.Name())
		s.TTLAt, ok = wire.TTLOffsets(s.TTLAt, body, e.Records())
		return body, ok
	}
	return nil, false
}
