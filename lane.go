package optcache

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// laneCounters count what happens on one address with a fast path. Workers add to them once for each batch.
type laneCounters struct {
	addr       string
	packets    atomic.Uint64
	hits       atomic.Uint64
	passed     [passes]atomic.Uint64
	dropped    atomic.Uint64
	sendErrors atomic.Uint64
	truncated  atomic.Uint64
	panics     atomic.Uint64
	workers    atomic.Int64
	batches    [batchBuckets]atomic.Uint64 // by size: up to 1, 2, 4, ... packets
}

const (
	// batchSize is how many packets a worker takes at once, at the most.
	batchSize    = 64
	batchBuckets = 7
)

// batch counts one batch of n packets.
func (c *laneCounters) batch(n int) {
	c.packets.Add(uint64(n))
	c.batches[bits.Len(uint(n-1))].Add(1)
}

// allLanes holds the counters of all addresses that there have been.
var allLanes struct {
	mu sync.Mutex // guards m
	m  map[string]*laneCounters
}

func laneCountersOf(addr string) *laneCounters {
	allLanes.mu.Lock()
	defer allLanes.mu.Unlock()
	c, ok := allLanes.m[addr]
	if !ok {
		c = &laneCounters{addr: addr}
		if allLanes.m == nil {
			allLanes.m = make(map[string]*laneCounters)
		}
		allLanes.m[addr] = c
	}
	return c
}

func laneDesc(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("coredns", pluginName, "fastpath_"+name), help, append([]string{"server"}, more...), nil)
}

var (
	lanePacketsDesc   = laneDesc("packets_total", "The count of packets received by the fast path.")
	laneBatchDesc     = laneDesc("batch_packets", "The number of packets that a worker of the fast path received at once.")
	laneHitsDesc      = laneDesc("hits_total", "The count of queries that the fast path answered.")
	lanePassedDesc    = laneDesc("passed_total", "The count of packets that the fast path passed on to the server, by reason.", "reason")
	laneDroppedDesc   = laneDesc("dropped_total", "The count of packets dropped because too many waited for the server.")
	laneErrorsDesc    = laneDesc("send_errors_total", "The count of replies that could not be sent.")
	laneTruncatedDesc = laneDesc("oversize_total", "The count of packets received that were too large for a query.")
	lanePanicsDesc    = laneDesc("panics_total", "The count of panics in workers of the fast path.")
	laneWorkersDesc   = laneDesc("workers", "The number of workers of the fast path.")

	laneDescs = []*prometheus.Desc{lanePacketsDesc, laneBatchDesc, laneHitsDesc, lanePassedDesc, laneDroppedDesc,
		laneErrorsDesc, laneTruncatedDesc, lanePanicsDesc, laneWorkersDesc}
)

// collectLanes gives the numbers to Prometheus.
func collectLanes(ch chan<- prometheus.Metric) {
	allLanes.mu.Lock()
	var all []*laneCounters
	for _, c := range allLanes.m {
		all = append(all, c)
	}
	allLanes.mu.Unlock()
	for _, c := range all {
		total := func(d *prometheus.Desc, n *atomic.Uint64, more ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n.Load()), append([]string{c.addr}, more...)...)
		}
		total(lanePacketsDesc, &c.packets)
		total(laneHitsDesc, &c.hits)
		for why := passNot + 1; why < passes; why++ {
			total(lanePassedDesc, &c.passed[why], passNames[why])
		}
		total(laneDroppedDesc, &c.dropped)
		total(laneErrorsDesc, &c.sendErrors)
		total(laneTruncatedDesc, &c.truncated)
		total(lanePanicsDesc, &c.panics)
		ch <- prometheus.MustNewConstMetric(laneWorkersDesc, prometheus.GaugeValue, float64(c.workers.Load()), c.addr)

		buckets := make(map[float64]uint64)
		var batches uint64
		for i := range c.batches {
			batches += c.batches[i].Load()
			buckets[float64(int(1)<<i)] = batches
		}
		ch <- prometheus.MustNewConstHistogram(laneBatchDesc, batches, float64(c.packets.Load()), buckets, c.addr)
	}
}
