package optcache

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metadata"

	"github.com/miekg/dns"
	"golang.org/x/time/rate"

	"github.com/optcache/optcache/plugin/pkg/arg"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/reply"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file answers misses from what is known of the names above: nxdomain_cut. Below a name that does not exist nothing exists
// (RFC 8020). A miss below a living NXDOMAIN is answered with that NXDOMAIN. With probe, names are asked for that nobody would
// ask for, so that a denial is found as high up as possible. Package cut has the hints that tell which names are worth a look.

// cutOptions are the options of nxdomain_cut.
type cutOptions struct {
	on    bool
	probe bool
	zones []string // normalized; nil: those of the block
}

// cutArgs reads [probe] [ZONES...].
func (b *corefileBlock) cutArgs() error {
	words, err := arg.All(b.Controller, 0, 1<<16)
	if err != nil {
		return err
	}
	b.cut = cutOptions{on: true}
	if len(words) > 0 && words[0] == "probe" {
		b.cut.probe, words = true, words[1:]
	}
	for _, word := range words {
		names, err := b.zonesOf("nxdomain_cut", word)
		if err != nil {
			return err
		}
		b.cut.zones = append(b.cut.zones, names...)
	}
	return nil
}

const (
	probeRate  = 50 // probes per second
	probeBurst = 50
	maxProbers = 16 // requests that probe at once
)

// cutter answers misses of one instance. It does not change after newCutter, but for the atomics.
type cutter struct {
	zones   zones.Table[cutZone]
	limit   *rate.Limiter // of probes
	probers atomic.Int32
	kept    [64]atomic.Int64 // when the last one of some names was asked for again, in ns on the store's clock
}

// cutZone is a zone that exists. There is no cut at it or above it.
type cutZone struct {
	length int  // of its wire name
	cut    bool // there may be cuts below it
}

// newCutter returns the cutter of a block. inner is the plugin behind the cache.
func newCutter(o *options, inner plugin.Handler) *cutter {
	c := &cutter{limit: rate.NewLimiter(probeRate, probeBurst)}
	wanted := o.cut.zones
	if wanted == nil {
		wanted = o.zones
	}
	within := zones.NewSet(wanted)
	// Plugins such as kubernetes and hosts know some addresses of a reverse zone, and leave the others, and all names above, to an
	// upstream that denies them. So there are cuts only where the Corefile names the zone.
	reverse := []string{"in-addr.arpa.", "ip6.arpa."}
	isReverse := zones.NewSet(reverse)
	for _, zone := range slices.Concat(wanted, o.zones, o.denial.except, chain.ZonesOf(inner), reverse) {
		if name, ok := zones.Wire(zone); ok {
			c.zones.Add(name, cutZone{length: len(name), cut: within.Contains(name) && (o.cut.zones != nil || !isReverse.Contains(name))})
		}
	}
	return c
}

// eachAncestor calls f with the names above name, which lie below the closest zone, from the highest one down, until f says no.
// It leaves out names that begin with an underscore (RFC 8552): kubernetes denies _tcp.NAME while _http._tcp.NAME exists.
func (c *cutter) eachAncestor(name []byte, f func(ancestor []byte) bool) {
	zone := c.zones.Find(name)
	if zone == nil || !zone.cut {
		return
	}
	var offs [128]uint8
	n := 0
	for off := 1 + int(name[0]); len(name)-off > zone.length && n < len(offs); off += 1 + int(name[off]) {
		offs[n] = uint8(off)
		n++
	}
	for _, off := range slices.Backward(offs[:n]) {
		if name[off+1] == '_' {
			continue
		}
		if !f(name[off:]) {
			return
		}
	}
}

// findCut looks for a living NXDOMAIN above the question of s, whose key is in s. If there is one, s has it, and findCut
// returns true. Otherwise s has the key that it had.
func (o *Optcache) findCut(s *scratch, now int64) (found bool) {
	hints := o.store.cuts
	if hints == nil || hints.Empty() || s.Key.Qclass() != dns.ClassINET {
		return false
	}
	key := s.Key
	do, cd := s.Query.DO(), s.Query.CD()
	o.cutter.eachAncestor(key.Name(), func(name []byte) bool {
		hint := hints.Look(name, cd)
		// With DO, the answer for the name above must be without proofs, for they would not prove that this name does not
		// exist. So it serves clients without DO just as well.
		for _, with := range [2]bool{do, true} {
			qtype, ok := hint.Denied(with)
			if !ok {
				continue
			}
			known := o.findDenial(s, name, qtype, with, cd, now) && (!s.asker.prefix.Is() || s.Entry.Flags&record.FlagForAll != 0)
			if known && (!with || !s.Entry.Signed()) {
				hints.Use(name, cd)
				found = true
				return false
			}
		}
		return true
	})
	if !found {
		s.Key = key
	}
	return found
}

// replyCut answers a request with the NXDOMAIN of a name above, which findCut has found. It releases s.
func (o *Optcache) replyCut(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, s *scratch, srv *server, now int64) (int, error) {
	defer o.release(s)
	o.keepCut(ctx, s, srv, now)
	s.Entry.Flags &^= record.FlagAD // nobody has validated that this name does not exist
	m, err := s.Message(r, o.shownTTL(&s.Entry, now))
	if err != nil {
		return dns.RcodeServerFailure, err
	}
	srv.add(s.stripe, countCut, 1)
	if o.outer.Listens() {
		o.describeHit(ctx, s, statusSynthesized, now)
	}
	if o.explain && s.Query.EDNS {
		m.Extra = append(m.Extra, reply.EDE(dns.ExtendedErrorCodeSynthesized))
	}
	s.asker.tellScope(m, 0)
	watchOf(ctx).found(o, s, statusSynthesized, now)
	w.WriteMsg(m)
	return dns.RcodeSuccess, nil
}

