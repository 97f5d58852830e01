package optcache

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

	"github.com/coredns/coredns/plugin/pkg/response"
	coretls "github.com/coredns/coredns/plugin/pkg/tls"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/level2"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/arg"
	"github.com/optcache/optcache/plugin/pkg/flushed"
	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/regular"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/subnet"
	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file has the second level, which many replicas have in common: what it is asked, what is put there, and what is taken from
// there. A hit knows nothing of it. Package level2 speaks with the servers.

// sharedOptions are the options of the second level.
type sharedOptions struct {
	level2.Options
	zones []string // normalized; only names in them; nil: all
}

func (s *sharedOptions) on() bool { return len(s.Servers.Addresses) > 0 }

const (
	defaultSharedTimeout          = 5 * time.Millisecond
	minSharedTimeout              = time.Millisecond
	maxSharedTimeout              = time.Second
	mostPrefix, mostSharedServers = 64, 64
)

// sharedProperties are the options of the second level.
var sharedProperties = []string{"shared", "shared_timeout", "shared_zones", "shared_secret", "shared_password", "shared_prefix", "shared_write",
	"shared_resolver", "shared_tls"}

// sharedArgs reads one of sharedProperties.
func (b *corefileBlock) sharedArgs(name string) (err error) {
	o := &b.shared
	switch name {
	case "shared":
		words, err := arg.All(b.Controller, 1, mostSharedServers)
		if err != nil {
			return err
		}
		if o.Servers, err = level2.ParseServers(words); err != nil {
			return b.Errf("shared: %v", err)
		}
		return nil
	case "shared_zones":
		words, err := arg.All(b.Controller, 1, math.MaxInt)
		if err != nil {
			return err
		}
		for _, word := range words {
			names, err := b.zonesOf(name, word)
			if err != nil {
				return err
			}
			o.zones = append(o.zones, names...)
		}
		return nil
	case "shared_tls":
		words, err := arg.All(b.Controller, 0, 3)
		if err != nil {
			return err
		}
		if err = regular.Check(words...); err == nil {
			o.TLS, err = coretls.NewTLSConfigFromArgs(words...)
		}
		if err != nil {
			return b.Errf("shared_tls: %v", err)
		}
		return nil
	case "shared_write":
		writes, err := arg.Switch(b.Controller)
		o.ReadOnly = !writes
		return err
	}
	_, word, err := arg.One(b.Controller)
	if err != nil {
		return err
	}
	switch name {
	case "shared_timeout":
		if o.Timeout, err = arg.DurationUpTo(b.Controller, name, word, maxSharedTimeout); err == nil && o.Timeout < minSharedTimeout {
			err = b.Errf("%s: %q is less than %v", name, word, minSharedTimeout)
		}
	case "shared_secret", "shared_password":
		file := &o.SecretFile
		if name == "shared_password" {
			file = &o.PasswordFile
		}
		if *file, err = filepath.Abs(word); err != nil {
			err = b.Errf("%s: %q: %v", name, word, err)
		}
	case "shared_prefix":
		if o.Prefix = word; len(word) > mostPrefix || strings.ContainsFunc(word, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune("{}*?[]\\", r) }) {
			err = b.Errf("%s: %q: letters, digits and -._:/ are good, and up to %d of them", name, word, mostPrefix)
		}
	case "shared_resolver":
		if o.Resolver, err = level2.ParseResolver(word); err != nil {
			err = b.Errf("%s: %v", name, err)
		}
	}
	return err
}

// checkShared checks the options of the second level together, when the block has been read.
func (b *corefileBlock) checkShared() error {
	if !b.shared.on() {
		return nil
	}
	if b.shared.SecretFile == "" {
		return fmt.Errorf("%s - shared needs shared_secret FILE: without a secret, whoever writes to the server would write answers", b.at["shared"])
	}
	if b.at["shared_tls"] != "" && !b.shared.Servers.TLS {
		return fmt.Errorf("%s - shared_tls: %s is without TLS: rediss:// and valkeys:// are with it", b.at["shared_tls"], b.shared.Servers.String())
	}
	return nil
}

