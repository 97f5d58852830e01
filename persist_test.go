package optcache

import (
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/snapshot"
)

// This file tests what a restart finds in a snapshot: instances stop, and others start from their files. The file's
// format is tested in plugin/pkg/snapshot. A server is restarted in test/persist_test.go.

// fromFile returns an instance with a snapshot file, after it has read the file. Its clock stands at now.
func fromFile(tb testing.TB, path string, o options, next plugin.Handler, now int64) *Optcache {
	tb.Helper()
	o.file = fileOptions{path: path}
	h := newOptcache(o)
	h.Next = next
	var clock atomic.Int64
	clock.Store(now)
	h.clock = clock.Load
	if err := h.start(tb.Name(), []plugin.Handler{h}); err != nil {
		tb.Fatal(err)
	}
	stopsWith(tb, h)
	for h.snapshotter.partial.Load() {
		time.Sleep(time.Millisecond)
	}
	return h
}

// started starts an instance that goes by the real clock and returns it when it has read its snapshot, if it has one.
func started(tb testing.TB, o options, next plugin.Handler, id identity) *Optcache {
	tb.Helper()
	h := newOptcache(o)
	h.Next, h.clock, h.identity = next, systemNow, id
	if err := h.start(tb.Name(), []plugin.Handler{h}); err != nil {
		tb.Fatal(err)
	}
	stopsWith(tb, h)
	for h.snapshotter != nil && h.snapshotter.partial.Load() {
		time.Sleep(time.Millisecond)
	}
	h.server(serverContext(tb)) // an instance that has served nothing writes no snapshot
	return h
}

// inFile is options of an instance with a snapshot file.
func inFile(path string) options {
	o := roomFor(roomyOptions())
	o.file = fileOptions{path: path}
	return o
}

func TestRestartFindsTheAnswers(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers")
	up := new(census)
	o := roomFor(sizedOptions(4096))
	o.prefetch = prefetchOptions{amount: 100, gap: time.Minute, percentage: 10}
	h := fromFile(t, path, o, up, 5e9)
	ctx := serverContext(t)
	names := reloadNames(400)
	for i, name := range names {
		for range 1 + i%8 {
			answer(t, ctx, h, asking(name, dns.TypeA))
		}
	}
	signed := asking("signed.example.org.", dns.TypeA).SetEdns0(1232, true)
	signed.CheckingDisabled = true
	answer(t, ctx, h, signed)
	asked := up.asked.Load()
	hot := map[string]bool{}
	for _, name := range names {
		tier, _ := tierOf(h, name)
		hot[name] = tier == tierHot
	}
	h.stop()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}

	h = fromFile(t, path, o, up, 77e9) // another process has another clock
	if n := h.snapshotter.loaded.Load(); n != int64(len(names))+1 {
		t.Errorf("%d answers were read, want %d", n, len(names)+1)
	}
	stayed, were := 0, 0
	for _, name := range names {
		if hot[name] {
			were++
			if tier, _ := tierOf(h, name); tier == tierHot {
				stayed++
			}
		}
	}
	if were < 75 || stayed < were*3/4 {
		t.Errorf("%d of %d are still in the hot tier", stayed, were)
	}
	for _, name := range names {
		m := answer(t, ctx, h, asking(name, dns.TypeA))
		if (m.Rcode == dns.RcodeNameError) != (name[:2] == "no") {
			t.Fatalf("%v", m)
		}
		if name[:2] != "no" && m.Answer[0].Header().Ttl < 3590 {
			t.Errorf("%v", m.Answer[0])
		}
	}
	answer(t, ctx, h, signed)
	if n := up.asked.Load() - asked; n != 0 {
		t.Errorf("%d upstream queries for names that were alive", n)
	}
	answer(t, ctx, h, asking("signed.example.org.", dns.TypeA))
	if n := up.asked.Load() - asked; n != 1 {
		t.Error("an answer with DO and CD is one without")
	}
}

