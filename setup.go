package optcache

// The Corefile: what a block says, checked word by word, and where the handler
// it asks for enters the plugin chain. What the options do is not decided here.

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	_ "github.com/coredns/coredns/plugin/cache" // serves `use_optimized_cache false`
	clog "github.com/coredns/coredns/plugin/pkg/log"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/snapshot"
)

const (
	pluginName = "optcache"
	stockName  = "cache" // the plugin this one replaces word for word
)

// Limits of what a Corefile may ask for.
const (
	// minCapacity is the fewest entries a class has. `cache` never holds fewer:
	// 256 shards of at least 4. Corefiles say `denial 0` and live with that, so a
	// smaller number is raised and not refused.
	minCapacity = 1024
	// maxCapacity keeps a typing error from reserving terabytes.
	maxCapacity = 1 << 28
	// maxTTLSeconds is the largest TTL there is (RFC 2181, section 8).
	maxTTLSeconds = math.MaxInt32
	// maxServfail is how long a failure may be cached (RFC 2308, section 7.1).
	maxServfail = 5 * time.Minute
	// minMaxMemory, in bytes, is the least that max_memory may ask for.
	minMaxMemory = 1 << 20

	// maxRecheck is the longest time between two refreshes of a stale entry.
	maxRecheck = 5 * time.Minute
	// Limits of coalesce.
	maxWaiters       = 1_000_000
	minWait, maxWait = time.Millisecond, time.Minute

	maxWorkers = 1024 // of fastpath

	maxHotPercentage      = 50
	hotAuto               = -1  // `hot_cache_percentage auto`
	maxPromotionThreshold = 255 // the access counter in a record has 8 bits
)

var log = clog.NewWithPlugin(pluginName)

func init() { plugin.Register(pluginName, setup) }

func setup(c *caddy.Controller) error {
	again := *c // parse uses c up
	opts, optimized, err := parse(c)
	if err != nil {
		return plugin.Error(pluginName, err)
	}
	if !optimized {
		return setupStock(&again)
	}

	again.Next()
	errTwo := errTwoCaches(&again)
	cfg := dnsserver.GetConfig(c)
	o := newOptcache(opts)
	inChain := false

	cfg.AddPlugin(func(next plugin.Handler) plugin.Handler {
		o.Next = next
		inChain = true
		return o
	})
	c.OnStartup(func() error {
		if cfg.Handler(stockName) != nil {
			return errTwo
		}
		if !inChain { // no server was made of this block: nobody would use the memory
			return nil
		}
		o.place = placeOf(c, cfg)
		if all := caddy.Instances(); len(all) > 0 { // the last one is being started
			o.of = all[len(all)-1]
		}
		return o.start(cfg.ViewName, cfg.Handlers())
	})
	c.OnRestart(instances.nextGeneration)
	c.OnRestartFailed(func() error { return instances.forget(o) })
	// When the process ends, the server goes on serving for a while (health's lameduck), from this cache.
	c.OnShutdown(func() error {
		if !instances.reloading(o) {
			return nil
		}
		return o.stop()
	})
	c.OnFinalShutdown(o.stop)
	if opts.fast.on {
		return setupFast(c, o)
	}
	return nil
}

// setupStock serves the block that c is about to read with CoreDNS's own cache.
func setupStock(c *caddy.Controller) error {
	action, err := caddy.DirectiveAction("dns", stockName)
	if err != nil {
		return plugin.Error(pluginName, err)
	}
	tokens, dropped := stockTokens(c.Dispenser)
	if len(dropped) > 0 {
		log.Warningf("%s:%d: use_optimized_cache is false, these have no effect: %s",
			tokens[0].File, tokens[0].Line, strings.Join(dropped, ", "))
	}
	c.Next()
	errTwo := errTwoCaches(c)

	c.Dispenser = caddyfile.NewDispenserTokens(c.File(), tokens)
	cfg := dnsserver.GetConfig(c)
	if err := action(c); err != nil {
		return plugin.Error(pluginName, located(c, tokens, err))
	}

	// A config knows its handlers by name, so of two caches only the one that was
	// registered last shows: look both when ours registers and when all have.
	last := len(cfg.Plugin) - 1
	build := cfg.Plugin[last]
	var ours plugin.Handler
	second := false
	check := func() {
		if h := cfg.Handler(stockName); h != nil && h != ours {
			second = true
		}
	}
	cfg.Plugin[last] = func(next plugin.Handler) plugin.Handler {
		ours = build(next)
		check()
		return ours
	}
	c.OnStartup(func() error {
		if check(); second {
			return errTwo
		}
		return nil
	})
	return nil
}

