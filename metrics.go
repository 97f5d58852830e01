package optcache

import (
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// This file counts. A hit counts itself with one addition, on one of several stripes, so that
// cores do not tear a line between them; the sums and the labels are made when somebody asks.
// Counters outlive the instance they were counted for, as the built-in cache's do, and go on
// in the next one with the same labels.

// counter is one of the numbers that are kept for each server, zones and view.
type counter int

// The hits come first: by class, tier and way.
const (
	countMiss = counter(int(classes)*int(tiers)*int(ways)) + iota
	countDrop
	countStale
	countPrefetch
	countCoalesced
	countLetGo
	countEvicted
	_                                              // one for each class
	countPromoted                                  // by tier entered
	countDemoted  = countPromoted + counter(tiers) // by tier left
	counterEnd    = countDemoted + counter(tiers)
)

func countHit(c class, t tier, w way) counter {
	return counter((int(c)*int(tiers)+int(t))*int(ways) + int(w))
}

// stripe is one set of counters, on lines of its own.
type stripe struct {
	n [counterEnd]atomic.Uint64
	_ [lineBytes]byte
}

// labels are what the series of one instance behind one server are told apart by.
type labels struct {
	server, zones, view string
}

// counters are the counters of one set of labels.
type counters struct {
	labels
	stripes []stripe // a power of two
}

// add adds to a counter, on the stripe of that number.
func (c *counters) add(stripe uint32, which counter, n uint64) {
	c.stripes[stripe&uint32(len(c.stripes)-1)].n[which].Add(n)
}

// addEvents counts what the policy did during a request and forgets it.
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
	s.events = events{}
}

func (c *counters) sum(which counter) (n uint64) {
	for i := range c.stripes {
		n += c.stripes[i].n[which].Load()
	}
	return n
}

// hits sums the hits for which keep says yes.
func (c *counters) hits(keep func(class, tier, way) bool) (n uint64) {
	for cl := range classes {
		for t := range tiers {
			for w := range ways {
				if keep(cl, t, w) {
					n += c.sum(countHit(cl, t, w))
				}
			}
		}
	}
	return n
}

// stripeCount is the number of stripes: a power of two, and far more than there are cores, so that
// two cores seldom share one.
var stripeCount = func() int {
	n := 64
	for n < 8*runtime.GOMAXPROCS(0) && n < 512 {
		n *= 2
	}
	return n
}()

var nextStripe atomic.Uint32

// newScratch returns a scratch, which counts on a stripe of its own as far as there are enough.
// A sync.Pool keeps a scratch on the core that used it last.
func newScratch() *scratch {
	return &scratch{
		out:     make([]byte, 1024),
		offsets: make([]uint64, 0, 2*lineBytes/wordBytes), // whole lines
		stripe:  nextStripe.Add(1),
	}
}

// server is what an instance keeps for one of the servers that it works in.
type server struct {
	*counters
	of    *dnsserver.Server
	plain bool // DNS over UDP and TCP, with a writer that puts bytes on the wire as they are
}

// addServer makes the instance know a server. There are a few of them: one for each address
// the server block listens on.
func (o *Optcache) addServer(of *dnsserver.Server) *server {
	s := &server{of: of}
	addr := ""
	if of != nil {
		addr = of.Addr
		s.plain = strings.HasPrefix(addr, transport.DNS+"://") && !decorated(of)
	}
	s.counters = allCounters.get(labels{addr, strings.Join(o.zones, ","), o.view})
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

// decorated reports whether some plugin, which may stand in another server block on the same
// address, has put a writer of its own under the server's UDP socket: it expects messages to
// come by WriteMsg, and may keep the bytes it gets. The server does not say so; a field that is
// gone counts as yes.
func decorated(s *dnsserver.Server) bool {
	f, ok := unexported[func(*dnsserver.Server) dns.DecorateWriter](s, "udpDecorateWriterFunc")
	return !ok || decorates(f)
}

// counterSet holds the counters of all labels that there have been.
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
		c = &counters{labels: l, stripes: make([]stripe, stripeCount)}
		s.m[l] = c
	}
	return c
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

// instanceSet holds the instances that are running, the oldest first. It keeps none alive: of a
// reload that failed nobody says that it is over.
type instanceSet struct {
	mu         sync.Mutex // guards what follows, and of the instances generation and successor
	list       []weak.Pointer[Optcache]
	generation int // how many Corefiles have been loaded since the first one
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

// all returns the instances, and forgets those that are no more.
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

// collector gives the numbers to Prometheus.
type collector struct{}

func init() { prometheus.MustRegister(collector{}) }

func desc(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(plugin.Namespace, pluginName, name), help,
		append([]string{"server", "zones", "view"}, more...), nil)
}