// Records of a snapshot are admitted by the rules for responses from the network.
func TestWhatIsReadIsAdmitted(t *testing.T) {
	t.Parallel()
	now := time.Now()
	response := func(change func(*dns.Msg)) []byte {
		m := asking("host.example.org.", dns.TypeA)
		m.Response = true
		m.Answer = parsed("host.example.org. 300 IN A 192.0.2.1")
		change(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := response(func(*dns.Msg) {})
	for name, c := range map[string]struct {
		record snapshot.Record
		want   refusal
		ttl    uint32
	}{
		"good":        {record: snapshot.Record{Response: good, Stored: now}, ttl: 60},
		"older":       {record: snapshot.Record{Response: good, Stored: now.Add(-50 * time.Second)}, ttl: 10},
		"a bit ahead": {record: snapshot.Record{Response: good, Stored: now.Add(time.Second)}, ttl: 60},
		"future":      {record: snapshot.Record{Response: good, Stored: now.Add(time.Hour)}, want: refusedFuture},
		"expired":     {record: snapshot.Record{Response: good, Stored: now.Add(-time.Hour)}, want: refusedExpired},
		"no message":  {record: snapshot.Record{Response: []byte("no message"), Stored: now}, want: refusedMalformed},
		"query":       {record: snapshot.Record{Response: response(func(m *dns.Msg) { m.Response = false }), Stored: now}, want: refusedMalformed},
		"no question": {record: snapshot.Record{Response: response(func(m *dns.Msg) { m.Question = nil }), Stored: now}, want: refusedMalformed},
		"cut off":     {record: snapshot.Record{Response: response(func(m *dns.Msg) { m.Truncated = true }), Stored: now}, want: refusedMalformed},
		"refused":     {record: snapshot.Record{Response: response(func(m *dns.Msg) { m.Rcode = dns.RcodeRefused }), Stored: now}, want: refusedMalformed},
		"no TTL":      {record: snapshot.Record{Response: response(func(m *dns.Msg) { m.Answer[0].Header().Ttl = 0 }), Stored: now}, want: refusedExpired},
		"referral that RD=0 has brought": {record: snapshot.Record{Response: response(func(m *dns.Msg) {
			m.Answer, m.Ns = nil, parsed("example.org. 300 IN NS ns.example.org.")
		}), Stored: now, NoRD: true}, want: refusedMalformed},
		"signature that has expired": {record: snapshot.Record{Response: response(func(m *dns.Msg) {
			m.Answer = append(m.Answer, parsed("host.example.org. 300 IN RRSIG A 8 3 300 20010102000000 20010101000000 1 example.org. c2ln")...)
		}), Stored: now, DO: true}, want: refusedMalformed},
		"another zone": {record: snapshot.Record{Response: response(func(m *dns.Msg) { m.Question[0].Name, m.Answer[0].Header().Name = "a.example.net.", "a.example.net." }), Stored: now}, want: refusedZone},
		"not cached": {record: snapshot.Record{Response: response(func(m *dns.Msg) {
			m.Question[0].Name, m.Answer[0].Header().Name = "a.no.example.org.", "a.no.example.org."
		}), Stored: now}, want: refusedZone},
	} {
		t.Run(name, func(t *testing.T) {
			o := roomFor(sizedOptions(4096))
			o.zones, o.success.except = []string{"example.org."}, []string{"no.example.org."}
			o.success.maxTTL = time.Minute
			up := new(census)
			h := startNamed(t, t.Name(), o, up)
			h.clock = func() int64 { return 0 }
			if got := h.admit(newScratch(), new(dns.Msg), &c.record, momentOf(h, now), nil); got != c.want {
				t.Fatalf("refused as %q, want %q", refusalNames[got], refusalNames[c.want])
			}
			if c.want != refusedNot {
				if n := h.store.total(); n != 0 {
					t.Errorf("%d entries", n)
				}
				return
			}
			m := answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA))
			if got := m.Answer[0].Header().Ttl; got != c.ttl || up.asked.Load() != 0 {
				t.Errorf("TTL %d, want %d; %d queries", got, c.ttl, up.asked.Load())
			}
		})
	}
}

