package optcache

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/metrics"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/query"
)

// This file runs CoreDNS's own cache and optcache side by side. Both are set up from the same Corefile,
// but for the plugin's name, behind and in front of the same plugins, in servers of their own; both get
// the same queries at the same times from the same clients, and ask upstreams that do the same. What they
// do must be the same. scenarios come from diff_scenario_test.go; how one is made shorter is here.
//
// What is allowed to differ is kept out of the scenarios, and is all that BEHAVIOUR.md's lines that are
// marked beyond say, with tests of their own:
//
//   - Letters: cache's reply has the letters of the first client, which spelling makes the last one's.
//   - TTLs of 2^31 or more, and a SOA MINIMUM below the SOA's TTL: never in the generator's responses.
//   - Coalescing and Extended DNS Errors: switched off.
//   - Evictions: there are fewer names than there is room.
//   - drops_total: counts each response to another question; cache lets some go uncounted. Not compared
//     in a scenario that has such a response.
//   - zone/wildcard, with prefetch or serve_stale: optcache tells of the wildcard that an answer was made from
//     when the answer came by a refresh, too. Not compared there.
//   - prefetch and serve_stale: cache keeps an answer beside the denial that came after it, and the other way
//     round, and lets failures take the place of denials. In optcache, what is newer and says something ends
//     what is older, and what says nothing ends nothing. There, a name has answers of one class only, and none
//     that neither answer nor deny; they fail with SERVFAIL only, where a name has positive answers and there is
//     no prefetch. With serve_stale, they fail only where failures are not kept, for cache serves those stale, too;
//     with prefer_positive, all answer, for to cache a denial is no news of a stale denial; and none are cut off, have a TTL of 0, or are not kept for another reason.
//   - dns64 and rewritten names, with prefetch, serve_stale or a MINTTL above 5 s: the question behind them decides on
//     what a response is.
//   - NOERROR that neither answers nor denies, with a MINTTL above 5 s: that is not for it. Never in there.
//   - NOERROR with records in the authority section that are neither SOA nor NS: says nothing. Never in there.
//   - NXDOMAIN behind a CNAME, which optcache keeps: never in the generator's responses.
//   - Signatures that are not good for the time that a scenario takes, where the client has asked with DO: never in there.
//   - RD: what RD=0 brings is for RD=0 only, and kept only if it answers or denies. Queries are RD=0 where what RD=1 has
//     brought serves them, in which case a refresh has RD=1. In some scenarios all queries are RD=0, and responses that
//     cache keeps answer or deny.
//   - ECS: no response has a SCOPE above 0. Subnets of background refreshes are not compared: optcache sends none.
//   - Refreshes that take longer than 4 s, after which optcache begins another one: no upstream takes as long. And
//     serve_stale verify TIMEOUT while another client verifies, when cache serves the old answer at once.

var (
	diffSteps = flag.Int("diff.steps", 0, "steps of the differential test; 0: what takes some seconds")
	diffSeed  = flag.Uint64("diff.seed", 1, "seed of the differential test; 0: one by chance")
)

// diffStep is one query, and what the upstream does while it is under way and after.
type diffStep struct {
	jump   time.Duration // before the query
	query  *dns.Msg
	client net.Addr

	response *dns.Msg // nil: the upstream fails without a message
	verbatim bool     // the question in it stays as it is
	takes    time.Duration
	wildcard string
}

// diffScenario is a server block, and what happens to it.
type diffScenario struct {
	options []string // lines of the cache's block
	head    string   // words behind the cache's name
	plugins []string // other plugins, with their options
	extra   []string // options of optcache only
	fast    bool     // hits over UDP are answered by the fast path, where it may stand
	steps   []diffStep

	oneClass bool // names have answers of one class only, and nothing that says nothing
	raised   bool // MINTTL of success is above 5 s
	waits    bool // verify: no query comes while another one's refresh is under way
	norec    bool // no query that arrives at the cache has RD
}

