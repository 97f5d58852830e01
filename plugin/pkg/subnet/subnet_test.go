package subnet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
)

// question is the prefix of a question, from its text.
func question(t testing.TB, s string) Prefix {
	t.Helper()
	n := netip.MustParsePrefix(s)
	p, _, ok := Of(n.Addr().AsSlice(), uint8(n.Bits()))
	if !ok {
		t.Fatalf("%q is no prefix", s)
	}
	return p
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		asked    string
		scope    uint8
		kept     string
		question string
		covered  bool
	}{
		{"10.1.1.0/24", 24, "10.1.1.0/24", "10.1.1.0/24", true},
		{"10.1.1.0/24", 24, "10.1.1.0/24", "10.1.1.7/32", true},
		{"10.1.1.0/24", 24, "10.1.1.0/24", "10.1.2.0/24", false},
		{"10.1.1.0/24", 24, "10.1.1.0/24", "10.1.0.0/16", false},
		{"10.1.1.0/24", 16, "10.1.0.0/16", "10.1.200.0/24", true},
		{"10.1.1.0/24", 16, "10.1.0.0/16", "10.2.1.0/24", false},
		{"10.1.1.0/24", 20, "10.1.0.0/20", "10.1.15.0/24", true},
		{"10.1.1.0/24", 20, "10.1.0.0/20", "10.1.16.0/24", false},
		{"10.1.1.0/24", 1, "0.0.0.0/1", "127.0.0.0/8", true},
		{"10.1.1.0/24", 1, "0.0.0.0/1", "128.0.0.0/8", false},
		{"10.1.1.0/24", 28, "10.1.1.0/24/28", "10.1.1.0/24", true},
		{"10.1.1.0/24", 28, "10.1.1.0/24/28", "10.1.1.0/28", false}, // may get a better answer
		{"10.1.1.0/24", 28, "10.1.1.0/24/28", "10.1.0.0/16", false},
		{"2001:db8:0:100::/56", 48, "2001:db8::/48", "2001:db8:0:200::/56", true},
		{"2001:db8:0:100::/56", 56, "2001:db8:0:100::/56", "2001:db8:0:200::/56", false},
		{"2001:db8:0:100::/56", 8, "2000::/8", "32.1.0.0/16", false}, // the same bytes in another family
	} {
		p := question(t, c.asked).Answered(c.scope)
		if got := p.Covers(question(t, c.question)); got != c.covered || p.String() != c.kept {
			t.Errorf("%s with SCOPE %d: %s, covers %s: %v, want %s, %v", c.asked, c.scope, p, c.question, got, c.kept, c.covered)
		}
	}
	private, _, _ := Of([]byte{0, 0, 0, 0}, 0)
	six, _, _ := Of(make([]byte, 16), 0)
	if private.String() != "0/0" || private != six || !private.Covers(six) || private.Covers(question(t, "10.0.0.0/8")) || (Prefix{}).Covers(Prefix{}) {
		t.Error("SOURCE 0 is not apart")
	}
	if _, exact, ok := Of([]byte{10, 1, 1, 1}, 24); exact || !ok {
		t.Error("bits beyond SOURCE are not seen")
	}
	if _, _, ok := Of([]byte{10, 1, 1, 1}, 33); ok {
		t.Error("/33 is a prefix")
	}
}

func TestParse(t *testing.T) {
	for _, s := range []string{"", "/", "0", "0/0/0", "10.0.0.0", "10.0.0.0/0", "10.0.0.0/33", "10.0.0.1/24", "10.0.0.0/24/23", "10.0.0.0/24/33", "10.0.0.0/24/24",
		"10.0.0.0/+8", "10.0.0.0/08", "::/0", "fe80::%eth0/64", "2001:DB8::/32", "2001:db8::/32/129", "10.0.0.0/8/9/10", "10.0.0.0/8 "} {
		if p, ok := Parse(s); ok {
			t.Errorf("%q is taken for %s", s, p)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"0/0", "10.1.1.0/24", "10.1.1.0/24/28", "2001:db8::/48", "::ffff:10.0.0.0/104"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, ok := Parse(s)
		if !ok {
			return
		}
		if p.String() != s || !p.valid() || len(s) > MaxText {
			t.Fatalf("%q became %q", s, p)
		}
		var b [MaxBytes]byte
		n := p.Put(b[:])
		if Size(b[:n]) != n || Read(b[:n]) != p {
			t.Fatalf("%q does not come back from bytes", s)
		}
	})
}

