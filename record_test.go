package optcache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// These tests are about the record, as the store uses it: a reader gets what was written.

// sample is one answer that a test stores.
type sample struct {
	flags    record.Flags
	ttl      uint32
	stored   int64
	counts   [3]uint16
	ttlAt    []uint16
	body     []byte
	wildcard string
	excess   int
}

func (a *sample) header() record.Entry {
	return record.Entry{Stored: a.stored, TTL: a.ttl, Flags: a.flags, Counts: a.counts, Link: record.MakeLink(0, 0, a.excess)}
}

// build makes the record of an answer for s.Key in s.Words.
func (a *sample) build(s *scratch) record.Entry {
	e := a.header()
	s.TTLAt = append(s.TTLAt[:0], a.ttlAt...)
	s.BuildRecord(&e, a.body, a.wildcard)
	return e
}

// check compares the answer that a reader has got in s with a. It returns what differs, or "".
func (a *sample) check(s *scratch) string {
	e := &s.Entry
	switch {
	case e.Flags != a.flags:
		return "flags"
	case e.TTL != a.ttl:
		return "ttl"
	case e.Stored != a.stored:
		return "stored"
	case e.Counts != a.counts:
		return "counts"
	case e.BodyLen != len(a.body) || !bytes.Equal(s.Out[s.Body:][:e.BodyLen], a.body):
		return "body"
	case string(s.Wildcard) != a.wildcard:
		return "wildcard"
	case e.Excess() != a.excess:
		return "excess"
	case e.TtlFields() != len(a.ttlAt):
		return "number of TTL offsets"
	}
	for i, at := range a.ttlAt {
		if uint16(s.Offsets[i/4]>>(i%4*16)) != at {
			return "TTL offsets"
		}
	}
	return ""
}

// randomSample makes an answer of a class with a body of n bytes.
func randomSample(rng *rand.Rand, c record.Class, n int, now int64) sample {
	a := sample{
		flags:  record.Flags(rng.IntN(128)) &^ record.FlagRcode,
		ttl:    1 + uint32(rng.IntN(20)),
		excess: rng.IntN(3) * rng.IntN(1000),
		stored: now,
		body:   make([]byte, n),
	}
	if c == record.Denial {
		a.flags |= record.FlagDenial | record.Flags(rng.IntN(4)) // NOERROR, FORMERR, SERVFAIL, NXDOMAIN
		if a.flags&record.FlagRcode == record.RcodeServerFailure {
			a.flags |= record.FlagVoid
		}
	}
	fillBytes(rng, a.body)
	records := min(rng.IntN(12), n/11)
	if rng.IntN(10) == 0 {
		a.flags |= record.FlagCompressed
	}
	for i := range records {
		a.counts[rng.IntN(3)]++
		if a.flags&record.FlagCompressed == 0 {
			a.ttlAt = append(a.ttlAt, uint16(i*11))
		}
	}
	if rng.IntN(4) == 0 {
		a.wildcard = string(bytes.Repeat([]byte{'w'}, rng.IntN(260)))
	}
	return a
}

func fillBytes(rng *rand.Rand, b []byte) {
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, rng.Uint64())
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(rng.Uint64())
	}
}

func TestRecordLayout(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		what      string
		got, want int
	}{
		{"size of a node", int(unsafe.Sizeof(node{})), nodeBytes},
		{"words of the header", record.HeaderWords, 6},
		{"word of the seq", record.WordSeq, 0},
		{"a line, in words", record.LineBytes / record.WordBytes, 8},
		{"largest key, in whole words", record.MaxKey % record.WordBytes, 0},
		{"largest key holds the longest name", max(record.MaxKey, wire.MaxName+record.KeyTail), record.MaxKey},
		{"a hot slot, in whole lines", hotSlotWords * record.WordBytes % record.LineBytes, 0},
		{"ways of a hot set fill its word of tags", hotWays * hotTagBits, 64},
		{"memory of a hot set", hotSetBytes, hotWays*hotSlotWords*8 + 8},
		{"granule of aligned records", alignedGranuleWords * record.WordBytes, record.LineBytes},
		{"flags leave the rcode alone", int(record.FlagRcode & (record.FlagAA | record.FlagRA | record.FlagAD | record.FlagDenial | record.FlagCompressed | record.FlagMessage)), 0},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: %d, want %d", tc.what, tc.got, tc.want)
		}
	}
}

