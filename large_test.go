package optcache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
)

// These tests are about large answers. An answer that is asked for once must not displace answers that are asked for all
// the time, however large it is. A large answer that is asked for all the time must stay.

// sizedUpstream answers names that begin with flood with size bytes, or with NODATA if size is 0. It answers other names
// with an address, and counts the requests for them.
type sizedUpstream struct {
	size int
	data string
	asks int
}

func newSizedUpstream(size int) *sizedUpstream {
	return &sizedUpstream{size: size, data: strings.Repeat("c0", max(size-100, 0))}
}

func (*sizedUpstream) Name() string { return "sized" }

func (u *sizedUpstream) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	q := r.Question[0]
	m := new(dns.Msg).SetReply(r)
	hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: q.Qclass, Ttl: 3600}
	switch {
	case !strings.HasPrefix(q.Name, "flood"):
		u.asks++
		m.Answer = []dns.RR{&dns.A{Hdr: hdr, A: net.IPv4(192, 0, 2, 1)}}
	case u.size == 0:
		m.Ns = []dns.RR{soaTemplate}
	default:
		hdr.Rrtype = 65280
		m.Answer = []dns.RR{&dns.RFC3597{Hdr: hdr, Rdata: u.data}}
	}
	return dns.RcodeSuccess, w.WriteMsg(m)
}

// floodMisses returns how many per cent of the requests for popular names miss during a flood. In the flood there are as
// many requests for other names, each asked for once, with answers of up.size bytes.
func floodMisses(tb testing.TB, h plugin.Handler, up *sizedUpstream, popular, requests int) float64 {
	ctx := serverContext(tb)
	w := &wireWriter{addr: tcp4Client}
	put := func(name string, qtype uint16) {
		h.ServeDNS(ctx, w, asking(name, qtype))
		w.packets = w.packets[:0]
	}
	rng := rand.New(rand.NewPCG(14, 0))
	name := func() string { return fmt.Sprintf("host-%d.example.org.", rng.IntN(popular)) }
	for range 10 * popular {
		put(name(), dns.TypeA)
	}
	before := up.asks
	qtype := uint16(65280)
	if up.size == 0 {
		qtype = dns.TypeA
	}
	for i := range requests {
		put(name(), dns.TypeA)
		put(fmt.Sprintf("flood-%d.example.net.", i), qtype)
	}
	return 100 * float64(up.asks-before) / float64(requests)
}

// largeOptions returns options with room for 10,000 answers of each class. With byMemory, memory is the limit: there is
// room for the popular answers and a few others.
func largeOptions(byMemory bool) options {
	o := sizedOptions(10_000)
	if byMemory {
		o.maxMemory = 8 << 20
	}
	return o
}

const largePopular = 4000

func TestLargeAnswersDoNotEmptyTheCache(t *testing.T) {
	for _, byMemory := range []bool{false, true} {
		for _, size := range []int{0, 1 << 10, 4 << 10, 16 << 10, 40 << 10, 60 << 10} {
			t.Run(fmt.Sprintf("%d bytes, bound by memory %v", size, byMemory), func(t *testing.T) {
				t.Parallel()
				up := newSizedUpstream(size)
				h := startNamed(t, t.Name(), largeOptions(byMemory), up)
				requests := 20_000
				if raceEnabled {
					requests = 2_000
				}
				if misses := floodMisses(t, h, up, largePopular, requests); misses > 2 {
					t.Errorf("%.1f %% of the requests for popular names miss", misses)
				}
			})
		}
	}
}

// A large answer that is asked for as often as other answers is admitted, and stays through a flood of large answers.
func TestPopularLargeAnswersStay(t *testing.T) {
	for _, byMemory := range []bool{false, true} {
		t.Run(fmt.Sprintf("bound by memory %v", byMemory), func(t *testing.T) {
			t.Parallel()
			up := newSizedUpstream(30 << 10)
			asks := 0
			count := plugin.HandlerFunc(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				if strings.HasPrefix(r.Question[0].Name, "flood-large") {
					asks++
				}
				return up.ServeDNS(ctx, w, r)
			})
			h := startNamed(t, t.Name(), largeOptions(byMemory), count)
			ctx := serverContext(t)
			w := &wireWriter{addr: tcp4Client}
			const large, rounds = 10, 300
			for i := range rounds {
				for k := range large {
					h.ServeDNS(ctx, w, asking(fmt.Sprintf("flood-large-%d.example.org.", k), 65280))
				}
				for k := range 20 {
					h.ServeDNS(ctx, w, asking(fmt.Sprintf("flood-%d-%d.example.org.", i, k), 65280))
					h.ServeDNS(ctx, w, asking(fmt.Sprintf("host-%d.example.org.", (20*i+k)%2000), dns.TypeA))
				}
				w.packets = w.packets[:0]
			}
			if most := large * rounds / 10; asks > most {
				t.Errorf("%d of %d requests for large popular answers miss", asks, large*rounds)
			}
		})
	}
}

// BenchmarkLargeFlood prints how many per cent of the requests for popular names miss.
func BenchmarkLargeFlood(b *testing.B) {
	for _, kind := range []string{"entries", "memory", "cache"} {
		for _, size := range []int{0, 1, 4, 16, 40, 60} {
			b.Run(fmt.Sprintf("%s/%dKB", kind, size), func(b *testing.B) {
				for range b.N {
					up := newSizedUpstream(size << 10)
					var h plugin.Handler
					if kind == "cache" {
						h = stockCache(b, up, "success 10000", "denial 10000")
					} else {
						h = startNamed(b, b.Name(), largeOptions(kind == "memory"), up)
					}
					b.ReportMetric(floodMisses(b, h, up, largePopular, 20_000), "%misses")
				}
			})
		}
	}
}

// A large answer that has expired keeps no other answer out, however often it was asked for.
func TestDeadLargeAnswersMakeRoom(t *testing.T) {
	t.Parallel()
	o := largeOptions(true)
	o.success.capacity, o.maxMemory = 1024, 2<<20
	up := newSizedUpstream(16 << 10)
	h := startNamed(t, t.Name(), o, up)
	clock := clocked(h)
	ctx := serverContext(t)
	w := &wireWriter{addr: tcp4Client}
	for round := range 20 {
		for range 12 {
			for k := range 8 {
				h.ServeDNS(ctx, w, asking(fmt.Sprintf("flood-%d-%d.example.org.", round, k), 65280))
			}
		}
		w.packets = w.packets[:0]
		clock.advance(2 * time.Hour) // all entries are dead
		before := count(h, countMiss)
		for range 2 {
			h.ServeDNS(ctx, w, asking(fmt.Sprintf("flood-once-%d.example.org.", round), 65280))
		}
		if n := count(h, countMiss) - before; n != 1 {
			t.Fatalf("round %d: a large answer was not kept although all others were dead", round)
		}
	}
}