// diffOutcome is what can be seen of one step.
type diffOutcome struct {
	packets  [][]byte
	asked    []string // of the upstream
	told     []string // lines of log, and messages of dnstap
	wildcard string
	panicked string
	fast     bool // by the fast path, where nobody reads metadata
}

// diffSide is one of the two servers.
type diffSide struct {
	name   string
	server *dnsserver.Server
	ctx    context.Context
	fast   *fast // or nil
	norec  bool  // as in the scenario
	stop   func()
	cache  *Optcache // or nil
	logged *logged   // by addr
	addr   string
	tapped tapped

	mu       sync.Mutex // guards what follows: refreshes ask in the background
	step     *diffStep
	asked    []string
	wildcard string
}

var diffDirectives = sync.OnceFunc(func() {
	optcacheDirective()
	fastpath.Supported() // tries with real sockets, which do not go by a bubble's time
})

// diffFastHits is how many replies came by the fast path.
var diffFastHits atomic.Int64

// newDiffSide sets up a server from the scenario's Corefile.
func newDiffSide(name string, sc *diffScenario, addr string, out *logged) (*diffSide, error) {
	s := &diffSide{name: name, stop: func() {}, norec: sc.norec, addr: addr, logged: out}
	s.tapped.as = func(p []byte) string { return diffPacket(p, sc.shuffled()) }
	base := caddy.NewTestController("dns", "")
	base.ServerBlockKeys = []string{"dns://.:53"}
	cfg := dnsserver.GetConfig(base)
	cfg.Zone, cfg.Transport = ".", "dns"

	var lines []string
	for _, line := range append(slices.Clone(sc.plugins), sc.block(name)) { // a plugin reads all its lines at once
		word, _, _ := strings.Cut(line, " ")
		if i := slices.IndexFunc(lines, func(other string) bool { return strings.HasPrefix(other, word+" ") }); i >= 0 {
			lines[i] += "\n" + line
		} else {
			lines = append(lines, line)
		}
	}
	slices.SortStableFunc(lines, func(a, b string) int { return directiveOrder(a) - directiveOrder(b) })
	cfg.AddPlugin(func(next plugin.Handler) plugin.Handler { return diffProbe{s, next} })
	for _, line := range lines {
		word, _, _ := strings.Cut(line, " ")
		switch {
		case word == "log":
			_, classes, some := strings.Cut(line, "{")
			if line = logLine(addr); some {
				line += " {" + classes
			}
		case word == "dnstap": // would connect
			cfg.AddPlugin(func(next plugin.Handler) plugin.Handler {
				return newTap(&s.tapped, strings.HasSuffix(line, "full"), next)
			})
			continue
		}
		if word == "prometheus" { // would listen
			cfg.AddPlugin(func(next plugin.Handler) plugin.Handler {
				m := metrics.New("")
				m.Next = next
				return m
			})
			continue
		}
		c := *base
		c.Dispenser = caddyfile.NewDispenser("Corefile", strings.NewReader(line))
		action, err := caddy.DirectiveAction("dns", word)
		if word == pluginName {
			action, err = setup, nil
		}
		if err != nil {
			return nil, err
		}
		if word == stockName {
			cfg.AddPlugin(func(next plugin.Handler) plugin.Handler { return spelling{next.(*cache.Cache)} })
		}
		if err := action(&c); err != nil {
			return nil, fmt.Errorf("%s: %w", line, err)
		}
	}
	cfg.AddPlugin(func(plugin.Handler) plugin.Handler { return s })
	var err error
	if s.server, err = dnsserver.NewServer(addr, []*dnsserver.Config{cfg}); err != nil {
		return nil, err
	}
	if v, ok := cfg.Handler("view").(dnsserver.Viewer); ok { // as for a Corefile
		cfg.ViewName, cfg.FilterFuncs = v.ViewName(), []dnsserver.FilterFunc{v.Filter}
	}
	s.ctx = context.WithValue(context.Background(), dnsserver.Key{}, s.server)
	s.ctx = context.WithValue(s.ctx, dnsserver.LoopKey{}, 0)
	if o, ok := cfg.Handler(pluginName).(*Optcache); ok {
		s.cache = o
		o.clock = systemNow
		if err := o.start("", cfg.Handlers()); err != nil {
			return nil, err
		}
		s.stop = func() { o.stop() }
		b := &fastBlock{o: o}
		cfg.UDPDecorateWriterFunc = b.serves
		if sc.fast && b.inspect(cfg) == nil {
			o.block = b
			r, err := newRoutes(s.server)
			if err != nil {
				return nil, err
			}
			s.fast = &fast{routes: *r}
		}
	}
	return s, nil
}