func TestMemoryIsLaidOutOnLines(t *testing.T) {
	t.Parallel()
	for _, granule := range []int{packedGranuleWords, alignedGranuleWords} {
		st := openStore(t, sizes{
			shards: 4, capacity: [record.Classes]int{100, 60}, granuleWords: granule,
			pieces: [record.Classes]int{2, 1}, buckets: 7, hotSets: 3, hotAfter: 3,
		})
		seen := map[uintptr]string{}
		line := func(what string, w []uint64) {
			at := uintptr(unsafe.Pointer(&w[0]))
			if at%record.LineBytes != 0 {
				t.Errorf("%s is at %#x: not on a line", what, at)
			}
			if before, ok := seen[at]; ok {
				t.Errorf("%s is where %s is", what, before)
			}
			seen[at] = what
		}
		line("index", st.slots.Words())
		for i := range st.shards {
			sh := &st.shards[i]
			r, pieces := &sh.region, st.pieces[record.Success]+st.pieces[record.Denial]
			for p := range pieces {
				piece := r.at(p * pieceWords)
				line(fmt.Sprintf("piece %d in shard %d", p, i), piece)
				if end := r.at((p+1)*pieceWords - 1); len(piece) != pieceWords || len(end) != 1 || &end[0] != &piece[pieceWords-1] {
					t.Errorf("piece of %d words, at its end %d", len(piece), len(end))
				}
			}
			if w := r.at(pieces * pieceWords); w != nil {
				t.Errorf("%d words behind the last piece", len(w))
			}
			if got := r.alloc.Cap(); got != pieces*st.pieceGranules() || got != r.share[record.Success]+r.share[record.Denial] {
				t.Errorf("the allocator has %d granules, the shares are %d", got, r.share)
			}
			for set := range uint64(len(sh.hot.tags)) {
				for way := range hotWays {
					slot := sh.hot.slot(set, way)
					line("hot slot", slot.words)
					if len(slot.record) != hotSlotWords-1 {
						t.Errorf("a hot slot has %d words for a record", len(slot.record))
					}
				}
			}
		}
		if want := 1 + 4*(3+3*hotWays); len(seen) != want {
			t.Errorf("%d parts, want %d", len(seen), want)
		}
	}
}

func TestRecordRoundTrip(t *testing.T) {
	t.Parallel()
	seed := record.MakeSeed(0)
	rng := rand.New(rand.NewPCG(2, 3))
	s, into := newScratch(), newScratch()
	lengths := []int{0, 1, 7, 8, 9, 11, 63, 64, 65, 16383, 16384, 65534, 65535}
	for round := range 2000 {
		var name [wire.MaxName]byte
		n := 1 + rng.IntN(wire.MaxName)
		fillBytes(rng, name[:n])
		s.Key.Set(seed, name[:n], uint16(rng.Uint32()), uint16(rng.Uint32()), rng.IntN(2) == 0, rng.IntN(2) == 0)
		length := rng.IntN(300)
		switch {
		case round < len(lengths):
			length = lengths[round]
		case round%50 == 0:
			length = rng.IntN(record.MaxMessage + 1)
		}
		a := randomSample(rng, record.Class(rng.IntN(int(record.Classes))), length, rng.Int64())
		if round%100 == 0 && a.flags&record.FlagCompressed == 0 { // the largest number of resource records
			a.counts, a.ttlAt = [3]uint16{}, nil
			for i := range length / 11 {
				a.counts[i%3]++
				a.ttlAt = append(a.ttlAt, uint16(i*11))
			}
		}
		e := a.build(s)
		w := slices.Clone(s.Words)
		w[record.WordSeq] = rng.Uint64()
		got := record.LoadEntry(w)
		e.Seq = w[record.WordSeq]
		if got != e {
			t.Fatalf("round %d: header %+v, want %+v", round, got, e)
		}
		if got.Flags.Class() != a.flags.Class() {
			t.Fatalf("round %d: class %d", round, got.Flags.Class())
		}
		if got.Size != len(w) || !got.Sane(len(w)) || got.Sane(len(w)-1) {
			t.Fatalf("round %d: size %d of %d words, sane %v, with a word less %v", round, got.Size, len(w), got.Sane(len(w)), got.Sane(len(w)-1))
		}
		if !got.HasKey(w, &s.Key) {
			t.Fatalf("round %d: another key", round)
		}
		// A key that differs in one bit is another key.
		bit := rng.IntN(s.Key.Len * 8)
		w[record.HeaderWords+bit/64] ^= 1 << (bit % 64)
		if got.HasKey(w, &s.Key) {
			t.Fatalf("round %d: bit %d of the key does not count", round, bit)
		}
		w[record.HeaderWords+bit/64] ^= 1 << (bit % 64)

		// CopyAnswer must not change the question in front of the body, however large the body is.
		into.Body = wire.HeaderLen + n + wire.QuestionTail
		into.Out = into.Out[:cap(into.Out)]
		fillBytes(rng, into.Out[:into.Body])
		question := slices.Clone(into.Out[:into.Body])
		into.Entry = got
		into.CopyAnswer(w)
		if diff := a.check(into); diff != "" {
			t.Fatalf("round %d: %s differs", round, diff)
		}
		if !bytes.Equal(into.Out[:into.Body], question) {
			t.Fatalf("round %d: copying the answer has changed the question", round)
		}
		if room := len(into.Out) - into.Body - got.BodyLen; room < wire.OPTLen {
			t.Fatalf("round %d: %d bytes left for OPT", round, room)
		}
	}
}
