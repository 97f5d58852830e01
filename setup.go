package optcache

// This file reads an optcache block of the Corefile and checks it word by word. It puts the handler into the plugin
// chain, and checks when a server block starts that the plugin can do its work there. What the options do stands in
// other files.

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache" // serves `use_optimized_cache false`
	clog "github.com/coredns/coredns/plugin/pkg/log"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/level2"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/arg"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/memlimit"
	"github.com/optcache/optcache/plugin/pkg/popularity"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

const (
	pluginName = "optcache"
	stockName  = "cache" // the plugin this one replaces word for word
)

// Limits of what a Corefile may ask for.
const (
	// minCapacity is the least number of entries of a class. `cache` never holds fewer: 256 shards of at least 4.
	// Corefiles that say `denial 0` work with `cache`, so a smaller number is raised and not refused.
	minCapacity     = 1024
	defaultCapacity = 10_000
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
	// Limits of upstream_limit.
	maxPerSecond, maxBurst = 10_000_000, 10_000_000
	defaultTurn            = time.Second // MAX_WAIT
	maxJitter              = 25          // per cent
	maxTTLs                = 1000        // options ttl, stale_for and prefetch_for of a block, each

	maxWorkers = 1024 // of fastpath

	maxHotPercentage      = 50
	hotAuto               = -1 // `hot_cache_percentage auto`
	maxPromotionThreshold = index.MaxCount
)

var log = clog.NewWithPlugin(pluginName)

func init() { plugin.Register(pluginName, setup) }

func setup(c *caddy.Controller) error {
	if err := checkVersion(caddy.AppVersion); err != nil {
		return plugin.Error(pluginName, err)
	}
	again := *c // parse reads c to its end
	b, err := parse(c)
	if err != nil {
		return plugin.Error(pluginName, err)
	}
	if !b.optimized {
		return setupStock(&again)
	}
	b.say()

	again.Next()
	errTwo := errTwoCaches(&again)
	cfg := dnsserver.GetConfig(c)
	o := newOptcache(b.options)
	inChain := false
	if o.pooled.name != "" {
		if err := b.joinPool(o, func() bool {
			o.identity = identityOf(c, cfg)
			return inChain
		}); err != nil {
			return plugin.Error(pluginName, err)
		}
	}
	o.fast.at = cmp.Or(o.fast.at, b.at[pluginName])

	cfg.AddPlugin(func(next plugin.Handler) plugin.Handler {
		o.Next = next
		inChain = true
		return o
	})
	c.OnStartup(func() error {
		if cfg.Handler(stockName) != nil {
			return errTwo
		}
		if !inChain { // the block has no server, so no request would use the memory
			return nil
		}
		o.identity = identityOf(c, cfg)
		o.addrs = chain.ServerAddrs(c.ServerBlockKeys, cfg.ListenHosts)
		if all := caddy.Instances(); len(all) > 0 { // the last one is being started
			o.of = all[len(all)-1]
		}
		defer b.say()
		if err := errors.Join(b.checkChain(cfg.Handlers(), o.Next), b.checkFile(), b.checkSecret(), b.checkWarmFrom()); err != nil {
			return plugin.Error(pluginName, err)
		}
		if err := o.start(cfg.ViewName, cfg.Handlers()); err != nil {
			return plugin.Error(pluginName, b.errMemory(err))
		}
		if of := o.bounds(); of != nil {
			b.checkMemory(of, o.store.data.Bytes(), o.store.bound())
		}
		if b.control.Address == "" {
			return nil
		}
		if err := o.listenForControl(c); err != nil {
			return plugin.Error(pluginName, fmt.Errorf("%s - control: %w", b.at["control"], err))
		}
		return nil
	})
	// Both callbacks run before CoreDNS hands the open sockets on to the new servers. OnRestart runs for the previous
	// Corefile, and does not run if that has no optcache. OnStartup runs for the new Corefile, and does not run if
	// that has none.
	c.OnStartup(func() error { return fastpath.LimitWaits(c.Context(), false) })
	c.OnRestart(func() error { return fastpath.LimitWaits(c.Context(), true) })
	if c.Get(corefileGeneration) == nil { // once for all blocks of the Corefile
		c.Set(corefileGeneration, true)
		c.OnRestart(instances.nextGeneration)
	}
	c.OnRestartFailed(func() error { return instances.rollBack(o) })
	// caddy calls OnShutdown in a reload, and when the process ends. In the latter case the servers go on for a while
	// (lameduck of `health`) and need the cache, so that the instance stops in OnFinalShutdown.
	c.OnShutdown(func() error {
		if !instances.reloading(o) {
			return nil
		}
		return o.stop()
	})
	c.OnFinalShutdown(o.stop)
	setupFast(c, o)
	return nil
}

// setupStock makes CoreDNS's own cache serve the block that c is about to read: `use_optimized_cache false`.
func setupStock(c *caddy.Controller) error {
	action, err := caddy.DirectiveAction("dns", stockName)
	if err != nil {
		return plugin.Error(pluginName, err)
	}
	head := *c
	head.Next()
	b := &corefileBlock{Controller: &head, at: map[string]string{pluginName: fmt.Sprintf("%s:%d", head.File(), head.Line())}}
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

	// A config knows its handlers by name, so that the last one registered hides another of the same name. check
	// looks when this cache registers, and once more when all plugins have registered.
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
		stock, ok := ours.(*cache.Cache)
		if !ok { // the block has no server
			return nil
		}
		defer b.say()
		if err := b.checkChain(cfg.Handlers(), stock.Next); err != nil {
			return plugin.Error(pluginName, err)
		}
		return nil
	})
	return nil
}

// errTwoCaches returns an error for the line that c stands on. Two caches in one block keep every answer twice, and
// each shows TTLs that the other has counted down.
func errTwoCaches(c *caddy.Controller) error {
	return plugin.Error(pluginName, c.Errf("%s and %s in one server block: remove one of them", stockName, pluginName))
}

