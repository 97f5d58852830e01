package optcache

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metrics"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// series gathers what has a name with that prefix and a label server with that value, and
// returns the values by name and other labels. Of a histogram there is the count, the sum and
// each bucket.
func series(tb testing.TB, from prometheus.Gatherer, prefix, server string) map[string]float64 {
	tb.Helper()
	families, err := from.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	all := make(map[string]float64)
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), prefix) {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			mine := false
			for _, l := range m.GetLabel() {
				if l.GetName() == "server" {
					mine = l.GetValue() == server
					continue
				}
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			if !mine {
				continue
			}
			key := strings.TrimPrefix(f.GetName(), prefix) + " " + strings.Join(labels, " ")
			if h := m.GetHistogram(); h != nil {
				all[key+" count"] = float64(h.GetSampleCount())
				all[key+" sum"] = h.GetSampleSum()
				for _, b := range h.GetBucket() {
					all[fmt.Sprintf("%s le %v", key, b.GetUpperBound())] = float64(b.GetCumulativeCount())
				}
				continue
			}
			all[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return all
}

// passing is a plugin that does nothing.
type passing struct {
	name string
	next plugin.Handler
}

func (p passing) Name() string { return p.name }
func (p passing) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return plugin.NextOrFailure(p.name, p.next, ctx, w, r)
}

// Behind the prometheus plugin the numbers about requests and responses are the same with
// either cache, but for the name of the plugin that answered.
func TestServerMetricsAreThoseOfCache(t *testing.T) {
	for _, between := range []bool{false, true} {
		t.Run(fmt.Sprintf("plugin between %v", between), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours := fmt.Sprintf("dns://optcache-%v:53", between)
				stocks := fmt.Sprintf("dns://stock-%v:53", between)
				ups := [2]*scripted{new(scripted), new(scripted)}
				h := newOptcache(roomyOptions())
				h.clock = systemNow
				h.Next = ups[0]
				stock := cache.New()
				stock.Next = ups[1]

				chain := func(c plugin.Handler) (*metrics.Metrics, []plugin.Handler) {
					m := metrics.New("")
					m.Next = c
					if between {
						p := passing{name: "errors", next: c}
						m.Next = p
						return m, []plugin.Handler{m, p, c}
					}
					return m, []plugin.Handler{m, c}
				}
				front, handlers := chain(h)
				if err := h.start(t.Name(), handlers); err != nil {
					t.Fatal(err)
				}
				defer h.stop()
				stockFront, _ := chain(stock)

				g := newTraffic(5)
				ctx, stockCtx := contextOf(t, ours), contextOf(t, stocks)
				for range 600 {
					q := g.question()
					m := g.response(q)
					ups[0].response, ups[1].response = m, m
					for range 4 {
						r, client := g.request(q), plainClients[g.IntN(4)]
						ask(ctx, front, r, client)
						ask(stockCtx, stockFront, r, client)
						time.Sleep(time.Duration(g.IntN(2)) * 3 * time.Second)
					}
				}
				if ws := sentWays(h); ws[wayBytes] < 100 || ws[wayPlugin]+ws[wayRecorder] != 0 {
					t.Errorf("hits by way %v: %v", wayNames, ws)
				}

				got := series(t, prometheus.DefaultGatherer, "coredns_dns_", ours)
				want := series(t, prometheus.DefaultGatherer, "coredns_dns_", stocks)
				renamed := make(map[string]float64)
				for k, v := range got {
					renamed[strings.ReplaceAll(k, "plugin="+pluginName, "plugin=cache")] += v
				}
				for k := range want {
					if strings.HasPrefix(k, "request_duration") {
						delete(want, k)
						delete(renamed, k)
					}
				}
				diffSeries(t, renamed, want)
				for _, needed := range []string{"rcode=NXDOMAIN", "rcode=SERVFAIL", "rcode=NOERROR"} {
					if !slices.ContainsFunc(slices.Collect(maps.Keys(want)), func(k string) bool { return strings.Contains(k, needed) }) {
						t.Errorf("the traffic has no %s", needed)
					}
				}
			})
		})
	}
}

func diffSeries(t *testing.T, got, want map[string]float64) {
	t.Helper()
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %v, want %v", k, got[k], v)
		}
	}
	for k, v := range got {
		if _, ok := want[k]; !ok && v != 0 {
			t.Errorf("%s is %v, want none", k, v)
		}
	}
}

