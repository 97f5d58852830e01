package optcache

import (
	"context"
	"fmt"
	golog "log"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/dnstap"
	"github.com/coredns/coredns/plugin/metadata"

	tap "github.com/dnstap/golang-dnstap"
	"github.com/miekg/dns"
)

// This file has what outer plugins are told of replies: lines of the plugin log, and messages of the plugin dnstap.

// toldFormat is a format of the plugin log with all that it knows.
const toldFormat = "{remote}:{port} {local} {type} {name} {class} {proto} {size} {>id} {>opcode} {>do} {>bufsize} " +
	"{rcode} {rsize} {>rflags} {duration} {/log/type} {/log/class}"

// tapped is a sink of the plugin dnstap.
type tapped struct {
	mu   sync.Mutex // guards text
	text []string
	as   func([]byte) string // a packet in words
	off  bool                // it is for a benchmark
}

func (s *tapped) Dnstap(d *tap.Dnstap) {
	if s.off {
		return
	}
	m := d.Message
	s.mu.Lock()
	defer s.mu.Unlock()
	line := fmt.Sprintf("%v %s:%d at %d.%09d, %d.%09d: %q\n", m.GetType(), net.IP(m.QueryAddress), m.GetQueryPort(),
		m.GetQueryTimeSec(), m.GetQueryTimeNsec(), m.GetResponseTimeSec(), m.GetResponseTimeNsec(), d.Extra)
	for _, p := range [][]byte{m.QueryMessage, m.ResponseMessage} {
		if len(p) > 0 {
			line += s.as(p)
		}
	}
	s.text = append(s.text, line)
}

func (s *tapped) take() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, s.text = s.text, nil
	return all
}

// newTap returns a plugin dnstap that sends to the sink.
func newTap(sink *tapped, full bool, next plugin.Handler) *dnstap.Dnstap {
	d := &dnstap.Dnstap{Next: next, IncludeRawMessage: full, ExtraFormat: "{size} {>do} {>bufsize} {name}"}
	io := reflect.ValueOf(d).Elem().FieldByName("io")
	reflect.NewAt(io.Type(), unsafe.Pointer(io.UnsafeAddr())).Elem().Set(reflect.ValueOf(sink))
	return d
}

// logged is an output of package log that keeps lines with a prefix.
type logged struct {
	mu    sync.Mutex // guards lines
	lines map[string][]string
}

// logOutput catches the lines of the plugin log with toldFormat, by the word in front.
func logOutput(tb testing.TB) *logged {
	l := &logged{lines: make(map[string][]string)}
	golog.SetOutput(l)
	tb.Cleanup(func() { golog.SetOutput(os.Stderr) })
	return l
}

func (l *logged) Write(b []byte) (int, error) {
	if _, line, ok := strings.Cut(string(b), "told/"); ok {
		who, line, _ := strings.Cut(line, " ")
		l.mu.Lock()
		l.lines[who] = append(l.lines[who], line)
		l.mu.Unlock()
	} else if strings.Contains(string(b), "LoadBalance") {
		panic("loadbalance was called with bytes")
	}
	return len(b), nil
}

func (l *logged) take(who string) (all []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all = l.lines[who]
	delete(l.lines, who)
	return all
}

// logLine is the line of a Corefile for a plugin log whose lines go to logged.take(who).
func logLine(who string) string { return fmt.Sprintf("log . %q", "told/"+who+" "+toldFormat) }

// pluginOf sets up a plugin of CoreDNS by its line in a Corefile.
func pluginOf(tb testing.TB, line string, next plugin.Handler) plugin.Handler {
	c := caddy.NewTestController("dns", "")
	c.Dispenser = caddyfile.NewDispenser("Corefile", strings.NewReader(line))
	word, _, _ := strings.Cut(line, " ")
	action, err := caddy.DirectiveAction("dns", word)
	if err == nil {
		err = action(c)
	}
	if err != nil {
		tb.Fatalf("%s: %v", line, err)
	}
	all := dnsserver.GetConfig(c).Plugin
	return all[len(all)-1](next)
}

// startBehind starts an instance behind plugins, the outermost first, and returns the first of them, too.
func startBehind(tb testing.TB, o options, next plugin.Handler, wrap ...func(plugin.Handler) plugin.Handler) (front plugin.Handler, h *Optcache) {
	h = newOptcache(o)
	h.Next, h.clock = next, systemNow
	front = h
	handlers := []plugin.Handler{h}
	for _, w := range slices.Backward(wrap) {
		front = w(front)
		handlers = append([]plugin.Handler{front}, handlers...)
	}
	if err := h.start(tb.Name(), handlers); err != nil {
		tb.Fatal(err)
	}
	stopsWith(tb, h)
	return front, h
}

