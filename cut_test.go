package optcache

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
)

// tree is an upstream with one zone, the root: the names that have an address, and with them all names above.
type tree struct {
	mu     sync.Mutex // guards hosts
	hosts  map[string]bool
	asked  atomic.Int64
	proofs bool                       // with DO, denials have proofs
	change func(m *dns.Msg, q string) // if set, changes each response
}

func (*tree) Name() string { return "tree" }

func (u *tree) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked.Add(1)
	q := strings.ToLower(r.Question[0].Name)
	m := new(dns.Msg).SetReply(r)
	exists := q == "."
	u.mu.Lock()
	for host := range u.hosts {
		exists = exists || dns.IsSubDomain(q, host)
	}
	host := u.hosts[q]
	u.mu.Unlock()
	switch {
	case host && r.Question[0].Qtype == dns.TypeA:
		m.Answer = parsed(q + " 60 IN A 192.0.2.1")
	default:
		if !exists {
			m.Rcode = dns.RcodeNameError
		}
		m.Ns = parsed(". 60 IN SOA a. b. 1 2 3 4 40")
	}
	if opt := r.IsEdns0(); opt != nil && opt.Do() {
		m.SetEdns0(4096, true)
		if u.proofs && len(m.Ns) > 0 {
			now := time.Now().UTC()
			m.Ns = append(m.Ns, parsed(fmt.Sprintf(". 60 IN RRSIG SOA 8 0 60 %s %s 1 . AAAA",
				now.Add(24*time.Hour).Format("20060102150405"), now.Add(-24*time.Hour).Format("20060102150405")))...)
		}
	}
	if u.change != nil {
		u.change(m, q)
	}
	w.WriteMsg(m)
	return dns.RcodeSuccess, nil
}

func hosts(names ...string) map[string]bool {
	all := make(map[string]bool)
	for _, n := range names {
		all[n] = true
	}
	return all
}

func cutting(probe bool, zones ...string) options {
	o := stockOptions()
	o.zones, o.explain = []string{"."}, true
	o.cut = cutOptions{on: true, probe: probe, zones: zones}
	return o
}

func withDO(r *dns.Msg) *dns.Msg { return r.SetEdns0(1232, true) }

func without(r *dns.Msg, change func(*dns.Msg)) *dns.Msg {
	change(r)
	return r
}