// An answer that other options have admitted lives no longer than under those, whatever the present options are. That
// holds over a restart and over a reload, and with the TTL in the answer's records or without.
func TestOtherOptionsProlongNothing(t *testing.T) {
	t.Parallel()
	const soa = "example.org. 600 IN SOA ns.example.org. host.example.org. 1 2 3 4 600"
	short := roomFor(sizedOptions(4096))
	short.servfail, short.success.minTTL, short.denial.minTTL = 5*time.Second, 5*time.Second, 5*time.Second
	short.success.maxTTL, short.denial.maxTTL = 20*time.Second, 20*time.Second
	long := short
	long.servfail, long.success.minTTL, long.denial.minTTL = 5*time.Minute, 4*time.Minute, 4*time.Minute
	long.success.maxTTL, long.denial.maxTTL = time.Hour, time.Hour
	withExtra := positive()
	withExtra.Extra = parsed("host.example.org. 300 IN A 192.0.2.1")
	referral := negative(dns.RcodeSuccess, "example.org. 300 IN NS ns.example.org.")
	for name, response := range map[string]*dns.Msg{
		"SERVFAIL":             negative(dns.RcodeServerFailure),
		"SERVFAIL with SOA":    negative(dns.RcodeServerFailure, soa),
		"SERVFAIL without any": nil, // the upstream fails without a message
		"NOTIMP":               negative(dns.RcodeNotImplemented),
		"NXDOMAIN":             negative(dns.RcodeNameError, soa),
		"NODATA":               negative(dns.RcodeSuccess, soa),
		"NOERROR, no records":  positive(),
		"additional only":      withExtra,
		"referral":             referral,
		"A":                    positive("host.example.org. 300 IN A 192.0.2.1"),
		"A of TTL 0":           positive("host.example.org. 0 IN A 192.0.2.1"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ttlOf := func(h *Optcache) (uint32, bool) {
				s, _ := h.scratchFor(asking("host.example.org.", dns.TypeA), udp4Client)
				ok := h.store.find(s, h.clock())
				return s.Entry.TTL, ok
			}
			path := filepath.Join(t.TempDir(), "answers")
			up := &scripted{response: response}
			for _, later := range []struct {
				options
				raised bool
			}{{long, true}, {short, false}} {
				first := short
				if !later.raised {
					first = long
				}
				fill := func(h *Optcache) uint32 {
					ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), nil)
					ttl, ok := ttlOf(h)
					if !ok {
						t.Fatal("not kept")
					}
					return ttl
				}
				check := func(h *Optcache, after string, before uint32) {
					ttl, ok := ttlOf(h)
					if want := min(before, 20); later.raised && (!ok || ttl != before) || ttl > want {
						t.Errorf("TTL %d after a %s, and %d before; raised: %v", ttl, after, before, later.raised)
					}
					h.stop()
				}
				old := firstOf(t, first, up)
				before := fill(old)
				next := nextOf(t, old, later.options)
				old.stop()
				check(settled(next), "reload", before)

				old = fromFile(t, path, first, up, 0)
				before = fill(old)
				old.stop()
				check(fromFile(t, path, later.options, up, 0), "restart", before)
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// Snapshots of earlier versions do not have the TTL of an answer without records. Such an answer gets the usual
// minimal TTL.
func TestFilesWithoutTTL(t *testing.T) {
	t.Parallel()
	now := time.Now()
	o := roomFor(sizedOptions(4096))
	o.servfail = 5 * time.Minute
	m := negative(dns.RcodeServerFailure)
	m.Question = asking("host.example.org.", dns.TypeA).Question
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for age, want := range map[time.Duration]refusal{4 * time.Second: refusedNot, 6 * time.Second: refusedExpired} {
		h := startNamed(t, t.Name(), o, new(census))
		h.clock = func() int64 { return 0 }
		record := snapshot.Record{Response: b, Stored: now.Add(-age)}
		if got := h.admit(newScratch(), new(dns.Msg), &record, moment{wall: now}, nil); got != want {
			t.Errorf("after %v: %q, want %q", age, refusalNames[got], refusalNames[want])
		}
	}
}

// A name stays popular over a short restart only: prefetch's gap includes the time in between.
func TestPopularityAgesInTheFile(t *testing.T) {
	t.Parallel()
	o := roomFor(sizedOptions(4096))
	o.prefetch = prefetchOptions{amount: 5, gap: time.Minute, percentage: 10}
	wall := time.Unix(1e9, 0)
	question := asking("host.example.org.", dns.TypeA)
	path := filepath.Join(t.TempDir(), "answers")
	h := fromFile(t, path, o, new(census), 1e15)
	for range 3 {
		answer(t, serverContext(t), h, question)
	}
	if _, err := h.writeAnswers(wall, nil); err != nil {
		t.Fatal(err)
	}
	for after, want := range map[time.Duration]uint32{0: 3, 30 * time.Second: 3, 2 * time.Minute: 1} {
		next := startNamed(t, t.Name()+after.String(), o, new(census))
		next.file.path, next.clock = path, func() int64 { return 1e15 }
		if err := new(snapshotter).read(next, next.clock(), wall.Add(after), nil); err != nil {
			t.Fatal(err)
		}
		s, _ := next.scratchFor(question, udp4Client)
		if !next.store.find(s, next.clock()) {
			t.Fatalf("after %v it is not there", after)
		}
		if n := next.store.countRequest(s, next.clock(), time.Minute, 10); n != want {
			t.Errorf("after %v: the next request is number %d, want %d", after, n, want)
		}
	}
}

// After a reload in the middle of reading, the rest of the file is read, and the next snapshot has all of it.
func TestReloadWhileReading(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers")
	o := roomFor(sizedOptions(4096))
	o.maxMemory = 12 << 20
	up := new(census)
	h := fromFile(t, path, o, up, 0)
	ctx := serverContext(t)
	names := reloadNames(3000)
	for _, name := range names {
		answer(t, ctx, h, asking(name, dns.TypeA))
	}
	h.stop()
	asked := up.asked.Load()
	o.file = fileOptions{path: path}
	for _, capacity := range []int{4096, 4096, 5000} { // the same store, and another one
		h = firstOf(t, o, up)
		o.success.capacity = capacity
		next := nextOf(t, h, o)
		h.stop()
		settled(next)
		for next.snapshotter.partial.Load() {
			time.Sleep(time.Millisecond)
		}
		for _, name := range names {
			answer(t, ctx, next, asking(name, dns.TypeA))
		}
		if n := up.asked.Load() - asked; n != 0 {
			t.Fatalf("%d queries for what was in the file", n)
		}
		next.stop()
	}
}

// Records of the file do not hide answers that have come since, to this generation or to the previous one.
func TestReadingHidesNoNews(t *testing.T) {
	t.Parallel()
	record := func(rcode int, rrs ...string) *snapshot.Record {
		m := asking("host.example.org.", dns.TypeA)
		m.Response, m.Rcode = true, rcode
		if rcode == dns.RcodeSuccess {
			m.Answer = parsed(rrs...)
		} else {
			m.Ns = parsed(rrs...)
		}
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return &snapshot.Record{Response: b, Stored: time.Unix(1e9-100, 0)}
	}
	const soa = "example.org. 600 IN SOA ns.example.org. host.example.org. 1 2 3 4 600"
	const old = "host.example.org. 600 IN A 192.0.2.99"
	ctx := serverContext(t)
	o := roomFor(sizedOptions(4096))
	o.file = fileOptions{path: filepath.Join(t.TempDir(), "answers")}
	h := firstOf(t, o, new(census)) // begins to read at time 0
	for h.snapshotter.partial.Load() {
		time.Sleep(time.Millisecond)
	}
	answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
	h.snapshotter.partial.Store(true) // as if the file were not read to its end
	for name, change := range map[string]func(*options){
		"same store": func(*options) {},
		"another":    func(o *options) { o.success.capacity = 5000 },
	} {
		o := o
		change(&o)
		next := newOptcache(o)
		next.Next, next.identity = h.Next, h.identity
		next.clock = func() int64 { return 90e9 }
		instances.nextGeneration()
		if err := next.start(h.identity.at, []plugin.Handler{next}); err != nil {
			t.Fatal(err)
		}
		if !next.fileUnread {
			t.Errorf("%s: it does not read what has not been read", name)
		}
		for _, r := range []*snapshot.Record{record(dns.RcodeNameError, soa), record(dns.RcodeSuccess, old)} {
			next.admit(newScratch(), new(dns.Msg), r, moment{90e9, 90e9, time.Unix(1e9, 0)}, nil)
		}
		h.stop()
		settled(next)
		m := answer(t, ctx, next, asking("host.example.org.", dns.TypeA))
		if m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0 || m.Answer[0].(*dns.A).A.Equal(net.IPv4(192, 0, 2, 99)) {
			t.Errorf("%s: the old answer is back: %v", name, m)
		}
		h = next
		h.snapshotter.partial.Store(true)
	}
	h.stop()
}

// An instance that has served no query does not write the file: it may belong to a reload that fails.
func TestUnaskedInstanceDoesNotWrite(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers")
	h := fromFile(t, path, roomFor(sizedOptions(4096)), new(census), 0)
	h.snapshotter.save()
	h.stop()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("there is a file: %v", err)
	}
}

// A file that cannot be read, or is damaged, costs a line in the log, and the server serves.
func TestBadFilesStartEmpty(t *testing.T) {
	t.Parallel()
	up := new(census)
	dir := t.TempDir()
	path := filepath.Join(dir, "answers")
	h := fromFile(t, path, roomFor(sizedOptions(4096)), up, 0)
	ctx := serverContext(t)
	for _, name := range reloadNames(100) {
		answer(t, ctx, h, asking(name, dns.TypeA))
	}
	h.stop()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := append([]byte(nil), whole...)
	flipped[len(flipped)/2] ^= 4
	for name, content := range map[string][]byte{"empty": {}, "text": []byte("not a snapshot"), "cut": whole[:len(whole)*2/3], "flipped": flipped} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, content, 0o600); err != nil {
			t.Fatal(err)
		}
		h := fromFile(t, p, roomFor(sizedOptions(4096)), up, 0)
		if h.snapshotter.failed.Load() != 1 {
			t.Errorf("%s: %d failures", name, h.snapshotter.failed.Load())
		}
		answer(t, ctx, h, asking("host-0.example.org.", dns.TypeA))
	}
	folder := fromFile(t, dir, roomFor(sizedOptions(4096)), up, 0)
	answer(t, ctx, folder, asking("host-0.example.org.", dns.TypeA))
	folder.stop()
	if n := folder.snapshotter.failed.Load(); n != 2 { // one for reading, one for writing
		t.Errorf("a folder: %d failures", n)
	}
}

// momentOf is the present of h, at which the wall clock shows wall.
func momentOf(h *Optcache, wall time.Time) moment {
	now := h.clock()
	return moment{now, now, wall}
}
