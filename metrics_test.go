package optcache

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	_ "github.com/coredns/coredns/plugin/bind"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/multisocket"
	_ "github.com/coredns/coredns/plugin/view"
	_ "github.com/coredns/coredns/plugin/whoami"

	"github.com/miekg/dns"
	"github.com/opentracing/opentracing-go"
	"github.com/opentracing/opentracing-go/mocktracer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/test/freeport"
)

// This file tests the metrics: that they agree with those of cache, when series appear and go, and what a scrape
// takes.

// series gathers the metrics whose names begin with prefix, and that have the given label server. It returns their
// values by name and other labels. A histogram gives its count, its sum and its buckets.
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

// passing is a plugin that only calls the next one.
type passing struct {
	name string
	next plugin.Handler
}

func (p passing) Name() string { return p.name }
func (p passing) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return plugin.NextOrFailure(p.name, p.next, ctx, w, r)
}

// The prometheus plugin in front counts the same requests and responses with optcache as with cache, except for the
// name of the plugin that answered.
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

				outer := func(c plugin.Handler) (*metrics.Metrics, []plugin.Handler) {
					m := metrics.New("")
					m.Next = c
					if between {
						p := passing{name: "errors", next: c}
						m.Next = p
						return m, []plugin.Handler{m, p, c}
					}
					return m, []plugin.Handler{m, c}
				}
				front, handlers := outer(h)
				if err := h.start(t.Name(), handlers); err != nil {
					t.Fatal(err)
				}
				stopsWith(t, h)
				stockFront, _ := outer(spelling{stock})

				g := newTraffic(5)
				ctx, stockCtx := contextOf(t, ours), contextOf(t, stocks)
				for range 600 {
					q := g.question()
					m := g.response(q)
					ups[0].response, ups[1].response = m, m
					for range 4 {
						r, client := asCache(h, g.request(q)), plainClients[g.IntN(4)]
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

// The counts of cache as coredns_cache_* are those of optcache as coredns_optcache_*.
func TestCacheMetricsAreThoseOfCache(t *testing.T) {
	for _, expire := range []bool{false, true} {
		t.Run(fmt.Sprintf("expiry %v", expire), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, stocks := fmt.Sprintf("dns://counts-%v:53", expire), fmt.Sprintf("dns://stock-counts-%v:53", expire)
				ups := [2]*scripted{new(scripted), new(scripted)}
				h := startNamed(t, "", roomyOptions(), ups[0])
				stock := cache.New()
				stock.Next = ups[1]
				earlier := series(t, prometheus.DefaultGatherer, "coredns_cache_", stocks) // of another run in this process
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
						r, client := asCache(h, g.request(q)), plainClients[g.IntN(4)]
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
							continue // which expired entries are still there differs
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
					"tier_hits_total", "sent_total", "promotions_total", "demotions_total", "memory_bytes", "memory_reserved_bytes", "memory_limit_bytes",
					"memory_huge_bytes", "hot_capacity", "miss_duration_seconds", "answer_size_bytes", "stale_age_seconds")
				theirs := series(t, prometheus.DefaultGatherer, "coredns_cache_", stocks)
				for k, v := range earlier {
					if strings.Contains(k, "_total ") {
						theirs[k] -= v
					}
				}
				want := rename(theirs)
				if len(want) < 5 || want["drops_total view= zones="] == 0 {
					t.Fatalf("the built-in cache counts only %v", want)
				}
				// optcache counts each response to another question as a drop, cache only those that it could have
				// kept.
				drops := "drops_total view= zones="
				if got[drops] < want[drops] {
					t.Errorf("%v drops, of which the built-in cache counts %v", got[drops], want[drops])
				}
				got[drops] = want[drops]
				diffSeries(t, got, want)
				// Every name and label of cache's metrics is there from the start.
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

// pedantic returns a registry that checks the collected metrics against their descriptions.
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
		instances.nextGeneration()
		h := startNamed(t, "shared", stockOptions(), addressUpstream)
		for range 3 {
			ask(ctx, h, asking("www.example.org.", dns.TypeA), udp4Client)
		}
		running = append(running, h)
		if got := series(t, reg, "coredns_optcache_", server); got["entries type=success view=shared zones=."] != 1 {
			t.Errorf("with %d instances: %v", len(running), got)
		}
	}
	// The same instance is behind several servers, and one of them has the address of another.
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

// corefileInput returns a Corefile as input for CoreDNS in this process.
func corefileInput(corefile string) caddy.Input {
	optcacheDirective()
	return caddy.CaddyfileInput{Filepath: "Testfile", Contents: []byte(corefile), ServerTypeName: "dns"}
}

// runCorefile runs a Corefile in this process until the test ends. reload replaces it by another one.
func runCorefile(t *testing.T, corefile string) (inst *caddy.Instance, reload func(string) error) {
	t.Helper()
	inst, err := caddy.Start(corefileInput(corefile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		inst.ShutdownCallbacks()
		inst.Stop()
	})
	return inst, func(corefile string) (err error) {
		inst, err = inst.Restart(corefileInput(corefile))
		return err
	}
}

// seriesOf gathers all series of the plugin with a given zone, by name and labels. It leaves out what is on huge pages: the kernel may
// not say that, or not in time.
func seriesOf(t *testing.T, zone string) map[string]float64 {
	t.Helper()
	families, err := pedantic(t).Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]float64)
	for _, f := range families {
		if strings.HasSuffix(f.GetName(), "_huge_bytes") {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := make(map[string]string)
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if !strings.HasSuffix(labels["zones"], zone) {
				continue
			}
			key := fmt.Sprintf("%s %s %s %s", f.GetName(), labels["server"], labels["zones"], labels["view"])
			for _, more := range []string{"type", "tier", "way", "reason"} {
				key += " " + labels[more]
			}
			all[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return all
}

// serversIn returns the addresses of all servers in the labels of the series.
func serversIn(series map[string]float64) []string {
	var all []string
	for k := range series {
		all = append(all, strings.Fields(k)[1])
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func TestSeriesAreThereBeforeAQueryComes(t *testing.T) {
	for i, tc := range []struct {
		name, corefile string
	}{
		{"one", "early.test:0 {\noptcache\n}"},
		{"several zones", "a.early.test:0 b.early.test:0 {\noptcache\n}"},
		{"several protocols", "early.test:0 tls://early.test:0 https://early.test:0 grpc://early.test:0 {\noptcache\n}"},
		{"bind", "early.test:0 {\nbind 127.0.0.1 127.0.0.2\noptcache\n}"},
		{"bind, IPv6 and several protocols", "early.test:0 tls://early.test:0 {\nbind 127.0.0.1 ::1\noptcache\n}"},
		{"multisocket", "early.test:0 {\nbind 127.0.0.1\nmultisocket 3\noptcache\n}"},
		{"view", "early.test:0 {\nview early.test {\nexpr true\n}\noptcache early.test\n}\nearly.test:0 {\noptcache\n}"},
		{"several blocks", "a.early.test:0 {\noptcache\n}\nb.early.test:0 {\nbind 127.0.0.1\noptcache\n}\nc.early.test:0 {\nwhoami\n}"},
		{"several blocks with the same labels", "a.early.test:0 {\noptcache early.test\n}\nb.early.test:0 {\noptcache early.test\n}"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if strings.Contains(tc.corefile, "::1") {
				l, err := net.Listen("tcp", "[::1]:0")
				if err != nil {
					t.Skip("this machine has no IPv6")
				}
				l.Close()
			}
			zone := fmt.Sprintf("early%d.test", i)
			text := regexp.MustCompile(`optcache.*`).ReplaceAllString(tc.corefile, "$0 {\nfastpath off\n}")
			inst, _ := runCorefile(t, strings.ReplaceAll(text, "early.test", zone))
			zone += "."
			early := seriesOf(t, zone)

			corefile, ok := chain.ContextOf(inst)
			if !ok {
				t.Fatal("the instance has no context")
			}
			configs, _ := chain.Configs(corefile)
			var want []string
			for _, s := range chain.Servers(inst) {
				if slices.ContainsFunc(configs, func(c *dnsserver.Config) bool {
					return c.Handler(pluginName) != nil && slices.Contains(serversOf(c), s.Addr)
				}) {
					want = append(want, s.Addr)
				}
			}
			slices.Sort(want)
			if want = slices.Compact(want); len(want) == 0 || !slices.Equal(serversIn(early), want) {
				t.Errorf("there are series of %v, and servers at %v", serversIn(early), want)
			}
			for _, d := range descs {
				name := regexp.MustCompile(`coredns_optcache_\w+`).FindString(d.String())
				if d == hugeDesc || d == fallbackDesc { // seriesOf leaves it out; with fastpath off
					continue
				}
				if !slices.ContainsFunc(slices.Collect(maps.Keys(early)), func(k string) bool { return strings.HasPrefix(k, name+" ") }) {
					t.Errorf("there is no %s", name)
				}
			}

			// A query adds no series but histograms, and no other labels.
			for _, c := range configs {
				o, ok := c.Handler(pluginName).(*Optcache)
				if !ok {
					continue
				}
				for _, addr := range serversOf(c) {
					ask(contextOf(t, addr), o, asking("www."+c.Zone, dns.TypeA), udp4Client)
				}
			}
			late := seriesOf(t, zone)
			for k := range late {
				name, _, _ := strings.Cut(k, " ")
				if _, ok := early[k]; !ok && !slices.ContainsFunc(histogramDescs, func(d *prometheus.Desc) bool { return strings.Contains(d.String(), name) }) {
					t.Errorf("only after a query there is %s", k)
				}
			}
			for k := range early {
				if _, ok := late[k]; !ok {
					t.Errorf("after a query there is no %s", k)
				}
			}
			asked := 0.0
			for k, n := range late {
				if strings.HasPrefix(k, "coredns_optcache_misses_total ") {
					asked += n
				}
			}
			if asked == 0 {
				t.Error("no query was counted")
			}
		})
	}
}

// serversOf returns the addresses that a config listens on, from the config's own fields.
func serversOf(c *dnsserver.Config) (addrs []string) {
	for _, host := range c.ListenHosts {
		addrs = append(addrs, c.Transport+"://"+net.JoinHostPort(host, c.Port))
	}
	return addrs
}

func TestServerAddresses(t *testing.T) {
	for _, tc := range []struct {
		keys, hosts, want []string
	}{
		{[]string{"dns://.:53"}, []string{""}, []string{"dns://:53"}},
		{[]string{"dns://example.org.:1053", "dns://example.net.:1053"}, []string{""}, []string{"dns://:1053"}},
		{[]string{"tls://.:853", "https://.:443", "grpc://.:443", "quic://.:853", "https3://.:443"}, []string{"192.0.2.1"},
			[]string{"tls://192.0.2.1:853", "https://192.0.2.1:443", "grpc://192.0.2.1:443", "quic://192.0.2.1:853", "https3://192.0.2.1:443"}},
		{[]string{"dns://2.0.192.in-addr.arpa.:53"}, []string{"2001:db8::1", "192.0.2.1"}, []string{"dns://[2001:db8::1]:53", "dns://192.0.2.1:53"}},
	} {
		if got := chain.ServerAddrs(tc.keys, tc.hosts); !slices.Equal(got, tc.want) {
			t.Errorf("%v on %v: %v, want %v", tc.keys, tc.hosts, got, tc.want)
		}
	}
}

func TestSeriesGoWithTheirBlocks(t *testing.T) {
	const gone, stays = "gone.test.", "stays.test."
	block := func(zone, more string) string { return zone + ":0 {\nbind 127.0.0.1\noptcache\n" + more + "}\n" }
	gauges := func(zone string) (n int) {
		for k := range seriesOf(t, zone) {
			if name := strings.Fields(k)[0]; !strings.Contains(name, "_total") {
				n++
			}
		}
		return n
	}
	_, reload := runCorefile(t, block(stays, ""))
	have := gauges(stays)
	if have == 0 {
		t.Fatal("there are no gauges")
	}
	for _, tc := range []struct {
		name, corefile string
		fails          bool
		gauges         int
	}{
		{"fails where it is parsed", block(stays, "") + block(gone, "nonsense\n"), true, 0},
		{"fails where blocks start", block(stays, "") + block(gone, "") + block(gone, ""), true, 0},
		{"fails where servers start", block(stays, "") + strings.Replace(block(gone, ""), "127.0.0.1", "192.0.2.1", 1), true, 0},
		{"one more block", block(stays, "") + block(gone, ""), false, have},
		{"one block less", block(stays, ""), false, 0},
		{"fails in the end", block(stays, "") + strings.Replace(block(gone, ""), "127.0.0.1", "192.0.2.1", 1), true, 0},
		{"no cache at all", "stays.test:0 {\nbind 127.0.0.1\nwhoami\n}", false, 0},
		{"fails where nobody listens for it", strings.Replace(block(gone, ""), "127.0.0.1", "192.0.2.1", 1), true, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := reload(tc.corefile); (err != nil) != tc.fails {
				t.Fatalf("the reload ended with %v", err)
			}
			if n := gauges(gone); n != tc.gauges {
				t.Errorf("%d gauges, want %d", n, tc.gauges)
			}
			if tc.gauges == 0 && len(seriesOf(t, gone)) > 0 { // the block has served no query
				t.Errorf("what has never served has series: %v", seriesOf(t, gone))
			}
			want := have
			if !strings.Contains(tc.corefile, "optcache") || strings.HasPrefix(tc.name, "fails where nobody") {
				want = 0
			}
			if n := gauges(stays); n != want {
				t.Errorf("%d gauges of the block that stays, want %d", n, want)
			}
		})
	}
}

// The prometheus plugin shows the metrics at each moment of CoreDNS's TestMetricsAvailableAfterReload and
// TestMetricsAvailableAfterReloadAndFailedReload, without the query that those tests send first.
func TestMetricsAvailableAfterReloads(t *testing.T) {
	const corefile = "available.test:0 {\nbind 127.0.0.1\nprometheus %s\noptcache {\ncache_file_path %s\n}\nwhoami\n%s}"
	// A scrape of the series that the tests before have left would take longer than CoreDNS gives it, under the race detector.
	allCounters.mu.Lock()
	allCounters.m = make(map[labels]*counters)
	allCounters.mu.Unlock()
	file, address := filepath.Join(t.TempDir(), "answers"), freeport.Address(t, "127.0.0.1")
	_, reload := runCorefile(t, fmt.Sprintf(corefile, address, file, ""))
	available := func() {
		t.Helper()
		res, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"entries", "hits_total", "misses_total", "memory_bytes", "memory_reserved_bytes", "memory_limit_bytes",
			"hot_capacity", "reload_kept_entries", "coalesce_waiting", "snapshot_failures", "snapshot_loaded_entries"} {
			line := regexp.MustCompile(`(?m)^coredns_optcache_` + name + `\{server="dns://127.0.0.1:0",.*zones="available.test."\}`)
			if !line.Match(body) {
				t.Errorf("there is no %s", name)
			}
		}
	}
	available()
	for range 2 {
		if err := reload(fmt.Sprintf(corefile, address, file, "invalid\n")); err == nil {
			t.Fatal("a wrong Corefile is accepted")
		}
		available()
	}
	for range 2 {
		if err := reload(fmt.Sprintf(corefile, address, file, "")); err != nil {
			t.Fatal(err)
		}
		available()
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
				for tc.file && h.snapshotter.partial.Load() {
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
			for deadline := time.Now().Add(time.Minute); gone.Value() != nil; runtime.GC() {
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

// manyBlocks starts n instances, each with an address of its own.
func manyBlocks(tb testing.TB, n int, o options) {
	tb.Helper()
	for i := range n {
		h := newOptcache(o)
		h.Next = addressUpstream
		h.clock = systemNow
		h.addrs = []string{fmt.Sprintf("dns://many:%d", i)}
		if err := h.start("", []plugin.Handler{h}); err != nil {
			tb.Fatal(err)
		}
		stopsWith(tb, h)
		for j := range 3 {
			s := newScratch()
			ask1(h.store, s, j, 0)
			a := plainSample(record.Success, 60, 0)
			insertSample(h.store, s, &a, 0)
		}
	}
}

// By default, Prometheus gives a scrape ten seconds, and CoreDNS gives the response five.
func TestScrapeOfManyBlocks(t *testing.T) {
	blocks := 800
	if raceEnabled { // the detector keeps a record of each word that a scrape reads
		blocks = 80
	}
	manyBlocks(t, blocks, stockOptions())
	reg := pedantic(t)
	fastest := time.Hour
	for range 3 { // the machine may be busy
		begun := time.Now()
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		fastest = min(fastest, time.Since(begun))
		for _, f := range families {
			n := 0
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					if strings.HasPrefix(l.GetValue(), "dns://many:") {
						n++
					}
				}
			}
			switch f.GetName() {
			case "coredns_optcache_memory_bytes", "coredns_optcache_memory_limit_bytes", "coredns_optcache_misses_total":
				if n != blocks {
					t.Errorf("%s has %d series of %d blocks", f.GetName(), n, blocks)
				}
			}
		}
	}
	if limit := 2 * time.Second; fastest > limit && !raceEnabled {
		t.Errorf("a scrape takes %v, and should take less than %v", fastest, limit)
	}
	t.Logf("a scrape of %d blocks takes %v", blocks, fastest)
}

func BenchmarkScrape(b *testing.B) {
	for _, n := range []int{1, 100, 800} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			manyBlocks(b, n, benchOptions(10_000))
			reg := pedantic(b)
			for b.Loop() {
				if _, err := reg.Gather(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "µs/block")
		})
	}
}

// Plugins that read metadata learn what became of a request, and its span says the same. A refresh has a span of its own, which
// may end after the request's.
func TestMetadataAndSpansSayWhatBecameOfARequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := new(upstream)
		up.answersWith(time.Second, oldRecord)
		o := stale(func(s *staleOptions) { s.verify, s.timeout = true, 100*time.Millisecond })
		o.prefetch = prefetchOptions{amount: 1, gap: time.Hour, percentage: 10}
		o.coalesce = defaultCoalesce
		h := startNamed(t, t.Name(), o, named{up, "next"}, named{name: "metadata"}, named{name: "trace"})
		tracer := mocktracer.New()
		said := func() string {
			span := tracer.StartSpan(pluginName)
			defer span.Finish()
			ctx := opentracing.ContextWithSpan(metadata.ContextWithMetadata(serverContext(t)), span)
			ask(ctx, h, asking("host.example.org.", dns.TypeA), udp4Client)
			var words []string
			for _, label := range []string{"status", "tier", "age", "ttl"} {
				if f := metadata.ValueFunc(ctx, "optcache/"+label); f != nil {
					words = append(words, f())
				}
				if tag, f := span.(*mocktracer.MockSpan).Tag("optcache/"+label), metadata.ValueFunc(ctx, "optcache/"+label); f == nil && tag != nil || f != nil && tag != f() {
					t.Errorf("the span has %s %v", label, tag)
				}
			}
			return strings.Join(words, " ")
		}
		// spans returns the spans since the last call, each behind the one that it is part of, or follows.
		spans := func() []string {
			synctest.Wait()
			names, all := map[int]string{}, []string{}
			for _, s := range tracer.FinishedSpans() {
				names[s.SpanContext.SpanID] = s.OperationName
			}
			for _, s := range tracer.FinishedSpans() {
				all = append(all, strings.TrimPrefix(names[s.ParentID]+" > "+s.OperationName, " > "))
			}
			tracer.Reset()
			slices.Sort(all)
			return all
		}
		var first string
		var wg sync.WaitGroup
		wg.Go(func() { first = said() })
		synctest.Wait()
		if got := said(); got != "coalesced" {
			t.Errorf("one that waits: %s", got)
		}
		if wg.Wait(); first != "miss" {
			t.Errorf("the first one: %s", first)
		}
		if got, want := spans(), []string{"optcache", "optcache", "optcache > next"}; !slices.Equal(got, want) {
			t.Errorf("a miss and one that waits: spans %q, want %q", got, want)
		}
		time.Sleep(10 * time.Second)
		if got := said(); got != "hit probationary 10 50" {
			t.Errorf("a hit: %s", got)
		}
		time.Sleep(46 * time.Second)
		spans()
		if got := said(); got != "prefetch probationary 56 4" {
			t.Errorf("a hit that starts a refresh: %s", got)
		}
		time.Sleep(2 * time.Second)
		if got, want := spans(), []string{"optcache", "optcache > optcache refresh", "optcache refresh > next"}; !slices.Equal(got, want) {
			t.Errorf("a hit that starts a refresh: spans %q, want %q", got, want)
		}
		time.Sleep(2 * time.Minute)
		if got := said(); !strings.HasPrefix(got, "stale probationary ") || !strings.HasSuffix(got, " 0") {
			t.Errorf("a stale answer: %s", got)
		}
		time.Sleep(2 * time.Minute)
		up.answersWith(0, newRecord)
		if got := said(); got != "verified" {
			t.Errorf("a verified answer: %s", got)
		}
	})
}

