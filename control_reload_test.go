package optcache

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
)

// This file tests flushes, and snapshots that operators ask for, while generations take over from each other.

// While a Corefile starts, the control interface has the instances that have started, and for the other blocks those of before.
func TestFlushWhileBlocksStart(t *testing.T) {
	o := roomFor(roomyOptions())
	o.control.Address = "unix:///" + t.Name()
	up := new(upstream)
	start := func(at string) *Optcache {
		return started(t, o, up, identity{keys: []string{"dns://.:53"}, at: t.Name() + at})
	}
	up.answersWith(0, oldRecord)
	instances.nextGeneration()
	a, b := start("a"), start("b")
	client(t, a)
	client(t, b)
	instances.nextGeneration()
	a2 := start("a") // and the next b is about to start: kubernetes may take 5 s for that
	blocks := blocksAt(o.control.Address)
	if !slices.Contains(blocks, control.Block(controlBlock{a2})) || !slices.Contains(blocks, control.Block(controlBlock{b})) || len(blocks) != 2 {
		t.Fatalf("%d blocks", len(blocks))
	}
	for _, block := range blocks {
		if _, err := block.Flush(control.Filter{}); err != nil {
			t.Fatal(err)
		}
	}
	up.answersWith(0, newRecord)
	b2 := start("b")
	a.stop()
	b.stop()
	for _, h := range []*Optcache{a2, b2} {
		if got := client(t, settled(h)); got.first() != newData {
			t.Errorf("%s: %v", h.identity.at, got)
		}
	}
}

// More flushes of other names than the log remembers lose no answer that a reload moves.
func TestManyFlushesLoseNothingThatMoves(t *testing.T) {
	for _, n := range []int{1, 256, 257} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			o := roomFor(roomyOptions())
			up := new(upstream)
			up.answersWith(0, oldRecord)
			h := firstOf(t, o, up)
			h.clock = systemNow
			client(t, h)
			time.Sleep(time.Millisecond)
			for i := range n {
				if _, err := (controlBlock{h}).Flush(control.Filter{Name: fmt.Sprintf("n%d.example.net.", i)}); err != nil {
					t.Fatal(err)
				}
			}
			next := moving(t, h, o)
			h.stop()
			h = settled(next)
			up.fails(0)
			if got := client(t, h); got.first() != oldData {
				t.Errorf("the answer is lost, although no flush was of it: %v; %d kept", got, h.store.kept.Load())
			}
		})
	}
}

// The wall clock is set back between a snapshot and the flush.
func TestFlushWhileTheClockIsSetBack(t *testing.T) {
	for _, step := range []time.Duration{0, -time.Second, -time.Minute} {
		t.Run(step.String(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "answers")
			up := new(upstream)
			up.answersWith(0, "host.example.org. 3600 IN A 192.0.2.1")
			h := started(t, inFile(path), up, identity{})
			client(t, h)
			if _, err := h.writeAnswers(time.Now(), nil); err != nil { // the wall clock is a minute ahead
				t.Fatal(err)
			}
			h.wall = func() time.Time { return time.Now().Add(step) } // NTP sets it right
			h.snapshotter.partial.Store(true)                         // killed before the next snapshot
			if n, err := (controlBlock{h}).Flush(control.Filter{}); err != nil || n != 1 {
				t.Fatal(n, err)
			}
			h2 := started(t, inFile(path), up, identity{}) // a minute later
			up.answersWith(0, newRecord)
			if got := client(t, h2); got.first() != newData {
				t.Errorf("what has been flushed is back: %v", got)
			}
		})
	}
}

// An answer that was alive at a flush of the stale ones stays, although it has expired when a reload moves it.
func TestFlushOfStaleIsJudgedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := roomFor(roomyOptions())
		o.stale.upTo = time.Hour
		up := new(upstream)
		o.success.minTTL = 0
		up.answersWith(0, "host.example.org. 1 IN A 192.0.2.1")
		h := firstOf(t, o, up)
		h.clock = systemNow
		client(t, h)
		if n, err := (controlBlock{h}).Flush(control.Filter{Stale: true}); err != nil || n != 0 {
			t.Fatal(n, err)
		}
		time.Sleep(1200 * time.Millisecond)
		next := moving(t, h, o)
		h.stop()
		h = settled(next)
		up.fails(0)
		if got := client(t, h); got.first() != oldData {
			t.Errorf("the answer was good when the flush came, and is lost: %v", got)
		}
	})
}

