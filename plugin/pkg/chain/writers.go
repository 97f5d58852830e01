package chain

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"time"

	"github.com/coredns/coredns/plugin/dnstap"
	"github.com/coredns/coredns/plugin/dnstap/msg"
	"github.com/coredns/coredns/plugin/loadbalance"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/pkg/nonwriter"
	"github.com/coredns/coredns/request"

	tap "github.com/dnstap/golang-dnstap"
	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file sends a reply in bytes past the writers of the outer plugins, and tells the plugins what WriteMsg would have told
// them. It also tells dnstap of the hits of the fast path.

// mostTold is how many writers of one request can be told.
const mostTold = 4

// Writers are the writers of one request: the server's, and those of outer plugins that are told of a reply.
type Writers struct {
	outer  *Outer
	server dns.ResponseWriter
	told   [mostTold]dns.ResponseWriter // the one next to the cache first
	n      int
}

// Reply is a reply in bytes, with what outer plugins are told of it.
type Reply struct {
	Packet []byte
	Rcode  int
	Len    int      // the length that a recorder notes of the reply as a message
	Msg    *dns.Msg // what outer plugins read of the message; needed if Outer.Reads
}

// WritersOf returns the writers that w writes to. ok is false if one of them is unknown, or if there are too many.
func (o *Outer) WritersOf(w dns.ResponseWriter) (ws Writers, ok bool) {
	ws.outer = o
	for range 64 { // more than a chain has
		at, told := w, true
		switch t := w.(type) {
		case *request.ScrubWriter:
			ws.server = t
			return ws, !IsInner(t)
		case *loadbalance.LoadBalanceResponseWriter: // its Write only warns that it does nothing
			w, told = t.ResponseWriter, false
		case *metrics.Recorder:
			w = t.ResponseWriter
		case *dnstest.Recorder: // of the plugin log
			w = t.ResponseWriter
		case *dnstap.ResponseWriter:
			if w = t.ResponseWriter; !canTap {
				return ws, false
			}
		default:
			if w, ok = inTracker(w); !ok {
				return ws, false
			}
			told = false
		}
		if told {
			if ws.n == mostTold {
				return ws, false
			}
			ws.told[ws.n] = at
			ws.n++
		}
	}
	return ws, false
}

// IsInner reports whether w is the server's writer of a lookup that another plugin makes in the server, as *kubernetes* does for an
// ExternalName. It keeps the message, and would hand bytes to the client of the outer request.
func IsInner(w dns.ResponseWriter) bool {
	s, ok := w.(*request.ScrubWriter)
	if !ok {
		return false
	}
	_, inner := s.ResponseWriter.(*nonwriter.Writer)
	return inner
}

// Send sends a reply to the client, and tells the outer plugins of it. It does not keep the packet.
func (ws *Writers) Send(r *Reply) {
	_, err := ws.server.Write(r.Packet)
	for i := ws.n - 1; i >= 0; i-- {
		switch t := ws.told[i].(type) {
		case *metrics.Recorder:
			t.SetPlugin(ws.outer.recorded)
			r.record(t.Recorder)
		case *dnstest.Recorder:
			r.record(t)
		case *dnstap.ResponseWriter:
			if err == nil {
				tapResponse(t, r.Packet)
			}
		}
	}
}

// record does what a recorder's WriteMsg does.
func (r *Reply) record(to *dnstest.Recorder) {
	to.Rcode, to.Msg = r.Rcode, r.Msg
	to.Len += r.Len
}

// tapResponse does what the plugin dnstap does when it has sent a message with these bytes (dnstap.ResponseWriter.tapResponse).
func tapResponse(w *dnstap.ResponseWriter, packet []byte) {
	m := new(tap.Message)
	msg.SetQueryTime(m, tapQueryTime.of(w))
	msg.SetResponseTime(m, time.Now())
	msg.SetQueryAddress(m, w.RemoteAddr())
	if w.IncludeRawMessage {
		m.ResponseMessage = bytes.Clone(packet) // the plugin sends it later
	}
	msg.SetType(m, tap.Message_CLIENT_RESPONSE)
	w.TapMessageWithMetadata(tapContext.of(w), m, request.Request{W: w.ResponseWriter, Req: tapQuery.of(w)})
}

// Tapped reports whether a plugin dnstap must be told of each hit.
func (e *Effects) Tapped() bool { return len(e.taps) > 0 }

// Tap tells the dnstap plugins of a hit of the fast path what their handlers would have told: the query, and the reply, unless it is
// nil because it could not be sent. It copies the bytes of both. begun is when the query came.
func (e *Effects) Tap(a *Asked, reply []byte, begun time.Time) {
	packet := a.Packet
	if opt := wire.HeaderLen + len(a.Name) + wire.QuestionTail; e.Space > 0 && len(packet) > opt { // bufsize stands in front of dnstap
		packet = bytes.Clone(packet)
		size := packet[opt+3:]
		binary.BigEndian.PutUint16(size, min(binary.BigEndian.Uint16(size), e.Space))
	}
	state := request.Request{W: a.writer()}
	if slices.ContainsFunc(e.taps, func(h *dnstap.Dnstap) bool { return h.ExtraFormat != "" }) {
		state.Req = new(dns.Msg)
		state.Req.Unpack(packet) // it is a plain query
	}
	from := a.remote()
	tell := func(kind tap.Message_Type, fill func(m *tap.Message, raw bool)) {
		for _, h := range e.taps {
			m := new(tap.Message)
			msg.SetQueryTime(m, begun)
			msg.SetQueryAddress(m, from)
			fill(m, h.IncludeRawMessage)
			msg.SetType(m, kind)
			h.TapMessageWithMetadata(context.Background(), m, state)
		}
	}
	tell(tap.Message_CLIENT_QUERY, func(m *tap.Message, raw bool) {
		if raw {
			m.QueryMessage = bytes.Clone(packet)
		}
	})
	if reply == nil {
		return
	}
	if state.Req != nil {
		state.SizeAndDo(new(dns.Msg)) // as the server does when it sends a message: it takes options out of the query
	}
	now := time.Now()
	tell(tap.Message_CLIENT_RESPONSE, func(m *tap.Message, raw bool) {
		msg.SetResponseTime(m, now)
		if raw {
			m.ResponseMessage = bytes.Clone(reply)
		}
	})
}