// stockTokens rewrites an optcache block that parse has accepted into a block of cache. The lines keep their numbers.
// dropped names the options that cache does not have.
func stockTokens(d caddyfile.Dispenser) (tokens []caddyfile.Token, dropped []string) {
	keep := func(word string) {
		tokens = append(tokens, caddyfile.Token{File: d.File(), Line: d.Line(), Text: word})
	}
	d.Next()
	keep(stockName)
	words := d.RemainingArgs()
	if n := len(words); n > 0 && words[n-1] == emptyBlock {
		words = words[:n-1]
	}
	for _, word := range words {
		keep(word)
	}
	if d.NextArg() {
		keep(d.Val()) // the opening brace
	}
	for d.Next() { // one line of the block each time
		switch name := d.Val(); {
		case name == "use_optimized_cache":
			d.RemainingArgs()
		case slices.Contains(ownProperties, name):
			d.RemainingArgs()
			dropped = append(dropped, name)
		default:
			keep(name)
			for n := 1; d.NextArg(); n++ {
				if name == "servfail" && n > 1 {
					dropped = append(dropped, "MAX of servfail")
					continue
				}
				keep(d.Val())
			}
		}
	}
	return tokens, dropped
}

// located adds a place to an error of cache's own parser, where the error has none: the line where that parser
// stopped.
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

// emptyBlock is an empty block whose braces are written without a space. The lexer reads one word. cache takes the
// word for the name of a zone that matches nothing.
const emptyBlock = "{}"

// braces are valid domain names, but a Corefile never means them as such.
var braces = []string{"{", "}", emptyBlock}

// ownProperties are the properties that cache lacks. They are read strictly. The properties of cache are read as
// cache reads them: what cache accepts is accepted, with a warning where a word has no effect.
var ownProperties = append([]string{"use_optimized_cache", "hot_cache_percentage", "hot_cache_promotion_threshold",
	"cache_line_optimization", "max_memory", "pool", "coalesce", "nxdomain_cut", "ecs", "upstream_limit", "keep_warm", "warm_from", "denial_without_soa", "ttl", "stale_for", "prefetch_for", "jitter", "ede", "fastpath", "cache_file_path",
	"control", "top_clients"}, sharedProperties...)

// severalTimes are the properties that may be given more than once: disable for each class. The block's own name is none.
var severalTimes = []string{"disable", "ttl", "stale_for", "prefetch_for", "keep_warm", pluginName}

// stockProperties are the properties of cache.
var stockProperties = []string{"success", "denial", "servfail", "disable", "keepttl", "prefetch", "serve_stale", "serve_stale_policy"}

// corefileBlock is an optcache block while it is read and checked.
type corefileBlock struct {
	*caddy.Controller
	options
	optimized bool // false: CoreDNS's own cache serves the block

	at       map[string]string // place of the block, and of each property in it, by name: FILE:LINE
	warnings []string          // each with its place
	nested   error             // for the first property of cache that is followed by a brace
}

// warn adds a warning about the line that is being read. say logs it.
func (b *corefileBlock) warn(format string, args ...any) { b.warnAt(b.here(), format, args...) }

func (b *corefileBlock) warnAt(at, format string, args ...any) {
	b.warnings = append(b.warnings, at+": "+fmt.Sprintf(format, args...))
}

func (b *corefileBlock) here() string { return fmt.Sprintf("%s:%d", b.File(), b.Line()) }

// say logs the warnings and drops them. setup calls it after reading, and again after the checks at the start.
func (b *corefileBlock) say() {
	for _, w := range b.warnings {
		log.Warning(w)
	}
	b.warnings = nil
}

// parse reads an optcache block:
//
//	optcache [TTL] [ZONES...] {
//	    PROPERTY [ARGS...]
//	}
func parse(c *caddy.Controller) (*corefileBlock, error) {
	b := &corefileBlock{
		Controller: c,
		options: options{
			success:            classOptions{capacity: defaultCapacity, maxTTL: time.Hour, minTTL: 5 * time.Second},
			denial:             classOptions{capacity: defaultCapacity, maxTTL: 30 * time.Minute, minTTL: 5 * time.Second},
			servfail:           5 * time.Second,
			prefetch:           prefetchOptions{gap: time.Minute, percentage: 10},
			coalesce:           defaultCoalesce,
			shared:             sharedOptions{Options: level2.Options{Timeout: defaultSharedTimeout, Prefix: pluginName}},
			explain:            true,
			hotPercentage:      10,
			promotionThreshold: 3,
			lineAligned:        true,
		},
		optimized: true,
		at:        map[string]string{},
	}
	c.Next()
	b.at[pluginName] = b.here()
	if err := b.parseHead(); err != nil {
		return nil, err
	}
	var policy error // the error for a serve_stale_policy without serve_stale
	for c.NextBlock() {
		name := c.Val()
		if at, twice := b.at[name]; twice && !slices.Contains(severalTimes, name) {
			if name == "serve_stale_policy" || !slices.Contains(stockProperties, name) {
				return nil, c.Errf("%s given twice", name)
			}
			b.warn("%s is given again: this line counts, as far as it goes, and not %s", name, at)
		}
		b.at[name] = b.here()

		var err error
		switch name {
		case "success":
			err = b.classArgs(&b.success)
		case "denial":
			err = b.classArgs(&b.denial)
		case "servfail":
			err = b.servfailArg()
		case "disable":
			err = b.disableArgs()
		case "keepttl":
			b.keepTTL = true
			_, err = b.stockArgs(0, 0)
		case "use_optimized_cache":
			b.optimized, err = arg.Bool(c)
		case "hot_cache_percentage":
			b.hotPercentage, err = hotPercentageArg(c)
		case "hot_cache_promotion_threshold":
			b.promotionThreshold, err = arg.Int(c, 1, maxPromotionThreshold)
		case "cache_line_optimization":
			b.lineAligned, err = arg.Bool(c)
		case "max_memory":
			err = b.memoryArg()
		case "pool":
			err = b.poolArgs()
		case "prefetch":
			err = b.prefetchArgs()
		case "serve_stale":
			err = b.staleArgs()
		case "serve_stale_policy":
			policy, err = b.policyArg()
		case "coalesce":
			err = coalesceArgs(c, &b.coalesce)
		case "upstream_limit":
			err = upstreamArgs(c, &b.upstream)
		case "nxdomain_cut":
			err = b.cutArgs()
		case "keep_warm":
			err = b.warmArgs()
		case "warm_from":
			err = b.warmFromArgs()
		case "ecs":
			err = b.ecsArgs()
		case "denial_without_soa":
			err = b.withoutSOAArg()
		case "ttl":
			err = b.ttlArgs()
		case "stale_for":
			b.staleFor, err = b.switchArgs(b.staleFor)
		case "prefetch_for":
			b.prefetchFor, err = b.switchArgs(b.prefetchFor)
		case "jitter":
			b.jitter, err = arg.Int(c, 0, maxJitter)
		case "fastpath":
			err = fastArgs(c, &b.fast)
		case "cache_file_path":
			err = fileArgs(c, &b.file)
		case "control":
			err = controlArgs(c, &b.control)
		case "top_clients":
			err = b.clientArgs()
		case "ede":
			b.explain, err = arg.Switch(c)
		default:
			if !slices.Contains(sharedProperties, name) {
				return nil, c.Errf("unknown property %q", name)
			}
			err = b.sharedArgs(name)
		}
		if err != nil {
			return nil, err
		}
	}

	if c.Next() {
		return nil, b.errLeftover()
	}
	if at := b.at["max_memory"]; at != "" && b.pooled.name != "" {
		return nil, fmt.Errorf("%s - max_memory: the block is in pool %q, whose blocks have one bound: %s has room for it, as in `pool %s 64MB`", at, b.pooled.name, b.at["pool"], b.pooled.name)
	}
	if policy != nil && b.at["serve_stale"] == "" {
		return nil, policy
	}
	if err := b.checkShared(); err != nil {
		return nil, err
	}
	b.stale.preferPositive = policy != nil
	b.warnOfIdleWords()
	return b, nil
}

