package optcache

import (
	"cmp"
	"context"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/opentracing/opentracing-go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/arena"
	"github.com/optcache/optcache/plugin/pkg/histogram"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/reply"
)

// This file has the metrics of the plugin, those of the fast path and of snapshots excepted. A hit adds one to one
// counter, on one of several stripes, so that cores do not write to the same cache line. Sums and labels are made
// when Prometheus asks. Counters outlive their instance, as those of the cache plugin do. An instance with the same
// labels goes on counting in them.
//
// It also holds instanceSet, the list of running instances: their gauges come from there.

// counter is the index of a counter in a stripe. There is a set of counters for each server, zones and view.
type counter int

// The first counters are hits, by class, tier and way.
const (
	countMiss = counter(int(record.Classes)*int(tiers)*int(ways)) + iota
	countDrop
	countStale // not counted, but the sum of those by age
	countPrefetch
	countCoalesced
	countLetGo
	countCut
	countProbe
	countKeptWarm
	countJittered
	countLimitDeferred
	countLimitStale
	countLimitWaited
	countLimitRefused
	countEvicted
	_                                              // countEvicted takes one for each class
	countFlush                                     // flushes that were asked for
	countFlushed                                   // answers that they have removed
	countPromoted                                  // by the tier entered
	countDemoted  = countPromoted + counter(tiers) // by the tier left
	countAge      = countDemoted + counter(tiers)  // stale answers, by the bucket of their age
	countAges     = countAge + staleBuckets        // the sum of their ages, in seconds
	countNarrowed = countAges + 1                  // evictions of answers for a prefix, by why
	counterEnd    = countNarrowed + narrowEvictions
)

// The buckets of the histograms. Stale answers are counted on stripes: while an upstream is away, every hit may be stale.
const (
	staleHigh    = 18 // 2^18 seconds are three days
	staleBuckets = staleHigh + 2
)

// limitNames say what becomes of a question that upstream_limit holds back, from countLimitDeferred on.
var limitNames = [...]string{"deferred", "stale", "waited", "refused"}

var (
	missShape  = histogram.Shape{Unit: 1e-9, Low: -14, High: 4, Schema: 3, Step: 2} // seconds of ns, from 61 µs to 16 s
	staleShape = histogram.Shape{Unit: 1, Low: 0, High: staleHigh, Schema: 0, Step: 3}
	sizeShape  = histogram.Shape{Unit: 1, Low: 6, High: 14, Schema: 3, Step: 1} // bytes, from 64 to 16 K
)

// outcome is how a miss has ended.
type outcome uint8

const (
	outcomeAnswered  outcome = iota // the next plugin has answered
	outcomeFailed                   // it has not, or with SERVFAIL
	outcomeCoalesced                // the answer to another request was shared, and was not SERVFAIL
	outcomeLetGo                    // that took too long
	outcomeShared                   // the second level has answered
	outcomes
)

var outcomeNames = [outcomes]string{"answered", "failed", "coalesced", "let_go", "shared"}

func countHit(c record.Class, t tier, w way) counter {
	return counter((int(c)*int(tiers)+int(t))*int(ways) + int(w))
}

// stripe is one set of counters. Padding keeps the stripes' counters on different cache lines.
type stripe struct {
	n [counterEnd]atomic.Uint64
	_ [record.LineBytes]byte
}

// labels are the labels that all series of an instance behind one server have.
type labels struct {
	server, zones, view string
}

// counters are the counters of one set of labels.
type counters struct {
	labels
	stripes []stripe // their number is a power of two
	misses  [outcomes]histogram.Histogram
	sizes   histogram.Histogram // of answers that were kept
	since   time.Time
}

func newCounters(l labels) *counters {
	c := &counters{labels: l, stripes: make([]stripe, stripeCount), sizes: histogram.New(&sizeShape), since: time.Now()}
	for i := range c.misses {
		c.misses[i] = histogram.New(&missShape)
	}
	return c
}

// add adds n to a counter. The stripe is the low bits of stripe.
func (c *counters) add(stripe uint32, which counter, n uint64) {
	c.stripes[stripe&uint32(len(c.stripes)-1)].n[which].Add(n)
}