func TestTable(t *testing.T) {
	shape := func(length uint8) Shape { return Shape{IPv4, length, length} }
	worth := map[uint64]int{}
	worthOf := func(r uint64) int { return worth[r] }
	tb := NewTable(3, 100, 1000)
	full := 0 // records that have gone because their name was full
	add := func(name uint64, s Shape, record uint64, bytes int) []uint64 {
		out, own := tb.Add(name, s, record, bytes, worthOf)
		full += own
		return out
	}
	add(1, shape(16), 1, 10)
	add(1, shape(24), 2, 10)
	if got := tb.Shapes(1); !slices.Equal(got, []Shape{shape(24), shape(16)}) {
		t.Errorf("shapes %v", got)
	}
	if tb.Shapes(1+uint64(len(tb.buckets))) != nil {
		t.Error("a name in the same bucket has shapes")
	}
	add(1, shape(20), 3, 10)
	if out := add(1, shape(20), 3, 20); out != nil || tb.Len() != 3 || tb.bytes != 40 { // again, and larger
		t.Errorf("out %v, %d records, %d bytes", out, tb.Len(), tb.bytes)
	}
	// Of a full name goes what is gone, then what was asked for least, then the oldest.
	worth = map[uint64]int{1: 5, 2: 0, 3: -1}
	if out := add(1, shape(24), 4, 10); !slices.Equal(out, []uint64{3}) {
		t.Errorf("out %v", out)
	}
	worth[4] = 7
	if out := add(1, shape(24), 5, 10); !slices.Equal(out, []uint64{2}) {
		t.Errorf("out %v", out)
	}
	worth = map[uint64]int{}
	if out := add(1, shape(24), 6, 10); len(out) != 1 {
		t.Errorf("out %v", out)
	}
	if names, records := tb.Lens(); names != 1 || records != 3 || full != 3 {
		t.Errorf("%d names, %d records, %d have gone for others", names, records, full)
	}
	// There is room for 1000 bytes.
	var out []uint64
	for i := range uint64(40) {
		out = append(out, add(100+i, shape(24), 100+i, 50)...)
	}
	if names, records := tb.Lens(); names < records-2 || names > records || full != 3 {
		t.Errorf("%d names, %d records, %d have gone for others", names, records, full)
	}
	if tb.bytes > 1000 || tb.bytes < 900 || len(out)+tb.Len() != 43 {
		t.Errorf("%d bytes, %d out, %d records", tb.bytes, len(out), tb.Len())
	}
	for _, r := range out {
		if r >= 100 && tb.Shapes(r) != nil {
			t.Errorf("name %d has no record, and shapes", r)
		}
	}
	// A record that is larger than all room is alone.
	if add(7, shape(24), 7, 5000); tb.names != 1 || tb.Len() != 1 || tb.Shapes(7) == nil {
		t.Errorf("%d records", tb.Len())
	}
	other := NewTable(3, 100, 100_000)
	other.Take(tb, func(r uint64) uint64 { return r + 1 })
	if other.Len() != 1 || other.Shapes(7) == nil {
		t.Errorf("%d records are taken over", other.Len())
	}
}

// A name that many prefixes ask for once keeps what is asked for again and again.
// Names that are asked for alike keep as many records, those in the same bucket, too.
func TestNamesInABucketShare(t *testing.T) {
	tb := NewTable(1000, 70, 1<<20)
	for i := range uint64(7000) {
		name := i % 7
		if name < 3 {
			name *= uint64(len(tb.buckets))
		}
		tb.Add(name, Shape{IPv4, 24, 24}, i, 10, func(uint64) int { return 0 })
	}
	for i := range uint64(7) {
		name := i
		if name < 3 {
			name *= uint64(len(tb.buckets))
		}
		if n := tb.find(name); n == nil || len(n.entries) < 9 || len(n.entries) > 11 {
			t.Errorf("name %d: %+v, want 10 records", i, n)
		}
	}
}

func TestFloodOfPrefixes(t *testing.T) {
	tb := NewTable(100, 10_000, 1<<30)
	popular := func(r uint64) int {
		if r < 50 {
			return 3
		}
		return 0
	}
	left := make(map[uint64]bool)
	for r := range uint64(50) {
		left[r] = true
	}
	for r := range uint64(10_000) {
		out, _ := tb.Add(1, Shape{IPv4, 24, 24}, r, 128, popular)
		for _, gone := range out {
			delete(left, gone)
		}
	}
	if tb.Len() != 100 || len(left) < 40 { // one in eight goes before the first newcomer
		t.Errorf("%d records, %d of the 50 popular ones", tb.Len(), len(left))
	}
}

func TestTableConcurrent(t *testing.T) {
	tb := NewTable(10, 200, 1<<20)
	var all sync.WaitGroup
	for g := range uint64(4) {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(g, 1))
			for range 3000 {
				name := rng.Uint64N(60)
				tb.Add(name, Shape{IPv6, uint8(1 + rng.UintN(56)), 56}, rng.Uint64N(1000), 100, func(r uint64) int { return int(r % 3) })
				if shapes := tb.Shapes(rng.Uint64N(60)); len(shapes) > 10 {
					t.Errorf("%d shapes", len(shapes))
				}
			}
		})
	}
	all.Wait()
	if tb.Len() > 200 {
		t.Errorf("%d records", tb.Len())
	}
	n, names := 0, 0
	for i := range tb.buckets {
		for nm := tb.buckets[i].Load(); nm != nil; nm = nm.next.Load() {
			n += len(nm.entries)
			names++
		}
	}
	if n != tb.Len() || names != tb.names || tb.bytes != int64(n)*100 {
		t.Errorf("%d records in lists, %d counted, %d bytes", n, tb.Len(), tb.bytes)
	}
}

func BenchmarkShapes(b *testing.B) {
	tb := NewTable(100, 10_000, 1<<30)
	for i := range uint64(5000) {
		tb.Add(i, Shape{IPv4, 24, 24}, i, 128, func(uint64) int { return 0 })
	}
	b.ReportAllocs()
	for i := uint64(0); b.Loop(); i++ {
		tb.Shapes(i % 6000)
	}
}

func ExamplePrefix_String() {
	p, _ := Parse("10.1.1.0/24")
	fmt.Println(p.Answered(16))
	// Output: 10.1.0.0/16
}