// checkSecret returns an error if the secret or the password of the second level cannot be read.
func (b *corefileBlock) checkSecret() error {
	if !b.shared.on() {
		return nil
	}
	if option, err := b.shared.CheckFiles(); err != nil {
		return fmt.Errorf("%s - %s: %w", b.at[option], option, err)
	}
	return nil
}

// secondLevel is an instance's way to the second level. A nil *secondLevel has no answers.
type secondLevel struct {
	*level2.Client
	o     *Optcache
	zones zones.Set
	all   bool   // names of all zones
	end   func() // ends the client
}

// sharedCounts has the counts of all second levels since the process started, by the labels without server. They outlive instances.
var sharedCounts sync.Map

// startSecond begins to use the second level. It is asked as soon as it has been reached, and this does not wait for that. The
// client refers to the instance weakly: nothing stops an instance whose start has failed.
func (o *Optcache) startSecond() error {
	with := o.shared.Options
	sealer, err := level2.ReadSealer(with.SecretFile, with.Prefix, o.view)
	if err != nil {
		return err
	}
	of := weak.Make(o)
	with.View, with.Wait, with.Stale = o.view, o.flights.Wait, o.stale.upTo
	with.Hottest = func(most int) []level2.Question {
		if o := of.Value(); o != nil {
			return o.hottest(most)
		}
		return nil
	}
	if !o.hadPredecessor {
		s, m := newScratch(), new(dns.Msg) // one goroutine warms
		with.Warm = func(a *level2.Answer, age time.Duration) {
			if o := of.Value(); o != nil && o.second.hasNameOf(a.Message) {
				o.takeIn(s, m, a, age)
			}
		}
	}
	with.Infof, with.Warningf = log.Infof, log.Warningf
	with.Flushed = func(f level2.Flush, ago time.Duration) {
		if o := of.Value(); o != nil {
			o.flushedElsewhere(f, ago)
		}
	}
	counts, _ := sharedCounts.LoadOrStore(o.labelsAt(""), level2.NewCounts())
	client := level2.New(with, sealer, counts.(*level2.Counts))
	cleanup := runtime.AddCleanup(o, func(c *level2.Client) { c.Close() }, client)
	o.second = &secondLevel{Client: client, o: o, zones: zones.NewSet(o.shared.zones), all: o.shared.zones == nil, end: func() {
		cleanup.Stop()
		client.Close()
	}}
	client.Start() // its calls find o.second
	return nil
}

// questionOf returns the question of a key, for the second level. It refers to the key.
func questionOf(k *record.Key) level2.Question {
	return level2.Question{Name: k.Name(), Type: k.Qtype(), Class: k.Qclass(), DO: k.Bits()&record.KeyDO != 0, CD: k.Bits()&record.KeyCD != 0}
}

// has reports whether the second level may have answers to the request of w. What was asked with RD=0 is of one replica's upstream.
// What was asked for a client's subnet may be for that one alone; with ecs scoped, it is known whom it is for.
func (s *secondLevel) has(w *writer) bool {
	return w.key.RD() && (w.traits.Subnet == "" || w.asker.prefix.Is()) && s.covers(w.key.Name())
}

// sharedForAll is the subnet of an answer that is for all clients because upstream has said so: the question had a subnet.
const sharedForAll = "*"

// subnets returns under which subnets the second level may have the answer for a client, the best first: that which the client is
// in, those of answers that are known here, and none. fits reports whether an answer is for the client. What is put under none is for
// clients without a subnet, unless it is for all.
func (s *secondLevel) subnets(w *writer) (all []string, fits func(string) bool) {
	asked := w.asker.prefix
	if !asked.Is() {
		return nil, func(of string) bool { return of == "" || of == sharedForAll }
	}
	all = []string{asked.String()}
	for _, shape := range s.o.store.shapes(&w.key) {
		if p, ok := asked.In(shape); ok && p != asked && len(all) < mostSubnets {
			all = append(all, p.String())
		}
	}
	return append(all, ""), func(of string) bool {
		p, ok := subnet.Parse(of)
		return of == sharedForAll || ok && p.Covers(asked)
	}
}

// mostSubnets is how many prefixes one look-up may be for.
const mostSubnets = 8

// covers reports whether a name is in shared_zones.
func (s *secondLevel) covers(name []byte) bool { return s.all || s.zones.Contains(name) }