// errTwoCaches blames the line that c stands on. Two caches in one block keep
// every answer twice and show each other's TTLs: never what anybody wants.
func errTwoCaches(c *caddy.Controller) error {
	return plugin.Error(pluginName, c.Errf("%s and %s in one server block: remove one of them", stockName, pluginName))
}

// stockTokens rewrites an optcache block that parse has accepted into one for cache.
// Lines keep their numbers. dropped names the options lost on the way.
func stockTokens(d caddyfile.Dispenser) (tokens []caddyfile.Token, dropped []string) {
	keep := func(word string) {
		tokens = append(tokens, caddyfile.Token{File: d.File(), Line: d.Line(), Text: word})
	}
	d.Next()
	keep(stockName)
	for d.NextArg() {
		if d.Val() != emptyBlock {
			keep(d.Val())
		}
		if d.Val() == "{" {
			break
		}
	}
	for d.Next() { // one line of the block each time
		switch name := d.Val(); name {
		case "use_optimized_cache":
			d.RemainingArgs()
		case "hot_cache_percentage", "hot_cache_promotion_threshold", "cache_line_optimization", "max_memory", "coalesce", "ede", "fastpath", "cache_file_path":
			d.RemainingArgs()
			dropped = append(dropped, name)
		default:
			keep(name)
			for d.NextArg() {
				keep(d.Val())
			}
		}
	}
	return tokens, dropped
}

// located adds to an error of cache's own parser, which mostly has none, the place
// where that parser stopped reading.
func located(c *caddy.Controller, tokens []caddyfile.Token, err error) error {
	if strings.Contains(err.Error(), c.File()+":") {
		return err
	}
	var line []string
	for _, t := range tokens {
		if t.File == c.File() && t.Line == c.Line() {
			line = append(line, t.Text)
		}
	}
	return c.Errf("%q: %v", strings.Join(line, " "), err)
}

// emptyBlock is how a block without options is written without a space. To the
// lexer it is one word, and to cache the name of a zone that matches nothing.
const emptyBlock = "{}"

// braces would pass for domain names, but in a Corefile are never meant as such.
var braces = []string{"{", "}", emptyBlock}

