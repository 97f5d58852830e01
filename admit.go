package optcache

import (
	"strings"
	"time"

	"github.com/coredns/coredns/plugin/pkg/dnsutil"
	"github.com/coredns/coredns/plugin/pkg/response"

	"github.com/miekg/dns"
)

// This file says which responses are kept, as what, and for how long.

// classify returns what kind of response m is. It is CoreDNS's view, but for a CNAME chain
// that ends before the type asked for: with an SOA, that is NODATA (RFC 2308 section 2.2).
func classify(m *dns.Msg, now time.Time) response.Type {
	kind, _ := response.Typify(m, now)
	if kind == response.NoError && broken(m) && soa(m) != nil {
		return response.NoData
	}
	return kind
}

// keepable reports whether a response of that kind may be kept.
func keepable(m *dns.Msg, kind response.Type) bool {
	if m.Truncated || len(m.Question) == 0 {
		return false
	}
	switch kind {
	case response.OtherError, response.Meta, response.Update:
		return false
	case response.NameError:
		// Without SOA nothing says for how long (RFC 2308 section 5).
		return soa(m) != nil
	case response.NoError:
		// NODATA in all but name, and without SOA. An answer without any records is different:
		// it may say what it has to say in the additional section, as whoami does.
		return !broken(m)
	}
	return true
}

// classOf returns the class that a response of that kind is kept in.
func classOf(kind response.Type) class {
	switch kind {
	case response.NameError, response.NoData, response.ServerError:
		return denial
	}
	return success
}

// ttl returns for how long a response of that kind is valid, and may be kept.
func (o *Optcache) ttl(m *dns.Msg, kind response.Type) time.Duration {
	limits := &o.success
	switch kind {
	case response.ServerError:
		return o.servfail
	case response.NameError, response.NoData:
		limits = &o.denial
	}
	return min(max(smallestTTL(m, kind, limits.maxTTL), limits.minTTL), limits.maxTTL)
}

// smallestTTL returns the lowest TTL of the records of m, most at the most. Of an SOA that
// denies, MINIMUM counts as well (RFC 2308 section 5). For kinds that have no TTL of their own
// and for responses without records it is CoreDNS's minimum.
func smallestTTL(m *dns.Msg, kind response.Type, most time.Duration) time.Duration {
	negative := kind == response.NameError || kind == response.NoData
	if kind != response.NoError && !negative {
		return dnsutil.MinimalDefaultTTL
	}
	least, records := uint32(most/time.Second), 0
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype == dns.TypeOPT {
				continue // its TTL field is something else
			}
			records++
			least = min(least, effectiveTTL(rr.Header().Ttl))
			if soa, ok := rr.(*dns.SOA); ok && negative {
				least = min(least, effectiveTTL(soa.Minttl))
			}
		}
	}
	if records == 0 {
		return dnsutil.MinimalDefaultTTL
	}
	return time.Duration(least) * time.Second
}

// effectiveTTL is a TTL as it counts: one with the top bit set is zero (RFC 2181 section 8).
func effectiveTTL(ttl uint32) uint32 {
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

// broken reports whether m has records in the answer section that do not answer its question:
// a CNAME chain that ends early, forks, runs in a circle or begins elsewhere.
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

// answersQuestion reports whether m says what was asked for: it has records in the answer section,
// and they lead to such a one.
func answersQuestion(m *dns.Msg) bool {
	return m.Rcode == dns.RcodeSuccess && len(m.Question) > 0 && len(m.Answer) > 0 && !broken(m)
}

// answers reports whether a response of that kind is a whole, positive answer.
func answers(m *dns.Msg, kind response.Type) bool {
	return !m.Truncated && kind == response.NoError && answersQuestion(m)
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

// chainEnd follows the CNAME chain from the question's name to the name that should have the
// answer. A question for a CNAME is not followed: ok then says that it has one. ok is false
// when a name has two targets (RFC 2181 section 10.1) or the chain comes back to itself.
func chainEnd(rrs []dns.RR, q dns.Question) (name string, ok bool) {
	type alias struct {
		target string
		fork   bool
	}
	var aliases map[string]alias // by owner in lower case; a map, for a message holds thousands
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
	return name, false // more steps than aliases: a circle
}