// What the built-in cache counts as coredns_cache_*, this plugin counts as coredns_optcache_*.
func TestCacheMetricsAreThoseOfCache(t *testing.T) {
	for _, expire := range []bool{false, true} {
		t.Run(fmt.Sprintf("expiry %v", expire), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, stocks := fmt.Sprintf("dns://counts-%v:53", expire), fmt.Sprintf("dns://stock-counts-%v:53", expire)
				ups := [2]*scripted{new(scripted), new(scripted)}
				h := startNamed(t, "", roomyOptions(), ups[0])
				stock := cache.New()
				stock.Next = ups[1]
				g := newTraffic(6)
				ctx, stockCtx := contextOf(t, ours), contextOf(t, stocks)
				for range 500 {
					q := g.question()
					m := g.response(q)
					verbatim := g.one(5)
					if verbatim {
						m.Question[0].Name = g.host()
					}
					for _, u := range ups {
						u.response, u.verbatim = m, verbatim
					}
					for range 4 {
						r, client := g.request(q), plainClients[g.IntN(4)]
						ask(ctx, h, r, client)
						ask(stockCtx, stock, r, client)
						if expire {
							time.Sleep(time.Duration(g.IntN(3)) * 4 * time.Second)
						}
					}
				}
				rename := func(all map[string]float64, drop ...string) map[string]float64 {
					n := make(map[string]float64)
					for k, v := range all {
						name, labels, _ := strings.Cut(k, " ")
						if name == "entries" && expire {
							continue // which of the dead ones is still there differs
						}
						if slices.Contains(drop, name) {
							continue
						}
						labels = strings.Replace(labels, "zones=.", "zones=", 1)
						n[name+" "+labels] = v
					}
					return n
				}
				got := rename(series(t, prometheus.DefaultGatherer, "coredns_optcache_", ours),
					"tier_hits_total", "sent_total", "promotions_total", "demotions_total", "memory_bytes", "memory_limit_bytes",
					"memory_huge_bytes", "hot_capacity")
				want := rename(series(t, prometheus.DefaultGatherer, "coredns_cache_", stocks))
				if len(want) < 5 || want["drops_total view= zones="] == 0 {
					t.Fatalf("the built-in cache counts only %v", want)
				}
				// A response that does not match is a drop here, whether or not it could be kept.
				drops := "drops_total view= zones="
				if got[drops] < want[drops] {
					t.Errorf("%v drops, of which the built-in cache counts %v", got[drops], want[drops])
				}
				got[drops] = want[drops]
				diffSeries(t, got, want)
				// Every name and label of the built-in cache is there from the start.
				for k := range want {
					if _, ok := got[k]; !ok {
						t.Errorf("there is no %s", k)
					}
				}

				all := series(t, prometheus.DefaultGatherer, "coredns_optcache_", ours)
				sum := func(prefix string) (n float64) {
					for k, v := range all {
						if strings.HasPrefix(k, prefix+" ") {
							n += v
						}
					}
					return n
				}
				hits := sum("hits_total")
				if by, sent := sum("tier_hits_total"), sum("sent_total"); by != hits || sent != hits {
					t.Errorf("%v hits, %v by tier, %v by way", hits, by, sent)
				}
				if req, miss := sum("requests_total"), sum("misses_total"); req != hits+miss {
					t.Errorf("%v requests, %v hits, %v misses", req, hits, miss)
				}
				if used, bound := sum("memory_bytes"), sum("memory_limit_bytes"); used <= 0 || used > bound {
					t.Errorf("%v of %v bytes are in use", used, bound)
				}
				for k := range all {
					if strings.Contains(k, "example") || strings.Contains(k, "host") {
						t.Errorf("a name from the traffic is in a label: %s", k)
					}
				}
			})
		})
	}
}

// pedantic is a registry that checks what the collector says against its descriptions.
func pedantic(tb testing.TB) prometheus.Gatherer {
	tb.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(collector{}); err != nil {
		tb.Fatal(err)
	}
	return reg
}