var (
	entriesDesc   = desc("entries", "The number of elements in the cache.", "type")
	requestsDesc  = desc("requests_total", "The count of cache requests.")
	hitsDesc      = desc("hits_total", "The count of cache hits.", "type")
	missesDesc    = desc("misses_total", "The count of cache misses.")
	dropsDesc     = desc("drops_total", "The number of responses that are not cached because they do not match the request.")
	evictionsDesc = desc("evictions_total", "The count of cache evictions.", "type")
	staleDesc     = desc("served_stale_total", "The number of requests served from stale cache entries.")
	prefetchDesc  = desc("prefetch_total", "The number of times the cache has prefetched a cached item.")
	coalescedDesc = desc("coalesced_total", "The count of cache requests that waited for another one's upstream query.")
	letGoDesc     = desc("coalesce_let_go_total", "The count of cache requests that waited too long for another one's upstream query.")
	waitingDesc   = desc("coalesce_waiting", "The number of cache requests that wait for another one's upstream query.")
	tierDesc      = desc("tier_hits_total", "The count of cache hits by the tier they were found in.", "tier")
	wayDesc       = desc("sent_total", "The count of cache hits by the way they were sent, and for messages why.", "way", "reason")
	promotedDesc  = desc("promotions_total", "The number of entries that moved up into a tier.", "tier")
	demotedDesc   = desc("demotions_total", "The number of entries that moved down out of a tier.", "tier")
	bytesDesc     = desc("memory_bytes", "The memory in use for entries, index and bookkeeping, in bytes.")
	hugeDesc      = desc("memory_huge_bytes", "The part of the memory that the kernel has put on huge pages, in bytes.")
	hotDesc       = desc("hot_capacity", "The number of elements that the hot tier has room for.")
	keptDesc      = desc("reload_kept_entries", "The number of elements that the last reload has left in the cache.")
	boundDesc     = desc("memory_limit_bytes", "The most that memory_bytes can become.")

	descs = []*prometheus.Desc{entriesDesc, requestsDesc, hitsDesc, missesDesc, dropsDesc, evictionsDesc,
		staleDesc, prefetchDesc, coalescedDesc, letGoDesc, waitingDesc, tierDesc, wayDesc, promotedDesc, demotedDesc, bytesDesc, boundDesc, hugeDesc, hotDesc, keptDesc}

	classNames = [classes]string{"success", "denial"}
)

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range slices.Concat(descs, laneDescs, snapshotDescs) {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (collector) Collect(ch chan<- prometheus.Metric) {
	collectLanes(ch)
	for _, c := range allCounters.all() {
		c.collect(ch)
	}
	// While one instance takes over from another both run; the newer one speaks for the labels.
	current := make(map[labels]*Optcache)
	for _, o := range instances.all() {
		if known := o.servers.Load(); known != nil {
			for _, s := range *known {
				current[s.labels] = o
			}
		}
	}
	for l, o := range current {
		st := o.store
		gauge := func(d *prometheus.Desc, v int64, more ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), l.values(more)...)
		}
		for c, name := range classNames {
			gauge(entriesDesc, st.len(class(c)), name)
		}
		gauge(bytesDesc, st.bytes())
		gauge(boundDesc, st.bound())
		gauge(hugeDesc, st.hugeBytes())
		gauge(hotDesc, st.hotCapacity())
		gauge(keptDesc, st.kept.Load())
		o.keeper.collect(ch, l)
		gauge(waitingDesc, o.flights.waiting.Load())
	}
}

func (l labels) values(more []string) []string {
	return append([]string{l.server, l.zones, l.view}, more...)
}

func (c *counters) collect(ch chan<- prometheus.Metric) {
	total := func(d *prometheus.Desc, n uint64, more ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), c.values(more)...)
	}
	var hits uint64
	for cl, name := range classNames {
		n := c.hits(func(k class, _ tier, _ way) bool { return k == class(cl) })
		hits += n
		total(hitsDesc, n, name)
		total(evictionsDesc, c.sum(countEvicted+counter(cl)), name)
	}
	misses := c.sum(countMiss)
	total(requestsDesc, hits+misses)
	total(missesDesc, misses)
	total(dropsDesc, c.sum(countDrop))
	total(staleDesc, c.sum(countStale))
	total(prefetchDesc, c.sum(countPrefetch))
	total(coalescedDesc, c.sum(countCoalesced))
	total(letGoDesc, c.sum(countLetGo))
	for t, name := range tierNames {
		total(tierDesc, c.hits(func(_ class, k tier, _ way) bool { return k == tier(t) }), name)
		if tier(t) != tierProbationary { // nothing moves up into it, or down out of it
			total(promotedDesc, c.sum(countPromoted+counter(t)), name)
			total(demotedDesc, c.sum(countDemoted+counter(t)), name)
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
		total(wayDesc, c.hits(func(_ class, _ tier, k way) bool { return k == way(w) }), kind, reason)
	}
}
