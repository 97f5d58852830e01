package record

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/subnet"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// These tests are about keys and headers. A torn header may have any content, and must do a reader no harm.

func FillRandom(rng *rand.Rand, b []byte) {
	for i := range b {
		b[i] = byte(rng.Uint64())
	}
}

func TestKeyIsPaddedWithZeros(t *testing.T) {
	t.Parallel()
	seed := MakeSeed(0)
	rng := rand.New(rand.NewPCG(1, 1))
	var k Key
	for i := range k.Bytes {
		k.Bytes[i] = 0xee
	}
	var name [wire.MaxName]byte
	for n := wire.MaxName; n >= 1; n-- { // from the longest one, so that bytes of a longer name would be seen
		FillRandom(rng, name[:n])
		k.Set(seed, name[:n], uint16(rng.Uint32()), uint16(rng.Uint32()), rng.IntN(2) == 0, rng.IntN(2) == 0)
		if k.Len != n+KeyTail {
			t.Fatalf("name of %d bytes: key of %d", n, k.Len)
		}
		for i := k.Len; i < Words(k.Len)*WordBytes; i++ {
			if k.Bytes[i] != 0 {
				t.Fatalf("name of %d bytes: padding byte %d is %#x", n, i, k.Bytes[i])
			}
		}
		if Words(k.Len)*WordBytes > MaxKey {
			t.Fatalf("name of %d bytes: key of %d words is over maxKey", n, Words(k.Len))
		}
	}
}

func TestKeyHasEveryPartOfTheQuestion(t *testing.T) {
	t.Parallel()
	seed := MakeSeed(0)
	name := []byte("\x03wWw\x07eXample\x03ORG\x00")
	lower := bytes.ToLower(name)
	make1 := func(name []byte, qtype, qclass uint16, do, cd bool) (k Key) {
		k.Set(seed, name, qtype, qclass, do, cd)
		return k
	}
	same := func(a, b Key) bool { return a.Len == b.Len && a.Hash == b.Hash && a.Bytes == b.Bytes }
	base := make1(name, 1, 1, false, false)
	if !same(base, make1(lower, 1, 1, false, false)) {
		t.Error("letters in upper case make another key")
	}
	if !bytes.Equal(base.Name(), lower) || base.Qtype() != 1 || base.Qclass() != 1 || base.Bits() != 0 {
		t.Error("the key does not give back what it was made of")
	}
	norec := base
	norec.SetRD(seed, false)
	both := norec
	if both.SetRD(seed, true); !same(base, both) || !base.RD() || norec.RD() {
		t.Error("RD does not come back")
	}
	others := []Key{
		base,
		make1([]byte("\x03wwx\x07example\x03org\x00"), 1, 1, false, false),
		make1(name, 28, 1, false, false),
		make1(name, 256, 1, false, false),
		make1(name, 1, 3, false, false),
		make1(name, 1, 1, true, false),
		make1(name, 1, 1, false, true),
		make1(name, 1, 1, true, true),
		norec,
	}
	for i := range others {
		for j := range i {
			if others[i].Hash == others[j].Hash || others[i].Bytes == others[j].Bytes {
				t.Errorf("keys %d and %d are the same", i, j)
			}
		}
	}
	if b := others[7].Bits(); b != KeyDO|KeyCD {
		t.Errorf("bits %#x", b)
	}
}

func TestKeyWithSubnet(t *testing.T) {
	t.Parallel()
	seed := MakeSeed(3)
	var base, k Key
	name := make([]byte, wire.MaxName)
	copy(name, "\x03www\x07example\x03org")
	for _, n := range []int{1, 17, wire.MaxName} {
		base.Set(seed, name[:n], 28, 1, true, false)
		seen := map[string]string{string(base.Bytes[:base.Len]): ""}
		for _, text := range []string{"0/0", "10.1.1.0/24", "10.1.0.0/16", "10.1.1.0/24/28", "255.255.255.255/32", "2001:db8::/48", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"} {
			p, ok := subnet.Parse(text)
			if !ok {
				t.Fatal(text)
			}
			k = base
			for i := range k.Bytes[k.Len:] {
				k.Bytes[k.Len+i] = 0xee
			}
			k.SetSubnet(seed, p)
			k.SetRD(seed, false)
			if !bytes.Equal(k.Name(), base.Name()) || k.Qtype() != 28 || k.Qclass() != 1 || k.Bits()&^keySubnet != KeyDO|KeyNoRD || k.Subnet() != p {
				t.Errorf("%s: the key does not give back what it was made of", text)
			}
			if other, twice := seen[string(k.Bytes[:k.Len])]; twice {
				t.Errorf("%s has the key of %q", text, other)
			}
			seen[string(k.Bytes[:k.Len])] = text
			for i := k.Len; i < Words(k.Len)*WordBytes; i++ {
				if k.Bytes[i] != 0 {
					t.Fatalf("%s: padding byte %d is %#x", text, i, k.Bytes[i])
				}
			}
			if Words(k.Len)*WordBytes > MaxKey {
				t.Fatalf("%s: key of %d words is over MaxKey", text, Words(k.Len))
			}
			k.SetRD(seed, true)
			if k.SetSubnet(seed, subnet.Prefix{}); !k.Equal(&base) || k.Subnet().Is() {
				t.Errorf("%s: the key without it is another one", text)
			}
		}
	}
}

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
		{5, -1, 5}, // now was read a moment before the answer was stored
	} {
		e := Entry{TTL: tc.ttl, Stored: 1e18}
		if got := e.Remaining(e.Stored + tc.age); got != tc.want {
			t.Errorf("TTL %d after %d ns: %d, want %d", tc.ttl, tc.age, got, tc.want)
		}
	}
}

