package optcache

import (
	"bytes"
	"context"
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
)

// controller reads corefile as the block of a server for example.org.
func controller(corefile string) *caddy.Controller {
	c := caddy.NewTestController("dns", corefile)
	c.ServerBlockKeys = []string{"dns://example.org.:53"}
	return c
}

// defaults is what a block without any word asks for.
func defaults() options {
	return options{
		zones:              []string{"example.org."},
		success:            classOptions{capacity: 10000, maxTTL: 3600 * time.Second, minTTL: 5 * time.Second},
		denial:             classOptions{capacity: 10000, maxTTL: 1800 * time.Second, minTTL: 5 * time.Second},
		servfail:           5 * time.Second,
		prefetch:           prefetchOptions{gap: time.Minute, percentage: 10},
		coalesce:           coalesceOptions{waiters: 1000, wait: 2 * time.Second},
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
		{"prefetch of more than can be counted", block("prefetch 4294967297"), func(o *options) { o.prefetch.amount = maxPopularity }},
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
		{"fastpath", block("fastpath"), func(o *options) { o.fast = fastOptions{on: true, at: "Testfile:2"} }},
		{"fastpath with workers", block("keepttl", "fastpath 1024"), func(o *options) {
			o.keepTTL, o.fast = true, fastOptions{on: true, workers: 1024, at: "Testfile:3"}
		}},
		{"cache_file_path", block("cache_file_path /var/lib/optcache/answers"), func(o *options) {
			o.file = fileOptions{path: "/var/lib/optcache/answers", interval: 5 * time.Minute}
		}},
		{"cache_file_path with an interval", block("cache_file_path /var/lib/../lib/answers 0"), func(o *options) {
			o.file = fileOptions{path: "/var/lib/answers"}
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
		{"max_memory plain", block("max_memory 2097152"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory B", block("max_memory 1048576B"), func(o *options) { o.maxMemory = 1 << 20 }},
		{"max_memory KB", block("max_memory 2048KB"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory KiB", block("max_memory 2048KiB"), func(o *options) { o.maxMemory = 2 << 20 }},
		{"max_memory MB", block("max_memory 64MB"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory mib", block("max_memory 64mib"), func(o *options) { o.maxMemory = 64 << 20 }},
		{"max_memory GB", block("max_memory 1GB"), func(o *options) { o.maxMemory = 1 << 30 }},
		{"max_memory gIb", block("max_memory 1gIb"), func(o *options) { o.maxMemory = 1 << 30 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			want := defaults()
			tc.change(&want)
			got, optimized, err := parse(controller(tc.corefile))
			if err != nil {
				t.Fatal(err)
			}
			if !optimized {
				t.Error("not optimized")
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
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
		{"TTL over 31 bits", "optcache 2147483648", 1, `TTL,"2147483648"`},
		{"TTL over 64 bits", "optcache 99999999999999999999", 1, `TTL,"99999999999999999999"`},
		{"TTL empty", `optcache ""`, 1, `"",environment variable`},
		{"zone with empty label", "optcache 10 a..b", 1, `"a..b",not a zone`},
		{"zone whose last dot is escaped", `optcache a.nl\`, 1, `"a.nl\\",not a zone`},
		{"zone too long", "optcache " + strings.Repeat("abc.", 70), 1, `abc.abc,not a zone`},
		{"zone empty", `optcache a.nl ""`, 1, `"",environment variable`},
		{"zone that is a brace", "optcache {} a.nl", 1, `"{}",not a zone`},
		{"plugin twice", "optcache\noptcache", 2, once},
		{"plugin twice with blocks", "optcache {\nkeepttl\n}\noptcache 10 {\n}", 4, once},
		{"block twice", "optcache {\n} {\n}", 2, `"{"`},
		{"block twice, full", "optcache {\nkeepttl\n}\n{\nkeepttl\n}", 4, `"{"`},
		{"block on the next line", "optcache\n{\nkeepttl\n}", 2, `"{",its own line`},
		{"word behind the block", "optcache {\nkeepttl\n} foo", 3, `"foo"`},
		{"block in the block", block("success 2000 {", "keepttl", "}"), 2, `"{",success`},
		{"brace behind a word", block("disable success }"), 2, `"}",disable`},
		{"unknown property", block("keepttl", "positive 15"), 3, `"positive",unknown`},
		{"empty property", block(`""`), 2, `"",unknown`},

		{"success without capacity", block("success"), 2, "success,lacks its value"},
		{"success not a number", block("success many"), 2, `success capacity,"many"`},
		{"success negative", block("success -1"), 2, `success capacity,"-1"`},
		{"success too large", block("success 268435457"), 2, `success capacity,"268435457"`},
		{"success TTL zero", block("success 2000 0"), 2, `success TTL,"0"`},
		{"success TTL not a number", block("success 2000 1h"), 2, `success TTL,"1h"`},
		{"success TTL overflow", block("success 2000 2147483648"), 2, `success TTL,"2147483648"`},
		{"success MINTTL negative", block("success 2000 10 -1"), 2, `success MINTTL,"-1"`},
		{"success MINTTL overflow", block("success 2000 10 2147483648"), 2, `success MINTTL,"2147483648"`},
		{"success with a word too many", block("success 2000 10 5 7"), 2, `success,"7"`},
		{"success twice", block("success 2000", "success 3000"), 3, "success,twice"},
		{"denial without capacity", block("denial"), 2, "denial,lacks its value"},
		{"denial not a number", block("success 15", "denial aaa"), 3, `denial capacity,"aaa"`},
		{"denial TTL zero", block("denial 2000 0"), 2, `denial TTL,"0"`},
		{"denial with a word too many", block("denial 2000 10 5 7"), 2, `denial,"7"`},
		{"denial twice", block("denial 2000", "keepttl", "denial 2000"), 4, "denial,twice"},

		{"servfail without duration", block("servfail"), 2, "servfail,lacks its value"},
		{"servfail not a duration", block("servfail 5"), 2, `servfail,"5"`},
		{"servfail negative", block("servfail -1s"), 2, `servfail,"-1s"`},
		{"servfail over 5 minutes", block("servfail 301s"), 2, `servfail,"301s",5m`},
		{"servfail with a word too many", block("servfail 1s 2s"), 2, `servfail,"2s"`},
		{"servfail twice", block("servfail 1s", "servfail 1s"), 3, "servfail,twice"},
		{"disable without class", block("disable"), 2, "disable,lacks its value"},
		{"disable of an unknown class", block("disable both"), 2, `disable,"both"`},
		{"disable of a zone that is none", block("disable success a.nl b..nl"), 2, `"b..nl",not a zone`},
		{"disable twice for one class", block("disable denial a.nl", "disable denial b.nl"), 3, "disable denial,twice"},
		{"keepttl with a word", block("keepttl true"), 2, `keepttl,"true"`},
		{"keepttl twice", block("keepttl", "keepttl"), 3, "keepttl,twice"},

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
		{"max_memory of an unknown unit", block("max_memory 64TB"), 2, `max_memory,"64TB"`},
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
		{"prefetch twice", block("prefetch 1", "prefetch 1"), 3, "prefetch,twice"},
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
		{"serve_stale twice", block("serve_stale", "serve_stale"), 3, "serve_stale,twice"},
		{"serve_stale_policy without value", block("serve_stale", "serve_stale_policy"), 3, "serve_stale_policy,lacks its value"},
		{"serve_stale_policy unknown", block("serve_stale", "serve_stale_policy newest"), 3, `serve_stale_policy,"newest"`},
		{"serve_stale_policy alone", block("serve_stale_policy prefer_positive"), 2, "serve_stale_policy,serve_stale"},
		{"serve_stale_policy twice", block("serve_stale_policy prefer_positive", "serve_stale_policy prefer_positive"), 3, "serve_stale_policy,twice"},
		{"cache_file_path without a path", block("cache_file_path"), 2, `cache_file_path`},
		{"cache_file_path with a word for an interval", block("cache_file_path /a often"), 2, `cache_file_path INTERVAL,"often"`},
		{"cache_file_path too often", block("cache_file_path /a 10ms"), 2, `cache_file_path INTERVAL,"10ms"`},
		{"cache_file_path before it began", block("cache_file_path /a -1s"), 2, `cache_file_path INTERVAL,"-1s"`},
		{"cache_file_path with a word too many", block("cache_file_path /a 1m b"), 2, `cache_file_path,"b"`},
		{"fastpath without workers", block("fastpath 0"), 2, `fastpath WORKERS,"0"`},
		{"fastpath with too many", block("fastpath 1025"), 2, `fastpath WORKERS,"1025"`},
		{"fastpath with a word", block("fastpath on"), 2, `fastpath WORKERS,"on"`},
		{"fastpath with a word too many", block("fastpath 1 2"), 2, `fastpath,"2"`},
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
			_, _, err := parse(controller(tc.corefile))
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
	got, _, err := parse(c)
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
	o, ok := chain(t, c, test.ErrorHandler()).(*Optcache)
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

// chain builds the only handler that setup has added, in front of next.
func chain(t *testing.T, c *caddy.Controller, next plugin.Handler) plugin.Handler {
	t.Helper()
	plugins := dnsserver.GetConfig(c).Plugin
	if len(plugins) != 1 {
		t.Fatalf("%d plugins in the chain, want 1", len(plugins))
	}
	return plugins[0](next)
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
		servfail 7s
		disable denial b.nl max_memory
		max_memory 64MB
		keepttl
	}`)
	captureLog(t, func() {
		if err := setup(c); err != nil {
			t.Fatal(err)
		}
	})
	h := chain(t, c, test.ErrorHandler())
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
	h := chain(t, c, plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
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
	const ours = "hot_cache_percentage 10\nhot_cache_promotion_threshold 3\ncache_line_optimization true\nmax_memory 64MB\n"
	out := captureLog(t, func() {
		if err := setup(controller("optcache {\n" + ours + "keepttl\nuse_optimized_cache false\n}")); err != nil {
			t.Fatal(err)
		}
	})
	want := "[WARNING] plugin/optcache: Testfile:1: use_optimized_cache is false, these have no effect: " +
		"hot_cache_percentage, hot_cache_promotion_threshold, cache_line_optimization, max_memory\n"
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

// optcacheDirective tells CoreDNS of the directive, as plugin.cfg does in a real build.
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

// errorLine is how an error names its line.
var errorLine = regexp.MustCompile(`Testfile:(\d+)\b`)

// FuzzCorefile reads any text as a block. What is refused names a line; what is accepted is within
// the documented ranges.
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
			return // such a block is another plugin's
		}
		c := controller(corefile)
		again := *c
		o, optimized, err := parse(c)
		refused := setup(&again)
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
		if optimized && !o.fast.on && refused != nil { // cache, or the server block, may refuse more
			t.Errorf("setup refuses what parse accepts: %v", refused)
		}
		if len(o.zones) == 0 {
			t.Error("no zones")
		}
		for _, z := range slices.Concat(o.zones, o.success.except, o.denial.except) {
			if _, ok := dns.IsDomainName(z); !ok || !dns.IsFqdn(z) || strings.ToLower(z) != z {
				t.Errorf("zone %q", z)
			}
		}
		for _, class := range []classOptions{o.success, o.denial} {
			between(t, "capacity", int64(class.capacity), 1024, 1<<28)
			between(t, "max TTL", int64(class.maxTTL), int64(time.Second), (1<<31-1)*int64(time.Second))
			between(t, "min TTL", int64(class.minTTL), 0, (1<<31-1)*int64(time.Second))
		}
		between(t, "servfail", int64(o.servfail), 0, int64(5*time.Minute))
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
		if optimized {
			z := plan(&o)
			if z.shards < 1 || z.perShard() < 1 || z.pieces[success] < 1 || z.pieces[denial] < 1 {
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
