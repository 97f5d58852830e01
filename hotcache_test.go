package optcache

import (
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/reply"
)

// These tests are about the hot tier alone. The tests choose the hashes of keys, so that sets and tags collide where they
// should.

func newHotTier(sets int) *hotTier {
	h := &hotTier{tags: make([]uint64, sets), slots: make([]uint64, sets*hotWays*hotSlotWords)}
	h.sets.Store(uint64(sets))
	return h
}

// hotHash returns a hash with that tag, whose home is that set when there are that many sets.
func hotHash(tag uint16, set, sets int) uint64 {
	home := (uint64(set)<<32 + uint64(sets) - 1) / uint64(sets)
	return uint64(tag)<<48 | home<<16
}

// hotScratch returns a scratch with a record for a name of one byte, with that hash, as the region would have it.
func hotScratch(name byte, hash uint64, id uint32, body []byte, ttl uint32) *scratch {
	s := newScratch()
	s.Key = hotKey(name, hash)
	s.Body = 18
	e := record.Entry{TTL: ttl}
	s.BuildRecord(&e, body, "")
	s.Words[record.WordLink] = record.MakeLink(id, 0, 0)
	s.Words[record.WordSeq] = 0xabcdef // the seq in the region, which the hot tier must not use
	return s
}

func hotKey(name byte, hash uint64) (k record.Key) {
	k.Bytes[0], k.Len, k.Hash = name, 1+record.KeyTail, hash
	return k
}

// enter claims a slot for the record in s, as promote does. The record that was there is removed.
func (h *hotTier) enter(s *scratch, now int64) bool {
	slot, ok := h.claim(s.Key.Hash, now)
	if ok {
		h.clear(slot)
		h.put(slot, s.Key.Hash, s.Words)
	}
	return ok
}

// answers reports whether the tier has a living answer with that body for the key of s.
func (h *hotTier) answers(s *scratch, now int64, body string) bool {
	r := newScratch()
	r.Key, r.Body = s.Key, s.Body
	return h.lookup(r, now) && string(r.Out[r.Body:][:r.Entry.BodyLen]) == body
}

func (h *hotTier) countOf(t *testing.T, s *scratch) uint64 {
	t.Helper()
	slot, ok := h.find(s.Key.Hash, &s.Key, none)
	if !ok {
		t.Fatalf("%q is not in the hot tier", s.Key.Bytes[0])
	}
	return slot.count()
}

func TestHotTierWithoutMemoryHoldsNothing(t *testing.T) {
	t.Parallel()
	var h hotTier
	s := hotScratch('a', 0, 1, nil, 10)
	if _, ok := h.claim(0, 0); ok {
		t.Error("claimed a slot that is not there")
	}
	if _, ok := h.find(0, &s.Key, none); ok || h.lookup(s, 0) {
		t.Error("found a record that is not there")
	}
}

func TestHotTierAnswersWhatWasPut(t *testing.T) {
	t.Parallel()
	const sets = 5
	for set := range sets {
		for _, tag := range []uint16{0, 1, 2, 0x8000, 0xffff} {
			h := newHotTier(sets)
			s := hotScratch('a', hotHash(tag, set, sets), 7, []byte("body"), 10)
			if got := h.home(s.Key.Hash); got != uint64(set) {
				t.Fatalf("home %d, want %d", got, set)
			}
			if h.answers(s, 0, "body") {
				t.Fatal("an empty tier answers")
			}
			if !h.enter(s, 0) || !h.answers(s, 0, "body") {
				t.Fatalf("set %d, tag %#x: not found", set, tag)
			}
			slot, ok := h.find(s.Key.Hash, &s.Key, none)
			byNode, okNode := h.find(s.Key.Hash, nil, 7)
			if !ok || !okNode || slot.set != byNode.set || slot.way != byNode.way || slot.node() != 7 {
				t.Fatalf("set %d, tag %#x: find by key %v, by node %v", set, tag, ok, okNode)
			}
			if _, ok := h.find(s.Key.Hash, nil, 8); ok {
				t.Fatal("found by a node that is not its own")
			}
			if w := slices.Clone(slot.record[1:len(s.Words)]); !slices.Equal(w, s.Words[1:]) {
				t.Fatal("the copy differs from the record")
			}
			h.clear(slot)
			if _, ok := h.find(s.Key.Hash, &s.Key, none); ok || h.answers(s, 0, "body") || h.tags[set] != 0 {
				t.Fatalf("set %d, tag %#x: found after clear", set, tag)
			}
		}
	}
}

func TestHotTierTakesTheLargestRecordThatFits(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	body := make([]byte, (hotSlotWords-1-record.HeaderWords-1)*record.WordBytes)
	for i := range body {
		body[i] = byte(i)
	}
	s := hotScratch('a', 0, 1, body, 10)
	if len(s.Words) != hotSlotWords-1 {
		t.Fatalf("record of %d words", len(s.Words))
	}
	neighbours := []*scratch{hotScratch('b', 1<<48, 2, []byte("b"), 10), hotScratch('c', 2<<48, 3, []byte("c"), 10)}
	h.enter(neighbours[0], 0)
	h.enter(s, 0)
	h.enter(neighbours[1], 0)
	if !h.answers(s, 0, string(body)) || !h.answers(neighbours[0], 0, "b") || !h.answers(neighbours[1], 0, "c") {
		t.Error("a record that fills its slot does not stand beside others")
	}
}

func TestHotTierComparesTheWholeKey(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		hash func(i int) uint64
	}{
		{"same tag and set", func(i int) uint64 { return hotHash(7, 0, 1) | uint64(i) }},
		{"same hash", func(int) uint64 { return hotHash(7, 0, 1) }},
		{"tags 0 and 1 share one", func(i int) uint64 { return hotHash(uint16(i%2), 0, 1) | uint64(i) }},
	} {
		h := newHotTier(1)
		var in []*scratch
		for i := range hotWays {
			s := hotScratch(byte('a'+i), tc.hash(i), uint32(i), []byte{byte(i)}, 10)
			if !h.enter(s, 0) {
				t.Fatalf("%s: way %d is not free", tc.name, i)
			}
			in = append(in, s)
		}
		for i, s := range in {
			if !h.answers(s, 0, string([]byte{byte(i)})) {
				t.Errorf("%s: %d is not answered with its own", tc.name, i)
			}
			if slot, ok := h.find(s.Key.Hash, &s.Key, none); !ok || slot.node() != uint32(i) {
				t.Errorf("%s: found another than %d", tc.name, i)
			}
			if slot, ok := h.find(s.Key.Hash, nil, uint32(i)); !ok || slot.node() != uint32(i) {
				t.Errorf("%s: found another than node %d", tc.name, i)
			}
		}
		stranger := hotScratch('z', tc.hash(0), 9, nil, 10)
		if h.lookup(stranger, 0) {
			t.Errorf("%s: a name that is not there is answered", tc.name)
		}
		// One copy is removed. The others must stay.
		slot, _ := h.find(in[1].Key.Hash, &in[1].Key, none)
		h.clear(slot)
		for i, s := range in {
			if got := h.answers(s, 0, string([]byte{byte(i)})); got != (i != 1) {
				t.Errorf("%s: after 1 has gone, %d is answered: %v", tc.name, i, got)
			}
		}
	}
}

func TestHotTierDoesNotAnswerTheDead(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	s := hotScratch('a', 0, 1, []byte("x"), 10)
	h.enter(s, 0)
	if !h.answers(s, 10e9-1, "x") || h.answers(s, 10e9, "x") {
		t.Error("the last nanosecond of 10 s is not where the answer ends")
	}
	before := h.countOf(t, s)
	h.answers(s, 11e9, "x")
	if h.countOf(t, s) != before {
		t.Error("an access that got no answer was counted")
	}
}

func TestHotAccessesAreCountedUpToSaturation(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	s := hotScratch('a', 0, 1, []byte("x"), 10)
	h.enter(s, 0)
	for i := range uint64(20) {
		if got, want := h.countOf(t, s), min(1+i, hotSaturation); got != want {
			t.Fatalf("after %d hits the count is %d, want %d", i, got, want)
		}
		h.answers(s, 0, "x")
	}
}

func TestHotSlotGoesToTheChallengerThatComesOftenEnough(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	var in []*scratch
	for i := range hotWays {
		s := hotScratch(byte('a'+i), uint64(i)<<48, uint32(i), []byte{byte(i)}, 10)
		h.enter(s, 0)
		for range 2 + i { // the access counts become 3, 4, 5 and 6
			h.answers(s, 0, string([]byte{byte(i)}))
		}
		in = append(in, s)
	}
	challenger := hotScratch('z', 99<<48, 9, []byte("z"), 10)
	for round := range 3 {
		if h.enter(challenger, 0) {
			t.Fatalf("a challenger gets in at challenge %d", round+1)
		}
		for i, s := range in {
			if got, want := h.countOf(t, s), uint64(3+i-round-1); got != want {
				t.Fatalf("after challenge %d the count of %d is %d, want %d", round+1, i, got, want)
			}
		}
	}
	if !h.enter(challenger, 0) || !h.answers(challenger, 0, "z") {
		t.Fatal("a slot that lost all its accesses is not given up")
	}
	if h.answers(in[0], 0, "\x00") {
		t.Error("the one with the fewest accesses is still there")
	}
	for i, s := range in[1:] {
		if !h.answers(s, 0, string([]byte{byte(i + 1)})) {
			t.Errorf("%d, which had more accesses, is gone", i+1)
		}
	}
}

func TestHotSlotOfTheDeadIsClaimedFirst(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	for i := range hotWays {
		ttl := uint32(10)
		if i == 2 {
			ttl = 1
		}
		s := hotScratch(byte('a'+i), uint64(i)<<48, uint32(i), nil, ttl)
		h.enter(s, 0)
		h.answers(s, 0, "")
	}
	slot, ok := h.claim(9<<48, 1e9)
	if !ok || slot.node() != 2 {
		t.Errorf("claimed %v the slot of node %d, want that of 2", ok, slot.node())
	}
}

func TestHotSeqOnlyGrows(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	rng := rand.New(rand.NewPCG(1, 2))
	s := hotScratch('a', 0, 1, []byte("x"), 10)
	slot := h.slot(0, 0)
	last := uint64(0)
	for range 1000 {
		if rng.IntN(2) == 0 {
			h.put(slot, 0, s.Words)
			if slot.record[record.WordSeq] <= last || slot.record[record.WordSeq]&1 != 0 {
				t.Fatalf("seq %d of a finished record after %d", slot.record[record.WordSeq], last)
			}
		} else {
			h.clear(slot)
			if slot.record[record.WordSeq] < last || slot.record[record.WordSeq]&1 != 1 {
				t.Fatalf("seq %d of an empty slot after %d", slot.record[record.WordSeq], last)
			}
		}
		last = slot.record[record.WordSeq]
	}
}

// TestHotSlotThatIsZeroedIsNotAnswered tests a state that a reader may see while close empties the tier: the reader has
// loaded the tag before it was zeroed, the seq is zero already, and a part of the record is not.
func TestHotSlotThatIsZeroedIsNotAnswered(t *testing.T) {
	t.Parallel()
	h := newHotTier(1)
	s := hotScratch('a', 0, 1, []byte("the first half the second half.."), 10)
	h.enter(s, 0)
	slot := h.slot(0, 0)
	slot.words[0], slot.record[record.WordSeq] = 0, 0
	clear(slot.record[record.HeaderWords+3:]) // the reader must not take a body of which half is zero
	if r := newScratch(); h.lookup(&scratch{Answer: reply.Answer{Buffer: record.Buffer{Key: s.Key, Body: s.Body, Out: r.Out}}}, 0) {
		t.Error("a reader takes a slot that is being zeroed for a finished record")
	}
}

// TestHotReadersNeverSeeATornSlot has readers beside a writer. The writer replaces the records that they read, by records of
// the same key and of other keys with the same tag, set and even hash.
func TestHotReadersNeverSeeATornSlot(t *testing.T) {
	t.Parallel()
	const names, writes = 7, 12_000
	h := newHotTier(1)
	body := func(name byte, gen uint64) []byte {
		b := make([]byte, 8*(1+gen%22))
		for i := 0; i < len(b); i += 8 {
			binary.LittleEndian.PutUint64(b[i:], gen<<8|uint64(name))
		}
		return b
	}
	hash := func(name byte) uint64 { return 7<<48 | uint64(name/2) } // two names to a hash
	done := make(chan struct{})
	var wg sync.WaitGroup
	var hits atomic.Int64
	for range 3 {
		wg.Go(func() {
			s := newScratch()
			s.Body = 18
			for i := 0; ; i++ {
				if i%64 == 0 {
					select {
					case <-done:
						return
					default:
					}
				}
				name := byte(i % names)
				s.Key = hotKey(name, hash(name))
				if !h.lookup(s, 0) {
					continue
				}
				hits.Add(1)
				got := s.Out[s.Body:][:s.Entry.BodyLen]
				if len(got) < 8 {
					t.Errorf("body of %d bytes", len(got))
					return
				}
				gen := binary.LittleEndian.Uint64(got) >> 8
				if string(got) != string(body(name, gen)) || s.Entry.TTL != uint32(gen+1) || s.Entry.Node() != uint32(gen) {
					t.Errorf("name %d got % x, TTL %d, node %d", name, got, s.Entry.TTL, s.Entry.Node())
					return
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(5, 6))
	// On a busy machine the readers may start late.
	for gen := uint64(0); gen < writes || hits.Load() == 0 && gen < 1000*writes; gen++ {
		if gen%64 == 0 {
			runtime.Gosched()
		}
		name := byte(rng.IntN(names))
		s := hotScratch(name, hash(name), uint32(gen), body(name, gen), uint32(gen+1))
		slot, ok := h.find(s.Key.Hash, &s.Key, none)
		switch {
		case ok && rng.IntN(4) == 0:
			h.clear(slot)
		case ok:
			h.put(slot, s.Key.Hash, s.Words)
		default:
			h.enter(s, 0)
		}
	}
	close(done)
	wg.Wait()
	if hits.Load() == 0 {
		t.Error("no reader ever had a hit")
	}
}