// keptPart is the part of the TTL of an NXDOMAIN, in per cent, that is left when keepCut asks for its name again.
const keptPart = 20

// keepCut asks again, in the background, for the name whose NXDOMAIN, in s, has answered a request, shortly before it expires. So a
// cut that is used stays, and costs one question in its TTL. Without probe, nobody asks for names that no client has asked for.
func (o *Optcache) keepCut(ctx context.Context, s *scratch, srv *server, now int64) {
	if !o.cut.probe || 100*s.Entry.Remaining(now) > keptPart*int64(s.Entry.TTL) {
		return
	}
	last := &o.cutter.kept[s.Key.Hash>>16%uint64(len(o.cutter.kept))]
	if before := last.Load(); before != 0 && now-before < int64(time.Second) || !last.CompareAndSwap(before, now) {
		return
	}
	if o.cutter.probers.Add(1) > maxProbers || !o.cutter.limit.AllowN(time.Unix(0, now), 1) {
		o.cutter.probers.Add(-1)
		return
	}
	key := s.Key
	ctx = metadata.ContextWithMetadata(context.WithoutCancel(ctx))
	go func() {
		defer o.cutter.probers.Add(-1)
		o.askFor(ctx, key.Name(), key.Qtype(), key.Bits()&record.KeyDO != 0, key.Bits()&record.KeyCD != 0, srv, countProbe)
	}()
}

// probe asks for the names above a name that has just been denied, from the highest one that is not known to exist down, until
// one is denied. It does so in the background, for a bounded number of names at once. ctx is that of the request that brought
// the denial, and k its key.
func (o *Optcache) probe(ctx context.Context, k record.Key, srv *server) {
	hints := o.store.cuts
	if hints == nil || k.Qclass() != dns.ClassINET || k.Bits()&record.KeyNoRD != 0 {
		return
	}
	do, cd := k.Bits()&record.KeyDO != 0, k.Bits()&record.KeyCD != 0
	open := false // there is something to ask for
	o.cutter.eachAncestor(k.Name(), func(name []byte) bool {
		hint := hints.Look(name, cd)
		open = !hint.Exists()
		return !open
	})
	if !open || o.cutter.probers.Add(1) > maxProbers {
		if open {
			o.cutter.probers.Add(-1)
		}
		return
	}
	ctx = context.WithoutCancel(ctx)
	go func() {
		defer o.cutter.probers.Add(-1)
		o.cutter.eachAncestor(k.Name(), func(name []byte) bool {
			if hints.Look(name, cd).Exists() {
				return true
			}
			if o.stopped.Load() || o.knows(name, do, cd) || !o.cutter.limit.AllowN(time.Unix(0, o.clock()), 1) {
				return false
			}
			o.askFor(metadata.ContextWithMetadata(ctx), name, dns.TypeA, do, cd, srv, countProbe)
			return hints.Look(name, cd).Exists()
		})
	}()
}

// knows reports whether a living NXDOMAIN is kept for name.
func (o *Optcache) knows(name []byte, do, cd bool) bool {
	qtype, ok := o.store.cuts.Look(name, cd).Denied(do)
	if !ok {
		return false
	}
	s := o.pool.Get().(*scratch)
	defer o.release(s)
	return o.findDenial(s, name, qtype, do, cd, o.clock())
}

// findDenial looks for a living NXDOMAIN that a question for a name and type has brought, and reports whether s has one now.
func (o *Optcache) findDenial(s *scratch, name []byte, qtype uint16, do, cd bool, now int64) bool {
	s.Key.Set(o.store.seed, name, qtype, dns.ClassINET, do, cd)
	return o.store.search(s, now) && s.Entry.Denies() && s.Entry.Remaining(now) > 0
}

// askFor asks the next plugin for a type of name, a lower-cased wire name, without a client, and counts that. It returns when the
// response is kept or refused. It returns false if it has not asked, because the name has failed and servfail makes it wait, the same
// is being asked, or upstream_limit has no token to spare.
func (o *Optcache) askFor(ctx context.Context, name []byte, qtype uint16, do, cd bool, srv *server, as counter) bool {
	qname, _, err := dns.UnpackDomainName(name, 0)
	if err != nil {
		return false
	}
	r := new(dns.Msg).SetQuestion(qname, qtype)
	r.Id, r.CheckingDisabled = uint16(rand.Uint32()), cd
	if do {
		r.SetEdns0(4096, true)
	}
	s, ok := o.scratchFor(r, noAddr)
	if !ok {
		o.release(s)
		return false
	}
	rw := o.newWriter(ctx, detached{local: noAddr, remote: noAddr}, r, s, srv, forMiss)
	o.release(s)
	if !o.mayAskAgain(&rw.key, o.clock()) || !o.leadsAlone(rw) {
		return false
	}
	srv.add(0, as, 1)
	o.background(ctx, rw, r)
	return true
}