// addStale counts a stale answer by its age in seconds.
func (c *counters) addStale(stripe uint32, age uint64) {
	c.add(stripe, countAge+counter(staleShape.Bucket(age)), 1)
	c.add(stripe, countAges, age)
}

// addEvents counts the evictions and moves that the policy made for a request, and clears them.
func (c *counters) addEvents(s *scratch) {
	if s.events == (events{}) {
		return
	}
	for i, n := range s.events.evicted {
		c.add(s.stripe, countEvicted+counter(i), uint64(n))
	}
	for i, n := range s.events.promoted {
		c.add(s.stripe, countPromoted+counter(i), uint64(n))
	}
	for i, n := range s.events.demoted {
		c.add(s.stripe, countDemoted+counter(i), uint64(n))
	}
	for why, n := range s.narrowed { // each is among the evictions, so that there are events
		c.add(s.stripe, countNarrowed+counter(why), uint64(n))
	}
	s.events, s.narrowed = events{}, [narrowEvictions]uint32{}
}

// sums are the counters of a set, each summed over all stripes.
type sums [counterEnd]uint64

func (c *counters) sums() (s sums) {
	for i := range c.stripes {
		for which := range s {
			s[which] += c.stripes[i].n[which].Load()
		}
	}
	for _, n := range s[countAge:countAges] {
		s[countStale] += n
	}
	return s
}

// sums returns the counters of all series of the instance. Before its first request these are what an instance with the same
// labels has counted, as after a reload.
func (o *Optcache) sums() (all sums) {
	var series []*counters
	if known := o.servers.Load(); known != nil {
		for _, srv := range *known {
			series = append(series, srv.counters)
		}
	}
	for _, addr := range o.addrs {
		if c := allCounters.known(o.labelsAt(addr)); c != nil && !slices.Contains(series, c) {
			series = append(series, c)
		}
	}
	for _, c := range series {
		for i, n := range c.sums() {
			all[i] += n
		}
	}
	return all
}

// hits sums the hits for which keep returns true.
func (s *sums) hits(keep func(record.Class, tier, way) bool) (n uint64) {
	for cl := range record.Classes {
		for t := range tiers {
			for w := range ways {
				if keep(cl, t, w) {
					n += s[countHit(cl, t, w)]
				}
			}
		}
	}
	return n
}

// stripeCount is the number of stripes: a power of two, and far more than there are cores, so that two cores seldom
// use the same one.
var stripeCount = func() int {
	n := 64
	for n < 8*runtime.GOMAXPROCS(0) && n < 512 {
		n *= 2
	}
	return n
}()

var nextStripe atomic.Uint32

// newScratch returns a scratch that counts on the next stripe. A sync.Pool keeps a scratch on the core that used it
// last.
func newScratch() *scratch {
	return &scratch{Answer: reply.Answer{Buffer: record.NewBuffer()}, stripe: nextStripe.Add(1)}
}

// server is what an instance knows about one of the servers that it answers for.
type server struct {
	*counters
	of    *dnsserver.Server
	plain bool // DNS over UDP, TCP or TLS, with a writer that puts bytes on the wire unchanged
}

// addServer adds a server to those of the instance, and returns the entry. There is one for each address that the
// server block listens on. It takes no lock: two requests may add the same server at once.
func (o *Optcache) addServer(of *dnsserver.Server) *server {
	s := &server{of: of}
	addr := ""
	if of != nil {
		addr = of.Addr
		protocol, _, _ := strings.Cut(addr, "://")
		s.plain = (protocol == transport.DNS || protocol == transport.TLS) && !decorated(of)
	}
	s.counters = allCounters.get(o.labelsAt(addr))
	for {
		old := o.servers.Load()
		var known []*server
		if old != nil {
			for _, k := range *old {
				if k.of == of {
					return k
				}
			}
			known = append(known, *old...)
		}
		known = append(known, s)
		if o.servers.CompareAndSwap(old, &known) {
			return s
		}
	}
}

// labelsAt returns the labels of the instance's series behind a server.
func (o *Optcache) labelsAt(addr string) labels {
	return labels{addr, strings.Join(o.zones, ","), o.view}
}