// parse reads an optcache block:
//
//	optcache [TTL] [ZONES...] {
//	    PROPERTY [ARGS...]
//	}
//
// optimized is false when CoreDNS's own cache shall serve it.
func parse(c *caddy.Controller) (opts options, optimized bool, err error) {
	opts = options{
		success:            classOptions{capacity: 10_000, maxTTL: time.Hour, minTTL: 5 * time.Second},
		denial:             classOptions{capacity: 10_000, maxTTL: 30 * time.Minute, minTTL: 5 * time.Second},
		servfail:           5 * time.Second,
		prefetch:           prefetchOptions{gap: time.Minute, percentage: 10},
		coalesce:           coalesceOptions{waiters: 1000, wait: 2 * time.Second},
		explain:            true,
		hotPercentage:      10,
		promotionThreshold: 3,
		lineAligned:        true,
	}
	optimized = true

	c.Next()
	if err := parseHead(c, &opts); err != nil {
		return opts, optimized, err
	}

	seen := map[string]bool{}
	var policy error // what is wrong with serve_stale_policy when there is no serve_stale
	for c.NextBlock() {
		name := c.Val()
		if seen[name] && name != "disable" { // disable: once for either class
			return opts, optimized, c.Errf("%s given twice", name)
		}
		seen[name] = true

		switch name {
		case "success":
			err = classArgs(c, &opts.success)
		case "denial":
			err = classArgs(c, &opts.denial)
		case "servfail":
			opts.servfail, err = durationArg(c, maxServfail)
		case "disable":
			err = disableArgs(c, &opts)
		case "keepttl":
			opts.keepTTL = true
			_, err = args(c, 0, 0)
		case "use_optimized_cache":
			optimized, err = boolArg(c)
		case "hot_cache_percentage":
			opts.hotPercentage, err = hotPercentageArg(c)
		case "hot_cache_promotion_threshold":
			opts.promotionThreshold, err = intArg(c, 1, maxPromotionThreshold)
		case "cache_line_optimization":
			opts.lineAligned, err = boolArg(c)
		case "max_memory":
			opts.maxMemory, err = sizeArg(c)
		case "prefetch":
			err = prefetchArgs(c, &opts.prefetch)
		case "serve_stale":
			err = staleArgs(c, &opts.stale)
		case "serve_stale_policy":
			policy, err = policyArg(c)
		case "coalesce":
			err = coalesceArgs(c, &opts.coalesce)
		case "fastpath":
			err = fastArgs(c, &opts.fast)
		case "cache_file_path":
			err = fileArgs(c, &opts.file)
		case "ede":
			opts.explain, err = switchArg(c)
		default:
			err = c.Errf("unknown property %q", name)
		}
		if err != nil {
			return opts, optimized, err
		}
	}

	if c.Next() {
		return opts, optimized, errLeftover(c)
	}
	if policy != nil && !seen["serve_stale"] {
		return opts, optimized, policy
	}
	opts.stale.preferPositive = policy != nil
	return opts, optimized, nil
}

// parseHead reads what stands before the block: [TTL] [ZONES...].
func parseHead(c *caddy.Controller, opts *options) error {
	words := c.RemainingArgs()
	if n := len(words); n > 0 && words[n-1] == emptyBlock {
		words = words[:n-1]
	}
	// As in cache: a first word that is a number is the TTL, any other is a zone.
	// A number too large to be one is still no zone.
	if len(words) > 0 {
		if _, err := strconv.Atoi(words[0]); err == nil || errors.Is(err, strconv.ErrRange) {
			ttl, err := number(c, "TTL", words[0], 1, maxTTLSeconds)
			if err != nil {
				return err
			}
			opts.success.maxTTL, opts.denial.maxTTL = seconds(ttl), seconds(ttl)
			words = words[1:]
		}
	}
	if len(words) == 0 {
		opts.zones = plugin.OriginsFromArgsOrServerBlock(nil, c.ServerBlockKeys)
		return nil
	}
	var err error
	opts.zones, err = zones(c, words)
	return err
}

// errLeftover says why there is a word behind the end of the block.
func errLeftover(c *caddy.Controller) error {
	switch c.Val() {
	case pluginName:
		return c.Errf("%s: %v", pluginName, plugin.ErrOnce)
	case "{":
		return c.Errf("unexpected \"{\": %s has one block, which opens on its own line", pluginName)
	}
	return c.Errf("unexpected %q after %s", c.Val(), pluginName)
}

// classArgs reads CAPACITY [TTL] [MINTTL].
func classArgs(c *caddy.Controller, class *classOptions) error {
	name := c.Val()
	words, err := args(c, 1, 3)
	if err != nil {
		return err
	}
	fields := []struct {
		name   string
		lo, hi int
		set    func(int)
	}{
		{"capacity", 0, maxCapacity, func(n int) { class.capacity = max(n, minCapacity) }},
		{"TTL", 1, maxTTLSeconds, func(n int) { class.maxTTL = seconds(n) }},
		{"MINTTL", 0, maxTTLSeconds, func(n int) { class.minTTL = seconds(n) }},
	}
	for i, word := range words {
		n, err := number(c, name+" "+fields[i].name, word, fields[i].lo, fields[i].hi)
		if err != nil {
			return err
		}
		fields[i].set(n)
	}
	return nil
}

