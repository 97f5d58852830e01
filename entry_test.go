package optcache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// Here is the record: what is written is read again, and a header that says anything at all
// leads nobody astray.

// sample is one answer as a test wants it stored.
type sample struct {
	flags    recordFlags
	ttl      uint32
	stored   int64
	counts   [3]uint16
	ttlAt    []uint16
	body     []byte
	wildcard string
	excess   int
}

func (a *sample) header() entry {
	return entry{stored: a.stored, ttl: a.ttl, flags: a.flags, counts: a.counts, link: makeLink(0, 0, a.excess)}
}

// build puts the record of an answer for s.key together.
func (a *sample) build(s *scratch) entry {
	e := a.header()
	s.ttlAt = append(s.ttlAt[:0], a.ttlAt...)
	s.buildRecord(&e, a.body, a.wildcard)
	return e
}

// check compares what a reader has got in s with the answer, and returns what differs.
func (a *sample) check(s *scratch) string {
	e := &s.entry
	switch {
	case e.flags != a.flags:
		return "flags"
	case e.ttl != a.ttl:
		return "ttl"
	case e.stored != a.stored:
		return "stored"
	case e.counts != a.counts:
		return "counts"
	case e.bodyLen != len(a.body) || !bytes.Equal(s.out[s.body:][:e.bodyLen], a.body):
		return "body"
	case string(s.wildcard) != a.wildcard:
		return "wildcard"
	case e.excess() != a.excess:
		return "excess"
	case e.ttlFields() != len(a.ttlAt):
		return "number of TTL offsets"
	}
	for i, at := range a.ttlAt {
		if uint16(s.offsets[i/4]>>(i%4*16)) != at {
			return "TTL offsets"
		}
	}
	return ""
}

// randomSample makes an answer of a class with a body of n bytes.
func randomSample(rng *rand.Rand, c class, n int, now int64) sample {
	a := sample{
		flags:  recordFlags(rng.IntN(128)) &^ flagRcode,
		ttl:    1 + uint32(rng.IntN(20)),
		excess: rng.IntN(3) * rng.IntN(1000),
		stored: now,
		body:   make([]byte, n),
	}
	if c == denial {
		a.flags |= flagDenial | recordFlags(rng.IntN(4)) // NOERROR, FORMERR, SERVFAIL, NXDOMAIN
	}
	fillRandom(rng, a.body)
	records := min(rng.IntN(12), n/11)
	if rng.IntN(10) == 0 {
		a.flags |= flagCompressed
	}
	for i := range records {
		a.counts[rng.IntN(3)]++
		if a.flags&flagCompressed == 0 {
			a.ttlAt = append(a.ttlAt, uint16(i*11))
		}
	}
	if rng.IntN(4) == 0 {
		a.wildcard = string(bytes.Repeat([]byte{'w'}, rng.IntN(260)))
	}
	return a
}

