package optcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	golog "log"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/test"

	"github.com/miekg/dns"

	controlclient "github.com/optcache/optcache/plugin/control/client"
	"github.com/optcache/optcache/plugin/level2"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/keep"
	"github.com/optcache/optcache/plugin/pkg/memlimit"
	"github.com/optcache/optcache/plugin/pkg/popularity"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file tests how a block of the Corefile is read: accepted words, errors and warnings, and setup in a server.
// The checks when a block starts are tested in check_test.go, and the comparison with the parser of cache is in
// stockparse_test.go.

// controller returns a controller that reads corefile in a server block for example.org.
func controller(corefile string) *caddy.Controller {
	c := caddy.NewTestController("dns", corefile)
	c.ServerBlockKeys = []string{"dns://example.org.:53"}
	return c
}

// defaults are the options of a block without properties.
func defaults() options {
	return options{
		zones:              []string{"example.org."},
		success:            classOptions{capacity: 10000, maxTTL: 3600 * time.Second, minTTL: 5 * time.Second},
		denial:             classOptions{capacity: 10000, maxTTL: 1800 * time.Second, minTTL: 5 * time.Second},
		servfail:           5 * time.Second,
		prefetch:           prefetchOptions{gap: time.Minute, percentage: 10},
		coalesce:           coalesceOptions{waiters: 1000, wait: 2 * time.Second},
		shared:             sharedOptions{Options: level2.Options{Timeout: 5 * time.Millisecond, Prefix: "optcache"}},
		explain:            true,
		hotPercentage:      10,
		promotionThreshold: 3,
		lineAligned:        true,
	}
}

// block wraps lines into an optcache block; the first of them is line 2.
func block(lines ...string) string {
	return "optcache {\n" + strings.Join(lines, "\n") + "\n}"
}