// disableArgs reads success|denial [ZONES...]; without zones it is all of them.
func disableArgs(c *caddy.Controller, opts *options) error {
	words, err := args(c, 1, math.MaxInt)
	if err != nil {
		return err
	}
	classes := map[string]*classOptions{"success": &opts.success, "denial": &opts.denial}
	class := classes[words[0]]
	if class == nil {
		return c.Errf("disable: %q is neither success nor denial", words[0])
	}
	if class.except != nil {
		return c.Errf("disable %s given twice", words[0])
	}
	class.except = []string{"."}
	if len(words) > 1 {
		class.except, err = zones(c, words[1:])
	}
	return err
}

// prefetchArgs reads AMOUNT [[DURATION] [PERCENTAGE%]].
func prefetchArgs(c *caddy.Controller, p *prefetchOptions) error {
	words, err := args(c, 1, 3)
	if err != nil {
		return err
	}
	amount, err := number(c, "prefetch AMOUNT", words[0], 0, math.MaxInt)
	if err != nil {
		return err
	}
	p.amount = uint32(min(amount, maxPopularity))
	if len(words) > 1 {
		if p.gap, err = duration(c, "prefetch DURATION", words[1]); err != nil {
			return err
		}
	}
	if len(words) > 2 {
		percentage, ok := strings.CutSuffix(words[2], "%")
		if !ok {
			return c.Errf("prefetch PERCENTAGE: %q does not end in %%", words[2])
		}
		p.percentage, err = number(c, "prefetch PERCENTAGE", percentage, 10, 90)
	}
	return err
}

// staleArgs reads [DURATION] [immediate [RESPONSE_TTL [FAILURE_RECHECK]] | verify [TIMEOUT
// [RESPONSE_TTL [FAILURE_RECHECK]]]].
func staleArgs(c *caddy.Controller, s *staleOptions) (err error) {
	s.upTo = time.Hour
	words, err := args(c, 0, 5)
	if err != nil || len(words) == 0 {
		return err
	}
	if s.upTo, err = durationUpTo(c, "serve_stale DURATION", words[0], math.MaxInt64); err != nil || len(words) == 1 {
		return err
	}
	mode, words := words[1], words[2:]
	switch strings.ToLower(mode) {
	case "verify":
		s.verify = true
		if len(words) > 0 {
			if s.timeout, err = durationUpTo(c, "serve_stale verify TIMEOUT", words[0], math.MaxInt64); err != nil {
				return err
			}
			words = words[1:]
		}
	case "immediate":
		if len(words) > 2 {
			return c.Errf("serve_stale: unexpected %q", words[2])
		}
	default:
		return c.Errf("serve_stale: %q is neither immediate nor verify", mode)
	}
	if len(words) > 0 {
		if s.ttl, err = durationUpTo(c, "serve_stale RESPONSE_TTL", words[0], math.MaxUint32*time.Second); err != nil {
			return err
		}
		if s.ttl%time.Second != 0 {
			return c.Errf("serve_stale RESPONSE_TTL: %q is not a whole number of seconds", words[0])
		}
	}
	if len(words) > 1 {
		s.recheck, err = durationUpTo(c, "serve_stale FAILURE_RECHECK", words[1], maxRecheck)
	}
	return err
}

// policyArg reads prefer_positive. The first error is what to say if nothing is served stale.
func policyArg(c *caddy.Controller) (lonely, err error) {
	name, word, err := oneArg(c)
	if err != nil {
		return nil, err
	}
	if !strings.EqualFold(word, "prefer_positive") {
		return nil, c.Errf("%s: %q is not prefer_positive", name, word)
	}
	return c.Errf("%s has no effect without serve_stale", name), nil
}

// coalesceArgs reads off | [MAX_WAITERS [MAX_WAIT]].
func coalesceArgs(c *caddy.Controller, o *coalesceOptions) error {
	words, err := args(c, 0, 2)
	if err != nil || len(words) == 0 {
		return err
	}
	if words[0] == "off" {
		o.waiters = 0
		if len(words) > 1 {
			return c.Errf("coalesce: unexpected %q", words[1])
		}
		return nil
	}
	if o.waiters, err = number(c, "coalesce MAX_WAITERS", words[0], 1, maxWaiters); err != nil || len(words) == 1 {
		return err
	}
	if o.wait, err = durationUpTo(c, "coalesce MAX_WAIT", words[1], maxWait); err == nil && o.wait < minWait {
		err = c.Errf("coalesce MAX_WAIT: %q is less than %v", words[1], minWait)
	}
	return err
}

