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

	"github.com/coredns/coredns/plugin/pkg/dnsutil"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/popularity"
	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/reply"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/subnet"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file keeps the answers over a restart. A snapshot of them is written to a file at intervals and when the
// instance stops. It is read in the background when the instance starts. Package snapshot has the file's format.
//
// A record in the file is trusted no more than a response from the network. It is admitted by the same rules (package
// admit) with the present options. By the wall clock, it has aged since the answer came.

// fileOptions are the arguments of cache_file_path.
type fileOptions struct {
	path     string        // absolute; empty: no snapshots
	interval time.Duration // between two snapshots; 0: only when the instance stops or a reload is over
}

// snapshotter reads and writes the snapshots of one instance, in a goroutine of its own. It refers to the instance
// weakly: no callback tells an instance whose start has failed that it is over, and the garbage collector must be
// able to free it.
type snapshotter struct {
	of      weak.Pointer[Optcache]
	file    fileOptions
	quit    chan struct{}   // closed when the instance stops or has been freed
	orphan  runtime.Cleanup // closes quit when the instance has been freed
	now     chan struct{}   // asks for a snapshot before the interval is over
	done    sync.WaitGroup
	over    atomic.Bool // the instance has stopped: its store may be empty, or another one's
	partial atomic.Bool // the file has not been read to its end; a snapshot would lose the rest

	// For the metrics.
	written, duration, bytes, entries atomic.Int64 // the last snapshot: unix time and duration in ns, file size in bytes, records
	failed, writes                    atomic.Int64
	intake
}

// intake counts what has become of records. It is safe for concurrent use.
type intake struct {
	loaded  atomic.Int64
	refused [refusals]atomic.Int64
}

func (in *intake) count(why refusal) {
	if why == refusedNot {
		in.loaded.Add(1)
	} else {
		in.refused[why].Add(1)
	}
}

func (in *intake) allRefused() (n int64) {
	for i := range in.refused {
		n += in.refused[i].Load()
	}
	return n
}

// refusal is the reason why a record of a snapshot is not admitted.
type refusal int

const (
	refusedNot       refusal = iota
	refusedMalformed         // no DNS response, or one that is never kept
	refusedZone              // not in the zones that the instance caches for
	refusedFuture            // stored later than now by the wall clock
	refusedExpired
	refusedSubnet // for some clients only, and ecs is not as it was
	refusedRoom   // too large, no room, or a newer answer is there
	refusals
)

var refusalNames = [refusals]string{"", "malformed", "zone", "future", "expired", "subnet", "room"}

const (
	// clockSlack is how far in the future an answer may have been stored: the wall clock may have been set back
	// since.
	clockSlack = 2 * time.Second

	// longAgo bounds the age of the last request for an answer. Longer ages are alike, because gaps of prefetch are
	// shorter.
	longAgo = 365 * 24 * time.Hour

	// A snapshot is written in slices of time with pauses between them. A query waits for one slice at most, and the
	// server has most of each core. The last snapshot takes no pauses, because the instance serves no more.
	savePause  = 100 * time.Microsecond
	leastSlice = 100 * time.Microsecond
	mostSlice  = 500 * time.Microsecond

	// A file may have snapshotRecords records for each entry that the store has room for. It may unpack to
	// snapshotBytes bytes for each such entry, or to twice the store's memory bound if that is more.
	snapshotRecords = 4
	snapshotBytes   = 4 << 10
)

// startSnapshots starts the snapshotter. It reads the file if the instance has no predecessor, or if the predecessor
// is still reading that file. It then writes snapshots. An instance with a predecessor has newer answers than any
// other file.
func (o *Optcache) startSnapshots() {
	k := &snapshotter{of: weak.Make(o), file: o.file, quit: make(chan struct{}), now: make(chan struct{}, 1)}
	k.orphan = runtime.AddCleanup(o, func(quit chan struct{}) { close(quit) }, k.quit)
	k.partial.Store(o.fileUnread)
	if o.fileUnread {
		o.store.beginReading()
	}
	o.snapshotter = k
	k.done.Go(k.work)
}

