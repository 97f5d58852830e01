package optcache

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"iter"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file keeps the answers over a restart: in a file that is written now and then and when the instance
// stops, and read in the background when it starts. How the file looks is the business of package snapshot.
//
// What is read is no more trusted than an answer from the network: it goes through the same door (admit.go),
// under the limits of today, and has aged by the wall clock since it came.

// fileOptions say where the answers are kept.
type fileOptions struct {
	path     string        // absolute; empty: nowhere
	interval time.Duration // between two snapshots; 0: only when the instance stops or a reload is over
}

// keeper writes and reads an instance's snapshots. It does not keep the instance alive: of one whose start has failed
// nobody says that it is over.
type keeper struct {
	of      weak.Pointer[Optcache]
	file    fileOptions
	quit    chan struct{} // closed when the instance stops, or is no more
	orphan  runtime.Cleanup
	now     chan struct{} // asks for a snapshot
	done    sync.WaitGroup
	partial atomic.Bool // not all has been read: a snapshot would lose what has not

	// For the metrics.
	written, duration, bytes, entries atomic.Int64 // the last snapshot: when and for how long, in ns
	loaded, failed                    atomic.Int64
	refused                           [refusals]atomic.Int64
}

// refusal is why an answer from a file is not taken.
type refusal int

const (
	refusedNot       refusal = iota
	refusedMalformed         // no message, or none that could be kept
	refusedZone              // not a zone that is cached
	refusedFuture            // it has not come yet
	refusedExpired
	refusedRoom // too large, or something newer is there
	refusals
)

var refusalNames = [refusals]string{"", "malformed", "zone", "future", "expired", "room"}

const (
	// clockSlack is by how much a clock may have gone back since an answer came.
	clockSlack = 2 * time.Second

	// A snapshot is written in slices, with a pause after each: a query waits for one slice at the most, and the
	// server has most of every core to itself. The last snapshot, when nothing is served any more, takes no pauses.
	savePause  = 100 * time.Microsecond
	leastSlice = 100 * time.Microsecond
	mostSlice  = 500 * time.Microsecond

	// snapshotRecords is how many records a file may have, in terms of the entries that there is room for, and
	// snapshotBytes how long each may be on average, unless twice the memory is more.
	snapshotRecords = 4
	snapshotBytes   = 4 << 10
)

// startKeeping reads the file, unless that has been done, and writes it from now on.
func (o *Optcache) startKeeping() {
	k := &keeper{of: weak.Make(o), file: o.file, quit: make(chan struct{}), now: make(chan struct{}, 1)}
	k.orphan = runtime.AddCleanup(o, func(quit chan struct{}) { close(quit) }, k.quit)
	k.partial.Store(o.unread)
	o.keeper = k
	k.done.Go(k.work)
}

// work reads, and then writes until the instance stops.
func (k *keeper) work() {
	if k.partial.Load() {
		k.load()
	}
	var due <-chan time.Time
	if k.file.interval > 0 {
		t := time.NewTicker(k.file.interval)
		defer t.Stop()
		due = t.C
	}
	for {
		select {
		case <-k.quit:
			return
		case <-due:
		case <-k.now:
		}
		k.save()
	}
}

// stop writes the last snapshot, unless another instance goes on with the file.
func (k *keeper) stop(heir *Optcache) {
	k.orphan.Stop()
	close(k.quit)
	k.done.Wait()
	if heir == nil || heir.file.path != k.file.path {
		k.save()
	}
}

// isReading reports whether there is something in the file of that name that has not been read yet.
func (k *keeper) isReading(path string) bool {
	return k != nil && k.file.path == path && k.partial.Load()
}

// wake asks for a snapshot, if the instance is kept in a file.
func (k *keeper) wake() {
	if k == nil {
		return
	}
	select {
	case k.now <- struct{}{}:
	default:
	}
}

// save writes a snapshot.
func (k *keeper) save() {
	o := k.of.Value()
	if o == nil || o.servers.Load() == nil && !o.forerunner { // whom nobody has asked knows what is in the file
		return
	}
	o.store.moving.Lock() // not half of it
	defer o.store.moving.Unlock()
	if k.partial.Load() || o.store.from.Load() != nil {
		return
	}
	begun := time.Now()
	stats, err := o.writeAnswers(begun, k.pause)
	if err != nil {
		k.failed.Add(1)
		log.Errorf("No snapshot has been written (%s): %v", snapshot.Reason(err), err)
		return
	}
	k.written.Store(begun.UnixNano())
	k.duration.Store(int64(time.Since(begun)))
	k.bytes.Store(stats.Bytes)
	k.entries.Store(int64(stats.Records))
}

