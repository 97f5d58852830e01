package fastpath

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// This file has the metrics of the fast path. They are kept by address, and outlive listeners.

// counters count what happens on one address with a fast path. Workers add to them once for each batch. They are safe for
// concurrent use.
type counters struct {
	addr        string
	packets     atomic.Uint64
	passed      [reasons]atomic.Uint64 // datagrams on the slow path, by reason; passed[Answered] has the hits
	dropped     atomic.Uint64          // datagrams and queries dropped because the slow path was full
	sendErrors  atomic.Uint64
	truncated   atomic.Uint64 // datagrams too large for a query
	panics      atomic.Uint64
	workers     atomic.Int64
	streams     atomic.Int64                // connections
	streamed    [reasons]atomic.Uint64      // queries on connections, like passed
	refused     atomic.Uint64               // connections that were not kept
	slowReaders atomic.Uint64               // connections closed because the client did not read
	off         atomic.Pointer[string]      // why there is no fast path, see Off; nil: there is one, or none was tried
	batches     [batchBuckets]atomic.Uint64 // batches of up to 1, 2, 4, ... packets
}

const (
	batchBuckets = 7 // powers of two from 1 to BatchSize
)

// batch counts one batch of n packets.
func (c *counters) batch(n int) {
	c.packets.Add(uint64(n))
	c.batches[bits.Len(uint(n-1))].Add(1)
}

// allCounters holds the counters of all addresses that have had a fast path in this process.
var allCounters struct {
	mu sync.Mutex // guards m
	m  map[string]*counters
}

// countersOf returns the counters of a server's address, such as dns://:53.
func countersOf(addr string) *counters {
	allCounters.mu.Lock()
	defer allCounters.mu.Unlock()
	c, ok := allCounters.m[addr]
	if !ok {
		c = &counters{addr: addr}
		if allCounters.m == nil {
			allCounters.m = make(map[string]*counters)
		}
		allCounters.m[addr] = c
	}
	return c
}

// Values of Off.
const (
	offOpen   = "open"   // the sockets could not be opened
	offShared = "shared" // other processes serve the address, too
)

// Off returns why a server has no fast path, although its server blocks are fit for one. It is "" if it has one. server is the
// server's address, such as dns://:53.
func Off(server string) string {
	allCounters.mu.Lock()
	defer allCounters.mu.Unlock()
	if c := allCounters.m[server]; c != nil {
		if why := c.off.Load(); why != nil {
			return *why
		}
	}
	return ""
}

func (c *counters) setOff(why string) { c.off.Store(&why) }

func desc(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("coredns", "optcache", "fastpath_"+name), help, append([]string{"server"}, more...), nil)
}

var (
	packetsDesc   = desc("packets_total", "The count of packets received by the fast path.")
	batchDesc     = desc("batch_packets", "The number of packets that a worker of the fast path received at once.")
	hitsDesc      = desc("hits_total", "The count of queries that the fast path answered.")
	passedDesc    = desc("passed_total", "The count of packets that the fast path passed on to the server, by reason.", "reason")
	droppedDesc   = desc("dropped_total", "The count of packets dropped because too many waited for the server.")
	errorsDesc    = desc("send_errors_total", "The count of replies that could not be sent.")
	truncatedDesc = desc("oversize_total", "The count of packets received that were too large for a query.")
	panicsDesc    = desc("panics_total", "The count of panics in workers of the fast path.")
	workersDesc   = desc("workers", "The number of workers of the fast path.")

	streamsDesc     = desc("streams", "The number of connections that the fast path serves.")
	streamHitsDesc  = desc("stream_hits_total", "The number of queries on connections that the fast path answered.")
	streamPassDesc  = desc("stream_passed_total", "The number of queries on connections that the fast path passed on to the server, by reason.", "reason")
	refusedDesc     = desc("stream_refused_total", "The number of connections that were closed after one answer because there were too many.")
	slowReadersDesc = desc("stream_slow_readers_total", "The number of connections that were closed because the client did not read.")

	// Descs describe the metrics that Collect sends.
	Descs = []*prometheus.Desc{packetsDesc, batchDesc, hitsDesc, passedDesc, droppedDesc,
		errorsDesc, truncatedDesc, panicsDesc, workersDesc, streamsDesc, streamHitsDesc, streamPassDesc, refusedDesc, slowReadersDesc}
)

// Counts are what the fast path of one address has done.
type Counts struct {
	Workers                int64
	Packets, Hits, Dropped uint64
	Batches                map[int]uint64 // by how many packets they had at most: 1, 2, 4, ...
}

// CountsOf returns the counts of a server's address. ok is false if it has had no fast path in this process.
func CountsOf(addr string) (n Counts, ok bool) {
	allCounters.mu.Lock()
	c, ok := allCounters.m[addr]
	allCounters.mu.Unlock()
	if !ok {
		return n, false
	}
	n = Counts{c.workers.Load(), c.packets.Load(), c.passed[Answered].Load(), c.dropped.Load(), make(map[int]uint64)}
	for i := range c.batches {
		n.Batches[1<<i] = c.batches[i].Load()
	}
	return n, true
}

// Collect sends the metrics of all addresses to ch. An address without workers has a gauge of workers only if it is in wanted:
// these are the addresses of the servers whose blocks have a fast path.
func Collect(ch chan<- prometheus.Metric, wanted map[string]bool) {
	allCounters.mu.Lock()
	var all []*counters
	for _, c := range allCounters.m {
		all = append(all, c)
	}
	allCounters.mu.Unlock()
	for _, c := range all {
		total := func(d *prometheus.Desc, n *atomic.Uint64, more ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n.Load()), append([]string{c.addr}, more...)...)
		}
		total(packetsDesc, &c.packets)
		total(hitsDesc, &c.passed[Answered])
		for why := Answered + 1; why < reasons; why++ {
			total(passedDesc, &c.passed[why], why.String())
		}
		total(droppedDesc, &c.dropped)
		total(errorsDesc, &c.sendErrors)
		total(truncatedDesc, &c.truncated)
		total(panicsDesc, &c.panics)
		ch <- prometheus.MustNewConstMetric(streamsDesc, prometheus.GaugeValue, float64(c.streams.Load()), c.addr)
		total(streamHitsDesc, &c.streamed[Answered])
		for why := Answered + 1; why < reasons; why++ {
			total(streamPassDesc, &c.streamed[why], why.String())
		}
		total(refusedDesc, &c.refused)
		total(slowReadersDesc, &c.slowReaders)
		if n := c.workers.Load(); n > 0 || wanted[c.addr] {
			ch <- prometheus.MustNewConstMetric(workersDesc, prometheus.GaugeValue, float64(n), c.addr)
		}

		buckets := make(map[float64]uint64)
		var batches uint64
		for i := range c.batches {
			batches += c.batches[i].Load()
			buckets[float64(int(1)<<i)] = batches
		}
		ch <- prometheus.MustNewConstHistogram(batchDesc, batches, float64(c.packets.Load()), buckets, c.addr)
	}
}