// fastArgs reads [WORKERS].
func fastArgs(c *caddy.Controller, o *fastOptions) error {
	o.on, o.at = true, fmt.Sprintf("%s:%d", c.File(), c.Line())
	words, err := args(c, 0, 1)
	if err == nil && len(words) > 0 {
		o.workers, err = number(c, "fastpath WORKERS", words[0], 1, maxWorkers)
	}
	return err
}

// snapshotFiles is what a Corefile's snapshot files are stored under, by path: the server blocks that name them.
type snapshotFiles map[string]fileOwner

// fileOwner is a server block, as told from others with the same keys.
type fileOwner struct {
	index int
	keys  string
}

// fileArgs reads PATH [INTERVAL].
func fileArgs(c *caddy.Controller, o *fileOptions) error {
	words, err := args(c, 1, 2)
	if err != nil {
		return err
	}
	if o.path, err = filepath.Abs(words[0]); err != nil {
		return c.Errf("cache_file_path: %q: %v", words[0], err)
	}
	o.interval = 5 * time.Minute
	if len(words) > 1 {
		if o.interval, err = durationUpTo(c, "cache_file_path INTERVAL", words[1], math.MaxInt64); err != nil {
			return err
		}
		if o.interval > 0 && o.interval < time.Second {
			return c.Errf("cache_file_path INTERVAL: %q is less than 1s", words[1])
		}
	}
	files, _ := c.Get(snapshotFiles{}.key()).(snapshotFiles)
	if files == nil {
		files = make(snapshotFiles)
		c.Set(files.key(), files)
	}
	block := fileOwner{c.ServerBlockIndex, strings.Join(c.ServerBlockKeys, " ")}
	path := o.path
	if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(dir, filepath.Base(path))
	}
	for _, path := range []string{path, path + snapshot.Temporary} {
		if other, taken := files[path]; taken && other != block {
			return c.Errf("cache_file_path: %q is the file of another server block, %s, or one beside it", words[0], other.keys)
		}
		files[path] = block
	}
	return nil
}

func (snapshotFiles) key() string { return pluginName + " snapshot files" }

// hotPercentageArg reads the hot tier's share of the capacity.
func hotPercentageArg(c *caddy.Controller) (int, error) {
	name, word, err := oneArg(c)
	if err != nil {
		return 0, err
	}
	if word == "auto" {
		return hotAuto, nil
	}
	return number(c, name, word, 0, maxHotPercentage)
}

// args returns the words after the current one; there must be lo to hi of them.
func args(c *caddy.Controller, lo, hi int) ([]string, error) {
	name := c.Val()
	words := c.RemainingArgs()
	switch {
	case c.NextArg(): // RemainingArgs stops short of the line's end at an opening brace only
		return nil, c.Errf("unexpected %q after %s", c.Val(), name)
	case slices.Contains(words, "}"):
		return nil, c.Errf("%s: unexpected \"}\": it goes on a line of its own", name)
	case slices.Contains(words, ""):
		return nil, c.Errf("%s lacks its value: \"\" was given; is an environment variable unset?", name)
	case len(words) < lo:
		return nil, c.Errf("%s lacks its value", name)
	case len(words) > hi:
		return nil, c.Errf("%s: unexpected %q", name, words[hi])
	}
	return words, nil
}

// oneArg returns the only word after name, the current one.
func oneArg(c *caddy.Controller) (name, word string, err error) {
	name = c.Val()
	words, err := args(c, 1, 1)
	if err != nil {
		return name, "", err
	}
	return name, words[0], nil
}

func intArg(c *caddy.Controller, lo, hi int) (int, error) {
	name, word, err := oneArg(c)
	if err != nil {
		return 0, err
	}
	return number(c, name, word, lo, hi)
}