// addEvictions counts evictions while answers move or are read from a file. It drops the promotions and demotions: an
// answer that gets its old segment back has not been promoted.
func (o *Optcache) addEvictions(s *scratch) {
	if s.events == (events{}) {
		return
	}
	s.events.promoted, s.events.demoted = [tiers]uint32{}, [tiers]uint32{}
	if all := o.allCounters(); len(all) > 0 {
		all[0].addEvents(s)
	}
}

// addFlush counts a flush, and the n answers that it has removed, behind each server: as the entries do that were there.
func (o *Optcache) addFlush(n int) {
	for _, c := range o.allCounters() {
		c.add(0, countFlush, 1)
		c.add(0, countFlushed, uint64(n))
	}
}

// allCounters returns the counters of the instance, one for each address. Those of servers that have passed requests come first.
func (o *Optcache) allCounters() (all []*counters) {
	add := func(c *counters) {
		if !slices.Contains(all, c) {
			all = append(all, c)
		}
	}
	if known := o.servers.Load(); known != nil {
		for _, s := range *known {
			add(s.counters)
		}
	}
	for _, addr := range o.addrs {
		add(allCounters.get(o.labelsAt(addr)))
	}
	return all
}

// decorated reports whether a plugin has put a writer of its own under the server's UDP socket. The plugin may be in
// another server block on the same address. Such a writer expects replies by WriteMsg, and may keep the bytes that it
// gets. CoreDNS does not export what tells; decorated returns true if that is gone.
func decorated(s *dnsserver.Server) bool {
	f, ok := decoratorOf(s)
	return !ok || f != nil
}

// counterSet holds the counters of all labels that have been in use since the process started.
type counterSet struct {
	mu sync.Mutex // guards m
	m  map[labels]*counters
}

var allCounters = counterSet{m: make(map[labels]*counters)}

func (s *counterSet) get(l labels) *counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.m[l]
	if !ok {
		c = newCounters(l)
		s.m[l] = c
	}
	return c
}

// known returns the counters of labels, or nil if nothing has been counted.
func (s *counterSet) known(l labels) *counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[l]
}

func (s *counterSet) all() []*counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	cs := make([]*counters, 0, len(s.m))
	for _, c := range s.m {
		cs = append(cs, c)
	}
	return cs
}

// instanceSet holds the running instances, the oldest first. It refers to them weakly: no callback tells an instance
// whose start has failed that it is over, and the garbage collector must be able to free it.
type instanceSet struct {
	mu         sync.Mutex // guards the fields below, and the instances' generation and successor
	list       []weak.Pointer[Optcache]
	generation int // number of Corefiles loaded since the first one
}

var instances instanceSet

func (s *instanceSet) add(o *Optcache) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, weak.Make(o))
}

func (s *instanceSet) remove(o *Optcache) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := weak.Make(o)
	s.list = slices.DeleteFunc(s.list, func(p weak.Pointer[Optcache]) bool { return p == gone })
}

// all returns the instances, and drops those that have been freed.
func (s *instanceSet) all() (list []*Optcache) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = slices.DeleteFunc(s.list, func(p weak.Pointer[Optcache]) bool {
		o := p.Value()
		if o != nil {
			list = append(list, o)
		}
		return o == nil
	})
	return list
}

// reporting returns, for the labels of each series, the instances whose gauges sum up to it. A block has series from
// its start until caddy drops its Corefile's instance, even without a query. Instances of a failed reload have none.
//
// In a reload, both generations run for a while. The older one reports until the newer one has served a query. Blocks
// of one generation can have the same labels, because each names the zones that it caches for; their gauges add up.
func (s *instanceSet) reporting() map[labels][]*Optcache {
	by := make(map[labels][]*Optcache)
	for _, o := range s.all() {
		if !o.runs() {
			continue
		}
		speak := func(l labels, asked bool) {
			others := by[l]
			switch {
			case slices.Contains(others, o):
			case len(others) == 0 || others[0].generation == o.generation:
				by[l] = append(others, o)
			case asked:
				by[l] = []*Optcache{o}
			}
		}
		if known := o.servers.Load(); known != nil {
			for _, s := range *known {
				speak(s.labels, true)
			}
		}
		for _, addr := range o.addrs {
			speak(o.labelsAt(addr), false)
		}
	}
	return by
}