// A request for a snapshot that comes to an instance after its end does not write its empty store over the file.
func TestStoppedInstanceWritesNoSnapshot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "answers")
	up := new(upstream)
	up.answersWith(0, oldRecord)
	id := identity{keys: []string{"dns://.:53"}, at: t.Name()}
	o := inFile(path)
	h := started(t, o, up, id)
	client(t, h)
	instances.nextGeneration()
	o.maxMemory *= 2
	next := started(t, o, up, id)
	h.stop()
	settled(next)
	if err := (controlBlock{next}).Snapshot(); err != nil {
		t.Fatal(err)
	}
	err := (controlBlock{h}).Snapshot()
	if !errors.Is(err, errIncomplete) || h.snapshotter.entries.Load() != 0 {
		t.Errorf("%v, %d answers written", err, h.snapshotter.entries.Load())
	}
}

// A flush through an instance of the previous generation reaches the store of its successor.
func TestFlushFollowsTheSuccessor(t *testing.T) {
	o := roomFor(roomyOptions())
	up := new(upstream)
	up.answersWith(0, oldRecord)
	h := firstOf(t, o, up)
	h.clock = systemNow
	next := moving(t, h, o)
	client(t, next) // is kept in next's store
	if _, err := (controlBlock{h}).Flush(control.Filter{}); err != nil {
		t.Fatal(err)
	}
	up.answersWith(0, newRecord)
	if got := client(t, next); got.first() != newData {
		t.Errorf("%v", got)
	}
}

// When a block has changed so much that it has no predecessor, the previous instance does not write over the file.
func TestFileOfABlockThatHasChanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "answers")
	up := new(upstream)
	up.answersWith(0, oldRecord)
	start := func(at string) *Optcache {
		return started(t, inFile(path), up, identity{keys: []string{"dns://.:53"}, at: t.Name() + at})
	}
	h := start("@127.0.0.1")
	client(t, h)
	if err := (controlBlock{h}).Snapshot(); err != nil {
		t.Fatal(err)
	}
	instances.nextGeneration()
	next := start("@127.0.0.2") // `bind` has changed
	if _, err := (controlBlock{next}).Flush(control.Filter{}); err != nil {
		t.Fatal(err)
	}
	for left := 1; left > 0; time.Sleep(time.Millisecond) { // until the snapshot after the flush is written
		marks, err := snapshot.Marks(path)
		if left = len(marks); err != nil {
			t.Fatal(err)
		}
	}
	h.stop()
	next.snapshotter.partial.Store(true) // kill -9
	again := start("@127.0.0.2")
	up.answersWith(0, newRecord)
	if got := client(t, again); got.first() != newData {
		t.Errorf("what has been flushed is back: %v", got)
	}
}

// A look-up by type finds answers of all classes.
func TestLookupFindsAllClasses(t *testing.T) {
	up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		rr := &dns.TXT{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeTXT, Class: r.Question[0].Qclass, Ttl: 60}, Txt: []string{"x"}}
		m.Answer = []dns.RR{rr}
		return 0, w.WriteMsg(m)
	})
	h := startNamed(t, t.Name(), roomFor(roomyOptions()), up)
	missed := 0
	for i := range 20 {
		q := asking(fmt.Sprintf("v%d.bind.", i), dns.TypeTXT)
		q.Question[0].Qclass = dns.ClassCHAOS
		answer(t, serverContext(t), h, q)
		all, _ := (controlBlock{h}).Lookup(q.Question[0].Name, 0)
		one, _ := (controlBlock{h}).Lookup(q.Question[0].Name, dns.TypeTXT)
		if len(all) != len(one) {
			missed++
		}
	}
	if missed > 0 {
		t.Errorf("lookup NAME TXT misses %d of 20 answers of class CH that lookup NAME finds", missed)
	}
}