// warnOfIdleWords warns of properties that have no effect because of another property of the block.
func (b *corefileBlock) warnOfIdleWords() {
	idle := func(name, why string, args ...any) {
		if at := b.at[name]; at != "" {
			b.warnAt(at, "%s has no effect: %s", name, fmt.Sprintf(why, args...))
		}
	}
	if b.stale.upTo < time.Second {
		idle("serve_stale_policy", "serve_stale keeps nothing")
	}
	for _, of := range []struct {
		name, needs string
		lacks       bool
		switches    []admit.Switch
	}{
		{"stale_for", "serve_stale is not given, or keeps nothing", b.stale.upTo < time.Second, b.staleFor},
		{"prefetch_for", "prefetch is not given, or 0", b.prefetch.amount == 0, b.prefetchFor},
	} {
		switch {
		case of.lacks:
			idle(of.name, "%s", of.needs)
		case !slices.ContainsFunc(of.switches, func(s admit.Switch) bool { return !s.On }):
			idle(of.name, "it is on for all names, and no line says off; `%s off` is for all names that no other line is for", of.name)
		}
	}
	if b.control.Address == "" {
		idle("top_clients", "control is not given")
	}
	if b.shared.on() {
		idle("warm_from", "shared is given, and the group's answers are taken over from the second level")
	} else {
		for _, name := range sharedProperties {
			idle(name, "shared is not given")
		}
	}
	if b.coalesce.waiters > 0 && b.upstream.wait > b.coalesce.wait {
		b.warnAt(b.at["upstream_limit"], "upstream_limit: a MAX_WAIT of %v is more than the %v of coalesce, after which a question is asked once more, and needs another token",
			b.upstream.wait, b.coalesce.wait)
	}
	if b.hotPercentage == 0 {
		idle("hot_cache_promotion_threshold", "hot_cache_percentage is 0")
	}
	// whole reports whether `disable` excludes a class from all zones that the block caches for.
	whole := func(class *classOptions) bool {
		return len(b.zones) > 0 && !slices.ContainsFunc(b.zones, func(zone string) bool { return plugin.Zones(class.except).Matches(zone) == "" })
	}
	if whole(&b.success) {
		idle("success", "%s disables all of it", b.at["disable success"])
	}
	if whole(&b.denial) {
		idle("denial", "%s disables all of it", b.at["disable denial"])
		idle("servfail", "%s disables all of it", b.at["disable denial"])
	}
	if whole(&b.success) && whole(&b.denial) {
		b.warnAt(b.at[pluginName], "nothing is kept: disable is given for success and for denial")
	}
}

// parseHead reads what stands before the block: [TTL] [ZONES...].
func (b *corefileBlock) parseHead() error {
	words := b.RemainingArgs()
	if n := len(words); n > 0 && words[n-1] == emptyBlock {
		b.warn("%q is one word, and taken for an empty block: write { and } with a space, or leave them out", emptyBlock)
		words = words[:n-1]
	}
	// As in cache, a first word that is a number is the TTL, and any other word is a zone. A number too large for an
	// int is a zone, too.
	if len(words) > 0 {
		if _, err := strconv.Atoi(words[0]); err == nil {
			ttl, err := b.clamp("TTL", words[0], 1, maxTTLSeconds)
			if err != nil {
				return err
			}
			b.success.maxTTL, b.denial.maxTTL = seconds(ttl), seconds(ttl)
			words = words[1:]
		}
	}
	served := plugin.OriginsFromArgsOrServerBlock(nil, b.ServerBlockKeys)
	if len(words) == 0 {
		b.zones = served
		return nil
	}
	b.zones = []string{}
	for _, word := range words {
		names := plugin.Host(word).NormalizeExact()
		b.warnOfZone(word, names, served, "the server block's zones")
		b.zones = append(b.zones, names...)
	}
	if len(b.zones) == 0 {
		b.warn("no zone is left: as with %s, nothing is kept", stockName)
	}
	return nil
}