func boolArg(c *caddy.Controller) (bool, error) {
	name, word, err := oneArg(c)
	if err != nil {
		return false, err
	}
	if word != "true" && word != "false" {
		return false, c.Errf("%s: %q is neither true nor false", name, word)
	}
	return word == "true", nil
}

func durationArg(c *caddy.Controller, hi time.Duration) (time.Duration, error) {
	name, word, err := oneArg(c)
	if err != nil {
		return 0, err
	}
	return durationUpTo(c, name, word, hi)
}

// duration is word as a duration; what names it in the error.
func duration(c *caddy.Controller, what, word string) (time.Duration, error) {
	d, err := time.ParseDuration(word)
	if err != nil {
		return 0, c.Errf("%s: %q is not a duration such as 5s", what, word)
	}
	return d, nil
}

// durationUpTo is word as a duration from 0 to hi.
func durationUpTo(c *caddy.Controller, what, word string, hi time.Duration) (time.Duration, error) {
	d, err := duration(c, what, word)
	if err != nil {
		return 0, err
	}
	if d < 0 || d > hi {
		if hi == math.MaxInt64 {
			return 0, c.Errf("%s: %q is less than 0", what, word)
		}
		return 0, c.Errf("%s: %q is not between 0 and %v", what, word, hi)
	}
	return d, nil
}

// switchArg reads on or off.
func switchArg(c *caddy.Controller) (bool, error) {
	name, word, err := oneArg(c)
	if err != nil {
		return false, err
	}
	if word != "on" && word != "off" {
		return false, c.Errf("%s: %q is neither on nor off", name, word)
	}
	return word == "on", nil
}

// sizeUnits in bytes. KB is KiB: memory comes in powers of two.
var sizeUnits = map[string]uint64{
	"": 1, "b": 1,
	"kb": 1 << 10, "kib": 1 << 10,
	"mb": 1 << 20, "mib": 1 << 20,
	"gb": 1 << 30, "gib": 1 << 30,
}

// sizeArg reads an amount of memory, such as 64MB, in bytes.
func sizeArg(c *caddy.Controller) (int64, error) {
	name, word, err := oneArg(c)
	if err != nil {
		return 0, err
	}
	unitAt := len(word) - len(strings.TrimLeft(word, "0123456789"))
	unit, ok := sizeUnits[strings.ToLower(word[unitAt:])]
	n, err := strconv.ParseUint(word[:unitAt], 10, 63)
	switch {
	case !ok || errors.Is(err, strconv.ErrSyntax):
		return 0, c.Errf("%s: %q is not a size such as 64MB", name, word)
	case err != nil || n > math.MaxInt64/unit:
		return 0, c.Errf("%s: %q is too large", name, word)
	case n != 0 && n*unit < minMaxMemory:
		return 0, c.Errf("%s: %q is less than 1MB", name, word)
	}
	return int64(n * unit), nil
}

// number is word as a number from lo to hi; what names it in the error.
func number(c *caddy.Controller, what, word string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(word)
	if errors.Is(err, strconv.ErrSyntax) {
		return 0, c.Errf("%s: %q is not a whole number", what, word)
	}
	if err != nil || n < lo || n > hi {
		return 0, c.Errf("%s: %q is not between %d and %d", what, word, lo, hi)
	}
	return n, nil
}

// zones normalizes names, and networks in CIDR notation to their reverse zones.
// Unlike plugin.OriginsFromArgsOrServerBlock it does not pass over what is no zone.
func zones(c *caddy.Controller, words []string) ([]string, error) {
	var all []string
	for _, word := range words {
		if word == "" { // would normalize to the root
			return nil, c.Errf("an empty word \"\" is not a zone; is an environment variable unset?")
		}
		names := plugin.Host(word).NormalizeExact()
		if len(names) == 0 || slices.ContainsFunc(names, notDomainName) || slices.Contains(braces, word) {
			return nil, c.Errf("%q is not a zone", word)
		}
		all = append(all, names...)
	}
	return all, nil
}

// notDomainName reports whether a normalized zone is no name. One that ends in a backslash has
// escaped the final dot.
func notDomainName(s string) bool {
	_, ok := dns.IsDomainName(s)
	return !ok || !dns.IsFqdn(s)
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }
