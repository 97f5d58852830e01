package chain

import (
	"slices"
	"strings"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/rcode"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file counts the hits of the fast path in the series of the plugin prometheus, as the plugin's handler would
// (metrics.ServeDNS and vars.Report).

// Report has the labels that the plugin prometheus of a server block uses.
type Report struct {
	Zones func() []string // returns the plugin's zones, one of which is the label zone

	// Plugin is the label plugin: the name of the plugin next to prometheus in the chain. Only this one tells prometheus that
	// it has written the response (plugin.PluginTracker), even if a plugin further behind has made the response.
	Plugin string

	View string // the label view
}

// Reporter counts hits of one server block on one server. It remembers each series that it has looked up. It belongs to one
// worker, and is not safe for concurrent use.
type Reporter struct {
	zones zones.Table[*zoneReporter] // the plugin's zones, and the root
}

// zoneReporter has the series of one zone. A series is looked up when the first hit needs it, for a series exists from then on.
type zoneReporter struct {
	server, zone, view, plugin string

	requests                  [2][2]map[uint16]prometheus.Counter // by protocol, address family, and type
	rcodes                    [16]prometheus.Counter
	do                        prometheus.Counter
	duration                  prometheus.Observer
	requestSize, responseSize [2]prometheus.Observer // by protocol
}

// reportsAll is the label zone of queries outside of the plugin's zones.
const reportsAll = "."

// NewReporter returns a reporter for the server with the address server, such as dns://:53.
func NewReporter(server string, o *Report) *Reporter {
	r := new(Reporter)
	for _, zone := range append(slices.Clone(o.Zones()), reportsAll) {
		if name, ok := zones.Wire(plugin.Name(zone).Normalize()); ok {
			r.zones.Add(name, &zoneReporter{server: server, zone: zone, view: o.View, plugin: o.Plugin})
		}
	}
	return r
}

// Hit is one hit, as the series need it.
type Hit struct {
	Name              []byte // the qname in wire format and lower case
	Query             *query.Query
	Rcode             int
	Request, Response int // sizes in bytes, as CoreDNS counts them
	Took              time.Duration
}

// Count counts a hit.
func (r *Reporter) Count(h *Hit) {
	z := *r.zones.Find(h.Name)
	family, proto := 1, 0
	if h.Query.IPv4 {
		family = 0
	}
	if h.Query.OverTCP() {
		proto = 1
	}
	z.request(proto, family, h.Query.Qtype).Inc()
	if h.Query.DO() {
		if z.do == nil {
			z.do = vars.RequestDo.WithLabelValues(z.server, z.zone, z.view)
		}
		z.do.Inc()
	}
	if z.duration == nil {
		z.duration = vars.RequestDuration.WithLabelValues(z.server, z.zone, z.view)
	}
	if z.requestSize[proto] == nil {
		z.requestSize[proto] = vars.RequestSize.WithLabelValues(z.server, z.zone, z.view, protocols[proto])
		z.responseSize[proto] = vars.ResponseSize.WithLabelValues(z.server, z.zone, z.view, protocols[proto])
	}
	z.duration.Observe(h.Took.Seconds())
	z.responseSize[proto].Observe(float64(h.Response))
	z.requestSize[proto].Observe(float64(h.Request))
	z.rcode(h.Rcode).Inc()
}

// protocols are the labels proto. TLS counts as TCP.
var protocols = [2]string{"udp", "tcp"}

// request returns the counter of requests of a type over a protocol by clients of a family: 0 is IPv4, 1 is IPv6.
func (z *zoneReporter) request(proto, family int, qtype uint16) prometheus.Counter {
	if c, ok := z.requests[proto][family][qtype]; ok {
		return c
	}
	label := typeLabel(qtype)
	if label == otherTypes && qtype != 0 { // all these types share the key 0, which no query in the fast path has
		return z.request(proto, family, 0)
	}
	c := vars.RequestCount.WithLabelValues(z.server, z.zone, z.view, protocols[proto], []string{"1", "2"}[family], label)
	if z.requests[proto][family] == nil {
		z.requests[proto][family] = make(map[uint16]prometheus.Counter)
	}
	z.requests[proto][family][qtype] = c
	return c
}

func (z *zoneReporter) rcode(code int) prometheus.Counter {
	if z.rcodes[code] == nil {
		z.rcodes[code] = vars.ResponseRcode.WithLabelValues(z.server, z.zone, z.view, rcode.ToString(code), z.plugin)
	}
	return z.rcodes[code]
}

// otherTypes is the label type of all query types that are not in typeLabels.
const otherTypes = "other"

// typeLabels are the query types with a label of their own (vars.monitorType).
var typeLabels = strings.Fields("AAAA A CNAME DNSKEY DS MX NSEC3 NSEC NS PTR RRSIG SOA SRV TXT HTTPS SVCB IXFR AXFR ANY")

func typeLabel(qtype uint16) string {
	if name := dns.TypeToString[qtype]; slices.Contains(typeLabels, name) {
		return name
	}
	return otherTypes
}