// warnOfZone warns of a word that stands for zones, and has no effect because no qname can be in them. names are the
// zones that the word is taken for, possibly none. within are the zones whose requests arrive here.
func (b *corefileBlock) warnOfZone(word string, names, within []string, whose string) {
	switch {
	case len(names) == 0 && word == "":
		b.warn("an empty word \"\" is not a zone, and is ignored; is an environment variable unset?")
	case len(names) == 0:
		b.warn("%q is not a zone, and is ignored", word)
	case word == "":
		b.warn("an empty word \"\" is taken for the root zone, that is all names; is an environment variable unset?")
	case slices.ContainsFunc(names, notDomainName), slices.Contains(braces, word):
		b.warn("%q is taken for a zone, and no name is in it", word)
	case looksLikeNumber(word):
		b.warn("%q is taken for a zone: a TTL is a whole number of seconds, and stands first", word)
	case slices.Contains(stockProperties, word), slices.Contains(ownProperties, word):
		b.warn("%q is taken for a zone: properties stand in a block, each on a line of its own", word)
	case isAddress(word):
		b.warn("%q is taken for a zone, not for an address: a network is written as 192.0.2.0/24", word)
	case len(within) > 0 && !slices.ContainsFunc(names, func(name string) bool {
		return slices.ContainsFunc(within, func(zone string) bool { return dns.IsSubDomain(zone, name) || dns.IsSubDomain(name, zone) })
	}):
		b.warn("%q has no effect: it is outside %s, %s", word, whose, strings.Join(within, " "))
	}
}

// looksLikeNumber reports whether a word is a number, a duration or a size rather than a zone.
func looksLikeNumber(word string) bool {
	if word == "" || !strings.ContainsRune("0123456789+-", rune(word[0])) {
		return false
	}
	_, errNumber := strconv.ParseFloat(word, 64)
	_, errDuration := time.ParseDuration(word)
	return errNumber == nil || errors.Is(errNumber, strconv.ErrRange) || errDuration == nil || !strings.ContainsAny(word, ".:/")
}

func isAddress(word string) bool {
	_, err := netip.ParseAddr(word)
	return err == nil
}

// errLeftover returns the error for a word after the end of the block.
func (b *corefileBlock) errLeftover() error {
	switch {
	case b.nested != nil:
		return b.nested
	case b.Val() == pluginName:
		return b.Errf("%s: %v", pluginName, plugin.ErrOnce)
	case b.Val() == "{":
		return b.Errf("unexpected \"{\": %s has one block, which opens on its own line: put the brace at the end of that line, as in \"%s {\"",
			pluginName, pluginName)
	}
	return b.Errf("unexpected %q after %s", b.Val(), pluginName)
}

// stockArgs returns the words after a property of cache, of which there must be lo to hi. Like cache, it does not
// stop at a brace that opens another block. It keeps an error for the brace in b.nested: errLeftover returns that if
// the block then ends too early.
func (b *corefileBlock) stockArgs(lo, hi int) ([]string, error) {
	name := b.Val()
	words := b.RemainingArgs()
	if ahead := b.Dispenser; ahead.NextArg() && b.nested == nil {
		b.nested = b.Errf("unexpected \"{\" after %s", name)
	}
	return words, arg.Check(b.Controller, name, words, lo, hi)
}

// clamp returns word as a number of at least lo. Like cache, it accepts a number above hi; the number counts as hi,
// with a warning. what names the value in messages.
func (b *corefileBlock) clamp(what, word string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(word)
	if err != nil || n < lo {
		return arg.Number(b.Controller, what, word, lo, hi)
	}
	if n > hi {
		b.warn("%s: %q counts as %d, which is the most", what, word, hi)
	}
	return min(n, hi), nil
}

// warnOfFraction warns of a duration that is not a whole number of seconds, for values that count in whole seconds.
func (b *corefileBlock) warnOfFraction(what, word string, d time.Duration) {
	switch {
	case d > 0 && d < time.Second:
		b.warn("%s: %q has no effect: it counts in whole seconds, and is less than one", what, word)
	case d%time.Second != 0:
		b.warn("%s: %q counts as %v: it counts in whole seconds", what, word, d.Truncate(time.Second))
	}
}

// classArgs reads CAPACITY [TTL] [MINTTL].
func (b *corefileBlock) classArgs(class *classOptions) error {
	name := b.Val()
	words, err := b.stockArgs(1, math.MaxInt)
	if err != nil {
		return err
	}
	fields := []struct {
		name   string
		lo, hi int
		set    func(int)
	}{
		{"capacity", math.MinInt, maxCapacity, func(n int) { class.capacity = max(n, minCapacity) }},
		{"TTL", 1, maxTTLSeconds, func(n int) { class.maxTTL = seconds(n) }},
		{"MINTTL", 0, maxTTLSeconds, func(n int) { class.minTTL = seconds(n) }},
	}
	for i, word := range words {
		if i == len(fields) {
			b.warn("%s: %q is ignored: there are three values at the most", name, strings.Join(words[i:], " "))
			break
		}
		n, err := b.clamp(name+" "+fields[i].name, word, fields[i].lo, fields[i].hi)
		if err != nil {
			return err
		}
		if i == 0 && n <= 0 {
			b.warn("%s capacity: %q counts as %d, which is the least; `disable %s` keeps none", name, word, minCapacity, name)
		}
		fields[i].set(n)
	}
	if len(words) > 2 && class.minTTL > class.maxTTL {
		b.warn("%s: a MINTTL of %q has an effect up to the TTL of %q only", name, words[2], words[1])
	}
	return nil
}

// servfailArg reads DURATION [MAX].
func (b *corefileBlock) servfailArg() error {
	words, err := b.stockArgs(1, 2)
	if err != nil {
		return err
	}
	if b.servfail, err = arg.DurationUpTo(b.Controller, "servfail", words[0], maxServfail); err != nil {
		return err
	}
	b.warnOfFraction("servfail", words[0], b.servfail)
	b.servfailMost = 0
	if len(words) == 1 {
		return nil
	}
	b.at["servfail MAX"] = b.here()
	if b.servfailMost, err = arg.DurationUpTo(b.Controller, "servfail MAX", words[1], maxServfail); err != nil {
		return err
	}
	switch {
	case b.servfailMost < b.servfail:
		return b.Errf("servfail MAX: %q is less than DURATION, %q", words[1], words[0])
	case b.servfail < time.Second && b.servfailMost > 0:
		return b.Errf("servfail MAX: %q has nothing to double: DURATION, %q, is less than a second", words[1], words[0])
	}
	b.warnOfFraction("servfail MAX", words[1], b.servfailMost)
	return nil
}