func TestCollectIsConsistentWithInstancesThatShareLabels(t *testing.T) {
	reg := pedantic(t)
	const server = "dns://shared:53"
	ctx := contextOf(t, server)
	var running []*Optcache
	for range 3 { // the same block, loaded again and again
		h := startNamed(t, "shared", stockOptions(), addressUpstream)
		for range 3 {
			ask(ctx, h, asking("www.example.org.", dns.TypeA), udp4Client)
		}
		running = append(running, h)
		if got := series(t, reg, "coredns_optcache_", server); got["entries type=success view=shared zones=."] != 1 {
			t.Errorf("with %d instances: %v", len(running), got)
		}
	}
	// The same instance behind several servers, of which one has the address of another.
	for _, addr := range []string{server, "dns://shared:54", server} {
		ask(contextOf(t, addr), running[2], asking("www.example.org.", dns.TypeA), udp4Client)
	}
	got := series(t, reg, "coredns_optcache_", server)
	if got["requests_total view=shared zones=."] != 11 || got["misses_total view=shared zones=."] != 3 {
		t.Errorf("shared counters: %v", got)
	}
	for _, h := range running {
		h.stop()
		series(t, reg, "coredns_optcache_", server)
	}
	got = series(t, reg, "coredns_optcache_", server)
	if _, ok := got["entries type=success view=shared zones=."]; ok {
		t.Errorf("an instance that has stopped still says what it holds: %v", got)
	}
	if got["requests_total view=shared zones=."] != 11 {
		t.Errorf("counters went with the instance: %v", got)
	}
}

func TestCollectWhileServing(t *testing.T) {
	reg := pedantic(t)
	h := startNamed(t, t.Name(), stockOptions(), addressUpstream)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 300 {
			ctx := contextOf(t, fmt.Sprintf("dns://busy:%d", i%7))
			ask(ctx, h, asking(fmt.Sprintf("n%d.example.org.", i%50), dns.TypeA), udp4Client)
		}
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		if _, err := reg.Gather(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCountersContinueInTheNextInstance(t *testing.T) {
	ctx := contextOf(t, "dns://next:53")
	for i := range 3 {
		h := startNamed(t, "next", stockOptions(), addressUpstream)
		for range 4 {
			ask(ctx, h, asking("www.example.org.", dns.TypeA), udp4Client)
		}
		h.stop()
		got := series(t, prometheus.DefaultGatherer, "coredns_optcache_", "dns://next:53")
		if n := got["hits_total type=success view=next zones=."]; n != float64(3*(i+1)) {
			t.Errorf("instance %d: %v hits, want %d", i, n, 3*(i+1))
		}
	}
}

func TestMetricsLabelsNameServerZonesAndView(t *testing.T) {
	o := stockOptions()
	o.zones = []string{"example.org.", "example.net."}
	h := startNamed(t, "a view", o, addressUpstream)
	srv, err := dnsserver.NewServer("tls://labels:853", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithValue(context.Background(), dnsserver.Key{}, srv)
	ask(ctx, h, asking("www.example.org.", dns.TypeA), tcp4Client)
	ask(ctx, h, asking("www.example.com.", dns.TypeA), tcp4Client) // not one of the zones
	got := series(t, prometheus.DefaultGatherer, "coredns_optcache_", "tls://labels:853")
	if got["requests_total view=a view zones=example.org.,example.net."] != 1 {
		t.Errorf("%v", got)
	}
}

func TestInstancesAreNotKeptAlive(t *testing.T) {
	tests := []struct {
		name       string
		stop, file bool
	}{{"stopped", true, false}, {"of a reload that failed", false, false}, {"with a file", false, true}}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			before := len(instances.all())
			gone := func() weak.Pointer[Optcache] {
				o := benchOptions(1000)
				if tc.file {
					o.file = fileOptions{path: filepath.Join(t.TempDir(), "answers"), interval: time.Hour}
				}
				h := newOptcache(o)
				h.Next = addressUpstream
				h.clock = systemNow
				if err := h.start(t.Name(), []plugin.Handler{h}); err != nil {
					t.Fatal(err)
				}
				for tc.file && h.keeper.partial.Load() {
					runtime.Gosched()
				}
				ask(serverContext(t), h, asking("www.example.org.", dns.TypeA), udp4Client)
				if _, err := prometheus.DefaultGatherer.Gather(); err != nil {
					t.Error(err)
				}
				if tc.stop {
					h.stop()
				}
				return weak.Make(h)
			}()
			for deadline := time.Now().Add(10 * time.Second); gone.Value() != nil; runtime.GC() {
				if time.Now().After(deadline) {
					t.Fatal("the instance is still reachable")
				}
			}
			if after := len(instances.all()); after > before {
				t.Errorf("%d instances, before %d", after, before)
			}
		})
	}
}