func TestParseAccepts(t *testing.T) {
	t.Parallel()
	limit, _ := memlimit.Of(os.DirFS("/"))
	for _, tc := range []struct {
		name     string
		corefile string
		change   func(*options) // from the defaults
	}{
		{"defaults", "optcache", func(o *options) {}},
		{"empty block", "optcache {\n}", func(o *options) {}},
		{"empty block in one word", "optcache {}", func(o *options) {}},
		{"empty block in one word behind a zone", "optcache 10 a.nl {}", func(o *options) {
			o.zones, o.success.maxTTL, o.denial.maxTTL = []string{"a.nl."}, 10*time.Second, 10*time.Second
		}},
		{"TTL sets both classes", "optcache 30", func(o *options) {
			o.success.maxTTL, o.denial.maxTTL = 30*time.Second, 30*time.Second
		}},
		{"largest TTL", "optcache 2147483647", func(o *options) {
			o.success.maxTTL, o.denial.maxTTL = 2147483647*time.Second, 2147483647*time.Second
		}},
		{"zones are normalized", "optcache Example.NL a.b.", func(o *options) { o.zones = []string{"example.nl.", "a.b."} }},
		{"first word that is no number is a zone", "optcache aaa example.nl", func(o *options) { o.zones = []string{"aaa.", "example.nl."} }},
		{"second number is a zone", "optcache 10 20", func(o *options) {
			o.zones, o.success.maxTTL, o.denial.maxTTL = []string{"20."}, 10*time.Second, 10*time.Second
		}},
		{"root zone", "optcache .", func(o *options) { o.zones = []string{"."} }},
		{"network becomes reverse zones", "optcache 10.0.0.0/15", func(o *options) {
			o.zones = []string{"0.10.in-addr.arpa.", "1.10.in-addr.arpa."}
		}},
		{"block overrides TTL for its class", "optcache 25 a.nl {\ndenial 2000 15\n}", func(o *options) {
			o.zones, o.success.maxTTL = []string{"a.nl."}, 25*time.Second
			o.denial.capacity, o.denial.maxTTL = 2000, 15*time.Second
		}},
		{"success capacity", block("success 4096"), func(o *options) { o.success.capacity = 4096 }},
		{"success TTL and MINTTL", block("success 4096 1800 30"), func(o *options) {
			o.success = classOptions{capacity: 4096, maxTTL: 1800 * time.Second, minTTL: 30 * time.Second}
		}},
		{"denial TTL and MINTTL", block("denial 4096 1800 0"), func(o *options) {
			o.denial = classOptions{capacity: 4096, maxTTL: 1800 * time.Second}
		}},
		{"MINTTL over TTL, as in cache", block("success 4096 5 60"), func(o *options) {
			o.success = classOptions{capacity: 4096, maxTTL: 5 * time.Second, minTTL: time.Minute}
		}},
		{"small capacities are raised", block("success 1", "denial 0"), func(o *options) {
			o.success.capacity, o.denial.capacity = 1024, 1024
		}},
		{"largest capacity", block("success 268435456"), func(o *options) { o.success.capacity = 1 << 28 }},
		{"servfail", block("servfail 1m"), func(o *options) { o.servfail = time.Minute }},
		{"servfail never", block("servfail 0"), func(o *options) { o.servfail = 0 }},
		{"servfail at most", block("servfail 5m"), func(o *options) { o.servfail = 5 * time.Minute }},
		{"servfail with MAX", block("servfail 2s 1m"), func(o *options) { o.servfail, o.servfailMost = 2*time.Second, time.Minute }},
		{"servfail with MAX at most", block("servfail 5m 5m"), func(o *options) { o.servfail, o.servfailMost = 5*time.Minute, 5*time.Minute }},
		{"servfail again without MAX", block("servfail 2s 1m", "servfail 3s"), func(o *options) { o.servfail = 3 * time.Second }},
		{"disable everywhere", block("disable denial"), func(o *options) { o.denial.except = []string{"."} }},
		{"disable zones of both classes", block("disable success A.nl b.nl", "disable denial c.nl"), func(o *options) {
			o.success.except, o.denial.except = []string{"a.nl.", "b.nl."}, []string{"c.nl."}
		}},
		{"keepttl", block("keepttl"), func(o *options) { o.keepTTL = true }},
		{"prefetch", block("prefetch 10"), func(o *options) { o.prefetch.amount = 10 }},
		{"prefetch off", block("prefetch 0"), func(o *options) {}},
		{"prefetch with all", block("prefetch 3 10s 90%"), func(o *options) {
			o.prefetch = prefetchOptions{amount: 3, gap: 10 * time.Second, percentage: 90}
		}},
		{"prefetch of more than can be counted", block("prefetch 4294967297"), func(o *options) { o.prefetch.amount = popularity.Most }},
		{"serve_stale", block("serve_stale"), func(o *options) { o.stale.upTo = time.Hour }},
		{"serve_stale off", block("serve_stale 0s"), func(o *options) {}},
		{"serve_stale with a window", block("serve_stale 10m"), func(o *options) { o.stale.upTo = 10 * time.Minute }},
		{"serve_stale immediate", block("serve_stale 10m Immediate 30s 5m"), func(o *options) {
			o.stale = staleOptions{upTo: 10 * time.Minute, ttl: 30 * time.Second, recheck: 5 * time.Minute}
		}},
		{"serve_stale verify", block("serve_stale 10m VERIFY"), func(o *options) {
			o.stale = staleOptions{upTo: 10 * time.Minute, verify: true}
		}},
		{"serve_stale verify with all", block("serve_stale 10m verify 100ms 4294967295s 1s"), func(o *options) {
			o.stale = staleOptions{upTo: 10 * time.Minute, verify: true, timeout: 100 * time.Millisecond, ttl: 4294967295 * time.Second, recheck: time.Second}
		}},
		{"serve_stale_policy", block("serve_stale_policy Prefer_Positive", "serve_stale"), func(o *options) {
			o.stale = staleOptions{upTo: time.Hour, preferPositive: true}
		}},
		{"coalesce", block("coalesce"), func(o *options) {}},
		{"fastpath", block("fastpath"), func(o *options) { o.fast = fastOptions{mode: fastOn, at: "Testfile:2"} }},
		{"fastpath on", block("fastpath on"), func(o *options) { o.fast = fastOptions{mode: fastOn, at: "Testfile:2"} }},
		{"fastpath off", block("fastpath off"), func(o *options) { o.fast = fastOptions{mode: fastOff, at: "Testfile:2"} }},
		{"fastpath auto", block("fastpath auto"), func(o *options) { o.fast = fastOptions{mode: fastAuto, at: "Testfile:2"} }},
		{"fastpath auto with workers", block("fastpath auto 3"), func(o *options) {
			o.fast = fastOptions{mode: fastAuto, workers: 3, at: "Testfile:2"}
		}},
		{"fastpath with workers", block("keepttl", "fastpath 1024"), func(o *options) {
			o.keepTTL, o.fast = true, fastOptions{mode: fastOn, workers: 1024, at: "Testfile:3"}
		}},
		{"cache_file_path", block("cache_file_path /var/lib/optcache/answers"), func(o *options) {
			o.file = fileOptions{path: "/var/lib/optcache/answers", interval: 5 * time.Minute}
		}},
		{"control", block("control 127.0.0.1:8053"), func(o *options) { o.control.Address = "127.0.0.1:8053" }},
		{"control at a unix socket", block("control unix:///tmp/control.sock"), func(o *options) { o.control.Address = "unix:///tmp/control.sock" }},
		{"cache_file_path with an interval", block("cache_file_path /var/lib/../lib/answers 0"), func(o *options) {
			o.file = fileOptions{path: "/var/lib/answers"}
		}},
		{"shared", block("shared valkey://192.0.2.1", "shared_secret /s"), func(o *options) {
			o.shared.Servers.Addresses, o.shared.SecretFile = []string{"192.0.2.1:6379"}, "/s"
		}},
		{"shared with all", block("shared rediss+cluster://192.0.2.1:1 rediss+cluster://192.0.2.2", "shared_secret /s", "shared_password /p", "shared_timeout 20ms",
			"shared_zones a.example.org", "shared_prefix node:7", "shared_resolver 192.0.2.53", "shared_write off"), func(o *options) {
			o.shared.Servers.Addresses, o.shared.Servers.Cluster, o.shared.Servers.TLS = []string{"192.0.2.1:1", "192.0.2.2:6379"}, true, true
			o.shared.SecretFile, o.shared.PasswordFile, o.shared.Timeout, o.shared.zones = "/s", "/p", 20*time.Millisecond, []string{"a.example.org."}
			o.shared.Prefix, o.shared.Resolver, o.shared.ReadOnly = "node:7", "192.0.2.53:53", true
		}},
		{"warm_from", block("warm_from https://b.example:8443"), func(o *options) { o.warmFrom.from = neighboursAt("https://b.example:8443") }},
		{"warm_from with all", block("warm_from https://b.example:8443 127.0.0.1:8053 unix:///run/c.sock ca /c token /t"), func(o *options) {
			o.warmFrom = warmFromOptions{neighboursAt("https://b.example:8443", "127.0.0.1:8053", "unix:///run/c.sock"), "/t", "/c"}
		}},
		{"top_clients", block("top_clients"), func(o *options) { o.clients = prefixes{24, 56} }},
		{"top_clients with prefixes", block("top_clients 32 128"), func(o *options) { o.clients = prefixes{32, 128} }},
		{"upstream_limit", block("upstream_limit 900"), func(o *options) {
			o.upstream = upstreamOptions{perSecond: 900, burst: 900, wait: time.Second}
		}},
		{"upstream_limit with all", block("upstream_limit 900 100 250ms group node"), func(o *options) {
			o.upstream = upstreamOptions{perSecond: 900, burst: 100, wait: 250 * time.Millisecond, group: "node"}
		}},
		{"upstream_limit with a group", block("upstream_limit 900 group node"), func(o *options) {
			o.upstream = upstreamOptions{perSecond: 900, burst: 900, wait: time.Second, group: "node"}
		}},
		{"denial_without_soa", block("denial_without_soa 5s"), func(o *options) { o.withoutSOA = 5 * time.Second }},
		{"keep_warm", block("keep_warm A.nl", "keep_warm b.nl mx TXT", "keep_warm file /etc/names"), func(o *options) {
			o.warm = warmOptions{file: "/etc/names", list: []keep.Question{
				{Name: "a.nl.", Type: dns.TypeA}, {Name: "a.nl.", Type: dns.TypeAAAA}, {Name: "b.nl.", Type: dns.TypeMX}, {Name: "b.nl.", Type: dns.TypeTXT},
			}}
		}},
		{"jitter", block("jitter 25"), func(o *options) { o.jitter = 25 }},
		{"ttl", block("ttl success 10"), func(o *options) { o.ttls = []admit.TTLs{bound(10, 0, "")} }},
		{"ttl for zones", block("ttl A.nl 10.0.0.0/8 success 10 5"), func(o *options) {
			t := bound(10, 5, "a.nl.")
			t.Zones = append(t.Zones, bound(0, 0, "10.in-addr.arpa.").Zones...)
			o.ttls = []admit.TTLs{t}
		}},
		{"ttl for types, both classes", block("ttl AAAA nl MX denial 20 success 10", "ttl success 5"), func(o *options) {
			t := bound(10, 0, "nl.", dns.TypeAAAA, dns.TypeMX)
			d := t
			d.Class, d.Max = record.Denial, 20*time.Second
			o.ttls = []admit.TTLs{d, t, bound(5, 0, "")}
		}},
		{"ecs", block("ecs"), func(*options) {}},
		{"ecs strict", block("ecs strict"), func(*options) {}},
		{"ecs off", block("ecs off"), func(o *options) { o.ecs.mode = ecsOff }},
		{"ecs scoped", block("ecs scoped"), func(o *options) { o.ecs = ecsOptions{ecsScoped, 100} }},
		{"ecs scoped with MAX", block("ecs scoped 10000"), func(o *options) { o.ecs = ecsOptions{ecsScoped, 10_000} }},
		{"stale_for", block("serve_stale", "stale_for off", "stale_for A.nl 10.0.0.0/8 AAAA on"), func(o *options) {
			o.stale.upTo = time.Hour
			o.staleFor = []admit.Switch{{}, {Selector: admit.Selector{
				Zones: [][]byte{bound(0, 0, "a.nl.").Zones[0], bound(0, 0, "10.in-addr.arpa.").Zones[0]}, Types: []uint16{dns.TypeAAAA},
			}, On: true}}
		}},
		{"prefetch_for", block("prefetch 2", "prefetch_for MX TXT off"), func(o *options) {
			o.prefetch.amount = 2
			o.prefetchFor = []admit.Switch{{Selector: admit.Selector{Types: []uint16{dns.TypeMX, dns.TypeTXT}}}}
		}},
		{"nxdomain_cut", block("nxdomain_cut"), func(o *options) { o.cut.on = true }},
		{"nxdomain_cut probe", block("nxdomain_cut probe"), func(o *options) { o.cut = cutOptions{on: true, probe: true} }},
		{"nxdomain_cut with zones", block("nxdomain_cut cluster.local 10.0.0.0/8"), func(o *options) {
			o.cut = cutOptions{on: true, zones: []string{"cluster.local.", "10.in-addr.arpa."}}
		}},
		{"nxdomain_cut probe with zones", block("nxdomain_cut probe A.nl"), func(o *options) {
			o.cut = cutOptions{on: true, probe: true, zones: []string{"a.nl."}}
		}},
		{"coalesce off", block("coalesce off"), func(o *options) { o.coalesce.waiters = 0 }},
		{"coalesce with waiters", block("coalesce 1"), func(o *options) { o.coalesce.waiters = 1 }},
		{"coalesce with all", block("coalesce 1000000 1m"), func(o *options) {
			o.coalesce = coalesceOptions{waiters: 1000000, wait: time.Minute}
		}},
		{"ede on", block("ede on"), func(o *options) {}},
		{"ede off", block("ede off"), func(o *options) { o.explain = false }},
		{"use_optimized_cache true", block("use_optimized_cache true"), func(o *options) {}},
		{"hot_cache_percentage none", block("hot_cache_percentage 0"), func(o *options) { o.hotPercentage = 0 }},
		{"hot_cache_percentage half", block("hot_cache_percentage 50"), func(o *options) { o.hotPercentage = 50 }},
		{"hot_cache_promotion_threshold least", block("hot_cache_promotion_threshold 1"), func(o *options) { o.promotionThreshold = 1 }},
		{"hot_cache_promotion_threshold most", block("hot_cache_promotion_threshold 255"), func(o *options) { o.promotionThreshold = 255 }},
		{"cache_line_optimization false", block("cache_line_optimization false"), func(o *options) { o.lineAligned = false }},
		{"max_memory derived", block("max_memory 0"), func(o *options) {}},
		{"max_memory share", block("max_memory 10%"), func(o *options) {
			o.maxMemory = min(max(memlimit.ForCaches(limit, memlimit.Heap())/100*10, 1<<20), mostMemory)
		}},
		{"max_memory auto", block("max_memory auto"), func(o *options) {
			o.maxMemory, o.memoryAuto = min(max(memlimit.ForCaches(limit, memlimit.Heap())/100*50, 1<<20), mostMemory), true
		}},
		{"pool", block("pool node"), func(o *options) { o.pooled.name = "node" }},
		{"pool with a size", block("pool node 64MB"), func(o *options) { o.pooled = poolOptions{name: "node", size: 64 << 20} }},
		{"pool with a share", block("pool node 10%"), func(o *options) {
			o.pooled = poolOptions{name: "node", size: min(max(memlimit.ForCaches(limit, memlimit.Heap())/100*10, 1<<20), mostMemory)}
		}},
		{"pool auto", block("pool node auto"), func(o *options) {
			o.pooled = poolOptions{name: "node", auto: true}
			if limit > 0 {
				o.pooled.size = min(max(memlimit.ForCaches(limit, memlimit.Heap())/100*50, 1<<20), mostMemory)
			}
		}},
		{"pool of blocks that are the same", block("pool node same"), func(o *options) { o.pooled = poolOptions{name: "node", same: true} }},
		{"pool with all words", block("pool node 64MB same"), func(o *options) { o.pooled = poolOptions{name: "node", size: 64 << 20, same: true} }},
		{"max_memory plain", block("max_memory 2097152"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory B", block("max_memory 1048576B"), func(o *options) { o.maxMemory = 1 << 20 }},
		{"max_memory KB", block("max_memory 2048KB"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory KiB", block("max_memory 2048KiB"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory MB", block("max_memory 64MB"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory mib", block("max_memory 64mib"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory k", block("max_memory 2048k"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory Ki", block("max_memory 2048Ki"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory M", block("max_memory 64M"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory Mi", block("max_memory 64Mi"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory MiB", block("max_memory 64MiB"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory G", block("max_memory 1G"), func(o *options) { o.maxMemory = 1 << 30 }},
		{"max_memory gi", block("max_memory 1gi"), func(o *options) { o.maxMemory = 1 << 30 }},
		{"max_memory T", block("max_memory 1T"), func(o *options) { o.maxMemory = 1 << 40 }},
		{"max_memory Ti", block("max_memory 1Ti"), func(o *options) { o.maxMemory = 1 << 40 }},
		{"max_memory TB", block("max_memory 1TB"), func(o *options) { o.maxMemory = 1 << 40 }},
		{"max_memory tib", block("max_memory 1tib"), func(o *options) { o.maxMemory = 1 << 40 }},
		{"max_memory GB", block("max_memory 1GB"), func(o *options) { o.maxMemory = 1 << 30 }},
		{"max_memory gIb", block("max_memory 1gIb"), func(o *options) { o.maxMemory = 1 << 30 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			want := defaults()
			tc.change(&want)
			b, err := parse(controller(tc.corefile))
			if want.maxMemory > mostMemory {
				if err == nil || !strings.Contains(err.Error(), ":2") {
					t.Errorf("accepted, or refused without its line: %v", err)
				}
				return
			}
			if overflows(tc.corefile) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !b.optimized {
				t.Error("not optimized")
			}
			if !reflect.DeepEqual(b.options, want) {
				t.Errorf("got  %+v\nwant %+v", b.options, want)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	const once = "once per Server Block"
	for _, tc := range []struct {
		name     string
		corefile string
		line     int
		words    string // all of them, separated by commas, are in the error
	}{
		{"TTL zero", "optcache 0", 1, `TTL,"0"`},
		{"TTL negative", "optcache -1 example.org", 1, `TTL,"-1"`},
		{"plugin twice", "optcache\noptcache", 2, once},
		{"plugin twice with blocks", "optcache {\nkeepttl\n}\noptcache 10 {\n}", 4, once},
		{"block twice", "optcache {\n} {\n}", 2, `"{"`},
		{"block twice, full", "optcache {\nkeepttl\n}\n{\nkeepttl\n}", 4, `"{"`},
		{"block on the next line", "optcache\n{\nkeepttl\n}", 2, `"{",put the brace at the end of that line,"optcache {"`},
		{"word behind the block", "optcache {\nkeepttl\n} foo", 3, `"foo"`},
		{"block in the block", block("success 2000 {", "keepttl", "}"), 2, `"{",success`},
		{"unknown property", block("keepttl", "positive 15"), 3, `"positive",unknown`},
		{"empty property", block(`""`), 2, `"",unknown`},

		{"success without capacity", block("success"), 2, "success,lacks its value"},
		{"success not a number", block("success many"), 2, `success capacity,"many"`},
		{"success TTL zero", block("success 2000 0"), 2, `success TTL,"0"`},
		{"success TTL not a number", block("success 2000 1h"), 2, `success TTL,"1h"`},
		{"success MINTTL negative", block("success 2000 10 -1"), 2, `success MINTTL,"-1"`},
		{"denial without capacity", block("denial"), 2, "denial,lacks its value"},
		{"denial not a number", block("success 15", "denial aaa"), 3, `denial capacity,"aaa"`},
		{"denial TTL zero", block("denial 2000 0"), 2, `denial TTL,"0"`},

		{"servfail without duration", block("servfail"), 2, "servfail,lacks its value"},
		{"servfail not a duration", block("servfail 5"), 2, `servfail,"5"`},
		{"servfail negative", block("servfail -1s"), 2, `servfail,"-1s"`},
		{"servfail over 5 minutes", block("servfail 301s"), 2, `servfail,"301s",5m`},
		{"servfail with a word too many", block("servfail 1s 2s 3s"), 2, `servfail,"3s"`},
		{"servfail MAX not a duration", block("servfail 1s 2"), 2, `servfail MAX,"2"`},
		{"servfail MAX negative", block("keepttl", "servfail 0 -2s"), 3, `servfail MAX,"-2s"`},
		{"servfail MAX over 5 minutes", block("servfail 1s 301s"), 2, `servfail MAX,"301s",5m`},
		{"servfail MAX below DURATION", block("servfail 10s 5s"), 2, `servfail MAX: "5s" is less than DURATION, "10s"`},
		{"servfail MAX of nothing", block("servfail 0 5s"), 2, `servfail MAX: "5s" has nothing to double,"0"`},
		{"servfail MAX empty", block(`servfail 5s ""`), 2, `servfail,"" was given`},
		{"disable without class", block("disable"), 2, "disable,lacks its value"},
		{"disable of an unknown class", block("disable both"), 2, `disable,"both"`},
		{"keepttl with a word", block("keepttl true"), 2, `keepttl,"true"`},

		{"use_optimized_cache without value", block("use_optimized_cache"), 2, "use_optimized_cache,lacks its value"},
		{"use_optimized_cache neither", block("use_optimized_cache yes"), 2, `use_optimized_cache,"yes"`},
		{"use_optimized_cache with a word too many", block("use_optimized_cache true false"), 2, `use_optimized_cache,"false"`},
		{"use_optimized_cache twice", block("use_optimized_cache true", "use_optimized_cache false"), 3, "use_optimized_cache,twice"},
		{"hot_cache_percentage without value", block("hot_cache_percentage"), 2, "hot_cache_percentage,lacks its value"},
		{"hot_cache_percentage empty", block(`hot_cache_percentage ""`), 2, "hot_cache_percentage,lacks its value,environment variable"},
		{"hot_cache_percentage with a sign", block("hot_cache_percentage 10%"), 2, `hot_cache_percentage,"10%"`},
		{"hot_cache_percentage negative", block("hot_cache_percentage -1"), 2, `hot_cache_percentage,"-1"`},
		{"hot_cache_percentage too large", block("hot_cache_percentage 51"), 2, `hot_cache_percentage,"51",between 0 and 50`},
		{"hot_cache_percentage automatic", block("hot_cache_percentage automatic"), 2, `hot_cache_percentage,"automatic"`},
		{"hot_cache_percentage twice", block("hot_cache_percentage 1", "hot_cache_percentage 1"), 3, "hot_cache_percentage,twice"},
		{"hot_cache_promotion_threshold zero", block("hot_cache_promotion_threshold 0"), 2, `hot_cache_promotion_threshold,"0"`},
		{"hot_cache_promotion_threshold too large", block("hot_cache_promotion_threshold 256"), 2, `hot_cache_promotion_threshold,"256"`},
		{"hot_cache_promotion_threshold not a number", block("hot_cache_promotion_threshold 3.5"), 2, `hot_cache_promotion_threshold,"3.5"`},
		{"cache_line_optimization neither", block("cache_line_optimization 1"), 2, `cache_line_optimization,"1"`},
		{"max_memory without value", block("max_memory"), 2, "max_memory,lacks its value"},
		{"max_memory without number", block("max_memory MB"), 2, `max_memory,"MB"`},
		{"max_memory of an unknown unit", block("max_memory 64PB"), 2, `max_memory,"64PB"`},
		{"max_memory of a unit twice", block("max_memory 64MBB"), 2, `max_memory,"64MBB"`},
		{"brace behind a value", block("success 1500 }"), 2, `success TTL,"}"`},
		{"max_memory with a fraction", block("max_memory 1.5GB"), 2, `max_memory,"1.5GB"`},
		{"max_memory negative", block("max_memory -64MB"), 2, `max_memory,"-64MB"`},
		{"max_memory with a space", block("max_memory 64 MB"), 2, `max_memory,"MB"`},
		{"max_memory too small", block("max_memory 512KiB"), 2, `max_memory,"512KiB",less than 1MB`},
		{"max_memory one byte too small", block("max_memory 1048575"), 2, `max_memory,"1048575"`},
		{"max_memory number overflow", block("max_memory 9223372036854775808"), 2, `max_memory,"9223372036854775808",too large`},
		{"max_memory unit overflow", block("max_memory 8589934592GB"), 2, `max_memory,"8589934592GB",too large`},

		{"prefetch without amount", block("prefetch"), 2, "prefetch,lacks its value"},
		{"prefetch negative", block("prefetch -1"), 2, `prefetch AMOUNT,"-1"`},
		{"prefetch not a number", block("prefetch many"), 2, `prefetch AMOUNT,"many"`},
		{"prefetch without unit", block("prefetch 1 60"), 2, `prefetch DURATION,"60"`},
		{"prefetch without percent sign", block("prefetch 1 1m 10"), 2, `prefetch PERCENTAGE,"10",%`},
		{"prefetch percentage too small", block("prefetch 1 1m 9%"), 2, `prefetch PERCENTAGE,"9",between 10 and 90`},
		{"prefetch percentage too large", block("prefetch 1 1m 91%"), 2, `prefetch PERCENTAGE,"91"`},
		{"prefetch percentage not a number", block("prefetch 1 1m x%"), 2, `prefetch PERCENTAGE,"x"`},
		{"prefetch with a word too many", block("prefetch 1 1m 10% 5"), 2, `prefetch,"5"`},
		{"serve_stale not a duration", block("keepttl", "serve_stale 60"), 3, `serve_stale DURATION,"60"`},
		{"serve_stale negative", block("serve_stale -1s"), 2, `serve_stale DURATION,"-1s"`},
		{"serve_stale of an unknown mode", block("serve_stale 1h later"), 2, `serve_stale,"later",immediate,verify`},
		{"serve_stale timeout not a duration", block("serve_stale 1h verify soon"), 2, `serve_stale verify TIMEOUT,"soon"`},
		{"serve_stale timeout negative", block("serve_stale 1h verify -1s"), 2, `serve_stale verify TIMEOUT,"-1s"`},
		{"serve_stale TTL negative", block("serve_stale 1h immediate -1s"), 2, `serve_stale RESPONSE_TTL,"-1s"`},
		{"serve_stale TTL of a fraction", block("serve_stale 1h immediate 1500ms"), 2, `serve_stale RESPONSE_TTL,"1500ms",whole`},
		{"serve_stale TTL too large", block("serve_stale 1h verify 0s 4294967296s"), 2, `serve_stale RESPONSE_TTL,"4294967296s"`},
		{"serve_stale recheck negative", block("serve_stale 1h immediate 1s -1s"), 2, `serve_stale FAILURE_RECHECK,"-1s"`},
		{"serve_stale recheck too long", block("serve_stale 1h verify 0s 1s 301s"), 2, `serve_stale FAILURE_RECHECK,"301s"`},
		{"serve_stale immediate with a word too many", block("serve_stale 1h immediate 1s 1s 1s"), 2, `serve_stale,"1s"`},
		{"serve_stale verify with a word too many", block("serve_stale 1h verify 1s 1s 1s 7s"), 2, `serve_stale,"7s"`},
		{"serve_stale_policy without value", block("serve_stale", "serve_stale_policy"), 3, "serve_stale_policy,lacks its value"},
		{"serve_stale_policy unknown", block("serve_stale", "serve_stale_policy newest"), 3, `serve_stale_policy,"newest"`},
		{"serve_stale_policy alone", block("serve_stale_policy prefer_positive"), 2, "serve_stale_policy,serve_stale"},
		{"serve_stale_policy twice", block("serve_stale_policy prefer_positive", "serve_stale_policy prefer_positive"), 3, "serve_stale_policy,twice"},
		{"top_clients with one length", block("top_clients 24"), 2, `top_clients,"24"`},
		{"top_clients with no number", block("top_clients /24 56"), 2, `top_clients V4LEN,"/24"`},
		{"top_clients with 0", block("top_clients 0 56"), 2, `top_clients V4LEN,"0"`},
		{"top_clients with 33", block("top_clients 33 56"), 2, `top_clients V4LEN,"33"`},
		{"top_clients with 129", block("top_clients 24 129"), 2, `top_clients V6LEN,"129"`},
		{"top_clients with a word too many", block("top_clients 24 56 64"), 2, `top_clients,"64"`},
		{"control without an address", block("control"), 2, `control`},
		{"control with a word too many", block("control 127.0.0.1:8053 tokens"), 2, `control,"tokens"`},
		{"control with a token without a file", block("control 127.0.0.1:8053 token"), 2, `control token`},
		{"control with two tokens", block("control 127.0.0.1:8053 token /a token /b"), 2, `control,token`},
		{"control with half of tls", block("control 127.0.0.1:8053 tls /a"), 2, `control tls`},
		{"control for all without a token", block("control 192.0.2.1:8053"), 2, `control,"192.0.2.1:8053"`},
		{"control without a port", block("control localhost"), 2, `control,"localhost"`},
		{"control in a folder that is not there", block("control unix:///none/at/all.sock"), 2, `control,/none:`},
		{"control with a token that is not there", block("control 127.0.0.1:8053 token /none/token"), 2, `control,/none/token`},
		{"cache_file_path without a path", block("cache_file_path"), 2, `cache_file_path`},
		{"cache_file_path with a word for an interval", block("cache_file_path /a often"), 2, `cache_file_path INTERVAL,"often"`},
		{"cache_file_path too often", block("cache_file_path /a 10ms"), 2, `cache_file_path INTERVAL,"10ms"`},
		{"cache_file_path before it began", block("cache_file_path /a -1s"), 2, `cache_file_path INTERVAL,"-1s"`},
		{"cache_file_path with a word too many", block("cache_file_path /a 1m b"), 2, `cache_file_path,"b"`},
		{"fastpath without workers", block("fastpath 0"), 2, `fastpath WORKERS,"0"`},
		{"fastpath with too many", block("fastpath 1025"), 2, `fastpath WORKERS,"1025"`},
		{"fastpath with a word", block("fastpath maybe"), 2, `fastpath WORKERS,"maybe"`},
		{"fastpath with a word too many", block("fastpath 1 2"), 2, `fastpath,"2"`},
		{"max_memory share of 0", block("max_memory 0%"), 2, `max_memory,"0"`},
		{"max_memory share of too much", block("max_memory 91%"), 2, `max_memory,"91"`},
		{"max_memory share of no number", block("max_memory much%"), 2, `max_memory,"much"`},
		{"pool without a name", block("pool"), 2, "pool,lacks its value"},
		{"pool with a size alone", block("pool 64MB"), 2, `pool,name is missing,"64MB"`},
		{"pool with a share alone", block("pool 40%"), 2, `pool,name is missing,"40%"`},
		{"pool auto alone", block("pool auto"), 2, `pool,name is missing,"auto"`},
		{"pool of no size", block("pool node lots"), 2, `pool SIZE,"lots"`},
		{"pool too small", block("pool node 1K"), 2, `pool SIZE,"1K",less than 1MB`},
		{"pool of a share of too much", block("pool node 91%"), 2, `pool SIZE,"91"`},
		{"pool with the size last", block("pool node same 64MB"), 2, `pool,"64MB",same`},
		{"pool with too many words", block("pool node 64MB same same"), 2, `pool,"same"`},
		{"pool twice", block("pool node", "pool other"), 3, "pool given twice"},
		{"pool and max_memory", block("pool node", "max_memory 64MB"), 3, `max_memory,"node",one bound,Testfile:2`},
		{"max_memory and pool", block("max_memory 64MB", "pool node"), 2, `max_memory,"node",one bound,Testfile:3`},
		{"max_memory share and more", block("max_memory 10% 20%"), 2, `max_memory,"20%"`},
		{"shared without URL", block("shared"), 2, "shared,lacks its value"},
		{"shared of no scheme", block("shared 192.0.2.1:6379"), 2, "shared,cannot be read"},
		{"shared of another scheme", block("shared http://h"), 2, `shared,"http"`},
		{"shared without secret", block("shared valkey://h"), 2, "shared,shared_secret FILE"},
		{"shared with two servers", block("shared valkey://a valkey://b"), 2, `shared,"b:6379"`},
		{"shared_timeout too short", block("shared_timeout 1us"), 2, `shared_timeout,"1us"`},
		{"shared_timeout too long", block("shared_timeout 2s"), 2, `shared_timeout,"2s"`},
		{"shared_zones of no zone", block("shared_zones a..b"), 2, `shared_zones,"a..b"`},
		{"shared_zones of a brace", block("shared_zones {}"), 2, `shared_zones,"{}"`},
		{"shared_prefix with a star", block("shared_prefix a*"), 2, `shared_prefix,"a*"`},
		{"shared_resolver by name", block("shared_resolver h"), 2, `shared_resolver,"h"`},
		{"shared_write maybe", block("shared_write maybe"), 2, `shared_write,"maybe"`},
		{"shared_tls without file", block("shared_tls /none/ca.pem"), 2, "shared_tls,/none/ca.pem"},
		{"shared_tls without TLS", block("shared valkey://h", "shared_secret /s", "shared_tls"), 4, "shared_tls,without TLS"},
		{"warm_from without URL", block("warm_from"), 2, "warm_from,lacks its value"},
		{"warm_from of a token only", block("warm_from token /t"), 2, `warm_from,"token"`},
		{"warm_from of no address", block("warm_from b.example"), 2, `warm_from,"b.example"`},
		{"warm_from of another scheme", block("warm_from ftp://b.example"), 2, `warm_from,"ftp://b.example"`},
		{"warm_from the same twice", block("warm_from 127.0.0.1:1 127.0.0.1:1"), 2, `warm_from,"127.0.0.1:1",twice`},
		{"warm_from with two tokens", block("warm_from 127.0.0.1:1 token /t token /u"), 2, "warm_from,token,twice"},
		{"warm_from with a token for the first only", block("warm_from 127.0.0.1:1 token /t 127.0.0.1:2"), 2, `warm_from,"token"`},
		{"warm_from twice", block("warm_from 127.0.0.1:1", "warm_from 127.0.0.1:2"), 3, "warm_from given twice"},
		{"upstream_limit without QPS", block("upstream_limit"), 2, "upstream_limit,lacks its value"},
		{"upstream_limit none", block("upstream_limit 0"), 2, `upstream_limit QPS,"0"`},
		{"upstream_limit no burst", block("upstream_limit 10 0"), 2, `upstream_limit BURST,"0"`},
		{"upstream_limit without unit", block("upstream_limit 10 10 5"), 2, `upstream_limit MAX_WAIT,"5"`},
		{"upstream_limit waits too long", block("upstream_limit 10 10 2m"), 2, `upstream_limit MAX_WAIT,"2m"`},
		{"upstream_limit with a word too many", block("upstream_limit 10 10 1s 5"), 2, `upstream_limit,"5"`},
		{"upstream_limit of no group", block("upstream_limit 10 group"), 2, `upstream_limit,"group"`},
		{"upstream_limit of two groups", block("upstream_limit 10 group a b"), 2, `upstream_limit,"group"`},
		{"upstream_limit of group only", block("upstream_limit group a"), 2, `upstream_limit QPS,"group"`},
		{"denial_without_soa without unit", block("denial_without_soa 5"), 2, `denial_without_soa,"5"`},
		{"keep_warm without name", block("keep_warm"), 2, "keep_warm,lacks its value"},
		{"keep_warm with a word that is no name", block("keep_warm a..nl"), 2, `keep_warm,"a..nl"`},
		{"keep_warm with an odd type", block("keep_warm a.nl A ADDRESS"), 2, `keep_warm,"ADDRESS"`},
		{"keep_warm with two files", block("keep_warm file a", "keep_warm file b"), 3, "keep_warm file,twice"},
		{"jitter too much", block("jitter 26"), 2, `jitter,"26"`},
		{"jitter with a sign", block("jitter 10%"), 2, `jitter,"10%"`},
		{"ttl without class", block("ttl a.nl b.nl"), 2, "ttl,neither success nor denial"},
		{"ttl without MAX", block("ttl a.nl success"), 2, "ttl success,MAX"},
		{"ttl with an odd class", block("ttl success 5 denail"), 2, `ttl success MIN,"denail"`},
		{"ttl with a word that is no zone", block("ttl a..nl success 5"), 2, `ttl,"a..nl"`},
		{"ttl with a number for a zone", block("ttl 30 success 5"), 2, `ttl,"30"`},
		{"ttl MAX zero", block("ttl success 0"), 2, `ttl success MAX,"0"`},
		{"ttl MIN above MAX", block("ttl success 5 6"), 2, `ttl success MIN,"6"`},
		{"ttl with three values", block("ttl success 5 4 3"), 2, `ttl success,"5 4 3"`},
		{"ttl, a class twice", block("ttl success 5 success 6"), 2, "ttl,success,twice"},
		{"ecs with an odd word", block("ecs on"), 2, `ecs,"on"`},
		{"ecs strict with MAX", block("ecs strict 5"), 2, `ecs,"5"`},
		{"ecs off with MAX", block("ecs off 5"), 2, `ecs,"5"`},
		{"ecs scoped, none", block("ecs scoped 0"), 2, `ecs scoped MAX,"0"`},
		{"ecs scoped, too many", block("ecs scoped 10001"), 2, `ecs scoped MAX,"10001"`},
		{"ecs scoped, no number", block("ecs scoped many"), 2, `ecs scoped MAX,"many"`},
		{"ecs with three words", block("ecs scoped 5 6"), 2, `ecs`},
		{"ecs twice", block("ecs off", "ecs strict"), 3, "ecs,twice"},
		{"stale_for without a word", block("stale_for"), 2, "stale_for,lacks its value"},
		{"stale_for without on or off", block("stale_for a.nl"), 2, "stale_for,neither on nor off"},
		{"stale_for with a time", block("stale_for a.nl 1h"), 2, `stale_for,"1h"`},
		{"stale_for with a word behind", block("stale_for a.nl off 5"), 2, `stale_for,"5"`},
		{"prefetch_for with a word that is no zone", block("keepttl", "prefetch_for a..nl on"), 3, `prefetch_for,"a..nl"`},
		{"prefetch_for with on and off", block("prefetch_for on off"), 2, `prefetch_for,"off"`},
		{"nxdomain_cut with a word that is no zone", block("nxdomain_cut a..b"), 2, `nxdomain_cut,"a..b"`},
		{"nxdomain_cut twice", block("nxdomain_cut", "nxdomain_cut probe"), 3, "nxdomain_cut,twice"},
		{"nxdomain_cut with an empty word", block(`nxdomain_cut ""`), 2, `nxdomain_cut,""`},
		{"fastpath with three words", block("fastpath on 1 2"), 2, `fastpath,"2"`},
		{"fastpath off with workers", block("fastpath off 2"), 2, `fastpath,"2"`},
		{"fastpath auto without workers", block("fastpath auto 0"), 2, `fastpath WORKERS,"0"`},
		{"coalesce none", block("coalesce 0"), 2, `coalesce MAX_WAITERS,"0"`},
		{"coalesce too many", block("coalesce 1000001"), 2, `coalesce MAX_WAITERS,"1000001"`},
		{"coalesce not a number", block("coalesce on"), 2, `coalesce MAX_WAITERS,"on"`},
		{"coalesce without unit", block("coalesce 10 2"), 2, `coalesce MAX_WAIT,"2"`},
		{"coalesce too short", block("coalesce 10 999us"), 2, `coalesce MAX_WAIT,"999us"`},
		{"coalesce too long", block("coalesce 10 61s"), 2, `coalesce MAX_WAIT,"61s"`},
		{"coalesce off with a word too many", block("coalesce off 2s"), 2, `coalesce,"2s"`},
		{"coalesce with a word too many", block("coalesce 10 2s 3"), 2, `coalesce,"3"`},
		{"ede without value", block("ede"), 2, "ede,lacks its value"},
		{"ede neither", block("ede true"), 2, `ede,"true"`},
		{"prefetch with an empty word", block(`prefetch 1 1m ""`, "use_optimized_cache false"), 2, "prefetch,environment variable"},
		{"bad value of an option without effect", block("use_optimized_cache false", "max_memory 1"), 3, `max_memory,"1"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, err := parse(controller(tc.corefile))
			wantError(t, err, tc.line, tc.words)
		})
	}
}

// wantError fails unless err names the file, the line and all of the words.
func wantError(t *testing.T, err error, line int, words string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range append(strings.Split(words, ","), fmt.Sprintf("Testfile:%d ", line)) {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not contain %q: %v", want, err)
		}
	}
}

func TestParseLeavesServerBlockKeysAlone(t *testing.T) {
	t.Parallel()
	c := controller("optcache")
	got, err := parse(c)
	if err != nil {
		t.Fatal(err)
	}
	got.zones[0] = "changed."
	if c.ServerBlockKeys[0] != "dns://example.org.:53" {
		t.Errorf("keys changed to %q", c.ServerBlockKeys)
	}
}

func TestSetupAddsHandlerToChain(t *testing.T) {
	t.Parallel()
	c := controller("optcache 30")
	if err := setup(c); err != nil {
		t.Fatal(err)
	}
	o, ok := handlerChain(t, c, test.ErrorHandler()).(*Optcache)
	if !ok {
		t.Fatal("handler is not an *Optcache")
	}
	if o.Next == nil {
		t.Error("handler has no next")
	}
	if o.success.maxTTL != 30*time.Second {
		t.Errorf("max TTL %v, want 30s", o.success.maxTTL)
	}
}

func TestSetupErrorNamesPlugin(t *testing.T) {
	t.Parallel()
	err := setup(controller(block("keepttl 1")))
	wantError(t, err, 2, `plugin/optcache: ,keepttl,"1"`)
}

// handlerChain builds the only handler that setup has added, in front of next.
func handlerChain(t *testing.T, c *caddy.Controller, next plugin.Handler) plugin.Handler {
	t.Helper()
	plugins := dnsserver.GetConfig(c).Plugin
	if n := len(plugins); n < 1 || n > 2 { // the door of the fast path may stand in front
		t.Fatalf("%d plugins in the chain, want 1 or 2", n)
	}
	return plugins[len(plugins)-1](next)
}

// captureLog returns what is logged while f runs.
func captureLog(t *testing.T, f func()) string {
	t.Helper()
	var out bytes.Buffer
	golog.SetOutput(&out)
	defer golog.SetOutput(os.Stderr)
	f()
	return out.String()
}

func TestSetupStockHasAllOptions(t *testing.T) {
	c := controller(`optcache 25 a.nl {
		success 2000 1800 30
		use_optimized_cache false
		denial 3000 15
		prefetch 10 2m 20%
		serve_stale 2h verify 100ms
		serve_stale_policy prefer_positive
		servfail 7s 1m
		disable denial b.nl max_memory
		max_memory 64MB
		keepttl
	}`)
	captureLog(t, func() {
		if err := setup(c); err != nil {
			t.Fatal(err)
		}
	})
	h := handlerChain(t, c, test.ErrorHandler())
	if h.Name() != "cache" {
		t.Fatalf("handler is %q, want cache", h.Name())
	}
	for field, want := range map[string]any{
		"Zones": []string{"a.nl."},
		"pcap":  2000, "pttl": 1800 * time.Second, "minpttl": 30 * time.Second,
		"ncap": 3000, "nttl": 15 * time.Second, "minnttl": 5 * time.Second,
		"failttl":  7 * time.Second,
		"prefetch": 10, "duration": 2 * time.Minute, "percentage": 20,
		"staleUpTo": 2 * time.Hour, "verifyStale": true, "verifyStaleTimeout": 100 * time.Millisecond, "preferPositive": true,
		"nexcept": []string{"b.nl.", "max_memory."},
		"keepttl": true,
	} {
		if d, ok := want.(time.Duration); ok {
			want = int64(d) // as fmt shows an unexported field
		}
		if got := reflect.ValueOf(h).Elem().FieldByName(field); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s is %v, want %v", field, got, want)
		}
	}
}

func TestSetupStockCaches(t *testing.T) {
	t.Parallel()
	c := controller("optcache {\nuse_optimized_cache false\n}")
	if err := setup(c); err != nil {
		t.Fatal(err)
	}
	upstream := 0
	h := handlerChain(t, c, plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		upstream++
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{test.A("a.example.org. 300 IN A 192.0.2.1")}
		return dns.RcodeSuccess, w.WriteMsg(m)
	}))
	for range 2 {
		rec := dnstest.NewRecorder(&test.ResponseWriter{})
		if _, err := h.ServeDNS(t.Context(), rec, new(dns.Msg).SetQuestion("a.example.org.", dns.TypeA)); err != nil {
			t.Fatal(err)
		}
		if len(rec.Msg.Answer) != 1 {
			t.Errorf("answer is %v", rec.Msg)
		}
	}
	if upstream != 1 {
		t.Errorf("upstream asked %d times, want once", upstream)
	}
}

func TestSetupStockDropsEmptyBlockWord(t *testing.T) {
	t.Parallel()
	tokens, dropped := stockTokens(controller("optcache a.nl {}").Dispenser)
	if len(tokens) != 2 || tokens[1].Text != "a.nl" || len(dropped) != 0 {
		t.Errorf("got %v and %v", tokens, dropped)
	}
}

func TestSetupStockNamesOptionsWithoutEffect(t *testing.T) {
	const ours = "servfail 5s 1m\nhot_cache_percentage 10\nhot_cache_promotion_threshold 3\ncache_line_optimization true\nmax_memory 64MB\n"
	out := captureLog(t, func() {
		if err := setup(controller("optcache {\n" + ours + "keepttl\nuse_optimized_cache false\n}")); err != nil {
			t.Fatal(err)
		}
	})
	want := "[WARNING] plugin/optcache: Testfile:1: use_optimized_cache is false, these have no effect: " +
		"MAX of servfail, hot_cache_percentage, hot_cache_promotion_threshold, cache_line_optimization, max_memory\n"
	if !strings.HasSuffix(out, want) || strings.Count(out, "\n") != 1 {
		t.Errorf("logged %q, want %q", out, want)
	}
}

func TestSetupStockWarnsOfNothing(t *testing.T) {
	out := captureLog(t, func() {
		if err := setup(controller(block("use_optimized_cache false", "keepttl"))); err != nil {
			t.Fatal(err)
		}
	})
	if out != "" {
		t.Errorf("logged %q", out)
	}
}

func TestSetupStockRefuses(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		lines []string // of a block whose line 2 is use_optimized_cache false
		line  int
		words string
	}{
		{"prefetch without amount", []string{"prefetch"}, 3, "prefetch"},
		{"prefetch amount", []string{"keepttl", "prefetch many"}, 4, `prefetch AMOUNT: "many" is not a whole number`},
		{"prefetch percentage", []string{"max_memory 64MB", "prefetch 1 1m 99%"}, 4, `"99" is not between 10 and 90`},
		{"serve_stale", []string{"serve_stale -20m", "keepttl"}, 3, `serve_stale DURATION: "-20m"`},
		{"serve_stale_policy twice", []string{"serve_stale", "serve_stale_policy prefer_positive", "serve_stale_policy prefer_positive"}, 5, "serve_stale_policy,twice"},
		{"serve_stale_policy without serve_stale", []string{"serve_stale_policy prefer_positive"}, 3, "serve_stale_policy has no effect without serve_stale"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := setup(controller(block(append([]string{"use_optimized_cache false"}, tc.lines...)...)))
			wantError(t, err, tc.line, "plugin/optcache,"+tc.words)
		})
	}
}

// optcacheDirective adds the directive to CoreDNS, as plugin.cfg does in a real build.
var optcacheDirective = sync.OnceFunc(func() {
	dnsserver.Quiet, caddy.Quiet = true, true
	if !slices.Contains(dnsserver.Directives, pluginName) {
		at := slices.Index(dnsserver.Directives, stockName)
		dnsserver.Directives = slices.Insert(dnsserver.Directives, at, pluginName)
	}
})

// startServer runs corefile in a real server until the test ends.
func startServer(t *testing.T, corefile string) error {
	t.Helper()
	optcacheDirective()
	inst, err := caddy.Start(caddy.CaddyfileInput{Filepath: "Testfile", Contents: []byte(corefile), ServerTypeName: "dns"})
	if err != nil {
		return err
	}
	inst.ShutdownCallbacks()
	return inst.Stop()
}

func TestSetupRefusesTwoCaches(t *testing.T) {
	const stock = "optcache {\nuse_optimized_cache false\n}\n"
	for _, tc := range []struct {
		name     string
		corefile string
		line     int // 0: no error
	}{
		{"optcache", ".:0 {\noptcache\n}", 0},
		{"optcache for several zones", "a.nl:0 b.nl:0 {\noptcache\n}", 0},
		{"stand-in", ".:0 {\n" + stock + "}", 0},
		{"stand-in for several zones", "a.nl:0 b.nl:0 {\n" + stock + "}", 0},
		{"one cache per server block", "a.nl:0 {\noptcache\n}\nb.nl:0 {\ncache\n}\nc.nl:0 {\n" + stock + "}", 0},
		{"cache and optcache", ".:0 {\ncache\noptcache\n}", 3},
		{"optcache and cache", ".:0 {\noptcache 10\ncache\n}", 2},
		{"cache and stand-in", ".:0 {\ncache\n" + stock + "}", 3},
		{"cache and stand-in for several zones", "a.nl:0 b.nl:0 {\ncache\n" + stock + "}", 3},
	} {
		for _, order := range []string{"optcache first", "cache first"} {
			t.Run(tc.name+", "+order, func(t *testing.T) {
				placeDirective(t, order == "cache first")
				err := startServer(t, tc.corefile)
				if tc.line > 0 {
					wantError(t, err, tc.line, "plugin/optcache,cache and optcache in one server block")
				} else if err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// placeDirective puts optcache before or behind cache in the order of plugins.
func placeDirective(t *testing.T, behind bool) {
	t.Helper()
	optcacheDirective()
	before := dnsserver.Directives
	t.Cleanup(func() { dnsserver.Directives = before })

	without := slices.DeleteFunc(slices.Clone(before), func(s string) bool { return s == pluginName })
	at := slices.Index(without, stockName)
	if behind {
		at++
	}
	dnsserver.Directives = slices.Insert(without, at, pluginName)
}

func TestSetupReadsEnvironment(t *testing.T) {
	corefile := ".:0 {\noptcache {\nhot_cache_percentage {$HEIMDALL_HOT_CACHE_PERCENTAGE}\n}\n}"
	t.Run("set", func(t *testing.T) {
		t.Setenv("HEIMDALL_HOT_CACHE_PERCENTAGE", "20")
		if err := startServer(t, corefile); err != nil {
			t.Error(err)
		}
	})
	t.Run("wrong", func(t *testing.T) {
		t.Setenv("HEIMDALL_HOT_CACHE_PERCENTAGE", "60")
		wantError(t, startServer(t, corefile), 3, `hot_cache_percentage,"60"`)
	})
	t.Run("unset", func(t *testing.T) {
		wantError(t, startServer(t, corefile), 3, "hot_cache_percentage lacks its value,environment variable")
	})
}

// errorLine matches the place in an error.
var errorLine = regexp.MustCompile(`Testfile:(\d+)\b`)

// FuzzCorefile reads any text as a block. An error must name a line. Accepted options must be in the documented
// ranges.
func FuzzCorefile(f *testing.F) {
	for _, seed := range []string{
		"optcache",
		"optcache {}",
		"optcache 30 example.org 10.0.0.0/15",
		"optcache {\nsuccess 5000 3600 5\ndenial 0 1800 5\nservfail 5s\ndisable success a.nl\ndisable denial\nkeepttl\n}",
		"optcache {\nuse_optimized_cache true\nhot_cache_percentage 10\nhot_cache_promotion_threshold 3\ncache_line_optimization true\nmax_memory 64MB\n}",
		"optcache {\nhot_cache_percentage auto\nmax_memory 1048576\n}",
		"optcache {\nuse_optimized_cache false\nprefetch 10 1m 10%\nserve_stale 1h verify\nserve_stale_policy prefer_positive\n}",
		"optcache {\nuse_optimized_cache false\nserve_stale 1h verify 1s 30s 5m\ncoalesce off\nede off\n}",
		"optcache {\nprefetch 3 10s 90%\nserve_stale 10m Immediate 30s 5m\nserve_stale_policy prefer_positive\n}",
		"optcache {\nprefetch 4294967297 -1h\nserve_stale 1h VERIFY 100ms 0s 0\ncoalesce 1000000 1m\nede on\n}",
		"optcache {\nprefetch 1 1m 91%\n}",
		"optcache {\nserve_stale 2540400h immediate 4294967295s 301s\n}",
		"optcache {\ncoalesce 0 1us\n}",
		"optcache {\nfastpath 2\n}",
		"optcache {\nfastpath auto 1\n}",
		"optcache {\nfastpath off 1\n}",
		"optcache {\ncoalesce off 1s\n}",
		"optcache {\nserve_stale_policy prefer_positive\n}",
		"optcache {\nede maybe\n}",
		"optcache {\nsuccess \"\" {\n}\n}",
		"optcache { keepttl }\noptcache",
	} {
		f.Add(seed)
	}
	golog.SetOutput(&bytes.Buffer{})
	f.Cleanup(func() { golog.SetOutput(os.Stderr) })

	f.Fuzz(func(t *testing.T, corefile string) {
		if !strings.HasPrefix(corefile, pluginName) {
			return // the block belongs to another plugin
		}
		c := controller(corefile)
		again := *c
		o, err := parse(c)
		refused := setup(&again)
		compareWithStock(t, corefile, o, err)
		if err != nil {
			if refused == nil {
				t.Errorf("setup accepts what parse refuses: %v", err)
			}
			at := errorLine.FindStringSubmatch(err.Error())
			if at == nil {
				t.Fatalf("error without its place: %v", err)
			}
			if line, _ := strconv.Atoi(at[1]); line < 1 || line > 1+strings.Count(corefile, "\n") {
				t.Errorf("error with a line that is none: %v", err)
			}
			return
		}
		if o.optimized && o.fast.mode != fastOn && refused != nil { // cache, or the server block, may refuse more
			t.Errorf("setup refuses what parse accepts: %v", refused)
		}
		for _, w := range o.warnings {
			at := regexp.MustCompile(`^Testfile:(\d+): `).FindStringSubmatch(w)
			if at == nil {
				t.Fatalf("warning without its place: %s", w)
			}
			if line, _ := strconv.Atoi(at[1]); line < 1 || line > 1+strings.Count(corefile, "\n") {
				t.Errorf("warning with a line that is none: %s", w)
			}
		}
		for _, class := range []classOptions{o.success, o.denial} {
			between(t, "capacity", int64(class.capacity), 1024, 1<<28)
			between(t, "max TTL", int64(class.maxTTL), int64(time.Second), (1<<31-1)*int64(time.Second))
			between(t, "min TTL", int64(class.minTTL), 0, (1<<31-1)*int64(time.Second))
		}
		between(t, "servfail", int64(o.servfail), 0, int64(5*time.Minute))
		between(t, "servfail MAX", int64(o.servfailMost), 0, int64(5*time.Minute))
		if o.hotPercentage != hotAuto {
			between(t, "hot percentage", int64(o.hotPercentage), 0, 50)
		}
		between(t, "promotion threshold", int64(o.promotionThreshold), 1, 255)
		if o.maxMemory != 0 {
			between(t, "max memory", o.maxMemory, 1<<20, 1<<63-1)
		}
		between(t, "prefetch amount", int64(o.prefetch.amount), 0, 1<<24-1)
		between(t, "prefetch percentage", int64(o.prefetch.percentage), 10, 90)
		s := o.stale
		between(t, "serve_stale", int64(s.upTo), 0, 1<<63-1)
		between(t, "verify timeout", int64(s.timeout), 0, 1<<63-1)
		between(t, "stale TTL", int64(s.ttl), 0, (1<<32-1)*int64(time.Second))
		between(t, "recheck", int64(s.recheck), 0, int64(5*time.Minute))
		if s.ttl%time.Second != 0 || s.timeout > 0 && !s.verify {
			t.Errorf("serve_stale: %+v", s)
		}
		between(t, "waiters", int64(o.coalesce.waiters), 0, 1_000_000)
		between(t, "wait", int64(o.coalesce.wait), int64(time.Millisecond), int64(time.Minute))
		if o.optimized {
			z := plan(&o.options)
			if z.shards < 1 || z.perShard() < 1 || z.pieces[record.Success] < 1 || z.pieces[record.Denial] < 1 {
				t.Errorf("planned %+v", z)
			}
		}
	})
}

func between(t *testing.T, what string, n, lo, hi int64) {
	t.Helper()
	if n < lo || n > hi {
		t.Errorf("%s is %d, want %d to %d", what, n, lo, hi)
	}
}

// overflows reports whether a number in a Corefile fits an int of 64 bits, but not this machine's int. What such a
// number means depends on cache's parser.
func overflows(corefile string) bool {
	return strconv.IntSize == 32 && slices.ContainsFunc(strings.Fields(corefile), func(word string) bool {
		_, err := strconv.Atoi(word)
		return errors.Is(err, strconv.ErrRange)
	})
}

// neighboursAt are control interfaces.
func neighboursAt(words ...string) (all []controlclient.Address) {
	for _, word := range words {
		at, err := controlclient.ParseAddress(word)
		if err != nil {
			panic(err)
		}
		all = append(all, at)
	}
	return all
}