// hasNameOf reports whether the second level may have answers to the question of a message.
func (s *secondLevel) hasNameOf(message []byte) bool {
	if s.all {
		return true
	}
	name, _, err := dns.UnpackDomainName(message, wire.HeaderLen)
	if err != nil {
		return false
	}
	of, ok := zones.Wire(name)
	return ok && s.zones.Contains(of)
}

// taken says how an answer was when it was taken from the second level. A nil *taken is a response of the next plugin.
type taken struct {
	age      time.Duration // since it came from upstream, or more
	ttl      time.Duration // with which it is kept there
	wildcard string
}

// old returns the age in ns.
func (t *taken) old() int64 {
	if t == nil {
		return 0
	}
	return int64(t.age)
}

// askSecond asks the second level for the answer to a request, and reports whether it has come: then it has gone through rw, as
// the next plugin's would. It waits for shared_timeout at most, or for another replica that is asking the upstream.
func (o *Optcache) askSecond(ctx context.Context, rw *writer, r *dns.Msg) bool {
	s := o.second
	if !s.has(rw) || ctx.Err() != nil {
		return false
	}
	q, need := questionOf(&rw.key), level2.Need{Waits: !goesAlone(ctx, r), Stale: o.stale.upTo >= time.Second}
	if rw.purpose != forMiss || rw.detached {
		need.Renews, need.Left = o.remains(&rw.key)
		need.Stale = need.Stale && !need.Renews
	}
	if need.Subnets, need.Fits = s.subnets(rw); need.Subnets != nil {
		need.Waits = false // another replica may be asking for other clients
	}
	rw.asked = o.clock()
	a, age, how := s.Ask(ctx, &q, need)
	rw.watch.second(how, age)
	if how != level2.Hit {
		if a != nil { // it is stale, and good if upstream does not answer
			s := o.pool.Get().(*scratch)
			o.takeIn(s, new(dns.Msg), a, age)
			o.release(s)
		}
		return false
	}
	m, kind, err := rw.open(a, age)
	if err != nil {
		s.Refuse(err)
		rw.taken = nil
		return false
	}
	if rw.purpose == forStale {
		if keep, _ := rw.accept(m, kind); !keep {
			rw.taken = nil
			return false
		}
	}
	if a.Wildcard != "" {
		setWildcard(ctx, a.Wildcard)
	}
	m.Id, m.RecursionDesired, m.CheckingDisabled = r.Id, rw.key.RD(), r.CheckingDisabled
	rw.outcome, rw.told = outcomeShared, true
	o.setStatus(ctx, statusShared)
	rw.WriteMsg(m)
	return true
}

// takeIn admits an answer of the second level as one of a snapshot. s and m are memory for that.
func (o *Optcache) takeIn(s *scratch, m *dns.Msg, a *level2.Answer, age time.Duration) {
	now, wall := o.clock(), o.wall()
	r := snapshot.Record{Response: a.Message, Stored: wall.Add(-age), TTL: a.TTL, DO: a.DO, CD: a.CD, Wildcard: a.Wildcard}
	if r.ForAll = a.Subnet == sharedForAll; !r.ForAll {
		r.Subnet = a.Subnet
	}
	o.admit(s, m, &r, moment{now, now, wall}, nil)
	o.addEvictions(s)
}

// hottest returns the questions whose answers are asked for most often, the first one most, and so many at most.
func (o *Optcache) hottest(most int) (all []level2.Question) {
	found, err := (controlBlock{o}).sorted(newScratch(), &flushed.Filter{Kinds: flushed.Successes | flushed.Denials}, &control.Filter{Sort: "accesses", Limit: most})
	if err != nil {
		return nil
	}
	slices.SortFunc(found, func(a, b *heldAnswer) int { return cmp.Compare(b.asked, a.asked) })
	for _, h := range found {
		if !h.key.RD() || h.key.Subnet().Is() || !o.second.covers(h.key.Name()) {
			continue
		}
		all = append(all, questionOf(&h.key))
	}
	return all
}