func TestCut(t *testing.T) {
	t.Parallel()
	noCD := func(r *dns.Msg) *dns.Msg { r.CheckingDisabled = true; return r }
	noRD := func(r *dns.Msg) *dns.Msg { r.RecursionDesired = false; return r }
	for _, c := range []struct {
		name          string
		zones         []string
		proofs        bool
		change        func(*dns.Msg, string)
		before        []*dns.Msg
		after         time.Duration // of the fake clock, from before to now
		r             *dns.Msg
		asks          bool // the upstream is asked for r
		rcode         int  // of the reply
		ttl           uint32
		capable, edns bool
	}{
		{name: "below", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, after: 10 * time.Second, r: asking("a.com.x.", dns.TypeA), rcode: 3, ttl: 30},
		{name: "far below", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: asking("a.b.c.d.com.x.", dns.TypeA), rcode: 3, ttl: 40},
		{name: "another type", before: []*dns.Msg{asking("com.x.", dns.TypeAAAA)}, r: asking("a.com.x.", dns.TypeSRV), rcode: 3, ttl: 40},
		{name: "letters", before: []*dns.Msg{asking("COM.x.", dns.TypeA)}, r: asking("a.cOm.X.", dns.TypeA), rcode: 3, ttl: 40},
		{name: "with EDNS", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: asking("a.com.x.", dns.TypeA).SetEdns0(1232, false), rcode: 3, ttl: 40, edns: true},
		{name: "RD=0 gets what RD=1 brought", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: noRD(asking("a.com.x.", dns.TypeA)), rcode: 3, ttl: 40},
		{name: "the name itself, another type", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: asking("com.x.", dns.TypeAAAA), asks: true, rcode: 3, ttl: 40},
		{name: "above", before: []*dns.Msg{asking("a.com.x.", dns.TypeA)}, r: asking("com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "beside, with the same end", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: asking("xcom.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "NODATA", before: []*dns.Msg{asking("svc.y.", dns.TypeAAAA)}, r: asking("a.svc.y.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "expired", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, after: 41 * time.Second, r: asking("a.com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "CD", before: []*dns.Msg{noCD(asking("com.x.", dns.TypeA))}, r: asking("a.com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "no CD", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: noCD(asking("a.com.x.", dns.TypeA)), asks: true, rcode: 3, ttl: 40},
		{name: "RD=0", before: []*dns.Msg{noRD(asking("com.x.", dns.TypeA))}, r: asking("a.com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "class CH", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: without(asking("a.com.x.", dns.TypeA), func(r *dns.Msg) { r.Question[0].Qclass = dns.ClassCHAOS }), asks: true, rcode: 3, ttl: 40},
		{name: "DO after DO, no proofs", before: []*dns.Msg{withDO(asking("com.x.", dns.TypeA))}, r: withDO(asking("a.com.x.", dns.TypeA)), rcode: 3, ttl: 40, edns: true},
		{name: "DO after DO, proofs", proofs: true, before: []*dns.Msg{withDO(asking("com.x.", dns.TypeA))}, r: withDO(asking("a.com.x.", dns.TypeA)), asks: true, rcode: 3, ttl: 40},
		{name: "DO after none", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: withDO(asking("a.com.x.", dns.TypeA)), asks: true, rcode: 3, ttl: 40},
		{name: "none after DO, no proofs", before: []*dns.Msg{withDO(asking("com.x.", dns.TypeA))}, r: asking("a.com.x.", dns.TypeA), rcode: 3, ttl: 40},
		{name: "none after DO, proofs", proofs: true, before: []*dns.Msg{withDO(asking("com.x.", dns.TypeA))}, r: asking("a.com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "exact answers go first", before: []*dns.Msg{asking("host.y.", dns.TypeA), asking("y.", dns.TypeA)}, change: func(m *dns.Msg, q string) {
			if q == "y." {
				m.Rcode, m.Answer = dns.RcodeNameError, nil
				m.Ns = parsed(". 60 IN SOA a. b. 1 2 3 4 40")
			}
		}, r: asking("host.y.", dns.TypeA), rcode: 0, ttl: 60},
		{name: "NXDOMAIN behind a CNAME", before: []*dns.Msg{asking("com.x.", dns.TypeA)}, change: func(m *dns.Msg, q string) {
			if q == "com.x." {
				m.Answer = parsed("com.x. 60 IN CNAME gone.")
			}
		}, r: asking("a.com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},

		{name: "a name with an underscore", before: []*dns.Msg{asking("_tcp.web.x.", dns.TypeA)}, r: asking("_http._tcp.web.x.", dns.TypeSRV), asks: true, rcode: 3, ttl: 40},
		{name: "a reverse zone", before: []*dns.Msg{asking("10.in-addr.arpa.", dns.TypePTR)}, r: asking("1.0.0.10.in-addr.arpa.", dns.TypePTR), asks: true, rcode: 3, ttl: 40},
		{name: "above the reverse zones", before: []*dns.Msg{asking("arpa.", dns.TypePTR)}, r: asking("1.ip6.arpa.", dns.TypePTR), asks: true, rcode: 3, ttl: 40},
		{name: "a reverse zone that is named", zones: []string{"10.in-addr.arpa."}, before: []*dns.Msg{asking("1.10.in-addr.arpa.", dns.TypePTR)}, r: asking("2.1.10.in-addr.arpa.", dns.TypePTR), rcode: 3, ttl: 40},
		{name: "at the zone", zones: []string{"x."}, before: []*dns.Msg{asking("x.", dns.TypeA)}, r: asking("a.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "above the zone", zones: []string{"svc.x."}, before: []*dns.Msg{asking("x.", dns.TypeA)}, r: asking("a.b.svc.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "just below the zone", zones: []string{"x."}, before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: asking("a.com.x.", dns.TypeA), rcode: 3, ttl: 40},
		{name: "outside of the zones", zones: []string{"z."}, before: []*dns.Msg{asking("com.x.", dns.TypeA)}, r: asking("a.com.x.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "across a zone", zones: []string{".", "cluster.local."}, before: []*dns.Msg{asking("local.", dns.TypeA)}, r: asking("a.cluster.local.", dns.TypeA), asks: true, rcode: 3, ttl: 40},
		{name: "below the outer zone", zones: []string{".", "cluster.local."}, before: []*dns.Msg{asking("local.", dns.TypeA)}, r: asking("a.local.", dns.TypeA), rcode: 3, ttl: 40},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := &tree{hosts: hosts("host.y.", "svc.y."), proofs: c.proofs, change: c.change}
			h := startNamed(t, t.Name(), cutting(false, c.zones...), u)
			clock := clocked(h)
			ctx := contextOf(t, "dns://:53")
			for _, r := range c.before {
				answer(t, ctx, h, r)
			}
			clock.advance(c.after)
			asked, cuts := u.asked.Load(), count(h, countCut)
			m := answer(t, ctx, h, c.r)
			if got := u.asked.Load() > asked; got != c.asks {
				t.Errorf("asks upstream: %v", got)
			}
			if m.Rcode != c.rcode || m.Question[0].Name != c.r.Question[0].Name || m.Id != c.r.Id {
				t.Errorf("reply: %v", m)
			}
			for _, rr := range slices.Concat(m.Answer, m.Ns) {
				if rr.Header().Ttl != c.ttl {
					t.Errorf("TTL %d, want %d", rr.Header().Ttl, c.ttl)
				}
			}
			if c.rcode == dns.RcodeNameError && (len(m.Ns) == 0 || m.Ns[0].Header().Rrtype != dns.TypeSOA) {
				t.Errorf("no SOA: %v", m)
			}
			if got := count(h, countCut) - cuts; got == 1 != (!c.asks && c.rcode == 3) {
				t.Errorf("%d are counted as synthesized", got)
			}
			if opt := m.IsEdns0(); c.edns && (opt == nil || len(opt.Option) != 1 || opt.Option[0].(*dns.EDNS0_EDE).InfoCode != dns.ExtendedErrorCodeSynthesized) {
				t.Errorf("no Extended DNS Error: %v", m)
			}
		})
	}
}

// zoned is a plugin that names its zones as CoreDNS's plugins do.
type zoned struct {
	*tree
	Zones []string
}

// The zones of the plugins behind are borders, though the Corefile names only the root: local. does not exist in the Internet,
// and cluster.local. exists in the cluster.
func TestCutKnowsTheZonesBehind(t *testing.T) {
	t.Parallel()
	u := &tree{hosts: hosts("a.cluster.local.")}
	behind := zoned{tree: u, Zones: []string{"cluster.local."}}
	h := startNamed(t, t.Name(), cutting(false), behind)
	ctx := contextOf(t, "dns://:53")
	u.change = func(m *dns.Msg, q string) {
		if q == "local." {
			m.Rcode = dns.RcodeNameError
		}
	}
	answer(t, ctx, h, asking("local.", dns.TypeA))
	if m := answer(t, ctx, h, asking("a.cluster.local.", dns.TypeA)); m.Rcode != dns.RcodeSuccess {
		t.Errorf("%v", m)
	}
}

// A reload that moves the answers keeps a cut. A flush of the denial ends it.
func TestCutAndReload(t *testing.T) {
	t.Parallel()
	u := &tree{}
	o := roomFor(cutting(false))
	h := firstOf(t, o, u)
	ctx := contextOf(t, "dns://:53")
	answer(t, ctx, h, asking("com.x.", dns.TypeA))
	o.success.capacity *= 2
	next := nextOf(t, h, o)
	h.stop()
	settled(next)
	asked := u.asked.Load()
	answer(t, ctx, next, asking("a.com.x.", dns.TypeA))
	if u.asked.Load() != asked {
		t.Error("the reload has lost the cut")
	}
	f, err := filterOf(&control.Filter{Name: "com.x."})
	if err != nil {
		t.Fatal(err)
	}
	next.store.flush(newScratch(), f, systemNow)
	answer(t, ctx, next, asking("b.com.x.", dns.TypeA))
	if u.asked.Load() != asked+1 {
		t.Error("the cut has outlived a flush")
	}
}

// probed waits until the probes of an instance are done.
func probed(h *Optcache) {
	for h.cutter.probers.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
}

// With probe, one miss of a search path is enough for all other names of the same top-level domain.
func TestCutProbe(t *testing.T) {
	t.Parallel()
	u := &tree{hosts: hosts("kubernetes.default.svc.cluster.local.")}
	h := startNamed(t, t.Name(), cutting(true, "cluster.local."), u)
	ctx := contextOf(t, "dns://:53")
	first := answer(t, ctx, h, asking("www.google.com.default.svc.cluster.local.", dns.TypeA))
	probed(h)
	if first.Rcode != dns.RcodeNameError || u.asked.Load() != 4 {
		t.Fatalf("%d questions upstream, want 1 and svc, default, com: %v", u.asked.Load(), first)
	}
	for i := range 100 {
		m := answer(t, ctx, h, asking(fmt.Sprintf("www.n%d.com.default.svc.cluster.local.", i), dns.TypeAAAA))
		if m.Rcode != dns.RcodeNameError {
			t.Fatalf("%v", m)
		}
	}
	answer(t, ctx, h, asking("www.n.org.default.svc.cluster.local.", dns.TypeA)) // and org
	probed(h)
	if n := u.asked.Load(); n != 6 {
		t.Errorf("%d questions upstream, want 6", n)
	}
	if m := answer(t, ctx, h, asking("kubernetes.default.svc.cluster.local.", dns.TypeA)); len(m.Answer) == 0 {
		t.Errorf("a name that exists: %v", m)
	}
	if n := count(h, countProbe); n != 4 {
		t.Errorf("%d probes are counted, want 4", n)
	}
}

// A cut that is used is asked for again before it expires, once, and stays. It goes when the name comes to exist.
func TestCutThatIsUsedStays(t *testing.T) {
	for _, probe := range []bool{true, false} {
		inBubble(t, fmt.Sprint(probe), func(t *testing.T) {
			u := &tree{hosts: hosts("kubernetes.default.svc.cluster.local.")}
			h := startNamed(t, t.Name(), cutting(probe, "cluster.local."), u)
			ctx := contextOf(t, "dns://:53")
			answer(t, ctx, h, asking("com.default.svc.cluster.local.", dns.TypeA))
			synctest.Wait()
			before := u.asked.Load()
			for i := range 1000 {
				answer(t, ctx, h, asking(fmt.Sprintf("n%d.com.default.svc.cluster.local.", i), dns.TypeA))
				time.Sleep(200 * time.Millisecond)
			}
			// The denial has a TTL of 40 s. In 200 s it is asked for about six times.
			if n := u.asked.Load() - before; probe && (n < 5 || n > 7) || !probe && n < 700 {
				t.Errorf("%d questions upstream", n)
			}
			if !probe {
				return
			}
			u.mu.Lock()
			u.hosts["www.com.default.svc.cluster.local."] = true
			u.mu.Unlock()
			for range 45 {
				answer(t, ctx, h, asking("other.com.default.svc.cluster.local.", dns.TypeA))
				time.Sleep(time.Second)
			}
			if m := answer(t, ctx, h, asking("www.com.default.svc.cluster.local.", dns.TypeA)); len(m.Answer) != 1 {
				t.Errorf("a name that exists: %v", m)
			}
			synctest.Wait()
		})
	}
}

// While the upstream is gone, a cut that is used is asked for again as rarely as all else.
func TestCutThatIsUsedWithoutUpstream(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		var dead atomic.Bool
		u := &tree{hosts: hosts("kubernetes.default.svc.cluster.local."), change: func(m *dns.Msg, _ string) {
			if dead.Load() {
				m.Rcode, m.Answer, m.Ns = dns.RcodeServerFailure, nil, nil
			}
		}}
		o := cutting(true, "cluster.local.")
		o.servfail, o.servfailMost = 5*time.Second, time.Minute
		h := startNamed(t, t.Name(), o, u)
		ctx := contextOf(t, "dns://:53")
		answer(t, ctx, h, asking("com.default.svc.cluster.local.", dns.TypeA)) // the denial has a TTL of 40 s
		dead.Store(true)
		for i := range 20 {
			answer(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA))
		}
		if h.gone() == 0 {
			t.Fatal("the upstream is not gone")
		}
		time.Sleep(33 * time.Second)
		before := u.asked.Load()
		for i := range 30 {
			m := answer(t, ctx, h, asking(fmt.Sprintf("n%d.com.default.svc.cluster.local.", i), dns.TypeA))
			if m.Rcode != dns.RcodeNameError {
				t.Errorf("%v", m)
			}
			time.Sleep(200 * time.Millisecond)
		}
		synctest.Wait()
		if n := u.asked.Load() - before; n > 2 {
			t.Errorf("%d questions in 6 s", n)
		}
	})
}

// A flood of names in domains that are all different makes a bounded number of probes.
func TestProbesAreLimited(t *testing.T) {
	t.Parallel()
	u := &tree{}
	h := startNamed(t, t.Name(), cutting(true), u)
	clock := clocked(h)
	ctx := contextOf(t, "dns://:53")
	for i := range 3 * probeBurst {
		answer(t, ctx, h, asking(fmt.Sprintf("a.b%d.", i), dns.TypeA))
		probed(h)
	}
	if n := count(h, countProbe); n != probeBurst {
		t.Errorf("%d probes, want %d", n, probeBurst)
	}
	clock.advance(time.Second)
	for i := range 3 * probeBurst {
		answer(t, ctx, h, asking(fmt.Sprintf("a.c%d.", i), dns.TypeA))
		probed(h)
	}
	if n := count(h, countProbe); n != probeBurst+probeRate {
		t.Errorf("%d probes after a second, want %d", n, probeBurst+probeRate)
	}
}

// In a zone that keeps to RFC 8020, a cut answers as the zone does, whatever is asked, and in whichever order.
func TestCutAnswersAsTheZoneDoes(t *testing.T) {
	t.Parallel()
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 18))
		name := func() string {
			var labels []string
			for range 1 + rnd.IntN(5) {
				labels = append(labels, string(rune('a'+rnd.IntN(4))))
			}
			return strings.Join(labels, ".") + "."
		}
		u := &tree{hosts: make(map[string]bool)}
		for range 12 {
			u.hosts[name()] = true
		}
		u.proofs = seed%2 == 0
		h := startNamed(t, fmt.Sprint(t.Name(), seed), cutting(seed%3 > 0), u)
		plain := startNamed(t, fmt.Sprint(t.Name(), "plain", seed), stockOptions(), u)
		clock, clock2 := clocked(h), clocked(plain)
		ctx := contextOf(t, "dns://:53")
		for range 600 {
			r := asking(name(), []uint16{dns.TypeA, dns.TypeAAAA}[rnd.IntN(2)])
			r.CheckingDisabled = rnd.IntN(4) == 0
			if rnd.IntN(4) == 0 {
				withDO(r)
			}
			if rnd.IntN(3) == 0 {
				clock.advance(time.Second)
				clock2.advance(time.Second)
			}
			got, want := answer(t, ctx, h, r), answer(t, ctx, plain, r)
			probed(h)
			if got.Rcode != want.Rcode || len(got.Answer) != len(want.Answer) || len(got.Ns) != len(want.Ns) {
				t.Fatalf("seed %d, of %v: %v\nwant %v", seed, slices.Sorted(maps.Keys(u.hosts)), got, want)
			}
		}
		if count(h, countCut) == 0 {
			t.Errorf("seed %d: nothing was cut", seed)
		}
	}
}

// A look-up of the names above costs nothing without a denial, and allocates nothing.
func BenchmarkFindCut(b *testing.B) {
	for _, c := range []struct {
		name   string
		denied string
	}{{"no cut", ""}, {"other", "org.default.svc.cluster.local."}, {"cut", "com.default.svc.cluster.local."}} {
		b.Run(c.name, func(b *testing.B) {
			h := startNamed(b, b.Name(), cutting(false), &tree{hosts: hosts("default.svc.cluster.local.")})
			ctx := contextOf(b, "dns://:53")
			if c.denied != "" {
				answer(b, ctx, h, asking(c.denied, dns.TypeA))
			}
			s, _ := h.scratchFor(asking("www.google.com.default.svc.cluster.local.", dns.TypeA), udp4Client)
			key := s.Key
			b.ReportAllocs()
			for b.Loop() {
				s.Key = key
				if h.findCut(s, h.clock()) != (c.name == "cut") {
					b.Fatal("wrong")
				}
			}
		})
	}
}

// A flush of a name has the next question for it asked, although a name above is denied. A zone with disable denial is a border.
func TestCutAndFlushOfANameBelow(t *testing.T) {
	t.Parallel()
	u := &tree{}
	o := cutting(false)
	o.denial.except = []string{"sub.com.x."}
	h := startNamed(t, t.Name(), o, u)
	ctx := contextOf(t, "dns://:53")
	answer(t, ctx, h, asking("com.x.", dns.TypeA))
	asks := func(name string, want bool) {
		t.Helper()
		asked := u.asked.Load()
		answer(t, ctx, h, asking(name, dns.TypeA))
		if got := u.asked.Load() > asked; got != want {
			t.Errorf("%s: asks upstream: %v", name, got)
		}
	}
	asks("a.com.x.", false)
	asks("a.sub.com.x.", true)
	if _, err := (controlBlock{h}).Flush(control.Filter{Name: "a.com.x."}); err != nil {
		t.Fatal(err)
	}
	asks("a.com.x.", true)
}