// pause lets queries go first, while the server serves. It returns for how long to work until the next pause: Go's
// pauses are longer than asked for when nothing else happens, and then a longer slice keeps nobody waiting.
func (k *keeper) pause() (slice time.Duration) {
	begun := time.Now()
	select {
	case <-k.quit:
	case <-time.After(savePause):
	}
	return min(max(time.Since(begun)/2, leastSlice), mostSlice)
}

// writeAnswers writes the file. wall is now. pause, which may be nil, is called now and then, and says for how long
// to work until the next time.
func (o *Optcache) writeAnswers(wall time.Time, pause func() time.Duration) (snapshot.Stats, error) {
	return snapshot.Write(o.file.path, snapshot.Header{
		Instance: clipped(strings.Join(o.zones, ","), snapshot.MaxInstance),
		Written:  wall,
		Extra:    binary.AppendUvarint(nil, uint64(o.store.climber.windowShare())),
	}, o.records(wall, pause))
}

func clipped(s string, most int) string { return s[:min(len(s), most)] }

// records yields the answers in the store, those that matter least first, so that whoever reads them in that order ends up
// with the others. A record is good up to the next one. Nobody waits for it: each is copied on its own.
func (o *Optcache) records(wall time.Time, pause func() time.Duration) iter.Seq[*snapshot.Record] {
	return func(yield func(*snapshot.Record) bool) {
		s, now := newScratch(), o.clock()
		var ids []uint32
		r := new(snapshot.Record)
		begun, slice := time.Now(), leastSlice
		for i := range o.store.shards {
			sh := &o.store.shards[i]
			sh.lock(s, now)
			ids = sh.policy.order(ids[:0])
			sh.unlock()
			for n, id := range ids {
				if pause != nil && n%32 == 0 && time.Since(begun) >= slice {
					slice = pause()
					begun = time.Now()
				}
				was, ok := sh.peek(s, id, now)
				// Of what has died, the standing is remembered.
				if !ok || !s.entry.servable(now, o.store.stale) && was.segment != protected {
					continue
				}
				if s.export(r, was, now, wall) && !yield(r) {
					return
				}
			}
		}
	}
}

// peek copies the entry of a node, with its answer, to s. It reports false when the node has none any more.
func (sh *shard) peek(s *scratch, id uint32, now int64) (was standing, ok bool) {
	sh.lock(s, now)
	defer sh.unlock()
	if sh.closed || sh.policy.nodes[id].segment == free {
		return was, false
	}
	s.entry, was = sh.copyOut(s, id)
	return was, true
}

// export makes r of the record in s.record. It is part of s.
func (s *scratch) export(r *snapshot.Record, was standing, now int64, wall time.Time) bool {
	e, name := &s.entry, s.key.name()
	s.body = wire.HeaderLen + len(name) + questionTail
	s.grow(s.body, 0)
	copy(s.out[wire.HeaderLen:], name)
	s.copyAnswer(s.record)
	q := query{qtype: s.key.qtype(), qclass: s.key.qclass()}
	ad := e.flags&flagAD != 0
	*r = snapshot.Record{
		Stored:    wall.Add(time.Duration(e.stored - now)),
		DO:        s.key.bits()&keyDO != 0,
		CD:        s.key.bits()&keyCD != 0,
		Protected: was.segment == protected,
		Hot:       was.hot,
		Accesses:  was.accesses,
		Frequency: uint8(min(was.frequency, math.MaxUint8)),
		Hits:      uint32(was.state[statePopularity] & maxPopularity),
		Wildcard:  string(s.wildcard),
	}
	if r.Hits > 0 {
		r.HitsAge = time.Duration(sincePopular(was.state[statePopularity], now)) * time.Millisecond
	}
	if e.flags&flagCompressed == 0 {
		r.Response = s.packet(&q, e.ttl, ad, edeNone)
		return len(r.Response) <= snapshot.MaxResponse
	}
	request := new(dns.Msg)
	qname, _, err := dns.UnpackDomainName(name, 0)
	request.Question = []dns.Question{{Name: qname, Qtype: q.qtype, Qclass: q.qclass}}
	m, err2 := s.message(request, e.ttl, ad)
	if err != nil || err2 != nil {
		return false
	}
	m.Compress = true
	r.Response, err = m.Pack()
	return err == nil && len(r.Response) <= snapshot.MaxResponse
}