// remains reports whether the store has an answer under a key, and how long it still lives.
func (o *Optcache) remains(k *record.Key) (is bool, left time.Duration) {
	s := o.pool.Get().(*scratch)
	defer o.release(s)
	s.Key = *k
	now := o.clock()
	if !o.store.search(s, now) {
		return false, 0
	}
	return true, time.Duration(s.Entry.Remaining(now)) * time.Second
}

// open returns an answer of the second level as the message that upstream once sent, if the rules allow it here, as those of a
// snapshot. It sets w.taken.
func (w *writer) open(a *level2.Answer, age time.Duration) (m *dns.Msg, kind response.Type, err error) {
	m = new(dns.Msg)
	if m.Unpack(a.Message) != nil || len(m.Question) != 1 || !cacheable(m) || !w.matches(m) {
		return nil, 0, level2.RefusedMalformed
	}
	if a.DO {
		m.SetEdns0(dns.MinMsgSize, true) // as in the original response
	}
	kind, rule, signed := w.judge(m)
	switch name := w.key.Name(); {
	case rule != admit.Keeps, kind == response.ServerError, query.Scoped(m), m.Truncated, w.o.rules.Excepts(admit.ClassOf(kind), name):
		return nil, 0, level2.RefusedRules
	}
	w.taken = &taken{age: age, ttl: time.Duration(a.TTL) * time.Second, wildcard: a.Wildcard}
	if w.lifetime(m, kind, signed, 0).TTL-age < time.Second {
		return nil, 0, level2.RefusedExpired
	}
	if p, ok := subnet.Parse(a.Subnet); ok { // the OPT record is for whom it is, as it was when upstream sent it
		w.asker.tellScope(m, p.Scope)
	}
	return m, kind, nil
}

// putSecond has an answer written to the second level that upstream has given to w's request, and that is kept. s has its record.
func (o *Optcache) putSecond(s *scratch, e *record.Entry, w *writer) {
	kind := flushed.KindOf(e.Flags)
	if !o.second.has(w) || e.Flags&record.FlagOneSubnet != 0 || kind == flushed.Failures || o.second.ReadOnly {
		return
	}
	now, at := o.clock(), time.Now()
	var r snapshot.Record
	s.Entry = *e
	if !s.export(&r, policyState{}, now, at) || len(r.Response) > level2.MaxMessage {
		return
	}
	q := questionOf(&s.Key)
	q.Name, q.Subnet = slices.Clone(q.Name), s.Key.Subnet().String()
	a := level2.Answer{Kind: uint8(kind), TTL: e.TTL, Subnet: q.Subnet, Wildcard: r.Wildcard, Message: slices.Clone(r.Response)}
	if e.Flags&record.FlagForAll != 0 {
		a.Subnet = sharedForAll
	}
	asked, stored := at.Add(time.Duration(w.asked-now)), at.Add(time.Duration(e.Stored-now))
	o.second.Put(q, a, asked, stored)
	// A replica that does not know yet how far answers for the name reach looks under the client's own prefix.
	if own := w.asker.prefix.String(); q.Subnet != "" && q.Subnet != own {
		q.Subnet = own
		o.second.Put(q, a, asked, stored)
	}
}

// groupFilter is a filter as the group knows it.
func groupFilter(f *flushed.Filter) level2.Flush {
	return level2.Flush{Name: f.Name, Subtree: f.Subtree, Type: f.Qtype, Kinds: uint8(f.Kinds), Expired: f.Expired}
}

// begin begins a flush that reaches all of the group. The caller flushes what it has, and then calls tell.
func (s *secondLevel) begin(f *flushed.Filter) (tell func() error, err error) {
	if s == nil {
		return func() error { return nil }, nil
	}
	flush, err := s.Begin(groupFilter(f))
	if err != nil {
		return func() error { return err }, nil // what is here is flushed all the same
	}
	return func() error {
		told, others, err := s.Tell(flush)
		if err == nil && told < others {
			err = fmt.Errorf("%d of %d other replicas have not said that they have done it", others-told, others)
		}
		return err
	}, nil
}

