package optcache

import (
	"context"
	"fmt"
	"io"
	golog "log"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"testing"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// packWriter is the end of a chain: it packs messages, as the server does, and sends nothing.
type packWriter struct {
	addr net.Addr
	last []byte
}

func (w *packWriter) LocalAddr() net.Addr         { return w.addr }
func (w *packWriter) RemoteAddr() net.Addr        { return w.addr }
func (w *packWriter) Write(b []byte) (int, error) { w.last = b; return len(b), nil }
func (w *packWriter) Close() error                { return nil }
func (w *packWriter) TsigStatus() error           { return nil }
func (w *packWriter) TsigTimersOnly(bool)         {}
func (w *packWriter) Hijack()                     {}
func (w *packWriter) WriteMsg(m *dns.Msg) error {
	b, err := m.Pack()
	w.last = b
	return err
}

// newUDPWriter returns a writer that shares no line with another: each reply writes to it.
func newUDPWriter() *packWriter {
	padded := new(struct {
		_ [2 * record.LineBytes]byte
		packWriter
		_ [2 * record.LineBytes]byte
	})
	padded.addr = &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 40212}
	return &padded.packWriter
}

// addressUpstream answers every question with one address.
var addressUpstream = plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	m := new(dns.Msg)
	m.SetReply(r)
	m.Answer = []dns.RR{&dns.A{
		Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600},
		A:   net.IPv4(192, 0, 2, 1),
	}}
	return dns.RcodeSuccess, w.WriteMsg(m)
})

// neverAsked fails the benchmark if a hit is a miss.
func neverAsked(tb testing.TB) plugin.Handler {
	return plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
		tb.Error("a hit went to the next plugin")
		return dns.RcodeServerFailure, nil
	})
}

// serverContext is the context of a request that came in by plain DNS.
func serverContext(tb testing.TB) context.Context {
	srv, err := dnsserver.NewServer("dns://127.0.0.1:53", nil)
	if err != nil {
		tb.Fatal(err)
	}
	ctx := context.WithValue(context.Background(), dnsserver.Key{}, srv)
	return context.WithValue(ctx, dnsserver.LoopKey{}, 0)
}

// question asks for an address, with the OPT that resolvers send (DNS flag day 2020).
func question(name string) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeA)
	m.SetEdns0(1232, false)
	return m
}

func benchOptions(capacity int) options {
	return options{
		zones:    []string{"."},
		success:  classOptions{capacity: capacity, maxTTL: 3600e9, minTTL: 5e9},
		denial:   classOptions{capacity: 1024, maxTTL: 1800e9, minTTL: 5e9},
		servfail: 5e9, hotPercentage: 10, promotionThreshold: 3, lineAligned: true,
	}
}

// newStarted returns a running instance in front of next.
func newStarted(tb testing.TB, o options, next plugin.Handler, front ...plugin.Handler) *Optcache {
	h := newOptcache(o)
	h.Next = next
	if _, bench := tb.(*testing.B); !bench {
		h.clock = systemNow // a test may run in a bubble with a clock of its own
	}
	if err := h.start("", append(front, h)); err != nil {
		tb.Fatal(err)
	}
	stopsWith(tb, h)
	return h
}

// named is a plugin that is only a name.
type named struct {
	plugin.Handler
	name string
}

func (n named) Name() string { return n.name }

// BenchmarkHit is a cached A answer, from the handler's call to the packed reply, through the
// writer that the server puts in front of every chain.
func BenchmarkHit(b *testing.B) {
	const name = "www.example.org."
	ctx := serverContext(b)
	hit := func(b *testing.B, h plugin.Handler, exhaust func(plugin.Handler)) {
		r := question(name)
		w := newUDPWriter()
		for range 5 { // into the hot tier, where there is one
			h.ServeDNS(ctx, request.NewScrubWriter(r, w), r)
		}
		exhaust(neverAsked(b))
		sw := request.NewScrubWriter(r, w)
		b.ReportAllocs()
		b.ResetTimer()
		for b.Loop() {
			h.ServeDNS(ctx, sw, r)
		}
	}
	b.Run("optcache-write", func(b *testing.B) {
		h := newStarted(b, benchOptions(10000), addressUpstream)
		hit(b, h, func(next plugin.Handler) { h.Next = next })
	})
	b.Run("optcache-writemsg", func(b *testing.B) {
		h := newStarted(b, benchOptions(10000), addressUpstream, named{name: "rewrite"})
		hit(b, h, func(next plugin.Handler) { h.Next = next })
	})
	b.Run("cache", func(b *testing.B) {
		h := cache.New()
		h.Next = addressUpstream
		hit(b, h, func(next plugin.Handler) { h.Next = next })
	})
}