// disableArgs reads success|denial [ZONES...]. Without zones, the class is disabled for all names.
func (b *corefileBlock) disableArgs() error {
	words, err := b.stockArgs(1, math.MaxInt)
	if err != nil {
		return err
	}
	classes := map[string]*classOptions{"success": &b.success, "denial": &b.denial}
	class := classes[words[0]]
	if class == nil {
		return b.Errf("disable: %q is neither success nor denial", words[0])
	}
	this := "disable " + words[0]
	if at := b.at[this]; at != "" {
		b.warn("%s is given again: this line counts, and not %s", this, at)
	}
	b.at[this] = b.here()
	class.except = []string{"."}
	if len(words) > 1 {
		class.except = nil
	}
	for _, word := range words[1:] {
		zone := plugin.Name(word).Normalize() // as cache reads the word: no network, scheme or port
		class.except = append(class.except, zone)
		if names := plugin.Host(word).NormalizeExact(); len(names) > 0 && !slices.Equal(names, []string{zone}) {
			b.warn("%s: %q has no effect: no name is in it; write %s", this, word, strings.Join(names, " "))
			continue
		}
		b.warnOfZone(word, []string{zone}, b.zones, "the zones that are cached for")
	}
	return nil
}

// withoutSOAArg reads DURATION.
func (b *corefileBlock) withoutSOAArg() error {
	_, word, err := arg.One(b.Controller)
	if err != nil {
		return err
	}
	if b.withoutSOA, err = arg.DurationUpTo(b.Controller, "denial_without_soa", word, maxTTLSeconds*time.Second); err == nil {
		b.warnOfFraction("denial_without_soa", word, b.withoutSOA)
	}
	return err
}

// ttlArgs reads [ZONES...] [TYPES...] success|denial MAX [MIN] [success|denial MAX [MIN]]. The option may be given many times.
func (b *corefileBlock) ttlArgs() error {
	words, err := arg.All(b.Controller, 2, math.MaxInt)
	if err != nil {
		return err
	}
	var t admit.TTLs
	if t.Selector, words, err = b.selector("ttl", words, "success", "denial"); err != nil {
		return err
	}
	if len(words) == 0 {
		return b.Errf("ttl: neither success nor denial is given")
	}
	seen := make(map[string]bool)
	for len(words) > 0 {
		class := words[0]
		switch {
		case class != "success" && class != "denial":
			return b.Errf("ttl: %q is neither success nor denial", class)
		case seen[class]:
			return b.Errf("ttl: %s given twice", class)
		}
		seen[class] = true
		words = words[1:]
		n := 0
		for n < len(words) && words[n] != "success" && words[n] != "denial" {
			n++
		}
		if n == 0 || n > 2 {
			return b.Errf("ttl %s: MAX and perhaps MIN follow, not %q", class, strings.Join(words[:n], " "))
		}
		most, err := arg.Number(b.Controller, "ttl "+class+" MAX", words[0], 1, maxTTLSeconds)
		if err != nil {
			return err
		}
		least := 0
		if n > 1 {
			if least, err = arg.Number(b.Controller, "ttl "+class+" MIN", words[1], 0, most); err != nil {
				return err
			}
		}
		words = words[n:]
		t.Class, t.Max, t.Min = record.Success, seconds(most), seconds(least)
		if class == "denial" {
			t.Class = record.Denial
		}
		if b.ttls = append(b.ttls, t); len(b.ttls) > maxTTLs {
			return b.Errf("ttl: there are more than %d bounds", maxTTLs)
		}
	}
	return nil
}

// switchArgs reads [ZONES...] [TYPES...] on|off, and adds it to those before. The option may be given many times.
func (b *corefileBlock) switchArgs(before []admit.Switch) ([]admit.Switch, error) {
	name := b.Val()
	words, err := arg.All(b.Controller, 1, math.MaxInt)
	if err != nil {
		return nil, err
	}
	s, words, err := b.selector(name, words, "on", "off")
	switch {
	case err != nil:
		return nil, err
	case len(words) == 0:
		return nil, b.Errf("%s: neither on nor off is given", name)
	case len(words) > 1:
		return nil, b.Errf("%s: unexpected %q after %s", name, words[1], words[0])
	case len(before) == maxTTLs:
		return nil, b.Errf("%s: there are more than %d lines", name, maxTTLs)
	}
	return append(before, admit.Switch{Selector: s, On: words[0] == "on"}), nil
}

// zonesOf returns the zones that a word of an option stands for.
func (b *corefileBlock) zonesOf(option, word string) ([]string, error) {
	names := plugin.Host(word).NormalizeExact()
	if len(names) == 0 || slices.ContainsFunc(names, notDomainName) || slices.Contains(braces, word) {
		return nil, b.Errf("%s: %q is not a zone", option, word)
	}
	b.warnOfZone(word, names, b.zones, "the zones that are cached for")
	return names, nil
}

// selector reads the zones and types that the words after a property begin with, up to one of two words, and returns the rest.
func (b *corefileBlock) selector(name string, words []string, end, otherEnd string) (s admit.Selector, rest []string, err error) {
	for len(words) > 0 && words[0] != end && words[0] != otherEnd {
		if qtype, ok := dns.StringToType[words[0]]; ok {
			s.Types = append(s.Types, qtype)
			words = words[1:]
			continue
		}
		names := plugin.Host(words[0]).NormalizeExact()
		if len(names) == 0 || slices.ContainsFunc(names, notDomainName) || looksLikeNumber(words[0]) && !strings.ContainsAny(words[0], "./") {
			return s, nil, b.Errf("%s: %q is neither a zone, a type, %s nor %s", name, words[0], end, otherEnd)
		}
		b.warnOfZone(words[0], names, b.zones, "the zones that are cached for")
		for _, name := range names {
			zone, _ := zones.Wire(name)
			s.Zones = append(s.Zones, zone)
		}
		words = words[1:]
	}
	return s, words, nil
}