// flushedElsewhere flushes what another replica has flushed, so long ago.
func (o *Optcache) flushedElsewhere(f level2.Flush, ago time.Duration) {
	to := flushed.Filter{Name: f.Name, Subtree: f.Subtree, Qtype: f.Type, Kinds: flushed.Kinds(f.Kinds) & flushed.AllKinds, Expired: f.Expired}
	const fresh = 5 * time.Second // an upstream has answered within that, or never
	if ago > fresh {              // this replica was not there: what it has asked since stays
		if to.Before = o.clock() - int64(ago-fresh); to.Before == 0 {
			to.Before = -1
		}
	}
	if _, err := instances.last(o).flush(to, o.wall().Add(-ago)); err != nil {
		log.Warningf("What another replica has flushed: %v", err)
	}
}

// hasFlushed reports whether the group has flushed the answer e of a snapshot. now is the present in ns on the store's clock.
func (s *secondLevel) hasFlushed(k *record.Key, e *record.Entry, now int64) bool {
	if s == nil {
		return false
	}
	q := questionOf(k)
	return s.HasFlushed(&q, uint8(flushed.KindOf(e.Flags)), time.Now().Add(time.Duration(e.Stored-now)), e.TTL)
}

var (
	sharedRequestsDesc = desc("shared_requests_total", "The number of questions to the second level, by what became of them.", "outcome")
	sharedRefusedDesc  = desc("shared_refused_total", "The number of answers of the second level that were not believed, by reason.", "reason")
	sharedWritesDesc   = desc("shared_writes_total", "The number of answers to put into the second level, by what became of them.", "outcome")
	sharedFlushesDesc  = desc("shared_flushes_total", "The number of flushes of other replicas that were done here.")
	sharedWarmedDesc   = desc("shared_warmed_total", "The number of answers that were taken over from the second level at the start.")
	sharedAwayDesc     = desc("shared_away", "Whether nobody waits for the second level, because it is away or too slow.")
	sharedTimeDesc     = desc("shared_duration_seconds", "A histogram of the time that the second level takes to answer.")

	sharedDescs = []*prometheus.Desc{sharedRequestsDesc, sharedRefusedDesc, sharedWritesDesc, sharedFlushesDesc, sharedWarmedDesc, sharedAwayDesc,
		sharedTimeDesc}
)

// secondOf returns the second level of the instances behind a series, the last one's. They count together.
func secondOf(all []*Optcache) (s *secondLevel) {
	for _, o := range all {
		if o.second != nil {
			s = o.second
		}
	}
	return s
}

func (s *secondLevel) collect(ch chan<- prometheus.Metric, l labels) {
	if s == nil {
		return
	}
	count := func(d *prometheus.Desc, v uint64, more ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), l.values(more)...)
	}
	for i, name := range level2.OutcomeNames {
		count(sharedRequestsDesc, s.Asked[i].Load(), name)
	}
	for i, name := range level2.ReasonNames {
		count(sharedRefusedDesc, s.Refused[i].Load(), name)
	}
	for i, name := range level2.WriteNames {
		count(sharedWritesDesc, s.Written[i].Load(), name)
	}
	count(sharedFlushesDesc, s.Flushes.Load())
	count(sharedWarmedDesc, s.Warmed.Load())
	away := 0.0
	if s.Away() {
		away = 1
	}
	ch <- prometheus.MustNewConstMetric(sharedAwayDesc, prometheus.GaugeValue, away, l.values(nil)...)
	if times := s.Time.Counts(); times.Count() > 0 {
		ch <- level2.Shape.Metric(sharedTimeDesc, times, s.Since, l.values(nil)...)
	}
}

// status describes the second level for operators.
func (s *secondLevel) status() *control.SharedStatus {
	if s == nil {
		return nil
	}
	st := &control.SharedStatus{
		Servers: s.Servers.String(), Group: s.Prefix, Away: s.Away(), Trouble: s.Trouble(), P95: s.P95().Seconds(),
		Asked: make(map[string]uint64), Refused: make(map[string]uint64), Writes: make(map[string]uint64), Flushes: s.Flushes.Load(), Warmed: s.Warmed.Load(),
	}
	for i, name := range level2.OutcomeNames {
		st.Asked[name] = s.Asked[i].Load()
	}
	for i, name := range level2.ReasonNames {
		if n := s.Refused[i].Load(); n > 0 {
			st.Refused[name] = n
		}
	}
	for i, name := range level2.WriteNames {
		st.Writes[name] = s.Written[i].Load()
	}
	return st
}