// collector collects the metrics of all instances.
type collector struct{}

func init() { prometheus.MustRegister(collector{}) }

// poolDesc describes a series of the pools that blocks have together.
func poolDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(plugin.Namespace, pluginName, "pool_"+name), help, []string{"pool"}, nil)
}

func desc(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(plugin.Namespace, pluginName, name), help,
		append([]string{"server", "zones", "view"}, more...), nil)
}

var (
	entriesDesc   = desc("entries", "The number of answers in the cache.", "type")
	requestsDesc  = desc("requests_total", "The number of requests: hits, misses, and synthesized answers.")
	hitsDesc      = desc("hits_total", "The number of hits.", "type")
	missesDesc    = desc("misses_total", "The number of misses.")
	dropsDesc     = desc("drops_total", "The number of responses from upstream that were not kept because they answer another question.")
	evictionsDesc = desc("evictions_total", "The number of answers that were removed to make room for others.", "type")
	staleDesc     = desc("served_stale_total", "The number of requests that got an expired answer.")
	prefetchDesc  = desc("prefetch_total", "The number of refreshes in the background, by prefetch and by serve_stale immediate.")
	coalescedDesc = desc("coalesced_total", "The number of requests that shared the upstream query of an earlier request.")
	letGoDesc     = desc("coalesce_let_go_total", "The number of waiters that got SERVFAIL because the query took too long.")
	cutDesc       = desc("synthesized_total", "The number of requests that were answered from what is known of other names: nxdomain_cut.", "reason")
	probeDesc     = desc("probes_total", "The number of names that nxdomain_cut probe has asked for.")
	keptWarmDesc  = desc("kept_warm_total", "The number of questions that keep_warm has asked.")
	jitteredDesc  = desc("jittered_total", "The number of answers that were kept for less time than their TTL says, by the option jitter.")
	limitedDesc   = desc("upstream_limited_total", "The number of questions that upstream_limit has held back, by what became of them: deferred, stale, waited, refused.", "outcome")
	subnetsDesc   = desc("subnet_answers", "The number of answers that are for a client subnet, by ecs scoped. Some may have expired or gone since.")
	subnetOfDesc  = desc("subnet_names", "The number of names that have such answers.")
	narrowedDesc  = desc("subnet_evictions_total", "The number of such answers that were removed to make room for others of their kind, because the name has MAX or all have their share of the cache.", "reason")
	waitingDesc   = desc("coalesce_waiting", "The number of waiters: requests that wait for the upstream query of an earlier request now.")
	tierDesc      = desc("tier_hits_total", "The number of hits by the tier of the answer.", "tier")
	wayDesc       = desc("sent_total", "The number of hits by how the reply was sent: fastpath, bytes, or message with its reason.", "way", "reason")
	promotedDesc  = desc("promotions_total", "The number of answers that moved up into a tier.", "tier")
	demotedDesc   = desc("demotions_total", "The number of answers that moved down out of a tier.", "tier")
	bytesDesc     = desc("memory_bytes", "The memory in use, in bytes: the pages that the kernel has given.")
	reservedDesc  = desc("memory_reserved_bytes", "The address space that is set aside, in use or not, in bytes.")
	hugeDesc      = desc("memory_huge_bytes", "The memory in use that is on huge pages, in bytes.")
	hotDesc       = desc("hot_capacity", "The number of answers that the hot tier has room for.")
	goneDesc      = desc("upstreams_gone", "The number of zones whose upstream is gone, by the option servfail.")
	keptDesc      = desc("reload_kept_entries", "The number of answers that the last reload kept.")
	boundDesc     = desc("memory_limit_bytes", "The most that the memory in use can become, in bytes.")
	fallbackDesc  = desc("fastpath_fallback_info", "1 for a server block without a fast path, which may have one by its Corefile, with the reason.", "reason")
	flushesDesc   = desc("flushes_total", "The number of flushes that operators have asked for.")
	flushedDesc   = desc("flushed_total", "The number of answers that flushes have removed.")
	missTimeDesc  = desc("miss_duration_seconds", "The time from a miss to its answer, in seconds, by outcome.", "outcome")
	staleAgeDesc  = desc("stale_age_seconds", "For how long the stale answers that were served had been expired, in seconds.")
	sizeDesc      = desc("answer_size_bytes", "The sizes of the answers that were kept, in bytes, as messages without OPT and without compression.")

	poolBytesDesc    = poolDesc("memory_bytes", "The memory in use by the blocks of a pool together, in bytes: the pages that the kernel has given.")
	poolReservedDesc = poolDesc("memory_reserved_bytes", "The address space that is set aside for the blocks of a pool together, in use or not, in bytes.")
	poolBoundDesc    = poolDesc("memory_limit_bytes", "The most that the memory in use by the blocks of a pool together can become, in bytes.")
	poolHugeDesc     = poolDesc("memory_huge_bytes", "The memory in use by the blocks of a pool together that is on huge pages, in bytes.")
	poolHotDesc      = poolDesc("hot_capacity", "The number of answers that the hot tier of a pool has room for.")

	poolDescs = []*prometheus.Desc{poolBytesDesc, poolReservedDesc, poolBoundDesc, poolHugeDesc, poolHotDesc}

	descs = []*prometheus.Desc{entriesDesc, requestsDesc, hitsDesc, missesDesc, dropsDesc, evictionsDesc,
		staleDesc, prefetchDesc, coalescedDesc, letGoDesc, cutDesc, probeDesc, keptWarmDesc, jitteredDesc, limitedDesc, waitingDesc, tierDesc, wayDesc, promotedDesc, demotedDesc, bytesDesc, reservedDesc, boundDesc, hugeDesc, hotDesc, keptDesc, goneDesc, subnetsDesc, subnetOfDesc, narrowedDesc, fallbackDesc, flushesDesc, flushedDesc}

	// The histograms of a block appear with their first value, and go with the block.
	histogramDescs = []*prometheus.Desc{missTimeDesc, staleAgeDesc, sizeDesc}

	classNames = [record.Classes]string{"success", "denial"}
)

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range slices.Concat(descs, poolDescs, histogramDescs, fastpath.Descs, snapshotDescs, neighbourDescs, sharedDescs) {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (collector) Collect(ch chan<- prometheus.Metric) {
	counted, speaking := make(map[labels]bool), instances.reporting()
	for _, c := range allCounters.all() {
		counted[c.labels] = true
		all := c.sums()
		c.collect(ch, &all)
		if len(speaking[c.labels]) > 0 {
			c.collectHistograms(ch, &all)
		}
	}
	wanted := make(map[string]bool) // whether a block on that server has a fast path
	for l, all := range speaking {
		wanted[l.server] = wanted[l.server] || slices.ContainsFunc(all, func(o *Optcache) bool { return o.block != nil })
	}
	fastpath.Collect(ch, wanted)
	memory, hugeIsKnown := usages(speaking)
	collectPools(ch, speaking, memory, hugeIsKnown)
	for l, all := range speaking {
		if !counted[l] {
			(&counters{labels: l}).collect(ch, new(sums)) // the instance has counted nothing
		}
		gauge := func(d *prometheus.Desc, value func(*Optcache) int64, more ...string) {
			var sum int64
			for _, o := range all {
				sum += value(o)
			}
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(sum), l.values(more)...)
		}
		for c, name := range classNames {
			gauge(entriesDesc, func(o *Optcache) int64 { return o.store.len(record.Class(c)) }, name)
		}
		if all[0].store.pool.name != "" { // the rest of the memory is the pool's
			gauge(bytesDesc, func(o *Optcache) int64 { return o.store.bytes(record.Success) + o.store.bytes(record.Denial) })
		} else {
			gauge(bytesDesc, func(o *Optcache) int64 { return memory[o.store.pool].used })
			gauge(reservedDesc, func(o *Optcache) int64 { return memory[o.store.pool].reserved })
			gauge(boundDesc, func(o *Optcache) int64 { return o.store.bound() })
			if hugeIsKnown {
				gauge(hugeDesc, func(o *Optcache) int64 { return memory[o.store.pool].huge })
			}
			gauge(hotDesc, func(o *Optcache) int64 { return o.store.hotCapacity() })
		}
		gauge(goneDesc, func(o *Optcache) int64 { return o.gone() })
		gauge(subnetOfDesc, func(o *Optcache) int64 { names, _ := o.store.subnetLens(); return names })
		gauge(subnetsDesc, func(o *Optcache) int64 { _, answers := o.store.subnetLens(); return answers })
		gauge(keptDesc, func(o *Optcache) int64 { return o.store.kept.Load() })
		gauge(waitingDesc, func(o *Optcache) int64 { return o.flights.Waiting() })
		worstSnapshotter(all).collect(ch, l)
		neighboursOf(all).collect(ch, l)
		secondOf(all).collect(ch, l)
		for _, o := range all {
			if reason := o.fallback(l.server); reason != "" {
				ch <- prometheus.MustNewConstMetric(fallbackDesc, prometheus.GaugeValue, 1, l.values([]string{reason})...)
				break
			}
		}
	}
}

