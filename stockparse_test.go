package optcache

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"

	"github.com/optcache/optcache/plugin/pkg/popularity"
)

// This file compares the parser of an optcache block with the parser of CoreDNS's cache: each accepts the blocks that
// the other accepts, and gives them the same meaning.

// stockParse reads a block of cache with cache's own parser, and returns the handler, whose fields are not exported.
func stockParse(t testing.TB, corefile string) (stock reflect.Value, err error) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil { // as for an empty percentage
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	action, err := caddy.DirectiveAction("dns", stockName)
	if err != nil {
		t.Fatal(err)
	}
	c := controller(corefile)
	if err := action(c); err != nil {
		return stock, err
	}
	return reflect.ValueOf(dnsserver.GetConfig(c).Plugin[0](nil)).Elem(), nil
}

// compareWithStock fails the test if cache accepts a block that optcache refuses or gives another meaning, or if
// cache refuses a block of its own properties that optcache accepts. b and err are the results of parse for corefile.
func compareWithStock(t *testing.T, corefile string, b *corefileBlock, err error) {
	t.Helper()
	rest, ours := strings.CutPrefix(corefile, pluginName)
	c := controller(corefile)
	if c.Next(); !ours || c.Val() != pluginName {
		return
	}
	if err == nil && slices.ContainsFunc(append(slices.Clone(ownProperties), "servfail MAX"), func(name string) bool { return b.at[name] != "" }) {
		return // cache does not know them
	}
	// emptyBlock is the only word that the two parsers take for different things.
	words := controller(corefile)
	words.Next()
	if head := words.RemainingArgs(); len(head) > 0 && head[len(head)-1] == emptyBlock {
		rest = strings.Replace(rest, emptyBlock, "", 1)
		if strings.Contains(rest, emptyBlock) || strings.Contains(rest, `"`) {
			return
		}
	}
	stock, stockErr := stockParse(t, stockName+rest)
	switch {
	case stockErr == nil && err != nil:
		t.Errorf("cache starts with it, and here: %v", err)
	case stockErr != nil && err == nil:
		t.Errorf("accepted, and cache says: %v", stockErr)
	}
	if stockErr != nil || err != nil {
		return
	}
	same(t, stock, &b.options)
}

// same fails the test unless the options have the meaning that stock, a *cache.Cache, has given them.
func same(t *testing.T, stock reflect.Value, o *options) {
	t.Helper()
	texts := func(field string) []string {
		var all []string
		for i := range stock.FieldByName(field).Len() {
			all = append(all, stock.FieldByName(field).Index(i).String())
		}
		return all
	}
	number := func(field string) int64 { return stock.FieldByName(field).Int() }
	// A TTL above the largest possible one never has an effect. A TTL that has overflowed was meant to be such a one.
	ttl := func(field string) int64 {
		n := number(field)
		if n < 0 || n > int64(maxTTLSeconds*time.Second) || n%int64(time.Second) != 0 {
			return int64(maxTTLSeconds * time.Second)
		}
		return n
	}
	capacity := func(field string) int64 { return min(max(number(field), minCapacity), maxCapacity) }
	for what, pair := range map[string][2]any{
		"zones":              {texts("Zones"), slices.Clip(o.zones)},
		"success capacity":   {capacity("pcap"), int64(o.success.capacity)},
		"success TTL":        {ttl("pttl"), int64(o.success.maxTTL)},
		"success MINTTL":     {ttl("minpttl"), int64(o.success.minTTL)},
		"success disabled":   {texts("pexcept"), o.success.except},
		"denial capacity":    {capacity("ncap"), int64(o.denial.capacity)},
		"denial TTL":         {ttl("nttl"), int64(o.denial.maxTTL)},
		"denial MINTTL":      {ttl("minnttl"), int64(o.denial.minTTL)},
		"denial disabled":    {texts("nexcept"), o.denial.except},
		"servfail":           {number("failttl"), int64(o.servfail)},
		"keepttl":            {stock.FieldByName("keepttl").Bool(), o.keepTTL},
		"prefetch":           {min(number("prefetch"), popularity.Most), int64(o.prefetch.amount)},
		"prefetch gap":       {number("duration"), int64(o.prefetch.gap)},
		"prefetch share":     {number("percentage"), int64(o.prefetch.percentage)},
		"serve_stale":        {number("staleUpTo"), int64(o.stale.upTo)},
		"verify":             {stock.FieldByName("verifyStale").Bool(), o.stale.verify},
		"verify timeout":     {number("verifyStaleTimeout"), int64(o.stale.timeout)},
		"stale TTL":          {number("staleTTL"), int64(o.stale.ttl)},
		"recheck":            {number("staleRecheck"), int64(o.stale.recheck)},
		"serve_stale_policy": {stock.FieldByName("preferPositive").Bool(), o.stale.preferPositive},
	} {
		if fmt.Sprint(pair[0]) != fmt.Sprint(pair[1]) {
			t.Errorf("%s: %v to cache, and here %v", what, pair[0], pair[1])
		}
	}
}

