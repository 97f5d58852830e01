package chain

import (
	"context"
	"slices"
	"testing"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/test"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// The query types with a label of their own are the same as in the plugin prometheus.
func TestTypeLabels(t *testing.T) {
	m := metrics.New("")
	m.Next = plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		return 0, w.WriteMsg(new(dns.Msg).SetReply(r))
	})
	for qtype := range uint16(300) {
		m.ServeDNS(t.Context(), &test.ResponseWriter{}, new(dns.Msg).SetQuestion("host.example.org.", qtype))
	}
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string]bool)
	for _, family := range families {
		if family.GetName() != "coredns_dns_requests_total" {
			continue
		}
		for _, series := range family.GetMetric() {
			for _, label := range series.GetLabel() {
				if label.GetName() == "type" {
					want[label.GetValue()] = true
				}
			}
		}
	}
	for qtype := range uint16(300) {
		if label := typeLabel(qtype); !want[label] {
			t.Errorf("type %d: %s", qtype, label)
		}
	}
	for label := range want {
		if label != otherTypes && !slices.Contains(typeLabels, label) {
			t.Errorf("%s is missing", label)
		}
	}
}