// collectPools sends the series of pools. While two generations have one of a name, it is the younger one's.
func collectPools(ch chan<- prometheus.Metric, speaking map[labels][]*Optcache, memory map[*pool]usage, hugeIsKnown bool) {
	youngest := make(map[string]*Optcache)
	for _, all := range speaking {
		for _, o := range all {
			name := o.store.pool.name
			if other := youngest[name]; name != "" && (other == nil || other.generation < o.generation) {
				youngest[name] = o
			}
		}
	}
	for name, o := range youngest {
		p := o.store.pool
		gauge := func(d *prometheus.Desc, value int64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), name)
		}
		gauge(poolBytesDesc, memory[p].used)
		gauge(poolReservedDesc, memory[p].reserved)
		gauge(poolBoundDesc, p.bound())
		if hugeIsKnown {
			gauge(poolHugeDesc, memory[p].huge)
		}
		gauge(poolHotDesc, p.hotCapacity())
	}
}

// hugeReader is shared by all instances, because it reads the pages of the whole process.
var hugeReader arena.HugeReader

// usages returns the memory in use of each pool, once for a pool with several series. It looks for huge pages once
// for all pools. hugeIsKnown is false if the kernel does not tell.
func usages(speaking map[labels][]*Optcache) (all map[*pool]usage, hugeIsKnown bool) {
	all = make(map[*pool]usage)
	var memories []*arena.Memory
	var resident []int64
	var of []*pool // the pool of each memory
	for _, block := range speaking {
		for _, o := range block {
			p := o.store.pool
			if _, known := all[p]; known {
				continue
			}
			u := p.usage()
			all[p] = u
			memories, resident = append(memories, p.memories()...), append(resident, u.mapped...)
			of = append(of, slices.Repeat([]*pool{p}, len(u.mapped))...)
		}
	}
	huge, hugeIsKnown := hugeReader.Among(memories, resident)
	for i, n := range huge {
		u := all[of[i]]
		u.huge += n
		all[of[i]] = u
	}
	return all, hugeIsKnown
}