func (k *snapshotter) work() {
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

// stop waits for the snapshotter's goroutine to end. It then writes the last snapshot, unless the successor uses the
// same file.
func (k *snapshotter) stop(successor *Optcache) {
	k.orphan.Stop()
	close(k.quit)
	k.done.Wait()
	if successor == nil || successor.file.path != k.file.path {
		k.save()
	}
	k.over.Store(true)
}

// isReading reports whether the snapshotter uses the file path and has not read it to its end.
func (k *snapshotter) isReading(path string) bool {
	return k != nil && k.file.path == path && k.partial.Load()
}

// wake asks for a snapshot. It does nothing if the instance has no snapshotter.
func (k *snapshotter) wake() {
	if k == nil {
		return
	}
	select {
	case k.now <- struct{}{}:
	default:
	}
}

// save writes a snapshot, if the instance knows more than the file.
func (k *snapshotter) save() {
	o := k.of.Value()
	// An instance that has served no query and has no predecessor knows nothing newer than the file.
	if o == nil || o.servers.Load() == nil && !o.hadPredecessor || instances.youngerAt(o, k.file.path) {
		return
	}
	if err := k.saveNow(o); err != nil && !errors.Is(err, errIncomplete) {
		k.failed.Add(1)
		log.Errorf("No snapshot has been written (%s): %v", snapshot.Reason(err), err)
	}
}

// errIncomplete says why a snapshot is not written now: the answers that are not in the store yet would be lost.
var errIncomplete = errors.New("answers are still on their way: from the file, or from before the reload")

// saveNow writes a snapshot of o, unless answers are still on their way to its store.
func (k *snapshotter) saveNow(o *Optcache) error {
	o.store.moving.Lock() // answers that move meanwhile would be missing in the file
	defer o.store.moving.Unlock()
	if k.partial.Load() || k.over.Load() || o.store.from.Load() != nil || o.store.to.Load() != nil {
		return errIncomplete
	}
	settled := snapshot.Settled(k.file.path)
	begun := time.Now()
	stats, err := o.writeAnswers(begun, k.pause)
	if err != nil {
		return err
	}
	if err := settled(); err != nil {
		log.Warningf("What has been flushed before the snapshot is still marked: %v", err)
	}
	k.written.Store(begun.UnixNano())
	k.duration.Store(int64(time.Since(begun)))
	k.bytes.Store(stats.Bytes)
	k.entries.Store(int64(stats.Records))
	k.writes.Add(1)
	return nil
}

// pause is the package's pause, unless the instance stops.
func (k *snapshotter) pause() (slice time.Duration) { return pause(k.quit) }

// pause sleeps, so that queries go first, until quit is closed. It returns for how long to work until the next pause. On
// an idle machine Go's timers fire late: a sleep is then longer than savePause, and the next slice is longer, too.
func pause(quit <-chan struct{}) (slice time.Duration) {
	begun := time.Now()
	select {
	case <-quit:
	case <-time.After(savePause):
	}
	return min(max(time.Since(begun)/2, leastSlice), mostSlice)
}

// writeAnswers writes a snapshot. wall is the present time. If pause is not nil, it is called after each slice and
// returns the length of the next one.
func (o *Optcache) writeAnswers(wall time.Time, pause func() time.Duration) (snapshot.Stats, error) {
	return snapshot.Write(o.file.path, o.header(wall), o.records([]*store{o.store}, wall, pause))
}

// header returns the header of a snapshot. wall is the present time.
func (o *Optcache) header(wall time.Time) snapshot.Header {
	return snapshot.Header{
		Instance: clipped(strings.Join(o.zones, ","), snapshot.MaxInstance),
		Written:  wall,
		Extra:    binary.AppendUvarint(nil, uint64(o.store.climber.WindowShare())),
	}
}

func clipped(s string, most int) string { return s[:min(len(s), most)] }

// records yields the answers in the stores, one store after the other, the least valuable of each shard first. A reader
// that inserts them in this order and runs out of room keeps the more valuable ones. A record is valid until the next
// one is yielded. A shard's lock is held to list its nodes, and then for one copy at a time, so that requests which
// insert answers do not wait for the file.
func (o *Optcache) records(of []*store, wall time.Time, pause func() time.Duration) iter.Seq[*snapshot.Record] {
	return func(yield func(*snapshot.Record) bool) {
		defer runtime.KeepAlive(of)
		s, now := newScratch(), o.clock()
		var ids []uint32
		r := new(snapshot.Record)
		begun, slice := time.Now(), leastSlice
		for st, sh := range shardsOf(of) {
			sh.lock(s, now)
			ids = sh.policy.order(ids[:0])
			sh.unlock()
			for n, id := range ids {
				if pause != nil && n%32 == 0 && time.Since(begun) >= slice {
					slice = pause()
					begun = time.Now()
				}
				was, ok := sh.peek(s, st.seed.Owner(), id, now)
				// An expired answer is written if it was protected or hot. The reader makes a ghost of it.
				if !ok || !s.Entry.Servable(now, o.store.stale) && was.segment != protected && !was.hot {
					continue
				}
				if s.export(r, was, now, wall) && !yield(r) {
					return
				}
			}
		}
	}
}

// shardsOf yields the shards of stores, one store after the other.
func shardsOf(all []*store) iter.Seq2[*store, *shard] {
	return func(yield func(*store, *shard) bool) {
		for _, st := range all {
			for i := range st.shards {
				if !yield(st, &st.shards[i]) {
					return
				}
			}
		}
	}
}

// peek copies the entry of a node, with its answer, to s. ok is false if the node has no entry any more, or not one of that owner.
func (sh *shard) peek(s *scratch, owner int, id uint32, now int64) (was policyState, ok bool) {
	sh.lock(s, now)
	defer sh.unlock()
	if sh.held[owner].closed || sh.ownerOf(id) != owner {
		return was, false
	}
	s.Entry, was = sh.copyOut(s, id)
	return was, true
}

// export fills r from the record in s.Words. r.Response is part of s. It returns false if the record cannot be
// written as a response.
func (s *scratch) export(r *snapshot.Record, was policyState, now int64, wall time.Time) bool {
	e, name := &s.Entry, s.Key.Name()
	s.Body = wire.HeaderLen + len(name) + wire.QuestionTail
	s.Grow(s.Body, 0)
	copy(s.Out[wire.HeaderLen:], name)
	s.CopyAnswer(s.Words)
	s.Query = query.Query{Bits: wire.FlagAD, Qtype: s.Key.Qtype(), Qclass: s.Key.Qclass()}
	*r = snapshot.Record{
		Stored:    wall.Add(time.Duration(e.Stored - now)),
		TTL:       e.TTL,
		DO:        s.Key.Bits()&record.KeyDO != 0,
		CD:        s.Key.Bits()&record.KeyCD != 0,
		NoRD:      !s.Key.RD(),
		ForAll:    e.Flags&record.FlagForAll != 0,
		Subnet:    s.Key.Subnet().String(),
		Protected: was.segment == protected,
		Hot:       was.hot,
		Accesses:  was.accesses,
		Frequency: uint8(min(was.frequency, math.MaxUint8)),
		Hits:      was.state.Count(),
		Wildcard:  string(s.Wildcard),
	}
	if e.Flags&record.FlagOneSubnet != 0 {
		r.Subnet = snapshot.AnySubnet
	}
	if r.Hits > 0 {
		r.HitsAge = was.state.Since(now)
	}
	if e.Flags&record.FlagCompressed == 0 {
		r.Response = s.Packet(e.TTL, reply.NoEDE)
		return len(r.Response) <= snapshot.MaxResponse
	}
	request := new(dns.Msg)
	qname, _, err := dns.UnpackDomainName(name, 0)
	request.Question = []dns.Question{{Name: qname, Qtype: s.Query.Qtype, Qclass: s.Query.Qclass}}
	m, err2 := s.Message(request, e.TTL)
	if err != nil || err2 != nil {
		return false
	}
	m.Compress = true
	r.Response, err = m.Pack()
	return err == nil && len(r.Response) <= snapshot.MaxResponse
}

var errStopped = errors.New("the instance has stopped")

// load reads the file and logs the outcome.
func (k *snapshotter) load() {
	o := k.of.Value()
	if o == nil {
		return
	}
	// The clocks are read in this order: if the machine is suspended in between, answers look older than they are,
	// not younger.
	now, begun := o.clock(), time.Now()
	err := k.read(o, now, begun, o.marks(now, begun))
	if errors.Is(err, errStopped) {
		o.store.reading.Add(-1) // the endings stay: the successor may read the file
		return
	}
	k.partial.Store(false)
	o.store.endReading()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		log.Infof("Starts with an empty cache: there is no %s yet", o.file.path)
	case err != nil && k.loaded.Load() == 0:
		k.failed.Add(1)
		log.Warningf("Starts with an empty cache (%s): %v", snapshot.Reason(err), err)
	case err != nil:
		k.failed.Add(1)
		log.Warningf("Has read %d answers, then (%s): %v", k.loaded.Load(), snapshot.Reason(err), err)
	default:
		log.Infof("Has read %d answers from %s in %v; %d were not good any more", k.loaded.Load(), o.file.path, time.Since(begun).Round(time.Millisecond), k.allRefused())
	}
}