// block is the cache's part of the Corefile.
func (sc *diffScenario) block(name string) string {
	lines := slices.Clone(sc.options)
	if name == pluginName {
		lines = append(append(lines, "coalesce off", "ede off"), sc.extra...)
	}
	return fmt.Sprintf("%s %s {\n\t%s\n}", name, sc.head, strings.Join(lines, "\n\t"))
}

// directiveOrder is where CoreDNS puts the plugin of a line.
func directiveOrder(line string) int {
	word, _, _ := strings.Cut(line, " ")
	if word == stockName {
		word = pluginName
	}
	return slices.Index(dnsserver.Directives, word)
}

// diffProbe stands in front of everything and looks at the metadata. Its name is that of a plugin that
// changes nothing.
type diffProbe struct {
	side *diffSide
	next plugin.Handler
}

func (p diffProbe) Name() string { return "cancel" }

func (p diffProbe) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	rcode, err := plugin.NextOrFailure(p.Name(), p.next, ctx, w, r)
	if f := metadata.ValueFunc(ctx, "zone/wildcard"); f != nil {
		p.side.mu.Lock()
		p.side.wildcard += f()
		p.side.mu.Unlock()
	}
	return rcode, err
}

// Name and ServeDNS make the side its own upstream.
func (s *diffSide) Name() string { return "upstream" }

func (s *diffSide) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	s.mu.Lock()
	step := s.step
	opt := ""
	if o := r.IsEdns0(); o != nil {
		opt = o.String()
		if w.RemoteAddr().String() == noAddr.String() { // a refresh in the background: it carries no client's subnet
			opt = query.WithoutSubnet(r).IsEdns0().String()
		}
	}
	rd := r.RecursionDesired || !s.norec && !step.query.RecursionDesired
	s.asked = append(s.asked, fmt.Sprintf("%s RD %v AD %v CD %v %s from %s %s",
		r.Question[0].String(), rd, r.AuthenticatedData, r.CheckingDisabled, opt, w.RemoteAddr().Network(), w.RemoteAddr()))
	s.mu.Unlock()
	time.Sleep(step.takes)
	if step.wildcard != "" {
		metadata.SetValueFunc(ctx, "zone/wildcard", func() string { return step.wildcard })
	}
	if step.response == nil {
		return dns.RcodeServerFailure, errUpstream
	}
	m := step.response.Copy()
	m.Id, m.RecursionDesired, m.CheckingDisabled = r.Id, r.RecursionDesired, r.CheckingDisabled
	if !step.verbatim {
		m.Question = r.Copy().Question
	}
	return m.Rcode, w.WriteMsg(m)
}