// prefetchArgs reads AMOUNT [[DURATION] [PERCENTAGE%]].
func (b *corefileBlock) prefetchArgs() error {
	p := &b.prefetch
	words, err := b.stockArgs(1, 3)
	if err != nil {
		return err
	}
	amount, err := arg.Number(b.Controller, "prefetch AMOUNT", words[0], 0, math.MaxInt)
	if err != nil {
		return err
	}
	p.amount = uint32(min(amount, popularity.Most))
	if amount > popularity.Most {
		b.warn("prefetch AMOUNT: %q counts as %d, which is the most", words[0], popularity.Most)
	}
	if len(words) > 1 {
		if p.gap, err = arg.Duration(b.Controller, "prefetch DURATION", words[1]); err != nil {
			return err
		}
		if p.gap < time.Millisecond && amount > 1 {
			b.warn("prefetch has no effect: no name is asked for %s times with no gap longer than %q", words[0], words[1])
		}
	}
	if len(words) > 2 {
		percentage, ok := strings.CutSuffix(words[2], "%")
		if !ok {
			return b.Errf("prefetch PERCENTAGE: %q does not end in %%", words[2])
		}
		p.percentage, err = arg.Number(b.Controller, "prefetch PERCENTAGE", percentage, 10, 90)
	}
	return err
}