// Histograms tell how misses end, how old stale answers are, and how large answers. They have no more series than values, go
// with their block, and go on with the next one.
func TestHistograms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		addr := "dns://" + t.Name() + ":53"
		ctx := contextOf(t, addr)
		now := func() map[string]float64 {
			all := series(t, pedantic(t), "coredns_optcache_", addr)
			for k := range all {
				if !strings.Contains(k, " count") && !strings.Contains(k, " sum") && !strings.Contains(k, " le ") {
					delete(all, k)
				}
			}
			return all
		}
		up := new(upstream)
		up.answersWith(time.Second, oldRecord)
		o := stale(func(*staleOptions) {})
		h := startNamed(t, t.Name(), o, up)
		if got := now(); len(got) > 0 {
			t.Errorf("without a value: %v", got)
		}
		together := func(n int, name string) {
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() { ask(ctx, h, asking(name, dns.TypeA), udp4Client) })
			}
			wg.Wait()
		}
		together(3, "host.example.org.")
		up.answersWith(10*time.Second, "slow.example.org. 60 IN A 192.0.2.1")
		together(3, "slow.example.org.") // the second one asks again after two seconds, the third one is let go after four
		up.fails(0)
		together(1, "fails.example.org.")
		time.Sleep(100 * time.Second)
		together(1, "host.example.org.")
		synctest.Wait()
		got := now()
		const labels = "view=TestHistograms zones=. "
		name := func(n string) float64 { return float64(len(n) + 1) }
		size := 2*(12+name("host.example.org.")+4+name("host.example.org.")+14) + 12 + name("fails.example.org.") + 4
		want := map[string]float64{
			"miss_duration_seconds outcome=answered " + labels + "count":  3,
			"miss_duration_seconds outcome=answered " + labels + "sum":    23,
			"miss_duration_seconds outcome=answered " + labels + "le 1":   1,
			"miss_duration_seconds outcome=answered " + labels + "le 16":  3,
			"miss_duration_seconds outcome=coalesced " + labels + "count": 2,
			"miss_duration_seconds outcome=coalesced " + labels + "sum":   2,
			"miss_duration_seconds outcome=failed " + labels + "count":    1,
			"miss_duration_seconds outcome=let_go " + labels + "count":    1,
			"miss_duration_seconds outcome=let_go " + labels + "sum":      4,
			"stale_age_seconds " + labels + "count":                       1,
			"stale_age_seconds " + labels + "sum":                         52,
			"stale_age_seconds " + labels + "le 8":                        0,
			"stale_age_seconds " + labels + "le 64":                       1,
			"answer_size_bytes " + labels + "count":                       3,
			"answer_size_bytes " + labels + "sum":                         size,
		}
		for key, want := range want {
			if v, ok := got[key]; !ok || v != want {
				t.Errorf("%s: %v, want %v", key, v, want)
			}
		}
		if t.Failed() {
			t.Logf("%v", got)
		}
		h.stop()
		if got := now(); len(got) > 0 {
			t.Errorf("the block has gone: %v", got)
		}
		h = startNamed(t, t.Name(), o, up)
		ask(ctx, h, asking("another.example.org.", dns.TypeA), udp4Client)
		if n := now()["miss_duration_seconds outcome=failed "+labels+"count"]; n != 2 {
			t.Errorf("after another miss of a next instance, %v have failed, want 2", n)
		}
	})
}