// do takes a step.
func (s *diffSide) do(step *diffStep) (out diffOutcome) {
	defer func() {
		if err := recover(); err != nil {
			out.panicked = fmt.Sprintf("%v\n%s", err, debug.Stack())
		}
	}()
	w := &wireWriter{addr: step.client}
	q := step.query.Copy()
	if p, err := q.Pack(); err == nil && len(p) <= 512 {
		read := new(dns.Msg)
		if read.Unpack(p) == nil { // it came by the wire
			q = read
		}
		if s.fast != nil {
			if reply, why := s.fast.ask(p, step.client); why == fastpath.Answered {
				diffFastHits.Add(1)
				return diffOutcome{packets: [][]byte{bytes.Clone(reply)}, fast: true}
			}
		}
	}
	s.server.ServeDNS(s.ctx, w, q)
	return diffOutcome{packets: w.packets}
}

// collect adds to what a step has shown what came behind.
func (s *diffSide) collect(out *diffOutcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	slices.Sort(s.asked)
	out.asked, s.asked = s.asked, nil
	out.wildcard, s.wildcard = s.wildcard, ""
	out.told = append(s.logged.take(s.addr), s.tapped.take()...)
}

// run goes through a scenario and says how many steps were taken until the sides differed, and how.
func (sc *diffScenario) run(t *testing.T, worker int, out *logged) (steps int, difference string, err error) {
	diffDirectives()
	synctest.Test(t, func(t *testing.T) {
		var sides [2]*diffSide
		var addrs [2]string
		var before [2]map[string]float64
		for i, name := range []string{pluginName, stockName} {
			addrs[i] = fmt.Sprintf("dns://diff-%s-%d:53", name, worker)
			before[i] = diffCounts(t, name, addrs[i])
			var s *diffSide
			if s, err = newDiffSide(name, sc, addrs[i], out); err != nil {
				return
			}
			sides[i] = s
			defer s.stop()
		}
		defer func() { time.Sleep(time.Hour) }() // whatever is under way comes to its end
		for steps = range sc.steps {
			step := &sc.steps[steps]
			if sc.waits {
				time.Sleep(4 * time.Second)
			}
			time.Sleep(step.jump)
			synctest.Wait() // for refreshes that end at this very moment
			if !sc.norec {
				step.query = asCache(sides[0].cache, step.query)
			}
			var outs [2]diffOutcome
			var wg sync.WaitGroup
			for i, s := range sides {
				s.mu.Lock()
				s.step = step
				s.mu.Unlock()
				wg.Go(func() { outs[i] = s.do(step) })
			}
			wg.Wait()
			synctest.Wait()
			for i, s := range sides {
				s.collect(&outs[i])
			}
			if difference = sc.compare(outs); difference != "" {
				steps++
				return
			}
		}
		steps = len(sc.steps)
		var counts [2]map[string]float64
		for i, name := range []string{pluginName, stockName} {
			counts[i] = diffCounts(t, name, addrs[i])
			for k, v := range before[i] {
				counts[i][k] -= v
			}
		}
		difference = sc.compareCounts(counts)
	})
	return steps, difference, err
}

// compare says in what the two outcomes of a step differ.
func (sc *diffScenario) compare(outs [2]diffOutcome) string {
	shuffled := sc.shuffled()
	var texts [2]string
	for i, out := range outs {
		var b strings.Builder
		for _, p := range out.packets {
			b.WriteString(diffPacket(p, shuffled))
		}
		if strings.Contains(sc.block(stockName), "prefetch") || strings.Contains(sc.block(stockName), "serve_stale") || outs[0].fast {
			out.wildcard = ""
		}
		fmt.Fprintf(&b, "upstream was asked:\n\t%s\nouter plugins were told:\n\t%s\nzone/wildcard: %q\n%s",
			strings.Join(out.asked, "\n\t"), strings.Join(out.told, "\n\t"), out.wildcard, out.panicked)
		texts[i] = b.String()
	}
	same := texts[0] == texts[1] && len(outs[0].packets) == len(outs[1].packets)
	for i := range outs[0].packets {
		same = same && (shuffled || bytes.Equal(outs[0].packets[i], outs[1].packets[i]))
	}
	if same && outs[0].panicked == "" {
		return ""
	}
	return fmt.Sprintf("--- optcache:\n%s\n--- cache:\n%s", texts[0], texts[1])
}

// shuffled reports whether the order of records is left to chance.
func (sc *diffScenario) shuffled() bool { return slices.Contains(sc.plugins, "loadbalance") }

// diffPacket is a packet in words; sorted, if the order of records is left to chance.
func diffPacket(p []byte, shuffled bool) string {
	m := new(dns.Msg)
	if err := m.Unpack(p); err != nil {
		return fmt.Sprintf("%x: %v\n", p, err)
	}
	if shuffled {
		for _, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
			if m.Truncated { // of what is left by chance
				*section = nil
			}
			slices.SortFunc(*section, func(a, b dns.RR) int { return strings.Compare(a.String(), b.String()) })
		}
		return m.String()
	}
	return fmt.Sprintf("%d bytes: %v\n", len(p), m)
}

// diffCounted are the series that both have.
var diffCounted = []string{"requests_total", "hits_total", "misses_total", "drops_total", "served_stale_total", "prefetch_total"}

// diffCounts returns the counters of a cache in a server, by name and type.
func diffCounts(t *testing.T, name, addr string) map[string]float64 {
	counts := make(map[string]float64)
	for k, v := range series(t, prometheus.DefaultGatherer, "coredns_"+name+"_", addr) {
		metric, labels, _ := strings.Cut(k, " ")
		if !slices.Contains(diffCounted, metric) {
			continue
		}
		for l := range strings.FieldsSeq(labels) {
			if strings.HasPrefix(l, "type=") {
				metric += " " + l
			}
		}
		counts[metric] += v
	}
	return counts
}

func (sc *diffScenario) compareCounts(counts [2]map[string]float64) string {
	mismatched := slices.ContainsFunc(sc.steps, func(s diffStep) bool { return s.verbatim || s.response != nil && !s.response.Response })
	var b strings.Builder
	for k, v := range counts[0] {
		if v != counts[1][k] && !(mismatched && strings.HasPrefix(k, "drops_total")) {
			fmt.Fprintf(&b, "%s: optcache %v, cache %v\n", k, v, counts[1][k])
		}
	}
	return b.String()
}

// shorten returns the shortest scenario it finds that still shows a difference: less steps, plugins,
// options, records and bits.
func (sc *diffScenario) shorten(fails func(*diffScenario) bool) *diffScenario {
	best := sc
	try := func(change func(*diffScenario)) bool {
		next := best.clone()
		change(next)
		if fails(next) {
			best = next
			return true
		}
		return false
	}
	for n := (len(best.steps) + 1) / 2; n > 0; n /= 2 {
		for at := 0; at < len(best.steps); {
			if !try(func(s *diffScenario) { s.steps = slices.Delete(s.steps, at, min(at+n, len(s.steps))) }) {
				at += n
			}
		}
	}
	for _, lines := range []func(*diffScenario) *[]string{
		func(s *diffScenario) *[]string { return &s.plugins },
		func(s *diffScenario) *[]string { return &s.options },
		func(s *diffScenario) *[]string { return &s.extra },
	} {
		for at := 0; at < len(*lines(best)); {
			if !try(func(s *diffScenario) { l := lines(s); *l = slices.Delete(*l, at, at+1) }) {
				at++
			}
		}
	}
	try(func(s *diffScenario) { s.head = "" })
	try(func(s *diffScenario) { s.fast = false })
	for i := range best.steps {
		for _, section := range []func(*dns.Msg) *[]dns.RR{
			func(m *dns.Msg) *[]dns.RR { return &m.Answer },
			func(m *dns.Msg) *[]dns.RR { return &m.Ns },
			func(m *dns.Msg) *[]dns.RR { return &m.Extra },
		} {
			for at := 0; best.steps[i].response != nil && at < len(*section(best.steps[i].response)); {
				if !try(func(s *diffScenario) { r := section(s.steps[i].response); *r = slices.Delete(*r, at, at+1) }) {
					at++
				}
			}
		}
		for _, change := range []func(*diffStep){
			func(s *diffStep) { s.jump = 0 },
			func(s *diffStep) { s.takes = 0 },
			func(s *diffStep) { s.wildcard = "" },
			func(s *diffStep) { s.query.Extra = nil },
			func(s *diffStep) { s.client = tcp4Client },
			func(s *diffStep) { s.query.MsgHdr = dns.MsgHdr{Id: s.query.Id} },
			func(s *diffStep) {
				if s.response != nil {
					s.response.MsgHdr = dns.MsgHdr{Response: s.response.Response, Rcode: s.response.Rcode}
				}
			},
		} {
			try(func(s *diffScenario) { change(&s.steps[i]) })
		}
	}
	return best
}

func (sc *diffScenario) clone() *diffScenario {
	c := *sc
	c.options, c.plugins, c.extra = slices.Clone(sc.options), slices.Clone(sc.plugins), slices.Clone(sc.extra)
	c.steps = slices.Clone(sc.steps)
	for i := range c.steps {
		s := &c.steps[i]
		s.query = s.query.Copy()
		if s.response != nil {
			s.response = s.response.Copy()
		}
	}
	return &c
}

// String is the scenario in words.
func (sc *diffScenario) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s\nfast path %v\n", strings.Join(sc.plugins, "\n"), sc.block(pluginName), sc.fast)
	for i, s := range sc.steps {
		fmt.Fprintf(&b, "=== step %d: after %v, from %s %s:\n%v\n", i+1, s.jump, s.client.Network(), s.client, s.query)
		if s.response == nil {
			fmt.Fprintf(&b, "--- the upstream fails after %v\n", s.takes)
		} else {
			fmt.Fprintf(&b, "--- the upstream says after %v, verbatim %v, wildcard %q:\n%v\n", s.takes, s.verbatim, s.wildcard, s.response)
		}
	}
	return b.String()
}

// Both do the same, whatever happens. The test prints its seed: with it, -diff.seed repeats the run on any
// number of cores.
func TestDifferential(t *testing.T) {
	steps, workers := *diffSteps, 1
	switch {
	case steps > 0:
		workers = runtime.GOMAXPROCS(0)
	case raceEnabled || testing.Short():
		steps = 2_000
	default:
		steps = 20_000
	}
	seed := *diffSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("%d steps, seed %d", steps, seed)
	var taken, scenarios, next atomic.Int64
	var failed atomic.Bool
	start := time.Now()
	out := logOutput(t)
	for worker := range workers {
		t.Run(fmt.Sprintf("worker %d", worker), func(t *testing.T) {
			t.Parallel()
			for !failed.Load() && taken.Load() < int64(steps) {
				number := next.Add(1)
				sc := newDiffScenario(seed, uint64(number))
				n, difference, err := sc.run(t, worker, out)
				if err != nil {
					t.Fatalf("seed %d, scenario %d: %v", seed, number, err)
				}
				if scenarios.Add(1)%500 == 0 {
					t.Logf("%d steps, %v", taken.Load(), time.Since(start).Round(time.Second))
				}
				taken.Add(int64(n))
				if difference == "" || failed.Swap(true) {
					continue
				}
				sc.steps = sc.steps[:n]
				shortest := sc.shorten(func(s *diffScenario) bool {
					_, d, err := s.run(t, worker, out)
					return d != "" && err == nil && s.allowed()
				})
				_, last, _ := shortest.run(t, worker, out)
				t.Errorf("seed %d, scenario %d, step %d:\n%s\n%s", seed, number, n, shortest, last)
			}
		})
	}
	t.Cleanup(func() {
		t.Logf("%d steps in %d scenarios, seed %d; %d replies by the fast path", taken.Load(), scenarios.Load(), seed, diffFastHits.Load())
	})
}