// balanced puts the plugin loadbalance in front.
func balanced(tb testing.TB) func(plugin.Handler) plugin.Handler {
	return func(next plugin.Handler) plugin.Handler { return pluginOf(tb, "loadbalance", next) }
}

// Behind loadbalance, records change places, by chance.
func TestHitsRotateInTheChain(t *testing.T) {
	up := &scripted{response: positive("host.example.org. 300 IN A 192.0.2.1", "host.example.org. 300 IN A 192.0.2.2", "host.example.org. 300 IN A 192.0.2.3")}
	front, h := startBehind(t, stockOptions(), up, balanced(t))
	orders := make(map[string]bool)
	for range 200 {
		order := ""
		for _, rr := range answer(t, serverContext(t), front, asking("host.example.org.", dns.TypeA)).Answer {
			order += rr.(*dns.A).A.String() + " "
		}
		orders[order] = true
	}
	if len(orders) != 6 {
		t.Errorf("%d orders of three records: %v", len(orders), orders)
	}
	if ws := sentWays(h); ws[wayBytes] != 199 {
		t.Errorf("hits by way %v: %v", wayNames, ws)
	}
}

// Log lines and dnstap messages say of a hit in bytes what they say of a message, and what they say of a hit of cache.
func TestOuterPluginsAreToldTheSame(t *testing.T) {
	for _, plugins := range []string{"log", "dnstap", "dnstap full", "log dnstap dnstap full loadbalance", "loadbalance"} {
		t.Run(plugins, func(t *testing.T) {
			out := logOutput(t)
			synctest.Test(t, func(t *testing.T) { toldTheSame(t, plugins, out) })
		})
	}
}

func toldTheSame(t *testing.T, plugins string, out *logged) {
	shuffled := strings.Contains(plugins, "loadbalance")
	ups := [3]*scripted{{}, {}, {}}
	var chains [3]plugin.Handler
	var sinks [3]*tapped
	var h *Optcache
	options := roomyOptions()
	options.explain = false
	for i := range chains {
		sinks[i] = &tapped{as: func(p []byte) string { return diffPacket(p, shuffled) }}
		var inner plugin.Handler
		if trioNames[i] == "cache" {
			stock := cache.New()
			stock.Next = ups[i]
			inner = spelling{stock}
		} else {
			o := newOptcache(options)
			o.Next, o.clock = ups[i], systemNow
			inner = o
			if trioNames[i] == "bytes" {
				h = o
			}
		}
		front, handlers := inner, []plugin.Handler{inner}
		words := strings.Fields(plugins)
		for at, word := range slices.Backward(words) {
			switch {
			case word == "log":
				front = pluginOf(t, logLine(trioNames[i]), front)
			case word == "dnstap":
				front = newTap(sinks[i], at+1 < len(words) && words[at+1] == "full", front)
			case word == "loadbalance":
				front = pluginOf(t, word, front)
			default:
				continue
			}
			handlers = append([]plugin.Handler{front}, handlers...)
		}
		if o, ok := inner.(*Optcache); ok {
			if trioNames[i] == "message" {
				handlers = append([]plugin.Handler{named{name: "rewrite"}}, handlers...)
			}
			if err := o.start(t.Name()+trioNames[i], handlers); err != nil {
				t.Fatal(err)
			}
			stopsWith(t, o)
		}
		chains[i] = front
	}
	g, ctx := newTraffic(77), serverContext(t)
	for history := range 400 {
		q := g.question()
		m := g.response(q)
		for i := range ups {
			ups[i].response = m
		}
		for range 4 {
			r, client := asCache(h, g.request(q)), plainClients[g.IntN(len(plainClients))]
			var told [3]string
			for i, c := range chains {
				w, _, _ := ask(metadata.ContextWithMetadata(context.WithoutCancel(ctx)), c, r, client)
				for _, p := range w.packets {
					told[i] += diffPacket(p, shuffled)
				}
				told[i] += strings.Join(append(out.take(trioNames[i]), sinks[i].take()...), "\n")
			}
			if told[0] != told[1] || told[0] != told[2] {
				t.Fatalf("history %d: %s\nbytes:\n%s\nmessage:\n%s\ncache:\n%s", history, r, told[0], told[1], told[2])
			}
			time.Sleep(time.Duration(g.IntN(3)) * time.Second)
		}
	}
	if ws := sentWays(h); ws[wayBytes] < 300 || ws[wayPlugin]+ws[wayRecorder] > 0 {
		t.Errorf("hits by way %v: %v", wayNames, ws)
	}
}
