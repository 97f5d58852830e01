package optcache

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/topk"
)

// This file finds the questions and the clients that come most often, for operators. Nothing here happens without the control
// interface.
//
// Misses are counted where they start. Of hits and clients, samples are counted. A scratch, which is used by one core at a time,
// takes a sample each so many requests, at random, and counts it as that many requests. The number is such that there are some
// hundred samples a second. So a quiet server counts every request, and a busy one takes little time for it. Between two
// samples, a request does what it does without the control interface: it compares its tally with a number (store.counted).

const (
	// topPeriod is a period of the windows: what is shown is of the last one to two periods.
	topPeriod = 10 * time.Minute

	// topPlaces is the number of places of a sketch. Whatever has more than that part of all requests is there.
	topPlaces = 1024

	// mostGap is the largest mean number of requests between two samples of a scratch.
	mostGap = 1024

	// The mean number doubles when a sample comes sooner than soon after the last one, and is halved when it comes later than
	// late. Both are longer than a tick of the clock, or nearly.
	soon, late = int64(time.Millisecond), int64(16 * time.Millisecond)
)

// tops are the windows of a store.
type tops struct {
	hits, misses *topk.Window
	clients      *topk.Window // nil: clients are not counted
	prefixes     prefixes
}

// prefixes are by how many bits of their addresses clients are told apart; 0: they are not counted.
type prefixes struct{ v4, v6 int }

// countTop has the store count what comes most often, from now on. It goes on with what the store has counted already.
func (st *store) countTop(p prefixes) {
	for {
		old := st.top.Load()
		now := time.Now()
		t := &tops{prefixes: p}
		if old != nil {
			t.hits, t.misses = old.hits, old.misses
		} else {
			t.hits, t.misses = topk.NewWindow(topPeriod, topPlaces, now), topk.NewWindow(topPeriod, topPlaces, now)
		}
		switch {
		case p == prefixes{}:
		case old != nil && old.prefixes == p:
			t.clients = old.clients
		default:
			t.clients = topk.NewWindow(topPeriod, topPlaces, now)
		}
		if st.top.CompareAndSwap(old, t) {
			return
		}
	}
}

// sampling is when a scratch takes its next sample.
type sampling struct {
	pause  uint32 // the tally's requests at which counted calls pause
	next   uint32 // the tally's requests at which the next sample is due
	gap    uint32 // the mean number of requests between two samples
	last   int64  // time of the last sample
	weight uint32 // of the request as a sample; 0: it is none. countClient sets it to 0
}

// pause is the part of counted that few requests get to. It takes a sample if one is due, and tells the climber of the tally
// when it is time.
func (st *store) pause(s *scratch, hit bool, now int64) {
	c := &s.sampling
	top := st.top.Load()
	if top != nil && s.tally.Requests >= c.next {
		c.next = s.tally.Requests + 1
		c.gap = max(c.gap, 1)
		if !hit || top.hits.TryAdd(topKey(&s.Key), uint64(c.gap), time.Now()) { // otherwise, the next request tries again
			c.weight = c.gap // the mean number of requests that have led to this sample
			switch ago := now - c.last; {
			case ago < soon:
				c.gap = min(2*c.gap, mostGap)
			case ago > late:
				c.gap = max(c.gap/2, 1)
			}
			c.last = now
			c.next = s.tally.Requests + 1 + rand.Uint32N(2*c.gap-1)
		}
	}
	if s.tally.Requests >= climber.NoteEvery {
		st.climber.Note(s.tally)
		c.next -= min(c.next, s.tally.Requests)
		s.tally = climber.Tally{}
	}
	if c.pause = climber.NoteEvery; top != nil {
		c.pause = min(c.pause, max(c.next, 1))
	}
}

// topKey is what questions are told apart by: the qname in wire format, and the type. It is part of k.
func topKey(k *record.Key) []byte { return k.Bytes[:len(k.Name())+2] }

// countClient is countSample for an address of package net.
func (o *Optcache) countClient(s *scratch, from net.Addr) {
	var addr netip.Addr
	switch from := from.(type) {
	case *net.UDPAddr:
		addr = from.AddrPort().Addr()
	case *net.TCPAddr:
		addr = from.AddrPort().Addr()
	}
	o.countSample(s, addr)
}

// countSample counts the client of a request that is a sample.
func (o *Optcache) countSample(s *scratch, client netip.Addr) {
	n := s.sampling.weight
	s.sampling.weight = 0
	if top := o.store.top.Load(); top != nil && top.clients != nil {
		top.addClient(client, uint64(n))
	}
}

func (t *tops) addClient(addr netip.Addr, n uint64) {
	addr = addr.Unmap().WithZone("")
	bits := t.prefixes.v6
	if addr.Is4() {
		bits = t.prefixes.v4
	}
	p, err := addr.Prefix(bits)
	if err != nil {
		return // no address
	}
	var key [17]byte
	text, _ := p.AppendBinary(key[:0])
	t.clients.Add(text, n, time.Now())
}

// missed counts a miss.
func (o *Optcache) missed(srv *server, stripe uint32, k *record.Key) {
	srv.add(stripe, countMiss, 1)
	if top := o.store.top.Load(); top != nil {
		top.misses.Add(topKey(k), 1, time.Now())
	}
}

// Top implements control.Block.
func (b controlBlock) Top(by string, n int) (found control.Top, err error) {
	top := b.o.store.top.Load()
	if top == nil {
		return found, fmt.Errorf("nothing is counted: %w", control.ErrNotCounted)
	}
	w := map[string]*topk.Window{"hits": top.hits, "misses": top.misses, "clients": top.clients}[by]
	if w == nil {
		return found, fmt.Errorf("%s: %w", by, control.ErrNotCounted)
	}
	t := w.Top(n, time.Now())
	found = control.Top{Since: t.Since.UTC(), Total: t.Total, Bound: t.Bound, OneIn: t.Coarse, Skipped: t.Skipped, Items: []control.TopItem{}}
	for _, it := range t.Items {
		i := control.TopItem{Count: it.Count, Error: it.Error}
		if by == "clients" {
			var p netip.Prefix
			if err := p.UnmarshalBinary(it.Key); err != nil {
				return found, err
			}
			i.Client = p.String()
		} else {
			end := len(it.Key) - 2
			if i.Name, _, err = dns.UnpackDomainName(it.Key[:end], 0); err != nil {
				return found, err
			}
			i.Type = dns.Type(uint16(it.Key[end])<<8 | uint16(it.Key[end+1])).String()
		}
		found.Items = append(found.Items, i)
	}
	return found, nil
}