func TestPatchTTLReachesEveryRecord(t *testing.T) {
	t.Parallel()
	for records := range 10 {
		s := NewBuffer()
		s.Key.Set(MakeSeed(0), []byte{0}, 1, 1, false, false)
		body := bytes.Repeat([]byte{0xaa}, records*16)
		want := slices.Clone(body)
		for i := range records {
			s.TTLAt = append(s.TTLAt, uint16(i*16+5))
			binary.BigEndian.PutUint32(want[i*16+5:], 0x01020304)
		}
		s.BuildRecord(&Entry{Counts: [3]uint16{uint16(records)}}, body, "")
		s.Body = 17
		s.Entry = LoadEntry(s.Words)
		s.CopyAnswer(s.Words)
		s.PatchTTL(0x01020304)
		if got := s.Out[s.Body:][:len(want)]; !bytes.Equal(got, want) {
			t.Errorf("%d records: % x, want % x", records, got, want)
		}
	}
}

// FuzzEntryHeader gives a reader words of any content, as it may meet them while a writer changes a record.
func FuzzEntryHeader(f *testing.F) {
	s := NewBuffer()
	s.Key.Set(MakeSeed(0), []byte("\x03www\x07example\x03org\x00"), 1, 1, false, false)
	rng := rand.New(rand.NewPCG(4, 5))
	for _, n := range []int{0, 30, 200} {
		body := make([]byte, n)
		FillRandom(rng, body)
		s.TTLAt = append(s.TTLAt[:0], 0)
		s.BuildRecord(&Entry{Stored: 7, TTL: 300, Flags: FlagDenial | FlagRA, Counts: [3]uint16{1}}, body, "*.example.org.")
		seed := make([]byte, len(s.Words)*WordBytes)
		LoadBytes(seed, s.Words)
		f.Add(seed)
	}
	f.Add(bytes.Repeat([]byte{0xff}, 512))
	f.Add(make([]byte, HeaderWords*WordBytes))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := make([]uint64, len(b)/WordBytes)
		if len(w) < HeaderWords {
			return
		}
		for i := range w {
			w[i] = binary.LittleEndian.Uint64(b[i*WordBytes:])
		}
		w = slices.Clip(w)
		readAnything(t, w, w[wordHash])
	})
}

// readAnything does all that a reader does with a record. It panics if a reader would.
func readAnything(t testing.TB, w []uint64, hash uint64) {
	e := LoadEntry(w)
	if !e.Sane(len(w)) {
		return
	}
	if e.Size < HeaderWords || e.Size > len(w) || e.bodyAt > e.offsetsAt || e.offsetsAt > e.wildcardAt || e.wildcardAt > e.Size {
		t.Fatalf("sane, but its parts are at %d %d %d of %d words", e.bodyAt, e.offsetsAt, e.wildcardAt, e.Size)
	}
	s := NewBuffer()
	s.Body = 300
	s.Key.Len, s.Key.Hash = e.KeyLen, hash
	LoadBytes(s.Key.Bytes[:Words(e.KeyLen)*WordBytes], w[HeaderWords:][:Words(e.KeyLen)])
	if !e.HasKey(w, &s.Key) {
		t.Fatal("a record does not have its own key")
	}
	s.Entry = e
	s.CopyAnswer(w)
	if e.BodyLen > len(s.Out)-s.Body-wire.OPTLen || len(s.Wildcard) != e.WildcardLen() || len(s.Offsets) < (e.TtlFields()+3)/4 {
		t.Fatalf("copied %d bytes of body, %d of wildcard, %d words of offsets of %+v", len(s.Out)-s.Body, len(s.Wildcard), len(s.Offsets), e)
	}
}

func TestAnyHeaderIsReadWithinBounds(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(6, 7))
	sane := 0
	for range 30_000 {
		w := make([]uint64, HeaderWords+rng.IntN(60))
		for i := range w {
			w[i] = rng.Uint64()
			if rng.IntN(2) == 0 { // some lengths must be small enough to be sane
				w[i] &= 0x003f_003f_0000_003f
			}
		}
		w = slices.Clip(w)
		if e := LoadEntry(w); e.Sane(len(w)) {
			sane++
		}
		readAnything(t, w, w[wordHash])
	}
	if sane < 300 {
		t.Errorf("only %d headers were sane: the test tests nothing", sane)
	}
}