// beginReading notes that records are about to be read that are older than what comes meanwhile.
func (st *store) beginReading() {
	st.reading.Add(1)
	st.ended.CompareAndSwap(nil, new(endings))
}

func (st *store) endReading() {
	if st.reading.Add(-1) == 0 {
		st.ended.Store(nil)
	}
}

// maxEndings bounds the entries of endings. Further ones are not noted, so that an old answer from the file may be
// served for the rest of its TTL.
const maxEndings = 1 << 16

// endings notes, while a snapshot is being read, that a response has ended what was known for a key but could not be
// kept itself. The snapshot's answer for such a key is older, and must not come back. A nil *endings notes nothing.
// All methods are safe for concurrent use.
type endings struct {
	mu sync.Mutex // guards at
	// The hash of a key, without the owner, and when its answer ended, in ns on the store's clock.
	at map[uint64]int64
}

// add notes an ending at now for keys with that hash.
func (e *endings) add(hash uint64, now int64) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.at == nil {
		e.at = make(map[uint64]int64)
	}
	hash = record.WithoutOwner(hash)
	if _, known := e.at[hash]; known || len(e.at) < maxEndings {
		e.at[hash] = now
	}
}

// after reports whether an ending came after the answer old was stored.
func (e *endings) after(old *record.Entry) bool {
	if e == nil {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	at, known := e.at[record.WithoutOwner(old.Hash)]
	return known && old.Stored < at
}

// batch is a number of records that one goroutine admits together.
type batch struct {
	records []snapshot.Record
	bytes   []byte // their responses
}

// A batch is full with batchRecords records, or with batchBytes bytes of responses. The last response may go beyond
// that.
const (
	batchRecords = 128
	batchBytes   = 64 << 10
)

// add copies a record to the batch, and reports whether the batch is full.
func (p *batch) add(r *snapshot.Record) bool {
	at := len(p.bytes)
	p.bytes = append(p.bytes, r.Response...)
	c := *r
	c.Response = p.bytes[at:]
	p.records = append(p.records, c)
	return len(p.records) == batchRecords || len(p.bytes) >= batchBytes
}

func (p *batch) empty() { p.records, p.bytes = p.records[:0], p.bytes[:0] }

// read admits the records of the file that have not been flushed since. now and wall are the same moment on the store's
// clock and on the wall clock.
func (k *snapshotter) read(o *Optcache, now int64, wall time.Time, flushed marks) error {
	return o.admitAll(func(each func(*snapshot.Record) error) error {
		var since time.Duration // since the file was written
		_, err := snapshot.Read(o.file.path, o.limits(), func(h *snapshot.Header) error {
			since = max(wall.Sub(h.Written), 0)
			if share, n := binary.Uvarint(h.Extra); n > 0 {
				o.store.climber.GoOnFrom(float64(share))
			}
			return nil
		}, func(r *snapshot.Record) error {
			select {
			case <-k.quit:
				return errStopped
			default:
			}
			r.HitsAge = agedBy(r.HitsAge, since)
			return each(r)
		})
		return err
	}, moment{now, now, wall}, flushed, k.count)
}

// moment is when records are admitted: the same moment on the store's clock and on the wall clock. What has been flushed since,
// on the store's clock, stays away.
type moment struct {
	since, now int64
	wall       time.Time
}

// agedBy returns the age of the last request for an answer, since when time has passed.
func agedBy(age, since time.Duration) time.Duration {
	return min(since, longAgo) + min(max(age, 0), longAgo)
}

// limits bounds what is read of a snapshot.
func (o *Optcache) limits() snapshot.Limits {
	entries := o.store.sizes.entries()
	return snapshot.Limits{Records: snapshotRecords * entries, Bytes: max(snapshotBytes*int64(entries), 2*o.store.bound())}
}

// admitAll admits the records that read passes to its argument, and tells done what has become of each. One goroutine reads. Admission takes most of the time, so that as
// many goroutines admit as the process has CPUs; they call done, too.
func (o *Optcache) admitAll(read func(each func(*snapshot.Record) error) error, at moment, flushed marks, done func(refusal)) error {
	workers := fastpath.OwnProcs()
	full, empty := make(chan *batch, workers), make(chan *batch, 2*workers)
	var taking sync.WaitGroup
	for range workers {
		empty <- new(batch)
		empty <- new(batch)
		taking.Go(func() {
			s, m := newScratch(), new(dns.Msg)
			for p := range full {
				for i := range p.records {
					done(o.admit(s, m, &p.records[i], at, flushed))
				}
				o.addEvictions(s)
				p.empty()
				empty <- p
			}
		})
	}
	filling := <-empty
	err := read(func(r *snapshot.Record) error {
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

// admit inserts an answer from a snapshot, as if the answer had come when it was stored. flushed is what the caller leaves out. m is memory that the caller reuses.
func (o *Optcache) admit(s *scratch, m *dns.Msg, r *snapshot.Record, at moment, flushed marks) refusal {
	now, wall := at.now, at.wall
	*m = dns.Msg{}
	if m.Unpack(r.Response) != nil || !m.Response || m.Opcode != dns.OpcodeQuery || len(m.Question) != 1 || !cacheable(m) {
		return refusedMalformed
	}
	q := &m.Question[0]
	n, ok := wire.PackName(s.Out[wire.HeaderLen:], q.Name)
	if !ok {
		return refusedMalformed
	}
	s.Key.Set(o.store.seed, s.Out[wire.HeaderLen:][:n], q.Qtype, q.Qclass, r.DO, r.CD)
	if r.NoRD {
		s.Key.SetRD(o.store.seed, false)
	}
	keeps := o.rules.SubnetsForAll
	if r.Subnet != "" && r.Subnet != snapshot.AnySubnet {
		keeps = o.rules.Subnets
		p, ok := subnet.Parse(r.Subnet)
		if !ok {
			return refusedMalformed
		}
		s.Key.SetSubnet(o.store.seed, p)
	}
	if r.DO {
		m.SetEdns0(dns.MinMsgSize, true) // as in the original response: Classify and Record look at signatures then
	}
	kind := admit.Classify(m, wall.UTC())
	c := admit.ClassOf(kind)
	name := s.Key.Name()
	switch {
	case !o.rules.Keepable(m, kind), query.Scoped(m), r.NoRD && !admit.Conclusive(m, kind):
		return refusedMalformed
	case !o.rules.Serves(name) || o.rules.Excepts(c, name):
		return refusedZone
	case r.Subnet != "" && !keeps:
		return refusedSubnet
	}
	age := wall.Sub(r.Stored)
	if age < -clockSlack {
		return refusedFuture
	}
	signed := int64(record.Unsigned) // how long the signatures are valid, in seconds from r.Stored
	if r.DO {
		signed = admit.SignedFor(m, r.Stored)
	}
	ttl := min(uint32(o.rules.TTL(m, kind)/time.Second), storedTTL(m, r), uint32(min(max(signed, 0), math.MaxUint32)))
	if ttl == 0 {
		return refusedExpired
	}
	m.Answer, m.Ns, m.Extra = admit.Settle(m.Answer, ttl), admit.Settle(m.Ns, ttl), admit.Settle(m.Extra, ttl)
	e, body, ok := o.rules.Record(&s.Buffer, m, kind, now-int64(max(age, 0)), ttl, signed)
	if r.ForAll {
		e.Flags |= record.FlagForAll
	}
	if r.Subnet == snapshot.AnySubnet {
		e.Flags |= record.FlagOneSubnet
	}
	if !e.Servable(now, o.store.stale) {
		if r.Protected || r.Hot {
			o.store.remember(s.Key.Hash, c)
		}
		return refusedExpired
	}
	if !ok {
		return refusedRoom
	}
	s.BuildRecord(&e, body, r.Wildcard)
	was := policyState{segment: window, hot: r.Hot, accesses: min(r.Accesses, maxPromotionThreshold), frequency: int(r.Frequency)}
	if r.Protected {
		was.segment = protected
	}
	if r.Hits > 0 {
		was.state = popularity.NewState(min(r.Hits, popularity.Most), now-int64(min(max(r.HitsAge, 0), longAgo)))
	}
	gone := func(k *record.Key, e *record.Entry) bool {
		return o.store.flushes.HasRead(k, e, at.since) || flushed.has(k, e) || o.second.hasFlushed(k, e, now)
	}
	if !o.store.insertMoved(s, &e, was, now, gone) {
		return refusedRoom
	}
	return refusedNot
}

// storedTTL returns the TTL, in seconds, that the answer had when it was written. It bounds the new TTL: a TTL that
// MINTTL or an earlier option has raised is not raised again.
func storedTTL(m *dns.Msg, r *snapshot.Record) uint32 {
	ttl, records := uint32(math.MaxUint32), 0
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype != dns.TypeOPT {
				ttl = min(ttl, admit.EffectiveTTL(rr.Header().Ttl))
				records++
			}
		}
	}
	switch {
	case r.TTL > 0:
		return min(ttl, r.TTL)
	case records == 0: // files of earlier versions have a TTL in records only
		return uint32(dnsutil.MinimalDefaultTTL / time.Second)
	}
	return ttl
}

// remember puts the hash of an expired answer, which was protected or hot, into the policy's ghost. If the answer
// returns, it is protected at once.
func (st *store) remember(hash uint64, c record.Class) {
	sh := st.shard(hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if !sh.holding(hash).closed {
		sh.policy.classes[c].ghost.put(uint32(hash >> 32))
	}
}

var (
	snapshotAgeDesc      = desc("snapshot_age_seconds", "The age of the last snapshot, in seconds.")
	snapshotDurationDesc = desc("snapshot_duration_seconds", "The time that it took to write the last snapshot, in seconds.")
	snapshotBytesDesc    = desc("snapshot_bytes", "The size of the last snapshot's file, in bytes.")
	snapshotEntriesDesc  = desc("snapshot_entries", "The number of elements in the last snapshot.")
	snapshotLoadedDesc   = desc("snapshot_loaded_entries", "The number of elements read from a snapshot at the start.")
	snapshotRefusedDesc  = desc("snapshot_refused_entries", "The number of elements of the snapshot that were not taken in at the start, by reason.", "reason")
	snapshotFailuresDesc = desc("snapshot_failures", "The count of snapshots that could not be written, or not be read to their end, since the last reload.")

	snapshotDescs = []*prometheus.Desc{snapshotAgeDesc, snapshotDurationDesc, snapshotBytesDesc, snapshotEntriesDesc,
		snapshotLoadedDesc, snapshotRefusedDesc, snapshotFailuresDesc}
)

func (in *intake) collect(loaded, refused *prometheus.Desc, gauge func(*prometheus.Desc, float64, ...string)) {
	gauge(loaded, float64(in.loaded.Load()))
	for why := refusedNot + 1; why < refusals; why++ {
		gauge(refused, float64(in.refused[why].Load()), refusalNames[why])
	}
}

func (k *snapshotter) collect(ch chan<- prometheus.Metric, l labels) {
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
	k.intake.collect(snapshotLoadedDesc, snapshotRefusedDesc, gauge)
	gauge(snapshotFailuresDesc, float64(k.failed.Load()))
}