// BenchmarkHitBehind is a cached answer behind outer plugins, and one that must be compressed or cut: as bytes, as a message, and
// with cache.
func BenchmarkHitBehind(b *testing.B) {
	golog.SetOutput(io.Discard)
	defer golog.SetOutput(os.Stderr)
	ctx := serverContext(b)
	for _, bc := range []struct {
		name      string
		addresses int
		wrap      []func(plugin.Handler) plugin.Handler
	}{
		{"loadbalance", 4, []func(plugin.Handler) plugin.Handler{balanced(b)}},
		{"prometheus-loadbalance", 4, []func(plugin.Handler) plugin.Handler{measured, balanced(b)}},
		{"log", 4, []func(plugin.Handler) plugin.Handler{func(next plugin.Handler) plugin.Handler { return pluginOf(b, "log", next) }}},
		{"dnstap", 4, []func(plugin.Handler) plugin.Handler{func(next plugin.Handler) plugin.Handler { return newTap(&tapped{off: true}, true, next) }}},
		{"compressed", 60, nil},
		{"cut", 200, nil},
	} {
		for _, how := range trioNames {
			b.Run(bc.name+"/"+how, func(b *testing.B) {
				up := &scripted{response: addresses("www.example.org.", bc.addresses)}
				wrap := bc.wrap
				if how == "message" {
					wrap = append(wrap, func(next plugin.Handler) plugin.Handler { return passing{name: "rewrite", next: next} })
				}
				front, _ := startBehind(b, benchOptions(10000), up, wrap...)
				if how == "cache" {
					stock := cache.New()
					stock.Next = up
					front = stock
					for _, w := range slices.Backward(wrap) {
						front = w(front)
					}
				}
				r := question("www.example.org.")
				sw := request.NewScrubWriter(r, newUDPWriter())
				for range 5 {
					front.ServeDNS(ctx, sw, r)
				}
				b.ReportAllocs()
				b.ResetTimer()
				for b.Loop() {
					front.ServeDNS(ctx, sw, r)
				}
			})
		}
	}
}

// BenchmarkHitParallel is how hits scale over the cores: run it with -cpu 1,2 and compare.
func BenchmarkHitParallel(b *testing.B) {
	const names = 100_000
	ctx := serverContext(b)
	b.Run("one-name", func(b *testing.B) {
		h := newStarted(b, benchOptions(10000), addressUpstream)
		parallelHits(b, ctx, h, []*dns.Msg{question("www.example.org.")})
	})
	b.Run("zipf", func(b *testing.B) {
		h := newStarted(b, benchOptions(2*names), addressUpstream)
		parallelHits(b, ctx, h, zipfQuestions(names, 1<<17))
	})
	b.Run("cache-one-name", func(b *testing.B) {
		h := cache.New()
		h.Next = addressUpstream
		parallelHits(b, ctx, h, []*dns.Msg{question("www.example.org.")})
	})
}

// zipfQuestions returns a sequence of questions for names of Zipf popularity, each message its
// own, as every request is.
func zipfQuestions(names, n int) []*dns.Msg {
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.0001, 1, uint64(names-1))
	qs := make([]*dns.Msg, n)
	for i := range qs {
		qs[i] = question(fmt.Sprintf("host-%d.example.org.", zipf.Uint64()))
	}
	return qs
}

func parallelHits(b *testing.B, ctx context.Context, h plugin.Handler, qs []*dns.Msg) {
	w := newUDPWriter()
	for range 5 {
		for _, r := range qs {
			h.ServeDNS(ctx, request.NewScrubWriter(r, w), r)
		}
	}
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		w := newUDPWriter()
		// Each goroutine has messages of its own: the server makes a new one for each request.
		own := make([]*dns.Msg, len(qs))
		sw := make([]*request.ScrubWriter, len(qs))
		for i, r := range qs {
			own[i] = r.Copy()
			sw[i] = request.NewScrubWriter(own[i], w)
		}
		for i := rand.IntN(len(qs)); pb.Next(); i++ {
			if i >= len(qs) {
				i = 0
			}
			h.ServeDNS(ctx, sw[i], own[i])
		}
	})
}

// BenchmarkInsert is what a miss costs beside the upstream: a response of an A answer for a
// name that is not cached, from the handler's call to the packed reply.
func BenchmarkInsert(b *testing.B) {
	ctx := serverContext(b)
	insert := func(b *testing.B, h plugin.Handler) {
		const names = 1 << 16 // far more than the capacity: nearly all of them are misses
		qs := make([]*dns.Msg, names)
		sw := make([]*request.ScrubWriter, names)
		w := newUDPWriter()
		for i := range qs {
			qs[i] = question(fmt.Sprintf("host-%d.example.org.", i))
			sw[i] = request.NewScrubWriter(qs[i], w)
			h.ServeDNS(ctx, sw[i], qs[i])
		}
		b.ReportAllocs()
		b.ResetTimer()
		for i := 0; b.Loop(); i++ {
			h.ServeDNS(ctx, sw[i%names], qs[i%names])
		}
	}
	b.Run("optcache", func(b *testing.B) {
		insert(b, newStarted(b, benchOptions(10000), addressUpstream))
	})
	b.Run("cache", func(b *testing.B) {
		h := cache.New()
		h.Next = addressUpstream
		insert(b, h)
	})
}