// worstSnapshotter returns the snapshotter with the most failures, and among equals the one with the oldest snapshot.
// It returns nil if no instance has a snapshotter.
func worstSnapshotter(all []*Optcache) (worst *snapshotter) {
	for _, o := range all {
		k := o.snapshotter
		if k == nil {
			continue
		}
		if worst == nil || cmp.Or(cmp.Compare(k.failed.Load(), worst.failed.Load()), cmp.Compare(worst.written.Load(), k.written.Load())) > 0 {
			worst = k
		}
	}
	return worst
}

func (l labels) values(more []string) []string {
	return append([]string{l.server, l.zones, l.view}, more...)
}

// collect sends the series of counters.
func (c *counters) collect(ch chan<- prometheus.Metric, all *sums) {
	total := func(d *prometheus.Desc, n uint64, more ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), c.values(more)...)
	}
	var hits uint64
	for cl, name := range classNames {
		n := all.hits(func(k record.Class, _ tier, _ way) bool { return k == record.Class(cl) })
		hits += n
		total(hitsDesc, n, name)
		total(evictionsDesc, all[countEvicted+counter(cl)], name)
	}
	misses := all[countMiss]
	total(requestsDesc, hits+misses+all[countCut])
	total(missesDesc, misses)
	total(dropsDesc, all[countDrop])
	total(staleDesc, all[countStale])
	total(prefetchDesc, all[countPrefetch])
	total(coalescedDesc, all[countCoalesced])
	total(letGoDesc, all[countLetGo])
	total(cutDesc, all[countCut], "nxdomain_cut")
	total(probeDesc, all[countProbe])
	total(keptWarmDesc, all[countKeptWarm])
	total(jitteredDesc, all[countJittered])
	for i, outcome := range limitNames {
		total(limitedDesc, all[countLimitDeferred+counter(i)], outcome)
	}
	for why, reason := range narrowNames {
		total(narrowedDesc, all[countNarrowed+counter(why)], reason)
	}
	total(flushesDesc, all[countFlush])
	total(flushedDesc, all[countFlushed])
	for t, name := range tierNames {
		total(tierDesc, all.hits(func(_ record.Class, k tier, _ way) bool { return k == tier(t) }), name)
		if tier(t) != tierProbationary { // an entry never moves up into it, or down out of it
			total(promotedDesc, all[countPromoted+counter(t)], name)
			total(demotedDesc, all[countDemoted+counter(t)], name)
		}
	}
	for w, reason := range wayNames {
		kind := "message"
		switch way(w) {
		case wayBytes:
			kind = "bytes"
		case wayFast:
			kind = "fastpath"
		}
		total(wayDesc, all.hits(func(_ record.Class, _ tier, k way) bool { return k == way(w) }), kind, reason)
	}
}