func fillRandom(rng *rand.Rand, b []byte) {
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
		{"words of the header", headerWords, 6},
		{"word of the seq", wordSeq, 0},
		{"a line, in words", lineBytes / wordBytes, 8},
		{"largest key, in whole words", maxKey % wordBytes, 0},
		{"largest key holds the longest name", max(maxKey, wire.MaxName+keyTail), maxKey},
		{"a hot slot, in whole lines", hotSlotWords * wordBytes % lineBytes, 0},
		{"ways of a hot set fill its word of tags", hotWays * hotTagBits, 64},
		{"memory of a hot set", hotSetBytes, hotWays*hotSlotWords*8 + 8},
		{"granule of aligned records", alignedGranuleWords * wordBytes, lineBytes},
		{"flags leave the rcode alone", int(flagRcode & (flagAA | flagRA | flagAD | flagDenial | flagCompressed | flagMessage)), 0},
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
			shards: 4, capacity: [classes]int{100, 60}, granuleWords: granule,
			pieces: [classes]int{2, 1}, buckets: 7, hotSets: 3, hotAfter: 3,
		})
		seen := map[uintptr]string{}
		line := func(what string, w []uint64) {
			at := uintptr(unsafe.Pointer(&w[0]))
			if at%lineBytes != 0 {
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
			for c := range sh.regions {
				r := &sh.regions[c]
				for p := range st.pieces[c] {
					piece := r.at(p * pieceWords)
					line(fmt.Sprintf("piece %d of class %d in shard %d", p, c, i), piece)
					if end := r.at((p+1)*pieceWords - 1); len(piece) != pieceWords || len(end) != 1 || &end[0] != &piece[pieceWords-1] {
						t.Errorf("piece of %d words, at its end %d", len(piece), len(end))
					}
				}
				if w := r.at(st.pieces[c] * pieceWords); w != nil {
					t.Errorf("class %d: %d words behind the last piece", c, len(w))
				}
				if got := r.alloc.Cap(); got != st.pieces[c]*st.pieceGranules() {
					t.Errorf("class %d: the allocator has %d granules", c, got)
				}
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

func TestKeyIsPaddedWithZeros(t *testing.T) {
	t.Parallel()
	seed := maphash.MakeSeed()
	rng := rand.New(rand.NewPCG(1, 1))
	var k key
	for i := range k.bytes {
		k.bytes[i] = 0xee
	}
	var name [wire.MaxName]byte
	for n := wire.MaxName; n >= 1; n-- { // from the longest: leftovers are there to be seen
		fillRandom(rng, name[:n])
		k.set(seed, name[:n], uint16(rng.Uint32()), uint16(rng.Uint32()), rng.IntN(2) == 0, rng.IntN(2) == 0)
		if k.n != n+keyTail {
			t.Fatalf("name of %d bytes: key of %d", n, k.n)
		}
		for i := k.n; i < words(k.n)*wordBytes; i++ {
			if k.bytes[i] != 0 {
				t.Fatalf("name of %d bytes: padding byte %d is %#x", n, i, k.bytes[i])
			}
		}
		if words(k.n)*wordBytes > maxKey {
			t.Fatalf("name of %d bytes: key of %d words is over maxKey", n, words(k.n))
		}
	}
}

func TestKeyHasEveryPartOfTheQuestion(t *testing.T) {
	t.Parallel()
	seed := maphash.MakeSeed()
	name := []byte("\x03wWw\x07eXample\x03ORG\x00")
	lower := bytes.ToLower(name)
	make1 := func(name []byte, qtype, qclass uint16, do, cd bool) (k key) {
		k.set(seed, name, qtype, qclass, do, cd)
		return k
	}
	same := func(a, b key) bool { return a.n == b.n && a.hash == b.hash && a.bytes == b.bytes }
	base := make1(name, 1, 1, false, false)
	if !same(base, make1(lower, 1, 1, false, false)) {
		t.Error("letters in upper case make another key")
	}
	if !bytes.Equal(base.name(), lower) || base.qtype() != 1 || base.qclass() != 1 || base.bits() != 0 {
		t.Error("the key does not give back what it was made of")
	}
	others := []key{
		base,
		make1([]byte("\x03wwx\x07example\x03org\x00"), 1, 1, false, false),
		make1(name, 28, 1, false, false),
		make1(name, 256, 1, false, false),
		make1(name, 1, 3, false, false),
		make1(name, 1, 1, true, false),
		make1(name, 1, 1, false, true),
		make1(name, 1, 1, true, true),
	}
	for i := range others {
		for j := range i {
			if others[i].hash == others[j].hash || others[i].bytes == others[j].bytes {
				t.Errorf("keys %d and %d are the same", i, j)
			}
		}
	}
	if b := others[7].bits(); b != keyDO|keyCD {
		t.Errorf("bits %#x", b)
	}
}

func TestRecordRoundTrip(t *testing.T) {
	t.Parallel()
	seed := maphash.MakeSeed()
	rng := rand.New(rand.NewPCG(2, 3))
	s, into := newScratch(), newScratch()
	lengths := []int{0, 1, 7, 8, 9, 11, 63, 64, 65, 16383, 16384, 65534, 65535}
	for round := range 2000 {
		var name [wire.MaxName]byte
		n := 1 + rng.IntN(wire.MaxName)
		fillRandom(rng, name[:n])
		s.key.set(seed, name[:n], uint16(rng.Uint32()), uint16(rng.Uint32()), rng.IntN(2) == 0, rng.IntN(2) == 0)
		length := rng.IntN(300)
		switch {
		case round < len(lengths):
			length = lengths[round]
		case round%50 == 0:
			length = rng.IntN(maxMessage + 1)
		}
		a := randomSample(rng, class(rng.IntN(int(classes))), length, rng.Int64())
		if round%100 == 0 && a.flags&flagCompressed == 0 { // as many records as a body can have
			a.counts, a.ttlAt = [3]uint16{}, nil
			for i := range length / 11 {
				a.counts[i%3]++
				a.ttlAt = append(a.ttlAt, uint16(i*11))
			}
		}
		e := a.build(s)
		w := slices.Clone(s.record)
		w[wordSeq] = rng.Uint64()
		got := loadEntry(w)
		e.seq = w[wordSeq]
		if got != e {
			t.Fatalf("round %d: header %+v, want %+v", round, got, e)
		}
		if got.class() != a.flags.class() {
			t.Fatalf("round %d: class %d", round, got.class())
		}
		if got.size != len(w) || !got.sane(len(w)) || got.sane(len(w)-1) {
			t.Fatalf("round %d: size %d of %d words, sane %v, with a word less %v", round, got.size, len(w), got.sane(len(w)), got.sane(len(w)-1))
		}
		if !got.hasKey(w, &s.key) {
			t.Fatalf("round %d: another key", round)
		}
		// Any bit of the key that differs makes another one.
		bit := rng.IntN(s.key.n * 8)
		w[headerWords+bit/64] ^= 1 << (bit % 64)
		if got.hasKey(w, &s.key) {
			t.Fatalf("round %d: bit %d of the key does not count", round, bit)
		}
		w[headerWords+bit/64] ^= 1 << (bit % 64)

		// The question in front of the body stays as it is, however large the body.
		into.body = wire.HeaderLen + n + questionTail
		into.out = into.out[:cap(into.out)]
		fillRandom(rng, into.out[:into.body])
		question := slices.Clone(into.out[:into.body])
		into.entry = got
		into.copyAnswer(w)
		if diff := a.check(into); diff != "" {
			t.Fatalf("round %d: %s differs", round, diff)
		}
		if !bytes.Equal(into.out[:into.body], question) {
			t.Fatalf("round %d: copying the answer has changed the question", round)
		}
		if room := len(into.out) - into.body - got.bodyLen; room < wire.OPTLen {
			t.Fatalf("round %d: %d bytes left for OPT", round, room)
		}
	}
}

func (e *entry) class() class { return e.flags.class() }

func TestTTLCountsDownInWholeSeconds(t *testing.T) {
	t.Parallel()
	const second = int64(1e9)
	for _, tc := range []struct {
		ttl  uint32
		age  int64
		want int64
	}{
		{5, 0, 5}, {5, 1, 5}, {5, second - 1, 5}, {5, second, 4},
		{5, 5*second - 1, 1}, {5, 5 * second, 0}, {5, 6 * second, -1},
		{0, 0, 0}, {1<<31 - 1, 0, 1<<31 - 1}, {1<<31 - 1, second << 31, -1},
		{5, -1, 5}, // another core's clock was read a moment earlier
	} {
		e := entry{ttl: tc.ttl, stored: 1e18}
		if got := e.remaining(e.stored + tc.age); got != tc.want {
			t.Errorf("TTL %d after %d ns: %d, want %d", tc.ttl, tc.age, got, tc.want)
		}
	}
}

func TestPatchTTLReachesEveryRecord(t *testing.T) {
	t.Parallel()
	for records := range 10 {
		s := newScratch()
		s.key.set(maphash.MakeSeed(), []byte{0}, 1, 1, false, false)
		a := sample{body: bytes.Repeat([]byte{0xaa}, records*16), counts: [3]uint16{uint16(records)}}
		want := slices.Clone(a.body)
		for i := range records {
			a.ttlAt = append(a.ttlAt, uint16(i*16+5))
			binary.BigEndian.PutUint32(want[i*16+5:], 0x01020304)
		}
		a.build(s)
		s.body = 17
		s.entry = loadEntry(s.record)
		s.copyAnswer(s.record)
		s.patchTTL(0x01020304)
		if got := s.out[s.body:][:len(want)]; !bytes.Equal(got, want) {
			t.Errorf("%d records: % x, want % x", records, got, want)
		}
	}
}

// FuzzEntryHeader is a reader before words that a writer is tearing: they may say anything.
func FuzzEntryHeader(f *testing.F) {
	s := newScratch()
	s.key.set(maphash.MakeSeed(), []byte("\x03www\x07example\x03org\x00"), 1, 1, false, false)
	rng := rand.New(rand.NewPCG(4, 5))
	for _, n := range []int{0, 30, 200} {
		a := randomSample(rng, denial, n, 7)
		a.build(s)
		seed := make([]byte, len(s.record)*wordBytes)
		loadBytes(seed, s.record)
		f.Add(seed)
	}
	f.Add(bytes.Repeat([]byte{0xff}, 512))
	f.Add(make([]byte, headerWords*wordBytes))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := make([]uint64, len(b)/wordBytes)
		if len(w) < headerWords {
			return
		}
		for i := range w {
			w[i] = binary.LittleEndian.Uint64(b[i*wordBytes:])
		}
		w = slices.Clip(w)
		readAnything(t, w, w[wordHash])
	})
}

// readAnything does what a reader does with a record. It panics where a reader would.
func readAnything(t testing.TB, w []uint64, hash uint64) {
	e := loadEntry(w)
	if !e.sane(len(w)) {
		return
	}
	if e.size < headerWords || e.size > len(w) || e.bodyAt > e.offsetsAt || e.offsetsAt > e.wildcardAt || e.wildcardAt > e.size {
		t.Fatalf("sane, but its parts are at %d %d %d of %d words", e.bodyAt, e.offsetsAt, e.wildcardAt, e.size)
	}
	s := newScratch()
	s.body = 300
	s.key.n, s.key.hash = e.keyLen, hash
	loadBytes(s.key.bytes[:words(e.keyLen)*wordBytes], w[headerWords:][:words(e.keyLen)])
	if !e.hasKey(w, &s.key) {
		t.Fatal("a record does not have its own key")
	}
	s.entry = e
	s.copyAnswer(w)
	if e.bodyLen > len(s.out)-s.body-wire.OPTLen || len(s.wildcard) != e.wildcardLen() || len(s.offsets) < (e.ttlFields()+3)/4 {
		t.Fatalf("copied %d bytes of body, %d of wildcard, %d words of offsets of %+v", len(s.out)-s.body, len(s.wildcard), len(s.offsets), e)
	}
}

func TestAnyHeaderIsReadWithinBounds(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(6, 7))
	sane := 0
	for range 30_000 {
		w := make([]uint64, headerWords+rng.IntN(60))
		for i := range w {
			w[i] = rng.Uint64()
			if rng.IntN(2) == 0 { // lengths that come near the truth
				w[i] &= 0x003f_003f_0000_003f
			}
		}
		w = slices.Clip(w)
		if e := loadEntry(w); e.sane(len(w)) {
			sane++
		}
		readAnything(t, w, w[wordHash])
	}
	if sane < 300 {
		t.Errorf("only %d headers were sane: the test tests nothing", sane)
	}
}