// errStopped ends the reading when the instance stops.
var errStopped = errors.New("the instance has stopped")

// load reads the file, and says how that went.
func (k *keeper) load() {
	o := k.of.Value()
	if o == nil {
		return
	}
	begun := time.Now()
	err := k.read(o, o.clock(), begun)
	if errors.Is(err, errStopped) {
		return
	}
	k.partial.Store(false)
	var refused int64
	for i := range k.refused {
		refused += k.refused[i].Load()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		log.Infof("Starts with an empty cache: there is no %s yet", o.file.path)
	case err != nil:
		k.failed.Add(1)
		log.Warningf("Has read %d answers, then (%s): %v", k.loaded.Load(), snapshot.Reason(err), err)
	default:
		log.Infof("Has read %d answers from %s in %v; %d were not good any more", k.loaded.Load(), o.file.path, time.Since(begun).Round(time.Millisecond), refused)
	}
}

// parcel is a number of records that are taken in together.
type parcel struct {
	records []snapshot.Record
	bytes   []byte // their responses
}

// A parcel has at most parcelRecords, and hardly more bytes than parcelBytes and one response.
const (
	parcelRecords = 128
	parcelBytes   = 64 << 10
)

// add copies a record to p, and reports whether p is full.
func (p *parcel) add(r *snapshot.Record) bool {
	at := len(p.bytes)
	p.bytes = append(p.bytes, r.Response...)
	c := *r
	c.Response = p.bytes[at:]
	p.records = append(p.records, c)
	return len(p.records) == parcelRecords || len(p.bytes) >= parcelBytes
}

func (p *parcel) empty() { p.records, p.bytes = p.records[:0], p.bytes[:0] }

// read takes in what is in the file. now and wall are one moment on the instance's clock and the wall's. One goroutine reads,
// and as many as there are CPUs take in, which takes most of the time.
func (k *keeper) read(o *Optcache, now int64, wall time.Time) error {
	workers := ownProcs()
	full, empty := make(chan *parcel, workers), make(chan *parcel, 2*workers)
	var taking sync.WaitGroup
	for range workers {
		empty <- new(parcel)
		empty <- new(parcel)
		taking.Go(func() {
			s, m := newScratch(), new(dns.Msg)
			for p := range full {
				for i := range p.records {
					if why := o.readmit(s, m, &p.records[i], now, wall); why != refusedNot {
						k.refused[why].Add(1)
					} else {
						k.loaded.Add(1)
					}
				}
				p.empty()
				empty <- p
			}
		})
	}
	filling := <-empty
	entries := o.store.sizes.entries()
	limits := snapshot.Limits{Records: snapshotRecords * entries, Bytes: max(snapshotBytes*int64(entries), 2*o.store.bound())}
	_, err := snapshot.Read(o.file.path, limits, func(h *snapshot.Header) error {
		if share, n := binary.Uvarint(h.Extra); n > 0 {
			o.store.climber.goOnFrom(float64(share))
		}
		return nil
	}, func(r *snapshot.Record) error {
		select {
		case <-k.quit:
			return errStopped
		default:
		}
		if filling.add(r) {
			full <- filling
			filling = <-empty
		}
		return nil
	})
	full <- filling
	close(full)
	taking.Wait()
	return err
}