// stockInputs returns the blocks in the tests of cache's parser, read from their source: all strings that begin with
// the plugin's name, and all that begin with one of its properties, each in a block.
func stockInputs(t *testing.T) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/coredns/coredns").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(out)), "plugin", "cache", "setup_test.go")
	file, err := parser.ParseFile(token.NewFileSet(), source, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var inputs []string
	for _, decl := range file.Decls {
		test, ok := decl.(*ast.FuncDecl)
		if !ok {
			continue
		}
		found, tables := 0, 0
		ast.Inspect(test, func(n ast.Node) bool {
			row, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if row.Type != nil { // the table, or a list in a row
				if _, ok := row.Type.(*ast.ArrayType); ok && len(row.Elts) > 0 {
					if _, ok := row.Elts[0].(*ast.CompositeLit); ok {
						tables += len(row.Elts)
					}
				}
				return true
			}
			first := row.Elts[0]
			if pair, ok := first.(*ast.KeyValueExpr); ok {
				first = pair.Value
			}
			text, err := strconv.Unquote(first.(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(text, stockName) {
				text = stockName + " {\n" + text + "\n}"
			}
			inputs = append(inputs, text)
			found++
			return true
		})
		if found == 0 || found != tables {
			t.Errorf("%s has %d rows, %d of them read", test.Name.Name, tables, found)
		}
	}
	return inputs
}

// Every input of cache's own tests has the same meaning here.
func TestCacheOwnTestsRead(t *testing.T) {
	t.Parallel()
	inputs := stockInputs(t)
	if len(inputs) < 70 {
		t.Errorf("only %d inputs read", len(inputs))
	}
	accepted := 0
	for _, input := range inputs {
		t.Run(input, func(t *testing.T) {
			corefile := pluginName + strings.TrimPrefix(input, stockName)
			corefile = strings.ReplaceAll(corefile, "\n\t\t  "+stockName, "\n"+pluginName)
			b, err := parse(controller(corefile))
			compareWithStock(t, corefile, b, err)
			if err == nil {
				accepted++
			}
		})
	}
	if accepted < 30 {
		t.Errorf("only %d inputs accepted", accepted)
	}
}

// An odd block that cache accepts is accepted, has the same meaning, and gives a warning.
func TestOddBlocksOfCacheStart(t *testing.T) {
	t.Parallel()
	huge := strconv.Itoa(math.MaxInt) // on 32 bits, no more than the largest TTL
	for _, tc := range []struct {
		name     string
		corefile string
		line     int // of the warning; 0: of none
		words    string
	}{
		{"plain", "optcache 30 {\nsuccess 2000 60 1\nprefetch 2\nservfail 1m\nserve_stale 1h verify 1s 1s 1s\ndisable denial a.example.org\nkeepttl\n}", 0, ""},
		{"TTL over 31 bits", "optcache " + huge, 1, "TTL," + huge + ",2147483647"},
		{"TTL over 64 bits is a zone", "optcache 99999999999999999999", 1, `"99999999999999999999" is taken for a zone`},
		{"zone empty", `optcache a.example.org ""`, 1, `"",environment variable`},
		{"zones all empty", `optcache ""`, 1, "no zone is left"},
		{"zone with empty label", "optcache 10 a..b example.org", 1, `"a..b",ignored`},
		{"zone too long", "optcache example.org " + strings.Repeat("abc.", 70), 1, "abc.abc,ignored"},
		{"zone whose last dot is escaped", `optcache a.nl\`, 1, `"a.nl\\",ignored`},
		{"zone that is a brace", "optcache {} example.org", 1, `"{}" is taken for a zone`},
		{"empty block in one word", "optcache {}", 1, `"{}",empty block`},
		{"success negative", block("success -1"), 2, `success capacity,"-1",1024`},
		{"success zero", block("success 0"), 2, `success capacity,"0",disable success`},
		{"success huge", block("success " + huge), 2, "success capacity,268435456"},
		{"success TTL huge", block("success 2000 " + huge), 2, "success TTL,2147483647"},
		{"success TTL that wraps round", block("success 2000 10000000000"), 2, `success TTL,"10000000000",2147483647`},
		{"success MINTTL huge", block("success 2000 10 2147483648"), 2, "success MINTTL,2147483647"},
		{"success MINTTL over TTL", block("success 2000 5 60"), 2, `MINTTL of "60",TTL of "5"`},
		{"success with a word too many", block("success 2000 10 5 7 x"), 2, `"7 x" is ignored`},
		{"success with an empty word too many", block(`success 2000 10 5 ""`), 2, `is ignored`},
		{"success with a brace too many", block("success 2000 10 5 }"), 2, `"}" is ignored`},
		{"success twice", block("success 2000 30 3", "success 3000"), 3, "success is given again,Testfile:2"},
		{"denial twice", block("denial 2000 30 3", "keepttl", "denial 2000 20"), 4, "denial is given again,Testfile:2"},
		{"denial with a word too many", block("denial 2000 10 5 7"), 2, `"7" is ignored`},
		{"denial negative", block("denial -20 10"), 2, `denial capacity,"-20"`},
		{"servfail twice", block("servfail 1s", "servfail 2s"), 3, "servfail is given again"},
		{"servfail below a second", block("servfail 500ms"), 2, `servfail: "500ms" has no effect`},
		{"servfail of a fraction", block("servfail 1500ms"), 2, `servfail: "1500ms" counts as 1s`},
		{"servfail MAX of a fraction", block("servfail 1s 1500ms"), 2, `servfail MAX: "1500ms" counts as 1s`},
		{"keepttl twice", block("keepttl", "keepttl"), 3, "keepttl is given again"},
		{"prefetch twice", block("prefetch 1 1m 20%", "prefetch 2"), 3, "prefetch is given again"},
		{"prefetch that counts to nothing", block("prefetch 5 -1m"), 2, `prefetch has no effect,"-1m"`},
		{"prefetch without a gap", block("prefetch 2 0s"), 2, `prefetch has no effect,"0s"`},
		{"prefetch of each request", block("prefetch 1 -1m"), 0, ""},
		{"prefetch of more than can be counted", block("prefetch 16777216"), 2, `prefetch AMOUNT,"16777216",16777215`},
		{"serve_stale twice", block("serve_stale 5m verify 1s 2s 3s", "serve_stale 1m"), 3, "serve_stale is given again"},
		{"serve_stale below a second", block("serve_stale 500ms"), 2, `serve_stale DURATION: "500ms" has no effect`},
		{"serve_stale of a fraction", block("serve_stale 2500ms immediate"), 2, `serve_stale DURATION: "2500ms" counts as 2s`},
		{"serve_stale_policy for nothing", block("serve_stale 0", "serve_stale_policy prefer_positive"), 3, "serve_stale_policy has no effect"},
		{"disable twice for one class", block("disable denial a.example.org", "disable denial b.example.org"), 3, "disable denial is given again,Testfile:2"},
		{"disable of an empty zone", block(`disable denial ""`), 2, `"" is taken for the root zone,environment variable`},
		{"disable of a zone that is none", block("disable success example.org b..nl"), 2, `"b..nl" is taken for a zone,no name is in it`},
		{"disable of a brace", block("disable success example.org }"), 2, `"}" is taken for a zone`},
		{"disable of a network", block("disable success 10.0.0.0/15"), 2, `"10.0.0.0/15" has no effect,0.10.in-addr.arpa. 1.10.in-addr.arpa.`},
		{"disable of a port", block("disable success example.org:53"), 2, `"example.org:53" has no effect,write example.org.`},
		{"disable of a number", block("disable success 30"), 2, `"30" is taken for a zone`},
		{"warm_from without TLS", block("warm_from https://b.example 127.0.0.1:1 dns.example:8053"), 2, "warm_from: dns.example:8053 is without TLS"},
		{"warm_from beside shared", block("shared valkey://192.0.2.1", "shared_secret /s", "warm_from https://b.example"), 4, "warm_from has no effect,shared"},
		{"disable outside", block("disable success example.net"), 2, `"example.net" has no effect,outside,example.org.`},
		{"disable of all of a class with a size", block("success 5000", "disable success example.org"), 2, "success has no effect,Testfile:3"},
		{"disable of all failures", block("servfail 1s", "disable denial"), 2, "servfail has no effect,Testfile:3"},
		{"disable of everything", block("disable denial", "disable success"), 1, "nothing is kept"},
		{"duration for a TTL", "optcache 30s", 1, `"30s" is taken for a zone,whole number of seconds`},
		{"TTL behind a zone", "optcache example.org 30", 1, `"30" is taken for a zone,stands first`},
		{"fraction for a TTL", "optcache 1.5", 1, `"1.5" is taken for a zone`},
		{"long duration for a TTL", "optcache 1h30m example.org", 1, `"1h30m" is taken for a zone`},
		{"size on the first line", "optcache 64MB", 1, `"64MB" is taken for a zone`},
		{"property on the first line", "optcache example.org keepttl", 1, `"keepttl" is taken for a zone,block`},
		{"address for a network", "optcache 10.1.2.3", 1, `"10.1.2.3" is taken for a zone,network`},
		{"address of six", "optcache 2001:db8::1", 1, `"2001:db8::1" is taken for a zone`},
		{"zone outside the server block", "optcache example.net", 1, `"example.net" has no effect,example.org.`},
		{"zone that holds the server block's", "optcache org", 0, ""},
		{"zone within the server block's", "optcache A.example.org.", 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b, err := parse(controller(tc.corefile))
			compareWithStock(t, tc.corefile, b, err)
			if overflows(tc.corefile) || strconv.IntSize == 32 && strings.Contains(tc.corefile, huge) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			wantWarning(t, b, tc.line, tc.words)
		})
	}
}

// A property without effect because of one of optcache's own properties gives a warning.
func TestIdleWordsAreWarnedOf(t *testing.T) {
	t.Parallel()
	b, err := parse(controller(block("hot_cache_promotion_threshold 5", "hot_cache_percentage 0")))
	if err != nil {
		t.Fatal(err)
	}
	wantWarning(t, b, 2, "hot_cache_promotion_threshold has no effect,hot_cache_percentage is 0")
}

// wantWarning fails the test unless one of the block's warnings names the line and all of the words. Line 0 means no
// warning.
func wantWarning(t *testing.T, b *corefileBlock, line int, words string) {
	t.Helper()
	if line == 0 {
		if len(b.warnings) > 0 {
			t.Errorf("warnings: %q", b.warnings)
		}
		return
	}
	for _, w := range b.warnings {
		if strings.HasPrefix(w, fmt.Sprintf("Testfile:%d: ", line)) && !slices.ContainsFunc(strings.Split(words, ","), func(word string) bool { return !strings.Contains(w, word) }) {
			return
		}
	}
	t.Errorf("no warning of line %d with %s: %q", line, words, b.warnings)
}
