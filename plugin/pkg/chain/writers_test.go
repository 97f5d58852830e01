package chain

import (
	"context"
	"testing"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/loadbalance"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/pkg/nonwriter"
	"github.com/coredns/coredns/plugin/test"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

// bytesWriter is the end of a chain that takes bytes.
type bytesWriter struct {
	test.ResponseWriter
	packets []string
}

func (w *bytesWriter) Write(b []byte) (int, error) {
	w.packets = append(w.packets, string(b))
	return len(b), nil
}

// tracked returns w in the writer that plugin.NextOrFailure puts around it.
func tracked(w dns.ResponseWriter) (wrapped dns.ResponseWriter) {
	plugin.NextOrFailure("", plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, _ *dns.Msg) (int, error) {
		wrapped = w
		return 0, nil
	}), context.Background(), w, nil)
	return wrapped
}

// Each recorder is told what WriteMsg would have told it, and the packet is written once.
func TestSend(t *testing.T) {
	end := new(bytesWriter)
	outermost := metrics.NewRecorder(request.NewScrubWriter(new(dns.Msg), end))
	log := dnstest.NewRecorder(tracked(outermost))
	o := &Outer{Writers: true, recorded: "log"}
	ws, ok := o.WritersOf(tracked(log))
	if !ok {
		t.Fatal("not known")
	}
	m := new(dns.Msg)
	ws.Send(&Reply{Packet: []byte("packet"), Rcode: dns.RcodeNameError, Len: 77, Msg: m})
	if len(end.packets) != 1 || end.packets[0] != "packet" {
		t.Errorf("written: %q", end.packets)
	}
	for _, r := range []*dnstest.Recorder{outermost.Recorder, log} {
		if r.Rcode != dns.RcodeNameError || r.Len != 77 || r.Msg != m {
			t.Errorf("%+v", r)
		}
	}
	if outermost.Plugin != "log" {
		t.Errorf("by %q", outermost.Plugin)
	}
}

func TestWritersOfTheUnknown(t *testing.T) {
	o := &Outer{Writers: true}
	scrub := request.NewScrubWriter(new(dns.Msg), new(bytesWriter))
	many := dns.ResponseWriter(scrub)
	for range mostTold + 1 {
		many = dnstest.NewRecorder(many)
	}
	for name, w := range map[string]dns.ResponseWriter{
		"none": nil, "no server": new(bytesWriter), "a recorder without a server": dnstest.NewRecorder(nil),
		"another": &struct{ dns.ResponseWriter }{scrub}, "too many": many,
	} {
		if _, ok := o.WritersOf(w); ok {
			t.Errorf("%s: known", name)
		}
	}
	if n := testing.AllocsPerRun(100, func() { o.WritersOf(scrub) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// Bytes would go past the writer of a lookup in the server, to the client of the outer request.
func TestInnerLookupsTakeNoBytes(t *testing.T) {
	r := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	for name, inner := range map[string]bool{"client": false, "plugin": true} {
		var below dns.ResponseWriter = &test.ResponseWriter{}
		if inner {
			below = nonwriter.New(below)
		}
		server := request.NewScrubWriter(r, below)
		for _, w := range []dns.ResponseWriter{server, &loadbalance.LoadBalanceResponseWriter{ResponseWriter: server}} {
			if _, ok := new(Outer).WritersOf(w); ok == inner || IsInner(server) != inner {
				t.Errorf("%s: %T takes bytes: %v", name, w, ok)
			}
		}
	}
}
