package optcache

import (
	"context"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// BenchmarkLines is what cache_line_optimization costs in memory and buys in time: a million answers
// of the kinds that a resolver gets, all in the arena, none in the hot tier, each asked for until
// its counter is saturated, then asked for by chance. B/record is the memory of a record, B/entry all
// memory in use for each entry, ns/hit is from the handler's call to the packed reply: the fastest
// of short rounds, in which both take turns, for the machine may have other guests.
func BenchmarkLines(b *testing.B) {
	const round = 1 << 14
	variants := []struct {
		name    string
		aligned bool
		h       *Optcache
		ask     func(i int)
		fastest float64
	}{{name: "true", aligned: true}, {name: "false"}}
	for i := range variants {
		v := &variants[i]
		o := benchOptions(million)
		o.denial.capacity = million / 2 // with a reserve, so that nothing is evicted
		o.hotPercentage, o.lineAligned = 0, v.aligned
		v.h = newStarted(b, o, mixedUpstream{})
		ctx, w := serverContext(b), newUDPWriter()
		// One message, whose question changes: a million would be other memory to wait for.
		var q mixedQuestion
		r := question(".")
		sw := request.NewScrubWriter(r, w)
		v.ask = func(i int) {
			r.Question[0].Name, r.Question[0].Qtype = q.number(i)
			v.h.ServeDNS(ctx, sw, r)
		}
		for range 5 {
			for i := range million {
				v.ask(i)
			}
		}
		v.fastest = math.Inf(1)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		for i := range variants {
			v := &variants[i]
			start := time.Now()
			for range round {
				v.ask(rng.IntN(million))
			}
			v.fastest = min(v.fastest, float64(time.Since(start))/round)
		}
	}
	b.ReportMetric(0, "ns/op") // of a round of both: says nothing
	for _, v := range variants {
		st := v.h.store
		held := st.len(record.Success) + st.len(record.Denial)
		if held < million*98/100 {
			b.Fatalf("only %d answers are cached", held)
		}
		b.ReportMetric(float64(st.recordBytes())/float64(held), "B/record-"+v.name)
		b.ReportMetric(float64(st.usage().used)/float64(held), "B/entry-"+v.name)
		b.ReportMetric(v.fastest, "ns/hit-"+v.name)
	}
}

// mixedQuestion makes the questions that mixedUpstream answers. The names are 12 to 40 characters long.
type mixedQuestion struct{ buf []byte }

// number returns question i. The name is valid until the next call.
func (q *mixedQuestion) number(i int) (name string, qtype uint16) {
	hash := uint32(i) * 2654435761
	q.buf = append(q.buf[:0], "abcdefghijklmnopqrstuvwx"[:1+hash>>8%24]...)
	q.buf = append(q.buf, '-')
	q.buf = strconv.AppendInt(q.buf, int64(i), 10)
	q.buf = append(q.buf, ".example."...)
	qtype = dns.TypeA
	if hash>>16%4 == 0 {
		qtype = dns.TypeAAAA
	}
	return unsafe.String(unsafe.SliceData(q.buf), len(q.buf)), qtype
}

// mixedUpstream answers as authorities do, by the name: of a hundred answers 45 have one address,
// 20 two to six, 20 a CNAME chain before one or two, and 15 are denials.
type mixedUpstream struct{}

func (mixedUpstream) Name() string { return "mixed" }

func (mixedUpstream) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	m := new(dns.Msg)
	m.SetReply(r)
	// The name is the caller's, who changes it.
	owner := strings.Clone(r.Question[0].Name)
	m.Question[0].Name = owner
	header := func(rrtype uint16) dns.RR_Header {
		return dns.RR_Header{Name: owner, Rrtype: rrtype, Class: dns.ClassINET, Ttl: 3600}
	}
	seed := fnv.New64a() // the same on every run
	seed.Write([]byte(owner))
	rng := rand.New(rand.NewPCG(3, seed.Sum64()))
	addresses := 1
	switch kind := rng.IntN(100); {
	case kind < 45:
	case kind < 65:
		addresses = 2 + rng.IntN(5)
	case kind < 85:
		addresses = 1 + rng.IntN(2)
		for range 1 + rng.IntN(2) {
			target := fmt.Sprintf("edge-%d.cdn.example.", rng.Uint32())
			m.Answer = append(m.Answer, &dns.CNAME{Hdr: header(dns.TypeCNAME), Target: target})
			owner = target
		}
	default:
		if kind < 92 {
			m.Rcode = dns.RcodeNameError
		}
		owner = "example."
		m.Ns = []dns.RR{&dns.SOA{Hdr: header(dns.TypeSOA), Ns: "ns1.example.", Mbox: "hostmaster.example.",
			Serial: 1, Refresh: 7200, Retry: 3600, Expire: 1209600, Minttl: 3600}}
		return m.Rcode, w.WriteMsg(m)
	}
	for range addresses {
		if r.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{Hdr: header(dns.TypeA), A: net.IPv4(192, 0, 2, byte(rng.Uint32()))})
		} else {
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header(dns.TypeAAAA), AAAA: net.ParseIP("2001:db8::1")})
		}
	}
	return dns.RcodeSuccess, w.WriteMsg(m)
}