// readmit takes in an answer that was stored elsewhere, as if it had come when it was stored. now and wall are one
// moment on both clocks. m is memory for it.
func (o *Optcache) readmit(s *scratch, m *dns.Msg, r *snapshot.Record, now int64, wall time.Time) refusal {
	*m = dns.Msg{}
	if m.Unpack(r.Response) != nil || !m.Response || m.Opcode != dns.OpcodeQuery || len(m.Question) != 1 || !cacheable(m) {
		return refusedMalformed
	}
	q := &m.Question[0]
	n, ok := wire.PackName(s.out[wire.HeaderLen:], q.Name)
	if !ok {
		return refusedMalformed
	}
	s.key.set(o.store.seed, s.out[wire.HeaderLen:][:n], q.Qtype, q.Qclass, r.DO, r.CD)
	if r.DO {
		m.SetEdns0(dns.MinMsgSize, true) // as it came: signatures matter then
	}
	kind := classify(m, wall.UTC())
	c := classOf(kind)
	name := s.key.name()
	switch {
	case !keepable(m, kind):
		return refusedMalformed
	case !o.zoneNames.contain(name) || o.bypass.contain(name) || o.except[c].contain(name):
		return refusedZone
	}
	age := wall.Sub(r.Stored)
	if age < -clockSlack {
		return refusedFuture
	}
	ttl := uint32(o.ttl(m, kind) / time.Second)
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype != dns.TypeOPT {
				ttl = min(ttl, effectiveTTL(rr.Header().Ttl)) // what was raised once is not raised again
			}
		}
	}
	if ttl == 0 {
		return refusedExpired
	}
	m.Answer, m.Ns, m.Extra = settle(m.Answer, ttl), settle(m.Ns, ttl), settle(m.Extra, ttl)
	e := entry{stored: now - int64(max(age, 0)), ttl: ttl, flags: flagsOf(m, c) | o.marks(m, c)}
	if !e.servable(now, o.store.stale) {
		if r.Protected || r.Hot {
			o.store.remember(s.key.hash, c)
		}
		return refusedExpired
	}
	body, ok := s.pack(m, &e)
	if !ok {
		return refusedRoom
	}
	s.buildRecord(&e, body, r.Wildcard)
	was := standing{segment: window, hot: r.Hot, accesses: min(r.Accesses, maxPromotionThreshold), frequency: int(r.Frequency)}
	if r.Protected {
		was.segment = protected
	}
	if r.Hits > 0 {
		was.state[statePopularity] = packPopularity(now-int64(r.HitsAge), min(r.Hits, maxPopularity))
	}
	if !o.store.settle(s, &e, was, now) {
		return refusedRoom
	}
	return refusedNot
}

// remember lets the policy know an entry that has died in good standing.
func (st *store) remember(hash uint64, c class) {
	sh := st.shard(hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.policy.classes[c].ghost.put(uint32(hash >> 32))
}

var (
	snapshotAgeDesc      = desc("snapshot_age_seconds", "How long ago the last snapshot was written.")
	snapshotDurationDesc = desc("snapshot_duration_seconds", "How long the last snapshot took.")
	snapshotBytesDesc    = desc("snapshot_bytes", "The size of the last snapshot.")
	snapshotEntriesDesc  = desc("snapshot_entries", "The number of elements in the last snapshot.")
	snapshotLoadedDesc   = desc("snapshot_loaded_entries", "The number of elements read from a snapshot at the start.")
	snapshotRefusedDesc  = desc("snapshot_refused_entries", "The number of elements of a snapshot that were not taken, by reason.", "reason")
	snapshotFailuresDesc = desc("snapshot_failures", "The count of snapshots that could not be written, or not be read to their end, since the last reload.")

	snapshotDescs = []*prometheus.Desc{snapshotAgeDesc, snapshotDurationDesc, snapshotBytesDesc, snapshotEntriesDesc,
		snapshotLoadedDesc, snapshotRefusedDesc, snapshotFailuresDesc}
)

// collect gives the numbers to Prometheus.
func (k *keeper) collect(ch chan<- prometheus.Metric, l labels) {
	if k == nil {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, more ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, l.values(more)...)
	}
	if written := k.written.Load(); written > 0 {
		gauge(snapshotAgeDesc, time.Since(time.Unix(0, written)).Seconds())
		gauge(snapshotDurationDesc, time.Duration(k.duration.Load()).Seconds())
		gauge(snapshotBytesDesc, float64(k.bytes.Load()))
		gauge(snapshotEntriesDesc, float64(k.entries.Load()))
	}
	gauge(snapshotLoadedDesc, float64(k.loaded.Load()))
	for why := refusedNot + 1; why < refusals; why++ {
		gauge(snapshotRefusedDesc, float64(k.refused[why].Load()), refusalNames[why])
	}
	gauge(snapshotFailuresDesc, float64(k.failed.Load()))
}
