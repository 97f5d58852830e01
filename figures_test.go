package optcache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
)

// This file has simulations whose figures are in bench/README.md. They print them with -v, and fail where they are much worse.

// A hundred instances start at once. Each is asked once a second for each of 1,000 names with a TTL of 30 s, at a moment of the
// second that does not change. Printed is, by minute, the largest second's upstream queries over the mean.
func TestHundredInstances(t *testing.T) {
	t.Parallel()
	const instances, names, minutes = 100, 1000, 10
	ttl := admit.Lifetime{TTL: 30 * time.Second}
	for _, c := range []struct {
		jitter      int
		first, last float64 // bounds of the ratio in the first minute and the last one
	}{{0, 30, 30}, {10, 8, 4}, {20, 4, 2}} {
		rng := rand.New(rand.NewPCG(18, uint64(c.jitter)))
		var asked [minutes * 60]int
		for range instances * names {
			for at := time.Duration(0); at < minutes*time.Minute; {
				asked[at/time.Second]++
				// The part is drawn as writer.WriteMsg does. What has expired is asked for by the next client.
				at += ttl.Shortened(rng.Float64() * float64(c.jitter) / 100).TTL
			}
		}
		var ratios []float64
		for minute := 1; minute < minutes; minute++ {
			most, sum := 0, 0
			for _, n := range asked[minute*60:][:60] {
				most, sum = max(most, n), sum+n
			}
			ratios = append(ratios, float64(most)/(float64(sum)/60))
		}
		t.Logf("jitter %2d: largest second over the mean, by minute: %.1f", c.jitter, ratios)
		if ratios[0] > c.first || ratios[len(ratios)-1] > c.last {
			t.Errorf("jitter %d: %.1f", c.jitter, ratios)
		}
	}
}

// narrowUpstream answers most packets a second, and drops the others. Who asks it waits 2 s for a packet, and gives up after 5 s, as
// forward does.
type narrowUpstream struct {
	most    int64
	second  atomic.Int64 // since begun
	packets atomic.Int64 // in this second
	begun   time.Time

	sent, dropped atomic.Int64
}

func (*narrowUpstream) Name() string { return "narrow" }

func (u *narrowUpstream) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	for begun := time.Now(); time.Since(begun) < 5*time.Second; {
		if now := int64(time.Since(u.begun) / time.Second); u.second.Swap(now) != now {
			u.packets.Store(0)
		}
		u.sent.Add(1)
		if u.packets.Add(1) <= u.most {
			time.Sleep(20 * time.Millisecond)
			m := new(dns.Msg).SetReply(r)
			m.Answer = parsed(r.Question[0].Name + " 5 IN A 192.0.2.1")
			return 0, w.WriteMsg(m)
		}
		u.dropped.Add(1)
		time.Sleep(2 * time.Second)
	}
	return dns.RcodeServerFailure, errors.New("i/o timeout")
}

// An upstream drops what is above 1,024 packets a second. Clients ask 3,000 questions a second, in one case for names of Zipf
// popularity with a TTL of 5 s, and in the other each time for another one. A query fails that has no answer after 5 s, or SERVFAIL.
func TestOverloadedUpstream(t *testing.T) {
	const perSecond, names = 3000, 100_000
	warmUp, seconds := 5, 5
	if os.Getenv("OPTCACHE_FIGURES") != "" {
		warmUp, seconds = 15, 15
	}
	failed := make(map[string]float64)
	for _, c := range []struct {
		name   string
		unique bool
		set    func(*options)
	}{
		{"popular names", false, func(*options) {}},
		{"popular names, upstream_limit 900", false, func(o *options) { o.upstream = upstreamOptions{perSecond: 900, burst: 900, wait: time.Second} }},
		{"popular names, serve_stale", false, func(o *options) { o.stale.upTo = time.Hour }},
		{"popular names, serve_stale, upstream_limit 900", false, func(o *options) {
			o.stale.upTo = time.Hour
			o.upstream = upstreamOptions{perSecond: 900, burst: 900, wait: time.Second}
		}},
		{"names asked for once", true, func(*options) {}},
		{"names asked for once, upstream_limit 900", true, func(o *options) {
			o.upstream = upstreamOptions{perSecond: 900, burst: 900, wait: time.Second}
		}},
	} {
		if c.unique && os.Getenv("OPTCACHE_FIGURES") == "" {
			continue
		}
		inBubble(t, c.name, func(t *testing.T) {
			o := sizedOptions(names / 2)
			o.coalesce = defaultCoalesce
			c.set(&o)
			u := &narrowUpstream{most: 1024, begun: time.Now()}
			h := startNamed(t, t.Name(), o, u)
			ctx := serverContext(t)
			rng := rand.New(rand.NewPCG(18, 3))
			zipf := rand.NewZipf(rng, 1.01, 1, names-1)
			var all, lost, took atomic.Int64
			done := make(chan struct{}, perSecond*(warmUp+seconds))
			for i := range perSecond * (warmUp + seconds) {
				name := fmt.Sprintf("n%d.example.org.", zipf.Uint64())
				if c.unique {
					name = fmt.Sprintf("u%d.example.org.", i)
				}
				go func() {
					defer func() { done <- struct{}{} }()
					begun, w := time.Now(), &wireWriter{addr: udp4Client}
					rcode, _ := h.ServeDNS(ctx, w, asking(name, dns.TypeA))
					if i < perSecond*warmUp {
						return
					}
					all.Add(1)
					d := time.Since(begun)
					took.Add(int64(min(d, 5*time.Second)))
					if d >= 5*time.Second || rcode == dns.RcodeServerFailure || len(w.packets) == 0 || w.packets[0][3]&0xf == dns.RcodeServerFailure {
						lost.Add(1)
					}
				}()
				time.Sleep(time.Second / perSecond)
			}
			for range perSecond * (warmUp + seconds) {
				<-done
			}
			time.Sleep(6 * time.Second) // what is under way in the background ends
			failed[c.name] = 100 * float64(lost.Load()) / float64(all.Load())
			t.Logf("%s: %.1f %% of the clients' queries failed; %d ms each; %.0f packets a second upstream, %.0f dropped", c.name, failed[c.name],
				took.Load()/all.Load()/1e6, float64(u.sent.Load())/float64(warmUp+seconds), float64(u.dropped.Load())/float64(warmUp+seconds))
		})
	}
	if today, with := failed["popular names, serve_stale"], failed["popular names, serve_stale, upstream_limit 900"]; with > today {
		t.Errorf("%.1f %% failed today, %.1f %% with upstream_limit", today, with)
	}
}