// collectHistograms sends the histograms that have counted something.
func (c *counters) collectHistograms(ch chan<- prometheus.Metric, all *sums) {
	send := func(d *prometheus.Desc, s *histogram.Shape, counts histogram.Counts, more ...string) {
		if counts.Count() > 0 {
			ch <- s.Metric(d, counts, c.since, c.values(more)...)
		}
	}
	for i, name := range outcomeNames {
		send(missTimeDesc, &missShape, c.misses[i].Counts(), name)
	}
	send(staleAgeDesc, &staleShape, histogram.Counts{Buckets: all[countAge:countAges], Sum: all[countAges]})
	send(sizeDesc, &sizeShape, c.sizes.Counts())
}

// What becomes of a request, for plugins that read metadata, such as log and dnstap, and for the plugin trace.
const (
	statusHit         = "hit"
	statusPrefetch    = "prefetch" // a hit that has started a refresh
	statusStale       = "stale"
	statusVerified    = "verified"    // the entry had expired, and the next plugin has answered in time
	statusMiss        = "miss"        // the next plugin was asked
	statusSynthesized = "synthesized" // a name above does not exist
	statusShared      = "shared"      // the second level has answered
	statusCoalesced   = "coalesced"   // the answer to another request was shared
)

// tell sets the metadata optcache/LABEL of a request, and the tag of the same name of its span. CoreDNS has begun the span when
// it called the plugin, if the plugin trace has chosen the request. value is called later, or never.
func (o *Optcache) tell(ctx context.Context, label string, value func() string) {
	label = pluginName + "/" + label
	if o.outer.Metadata {
		metadata.SetValueFunc(ctx, label, value)
	}
	if span := o.span(ctx); span != nil {
		span.SetTag(label, value())
	}
}

// span returns the span of a request, or nil.
func (o *Optcache) span(ctx context.Context) opentracing.Span {
	if !o.outer.Trace {
		return nil
	}
	return opentracing.SpanFromContext(ctx)
}

// setStatus tells what becomes of a request.
func (o *Optcache) setStatus(ctx context.Context, status string) {
	if o.outer.Listens() {
		o.tell(ctx, "status", func() string { return status })
	}
}

// describeHit tells of a request that the entry in s answers: what became of it, the tier that the entry was found in, its age,
// and the TTL that the client sees, both in seconds.
func (o *Optcache) describeHit(ctx context.Context, s *scratch, status string, now int64) {
	o.setStatus(ctx, status)
	t, age, ttl := s.tier, (now-s.Entry.Stored)/1e9, o.shownTTL(&s.Entry, now)
	o.tell(ctx, "tier", func() string { return tierNames[t] })
	o.tell(ctx, "age", func() string { return strconv.FormatInt(age, 10) })
	o.tell(ctx, "ttl", func() string { return strconv.FormatUint(uint64(ttl), 10) })
}