// staleArgs reads [DURATION] [immediate [RESPONSE_TTL [FAILURE_RECHECK]] | verify [TIMEOUT
// [RESPONSE_TTL [FAILURE_RECHECK]]]].
func (b *corefileBlock) staleArgs() error {
	c, s := b.Controller, &b.stale
	*s = staleOptions{upTo: time.Hour}
	words, err := b.stockArgs(0, 5)
	if err != nil || len(words) == 0 {
		return err
	}
	if s.upTo, err = arg.DurationUpTo(c, "serve_stale DURATION", words[0], math.MaxInt64); err != nil {
		return err
	}
	b.warnOfFraction("serve_stale DURATION", words[0], s.upTo)
	if len(words) == 1 {
		return nil
	}
	mode, words := words[1], words[2:]
	switch strings.ToLower(mode) {
	case "verify":
		s.verify = true
		if len(words) > 0 {
			if s.timeout, err = arg.DurationUpTo(c, "serve_stale verify TIMEOUT", words[0], math.MaxInt64); err != nil {
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
		if s.ttl, err = arg.DurationUpTo(c, "serve_stale RESPONSE_TTL", words[0], math.MaxUint32*time.Second); err != nil {
			return err
		}
		if s.ttl%time.Second != 0 {
			return c.Errf("serve_stale RESPONSE_TTL: %q is not a whole number of seconds", words[0])
		}
	}
	if len(words) > 1 {
		s.recheck, err = arg.DurationUpTo(c, "serve_stale FAILURE_RECHECK", words[1], maxRecheck)
	}
	return err
}

// policyArg reads prefer_positive. lonely is the error to return if the block has no serve_stale.
func (b *corefileBlock) policyArg() (lonely, err error) {
	name := b.Val()
	words, err := b.stockArgs(1, 1)
	if err != nil {
		return nil, err
	}
	if !strings.EqualFold(words[0], "prefer_positive") {
		return nil, b.Errf("%s: %q is not prefer_positive", name, words[0])
	}
	return b.Errf("%s has no effect without serve_stale", name), nil
}

// upstreamArgs reads QPS [BURST [MAX_WAIT]] [group NAME].
func upstreamArgs(c *caddy.Controller, o *upstreamOptions) error {
	words, err := arg.All(c, 1, 5)
	if err != nil {
		return err
	}
	o.wait = defaultTurn
	if at := slices.Index(words, "group"); at > 0 {
		if len(words) != at+2 || words[at+1] == "" {
			return c.Errf("upstream_limit: one name follows %q, at the end of the line", words[at])
		}
		o.group, words = words[at+1], words[:at]
	}
	if len(words) > 3 {
		return c.Errf("upstream_limit: unexpected %q", words[3])
	}
	if o.perSecond, err = arg.Number(c, "upstream_limit QPS", words[0], 1, maxPerSecond); err != nil {
		return err
	}
	if o.burst = o.perSecond; len(words) > 1 {
		if o.burst, err = arg.Number(c, "upstream_limit BURST", words[1], 1, maxBurst); err != nil {
			return err
		}
	}
	if len(words) > 2 {
		o.wait, err = arg.DurationUpTo(c, "upstream_limit MAX_WAIT", words[2], maxWait)
	}
	return err
}

// memoryArg reads what memorySize reads.
func (b *corefileBlock) memoryArg() error {
	name, word, err := arg.One(b.Controller)
	if err == nil {
		b.maxMemory, b.memoryAuto, err = memorySize(b.Controller, name, word)
	}
	return err
}

// memorySize returns word, which is SIZE, N% or auto, in bytes. A share is one of the memory that the process may have, less what it
// needs itself. auto is half of that, so that a reload may have two stores at once, and no more than the capacities ask for. what
// names the value in messages.
func memorySize(c *caddy.Controller, what, word string) (bytes int64, auto bool, err error) {
	percentage, isShare := strings.CutSuffix(word, "%")
	if auto = word == "auto"; !isShare && !auto {
		bytes, err = arg.Amount(c, what, word, minMaxMemory, mostMemory)
		return bytes, false, err
	}
	share := 50
	if isShare {
		if share, err = arg.Number(c, what, percentage, 1, 90); err != nil {
			return 0, false, err
		}
	}
	limit, _ := memlimit.Of(os.DirFS("/"))
	switch {
	case limit > 0:
		bytes = min(max(memlimit.ForCaches(limit, memlimit.Heap())/100*int64(share), minMaxMemory), mostMemory)
	case isShare:
		return 0, false, c.Errf("%s: %q is a share of nothing: the system does not tell how much memory there is", what, word)
	}
	return bytes, auto, nil
}

// coalesceArgs reads off | [MAX_WAITERS [MAX_WAIT]].
func coalesceArgs(c *caddy.Controller, o *coalesceOptions) error {
	words, err := arg.All(c, 0, 2)
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
	if o.waiters, err = arg.Number(c, "coalesce MAX_WAITERS", words[0], 1, maxWaiters); err != nil || len(words) == 1 {
		return err
	}
	if o.wait, err = arg.DurationUpTo(c, "coalesce MAX_WAIT", words[1], maxWait); err == nil && o.wait < minWait {
		err = c.Errf("coalesce MAX_WAIT: %q is less than %v", words[1], minWait)
	}
	return err
}

// fastArgs reads [auto|on|off] [WORKERS]. Without the first word it is on.
func fastArgs(c *caddy.Controller, o *fastOptions) error {
	o.mode, o.at = fastOn, fmt.Sprintf("%s:%d", c.File(), c.Line())
	words, err := arg.All(c, 0, 2)
	if err != nil || len(words) == 0 {
		return err
	}
	if mode, ok := fastModes[words[0]]; ok {
		o.mode, words = mode, words[1:]
	}
	switch {
	case len(words) > 0 && o.mode == fastOff, len(words) > 1:
		return c.Errf("fastpath: unexpected %q", words[len(words)-1])
	case len(words) > 0:
		o.workers, err = arg.Number(c, "fastpath WORKERS", words[0], 1, maxWorkers)
	}
	return err
}

// snapshotFiles maps the path of each snapshot file of a Corefile to the server block that names it.
type snapshotFiles map[string]fileOwner

// fileOwner identifies a server block. The index tells blocks with the same keys apart.
type fileOwner struct {
	index int
	keys  string
}

// fileArgs reads PATH [INTERVAL].
func fileArgs(c *caddy.Controller, o *fileOptions) error {
	words, err := arg.All(c, 1, 2)
	if err != nil {
		return err
	}
	if o.path, err = filepath.Abs(words[0]); err != nil {
		return c.Errf("cache_file_path: %q: %v", words[0], err)
	}
	o.interval = 5 * time.Minute
	if len(words) > 1 {
		if o.interval, err = arg.DurationUpTo(c, "cache_file_path INTERVAL", words[1], math.MaxInt64); err != nil {
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
	for taken, other := range files {
		if other != block && (taken == path || snapshot.IsBeside(taken, path) || snapshot.IsBeside(path, taken)) {
			return c.Errf("cache_file_path: %q is the file of another server block, %s, or one beside it", words[0], other.keys)
		}
	}
	files[path] = block
	return nil
}

// controlArgs reads ADDRESS [token FILE] [tls CERT KEY].
func controlArgs(c *caddy.Controller, o *control.Options) error {
	words, err := arg.All(c, 1, math.MaxInt)
	if err != nil {
		return err
	}
	o.Address, words = words[0], words[1:]
	for len(words) > 0 {
		name, files := words[0], []*string{&o.TokenFile}
		switch name {
		case "token":
		case "tls":
			files = []*string{&o.CertFile, &o.KeyFile}
		default:
			return c.Errf("control: unexpected %q: token FILE or tls CERT KEY may follow the address", name)
		}
		if err := arg.Check(c, "control "+name, words[1:], len(files), math.MaxInt); err != nil {
			return err
		}
		for i, file := range files {
			if *file != "" {
				return c.Errf("control: %s given twice", name)
			}
			if *file, err = filepath.Abs(words[1+i]); err != nil {
				return c.Errf("control %s: %q: %v", name, words[1+i], err)
			}
		}
		words = words[1+len(files):]
	}
	if err := o.Check(); err != nil {
		return c.Errf("control: %v", err)
	}
	return nil
}

func (snapshotFiles) key() string { return pluginName + " snapshot files" }

// clientArgs reads [V4LEN V6LEN].
func (b *corefileBlock) clientArgs() error {
	words, err := arg.All(b.Controller, 0, 2)
	if err != nil {
		return err
	}
	b.clients = prefixes{24, 56}
	if len(words) == 1 {
		return b.Errf("top_clients: %q is alone: V4LEN and V6LEN are needed, or neither", words[0])
	}
	for i, of := range []*int{&b.clients.v4, &b.clients.v6}[:len(words)] {
		if *of, err = arg.Number(b.Controller, "top_clients "+[]string{"V4LEN", "V6LEN"}[i], words[i], 1, []int{32, 128}[i]); err != nil {
			return err
		}
	}
	return nil
}

// hotPercentageArg reads the hot tier's share of the capacity, in percent, or auto.
func hotPercentageArg(c *caddy.Controller) (int, error) {
	name, word, err := arg.One(c)
	if err != nil {
		return 0, err
	}
	if word == "auto" {
		return hotAuto, nil
	}
	return arg.Number(c, name, word, 0, maxHotPercentage)
}

// notDomainName reports whether a normalized zone is not a valid name. In a name that ends in a backslash, the final
// dot is escaped.
func notDomainName(s string) bool {
	_, ok := dns.IsDomainName(s)
	return !ok || !dns.IsFqdn(s)
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

// The rest of the file checks a server block when it starts: whether the plugin's place in the chain lets it work,
// whether the machine has the memory, and whether snapshots can be written.

// madeFor is the version of CoreDNS that the plugin relies on: its unexported fields, and its order of plugins.
const madeFor = "1.15.0"

// checkVersion returns an error for any other version of CoreDNS. A builder may add a suffix after a hyphen or a
// plus. version is empty in programs that are not CoreDNS's own; those are accepted.
func checkVersion(version string) error {
	number, _, _ := strings.Cut(version, "-")
	number, _, _ = strings.Cut(number, "+")
	if number == "" || number == madeFor {
		return nil
	}
	return fmt.Errorf("this is CoreDNS %s, and %s is made for CoreDNS %s only: build it with that version", version, pluginName, madeFor)
}

var (
	// answerAll are plugins that answer every query, at least for their zones, and never call the next plugin.
	answerAll = []string{"forward", "grpc", "whoami", "erratic"}

	// answerSome are plugins that answer some queries and call the next plugin for others.
	answerSome = []string{"template", "dynupdate", "hosts", "route53", "azure", "clouddns", "k8s_external", "kubernetes",
		"file", "auto", "secondary", "etcd", "nomad"}

	// seeAll are plugins that must see every query or reply, those of the cache included.
	seeAll = []string{"prometheus", "errors", "log", "dnstap", "local", "dns64", "siit", "any", "chaos", "loadbalance",
		"tsig", "rewrite", "autopath", "acl"}
)

// checkChain returns an error, or adds warnings, where the order of the plugins makes the cache useless or harmful.
// handlers are the block's plugins, and next is the plugin behind the cache, or nil.
func (b *corefileBlock) checkChain(handlers []plugin.Handler, next plugin.Handler) error {
	at := slices.Index(dnsserver.Directives, pluginName)
	var front, hidden []string
	for _, h := range handlers {
		name := h.Name()
		switch before := slices.Index(dnsserver.Directives, name) < at; {
		case name == pluginName || name == stockName:
		case before && slices.Contains(answerAll, name), before && slices.Contains(answerSome, name):
			front = append(front, name)
		case !before && slices.Contains(seeAll, name):
			hidden = append(hidden, name)
		}
	}
	const remedy = "in plugin.cfg, " + pluginName + " belongs directly before " + stockName
	never := next == nil && len(front) > 0 || slices.ContainsFunc(front, func(name string) bool { return slices.Contains(answerAll, name) })
	switch {
	case never:
		return fmt.Errorf("%s: nothing would ever be cached: %s stands before %s; %s",
			b.at[pluginName], strings.Join(front, ", "), pluginName, remedy)
	case len(front) > 0:
		b.warnAt(b.at[pluginName], "answers of %s are not cached: it stands before %s; %s", strings.Join(front, ", "), pluginName, remedy)
	case next == nil:
		b.warnAt(b.at[pluginName], "there is nothing to cache: no plugin stands behind %s in this server block", pluginName)
	}
	if len(hidden) > 0 {
		b.warnAt(b.at[pluginName], "%s will not see answers from the cache: it stands behind %s; %s", strings.Join(hidden, ", "), pluginName, remedy)
	}
	return nil
}

// checkFile returns an error if cache_file_path can hold no snapshot. It only warns where a start can still use the
// path: a snapshot that can be read but not written, or a full disk, which may have room later.
func (b *corefileBlock) checkFile() error {
	if b.file.path == "" {
		return nil
	}
	at := b.at["cache_file_path"]
	info, err := os.Stat(b.file.path)
	switch {
	case err == nil && info.IsDir():
		return fmt.Errorf("%s - cache_file_path: %q is a folder, and must be a file or not be there", at, b.file.path)
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("%s - cache_file_path: %q is not a regular file", at, b.file.path)
	}
	exists := err == nil
	dir := filepath.Dir(b.file.path)
	f, err := os.CreateTemp(dir, filepath.Base(b.file.path)+".*.probe")
	if err == nil {
		return errors.Join(f.Close(), os.Remove(f.Name()))
	}
	var cause *fs.PathError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	if exists || errors.Is(err, syscall.ENOSPC) {
		b.warnAt(at, "cache_file_path: no snapshot can be written to %q: folder %q: %v", b.file.path, dir, err)
		return nil
	}
	return fmt.Errorf("%s - cache_file_path: %q cannot be written: folder %q: %w", at, b.file.path, dir, err)
}

// memorySource returns the property that decides the size of the memory, and its place.
func (b *corefileBlock) memorySource() (what, at string) {
	for _, name := range []string{"max_memory", "pool", "success", "denial"} {
		if b.at[name] != "" && (name != "max_memory" || b.maxMemory > 0) {
			return name, b.at[name]
		}
	}
	return pluginName, b.at[pluginName]
}

// errMemory adds to err, an error of the allocation, the property that asks for the memory, and its place.
func (b *corefileBlock) errMemory(err error) error {
	what, at := b.memorySource()
	return fmt.Errorf("%s - %s asks for more memory than the system gives (is there a limit, as of `ulimit -v`?): %w", at, what, err)
}

// typicalAnswer is the memory in bytes that a record of a few addresses takes.
const typicalAnswer = 256

// corefileMemory is the sum, in bytes, of the memory bounds of those blocks of a Corefile that have started.
type corefileMemory struct{ sum int64 }

func (corefileMemory) key() string { return pluginName + " memory" }

// checkMemory warns where the memory does not hold the entries that the block asks for, or where the process may use
// more than the machine or its control group has. of are the options that the memory is laid out for. records is the memory for
// answers, bound the memory for everything, both in bytes.
func (b *corefileBlock) checkMemory(of *options, records, bound int64) {
	what, at := b.memorySource()
	entries := int64(of.success.capacity) + int64(of.denial.capacity)
	if room := records / typicalAnswer; (of.maxMemory > 0 || bound >= mostMemory) && room < entries {
		b.warnAt(at, "%s leaves room for about %d answers of %d bytes, less than the %d of success and denial", what, room, typicalAnswer, entries)
	}
	limit, whose := memlimit.Of(os.DirFS("/"))
	memory, _ := b.Get(corefileMemory{}.key()).(*corefileMemory)
	if memory == nil {
		memory = new(corefileMemory)
		b.Set(memory.key(), memory)
	}
	before := memory.sum
	memory.sum += bound
	switch {
	case limit == 0:
	case bound > limit:
		b.warnAt(at, "%s allows %d MB, and %s %d MB: the process may be killed when the cache fills", what, bound>>20, whose, limit>>20)
	case before <= limit && memory.sum > limit:
		b.warnAt(at, "%s allows %d MB, together with other server blocks %d MB, and %s %d MB: the process may be killed when the caches fill",
			what, bound>>20, memory.sum>>20, whose, limit>>20)
	}
}
