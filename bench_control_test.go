package optcache

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file measures what operators do to a cache of a million answers, and what hits take meanwhile:
//
//	go test -run '^$' -bench BenchmarkFlush -benchtime 1x -count 5 .

const flushed1M = 1_000_000

// fillMillion fills the store with a million addresses: those of millionth, or others.
func fillMillion(b *testing.B, h *Optcache, millionth func(int) []byte) {
	b.Helper()
	s := newScratch()
	body := make([]byte, 0, 64)
	for i := range flushed1M {
		name := millionth(i)
		s.Key.Set(h.store.seed, name, 1, 1, false, false)
		body = append(append(body[:0], name...), 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1)
		s.TTLAt = append(s.TTLAt[:0], uint16(len(name)+4))
		e := record.Entry{Stored: h.clock(), TTL: 3600, Counts: [3]uint16{1}, Asked: h.clock()}
		h.store.insert(s, &e, body, "", h.clock())
	}
}

// millionth is the name nI.zJ.test., where a thousand names are in each zone.
func millionth(i int) []byte { return hostIn(fmt.Sprintf("n%d", i), i) }

// otherMillionth is another name in the same zone.
func otherMillionth(i int) []byte { return hostIn(fmt.Sprintf("m%d", i), i) }

func hostIn(host string, i int) []byte {
	zone := fmt.Sprintf("z%d", i/1000)
	return slices.Concat([]byte{byte(len(host))}, []byte(host), []byte{byte(len(zone))}, []byte(zone), []byte("\x04test\x00"))
}

// otherMillion is a dump of a million answers, none of which the store has.
func otherMillion(b *testing.B, text bool) rewinder {
	b.Helper()
	h := newStarted(b, benchOptions(flushed1M+flushed1M/4), addressUpstream)
	fillMillion(b, h, otherMillionth)
	var dump bytes.Buffer
	if n, err := (controlBlock{h}).Dump(&dump, text); err != nil || n != flushed1M {
		b.Fatalf("%d answers are dumped: %v", n, err)
	}
	h.stop()
	return rewinder{bytes.NewReader(dump.Bytes())}
}

func BenchmarkFlush(b *testing.B) {
	dump := func(text bool) func(controlBlock) (int, error) {
		return func(c controlBlock) (int, error) { return c.Dump(io.Discard, text) }
	}
	load := func(text bool) func(controlBlock, rewinder) (int, error) {
		return func(c controlBlock, from rewinder) (int, error) {
			from.Rewind()
			done, err := c.Load(from, text)
			return done.Loaded, err
		}
	}
	for _, bc := range []struct {
		name string
		do   func(controlBlock) (int, error)
		load func(controlBlock, rewinder) (int, error) // in its place: it takes a dump
	}{
		{name: "name", do: func(c controlBlock) (int, error) { return c.Flush(control.Filter{Name: "n500500.z500.test."}) }},
		{name: "subtree=1000", do: func(c controlBlock) (int, error) { return c.Flush(control.Filter{Name: "z500.test.", Subtree: true}) }},
		{name: "subtree=1000000", do: func(c controlBlock) (int, error) { return c.Flush(control.Filter{Name: "test.", Subtree: true}) }},
		{name: "list=1000000", do: func(c controlBlock) (n int, err error) {
			for f := (control.Filter{Limit: control.MaxPage}); ; {
				page, err := c.List(f)
				n += len(page.Answers)
				if f.After = page.Next; err != nil || f.After == "" {
					return n, err
				}
			}
		}},
		{name: "dump=1000000", do: dump(false)},
		{name: "dump-text=1000000", do: dump(true)},
		{name: "load=1000000", load: load(false)},
		{name: "load-text=1000000", load: load(true)},
	} {
		b.Run(bc.name, func(b *testing.B) {
			room := flushed1M
			if bc.load != nil {
				room *= 2
				from := otherMillion(b, strings.HasPrefix(bc.name, "load-text"))
				bc.do = func(c controlBlock) (int, error) { return bc.load(c, from) }
			}
			h := newStarted(b, benchOptions(room+room/4), addressUpstream)
			fillMillion(b, h, millionth)
			// One core serves hits all the time, and notes how long each takes, in the order of queries over a network.
			var stop atomic.Bool
			took := make(chan []time.Duration)
			sample := func() {
				s := newScratch()
				var all []time.Duration
				for i := 0; !stop.Load(); i += 7919 {
					s.Key.Set(h.store.seed, millionth(i%flushed1M), 1, 1, false, false)
					s.Body = 64
					begun := time.Now()
					h.store.lookup(s, h.clock())
					all = append(all, time.Since(begun))
					for time.Since(begun) < 33*time.Microsecond { // 30,000 a second
					}
				}
				slices.Sort(all)
				took <- all
			}
			p99 := func(all []time.Duration) float64 { return float64(all[len(all)*99/100]) / 1e3 }
			go sample()
			time.Sleep(time.Second)
			stop.Store(true)
			calm := <-took
			stop.Store(false)
			go sample()
			b.ResetTimer()
			n := 0
			for b.Loop() {
				m, err := bc.do(controlBlock{h})
				if err != nil {
					b.Fatal(err)
				}
				n = max(n, m)
			}
			b.StopTimer()
			stop.Store(true)
			busy := <-took
			b.ReportMetric(float64(n), "answers")
			b.ReportMetric(p99(busy), "µs-p99-of-hits")
			b.ReportMetric(p99(calm), "µs-p99-without")
		})
	}
}
