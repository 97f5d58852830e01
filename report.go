package optcache

import (
	"slices"
	"strings"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/rcode"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file tells the series of the plugin prometheus of the hits that the fast path has answered, as
// its handler would have (metrics.ServeDNS and vars.Report).

// reportOptions are what the plugin prometheus of a server block counts by.
type reportOptions struct {
	zones func() []string

	// plugin is the label of that name. The plugin prometheus sees who calls it, and nobody behind: it is
	// the one that stands next to it.
	plugin string
}

// reporter reports on one route. It belongs to one worker, which looks up each series once.
type reporter struct {
	zones []*zoneReporter // the plugin's zones, the most labels first
}

// zoneReporter has the series of one zone. They come into being with the first query that they count.
type zoneReporter struct {
	server, zone, plugin string
	name                 []byte // of the zone

	requests                            [2]map[uint16]prometheus.Counter // by address family and type
	rcodes                              [16]prometheus.Counter
	do                                  prometheus.Counter
	duration, requestSize, responseSize prometheus.Observer
}

// reportsAll is the zone of queries that are in none of the plugin's.
const reportsAll = "."

// newReporter returns a reporter for a server.
func newReporter(server string, o *reportOptions) *reporter {
	r := new(reporter)
	zones := o.zones()
	if !slices.Contains(zones, reportsAll) {
		zones = append(slices.Clone(zones), reportsAll)
	}
	for _, zone := range zones {
		var buf [wire.MaxName]byte
		if n, ok := wire.PackName(buf[:], plugin.Name(zone).Normalize()); ok {
			wire.Lower(buf[:n], buf[:n])
			r.zones = append(r.zones, &zoneReporter{server: server, zone: zone, plugin: o.plugin, name: slices.Clone(buf[:n])})
		}
	}
	slices.SortStableFunc(r.zones, func(a, b *zoneReporter) int { return len(b.name) - len(a.name) })
	return r
}

// report counts a hit. The client's view is none: routes have no views.
func (r *reporter) report(f *fastQuery, took time.Duration) {
	z := r.zone(f.s.key.name())
	family := 1
	if f.ipv4 {
		family = 0
	}
	z.request(family, f.qtype).Inc()
	if f.do() {
		if z.do == nil {
			z.do = vars.RequestDo.WithLabelValues(z.server, z.zone, "")
		}
		z.do.Inc()
	}
	if z.duration == nil {
		z.duration = vars.RequestDuration.WithLabelValues(z.server, z.zone, "")
		z.requestSize = vars.RequestSize.WithLabelValues(z.server, z.zone, "", "udp")
		z.responseSize = vars.ResponseSize.WithLabelValues(z.server, z.zone, "", "udp")
	}
	z.duration.Observe(took.Seconds())
	z.responseSize.Observe(float64(f.s.recorded(len(f.reply), f.edns, f.ede)))
	z.requestSize.Observe(float64(f.size))
	z.rcode(int(f.s.entry.flags & flagRcode)).Inc()
}

// zone returns the reporter of the zone that a lower-cased qname is in.
func (r *reporter) zone(qname []byte) *zoneReporter {
	for _, z := range r.zones {
		if wire.InZone(qname, z.name) {
			return z
		}
	}
	return r.zones[len(r.zones)-1] // the root
}

func (z *zoneReporter) request(family int, qtype uint16) prometheus.Counter {
	if c, ok := z.requests[family][qtype]; ok {
		return c
	}
	label := typeLabel(qtype)
	if label == otherTypes && qtype != 0 { // no query's: one key for all of them
		return z.request(family, 0)
	}
	c := vars.RequestCount.WithLabelValues(z.server, z.zone, "", "udp", []string{"1", "2"}[family], label)
	if z.requests[family] == nil {
		z.requests[family] = make(map[uint16]prometheus.Counter)
	}
	z.requests[family][qtype] = c
	return c
}

func (z *zoneReporter) rcode(code int) prometheus.Counter {
	if z.rcodes[code] == nil {
		z.rcodes[code] = vars.ResponseRcode.WithLabelValues(z.server, z.zone, "", rcode.ToString(code), z.plugin)
	}
	return z.rcodes[code]
}

// otherTypes is the label of all query types that have none of their own.
const otherTypes = "other"

// typeLabels are the types that have (vars.monitorType).
var typeLabels = strings.Fields("AAAA A CNAME DNSKEY DS MX NSEC3 NSEC NS PTR RRSIG SOA SRV TXT HTTPS SVCB IXFR AXFR ANY")

func typeLabel(qtype uint16) string {
	if name := dns.TypeToString[qtype]; slices.Contains(typeLabels, name) {
		return name
	}
	return otherTypes
}
