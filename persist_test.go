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

// This file is about what a restart finds in a file: instances that end, and others that start from what they have left.
// The file itself is tested in plugin/pkg/snapshot, a server that is restarted in test/persist_test.go.

// fromFile returns an instance that is kept in a file, when it has read it. Its clock stands where it was told.
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
	tb.Cleanup(func() { h.stop() })
	for h.keeper.partial.Load() {
		time.Sleep(time.Millisecond)
	}
	return h
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
	if n := h.keeper.loaded.Load(); n != int64(len(names))+1 {
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

// What is read goes through the door of an answer from the network.
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
			if got := h.readmit(newScratch(), new(dns.Msg), &c.record, h.clock(), now); got != c.want {
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

// A reload while the file is being read leaves nothing unread, neither in the cache nor in the file.
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
		for next.keeper.partial.Load() {
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

// What is in the file does not hide what has come since, to this generation or to the one before.
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
	h := firstOf(t, o, new(census)) // begins to read at 0
	for h.keeper.partial.Load() {
		time.Sleep(time.Millisecond)
	}
	answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
	h.keeper.partial.Store(true) // as if it had more to read
	for name, change := range map[string]func(*options){
		"same store": func(*options) {},
		"another":    func(o *options) { o.success.capacity = 5000 },
	} {
		o := o
		change(&o)
		next := newOptcache(o)
		next.Next, next.place = h.Next, h.place
		next.clock = func() int64 { return 90e9 }
		instances.nextGeneration()
		if err := next.start(h.place.at, []plugin.Handler{next}); err != nil {
			t.Fatal(err)
		}
		if !next.unread {
			t.Errorf("%s: it does not read what has not been read", name)
		}
		for _, r := range []*snapshot.Record{record(dns.RcodeNameError, soa), record(dns.RcodeSuccess, old)} {
			next.readmit(newScratch(), new(dns.Msg), r, 90e9, time.Unix(1e9, 0))
		}
		h.stop()
		settled(next)
		m := answer(t, ctx, next, asking("host.example.org.", dns.TypeA))
		if m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0 || m.Answer[0].(*dns.A).A.Equal(net.IPv4(192, 0, 2, 99)) {
			t.Errorf("%s: the old answer is back: %v", name, m)
		}
		h = next
		h.keeper.partial.Store(true)
	}
	h.stop()
}

// Who has not been asked for anything leaves the file alone: it may be of a reload that has failed.
func TestUnaskedInstanceDoesNotWrite(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers")
	h := fromFile(t, path, roomFor(sizedOptions(4096)), new(census), 0)
	h.keeper.save()
	h.stop()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("there is a file: %v", err)
	}
}

// Files that are none, or not any more, cost a line in the log, and the server serves.
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
		if h.keeper.failed.Load() != 1 {
			t.Errorf("%s: %d failures", name, h.keeper.failed.Load())
		}
		answer(t, ctx, h, asking("host-0.example.org.", dns.TypeA))
	}
	folder := fromFile(t, dir, roomFor(sizedOptions(4096)), up, 0)
	answer(t, ctx, folder, asking("host-0.example.org.", dns.TypeA))
	folder.stop()
	if n := folder.keeper.failed.Load(); n != 2 { // read and write
		t.Errorf("a folder: %d failures", n)
	}
}
