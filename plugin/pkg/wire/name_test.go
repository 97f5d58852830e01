package wire

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestPackName(t *testing.T) {
	t.Parallel()
	label63 := strings.Repeat("a", 63)
	full := strings.Repeat(label63+".", 3) + strings.Repeat("b", 61) + "." // 255 octets
	tests := []struct {
		name string
		wire string // "" when refused
	}{
		{".", "\x00"},
		{"a.", "\x01a\x00"},
		{"www.example.org.", "\x03www\x07example\x03org\x00"},
		{"wWw.eXample.ORG.", "\x03wWw\x07eXample\x03ORG\x00"},
		{"_dns.resolver.arpa.", "\x04_dns\x08resolver\x04arpa\x00"},
		{`a\.b.c.`, "\x03a.b\x01c\x00"},
		{`\..`, "\x01.\x00"},
		{`\046.`, "\x01.\x00"},
		{`\\.`, "\x01\\\x00"},
		{`\000\255\065.`, "\x03\x00\xffA\x00"},
		{`\@\032.`, "\x02@ \x00"},
		{"é.", "\x02\xc3\xa9\x00"},
		{"./.", ""},
		{"a./.", "\x01a\x01/\x00"}, // '/' is '.' + 1: a borrow would make it a dot

		{"", ""},
		{"a", ""},
		{"www.example.org", ""},
		{"..", ""},
		{".a.", ""},
		{"a..", ""},
		{"a..b.", ""},
		{"abcdefgh..", ""},
		{`\`, ""},
		{`\.`, ""},
		{`a.b\.`, ""},
		{`a\\\.`, ""},
		{`\12`, ""},
		{`\999`, ""},
		{`a.\`, ""},

		{`\12.`, ""},   // stricter than dns
		{`\1a2.`, ""},  // stricter than dns
		{`\256.`, ""},  // stricter than dns
		{`\999.`, ""},  // stricter than dns
		{`é\.`, ""},    // stricter than dns
		{`é\\.`, ""},   // as dns
		{`a\é.b.`, ""}, // stricter than dns

		{label63 + ".", "\x3f" + label63 + "\x00"},
		{label63 + "a.", ""},
		{`\097` + label63[1:] + ".", "\x3f" + label63 + "\x00"},
		{`\097` + label63 + ".", ""},
		{full, strings.Repeat("\x3f"+label63, 3) + "\x3d" + strings.Repeat("b", 61) + "\x00"},
		{"b" + full[1:len(full)-1] + "b.", ""},
		{strings.Repeat("a.", 127), strings.Repeat("\x01a", 127) + "\x00"},
		{strings.Repeat("a.", 128), ""},
		{strings.Repeat(`\097.`, 127), strings.Repeat("\x01a", 127) + "\x00"},
		{strings.Repeat(`\097.`, 128), ""},
		{strings.Repeat(`\097.`, 126) + `\097a.`, ""},
	}
	for _, tc := range tests {
		dst := make([]byte, MaxName)
		n, ok := PackName(dst, tc.name)
		if ok != (tc.wire != "") || string(dst[:n]) != tc.wire {
			t.Errorf("PackName(%q) = %q, %v, want %q", tc.name, dst[:n], ok, tc.wire)
		}
		checkPackName(t, tc.name)
	}
}

// checkPackName compares PackName with dns.PackDomainName.
func checkPackName(t *testing.T, name string) {
	t.Helper()
	want := make([]byte, MaxName)
	wantN, err := dns.PackDomainName(name, want, 0, nil, false)

	// PackName must not write behind MaxName bytes.
	got := bytes.Repeat([]byte{0xAA}, MaxName+8)
	n, ok := PackName(got, name)
	if !bytes.Equal(got[MaxName:], bytes.Repeat([]byte{0xAA}, 8)) {
		t.Fatalf("PackName(%q) wrote behind MaxName", name)
	}
	switch {
	case ok && err != nil:
		t.Fatalf("PackName(%q) = %q, dns refuses: %v", name, got[:n], err)
	case ok && !bytes.Equal(got[:n], want[:wantN]):
		t.Fatalf("PackName(%q) = %q, want %q", name, got[:n], want[:wantN])
	case !ok && n != 0:
		t.Fatalf("PackName(%q) refuses with length %d, want 0", name, n)
	case !ok && err == nil && !stricter(name):
		t.Fatalf("PackName(%q) refuses, dns gives %q", name, want[:wantN])
	}
	if !ok {
		return
	}
	if end := SkipName(got, 0); end != n {
		t.Fatalf("SkipName(%q) = %d, want %d", got[:n], end, n)
	}
}

var escape = regexp.MustCompile(`(?s)\\([0-9]{3}|.|$)`)

// stricter reports whether name is one that only PackName refuses, as its comment says.
func stricter(name string) bool {
	for _, e := range escape.FindAllString(name, -1) {
		if len(e) == 4 && e > `\255` || len(e) == 2 && isDigit(e[1]) {
			return true
		}
	}
	nonASCII := strings.IndexFunc(name, func(r rune) bool { return r > 127 }) >= 0
	return name == "" || nonASCII && strings.Contains(name, `\`)
}

func TestPackNameReadsWhatDNSWrites(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(1, 2))
	check := func(wire []byte) {
		t.Helper()
		name, _, err := dns.UnpackDomainName(wire, 0)
		if err != nil {
			t.Fatalf("UnpackDomainName(%q): %v", wire, err)
		}
		got := make([]byte, MaxName)
		if n, ok := PackName(got, name); !ok || !bytes.Equal(got[:n], wire) {
			t.Fatalf("PackName(%q) = %q, %v, want %q", name, got[:n], ok, wire)
		}
		checkPackName(t, name)
	}

	lengths := make(map[int]bool)
	for range 20000 {
		wire := randomName(rnd, anyByte)
		lengths[len(wire)] = true
		check(wire)
		check(randomName(rnd, hostByte))
	}
	for n := 1; n <= MaxName; n++ {
		if n != 2 && !lengths[n] { // no name has two octets
			t.Errorf("no name of %d octets tried", n)
		}
	}
	for n := 1; n <= maxLabel; n++ {
		for b := range 256 {
			check(append(append([]byte{byte(n)}, bytes.Repeat([]byte{byte(b)}, n)...), 0))
		}
	}
}

func TestPackNameAgreesOnRandomText(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(3, 4))
	pieces := []string{".", ".", `\`, `\.`, `\\`, `\0`, `\065`, `\256`, "0", "9", "a", "Zz", "/", "é", "\xff", "\x00", "example", strings.Repeat("x", 30)}
	for range 100000 {
		var name strings.Builder
		for range rnd.IntN(16) {
			name.WriteString(pieces[rnd.IntN(len(pieces))])
		}
		checkPackName(t, name.String())
		checkPackName(t, name.String()+".")
	}
}

// randomName returns a wire name of 1 to MaxName octets, lengths spread evenly,
// its labels of 1 to maxLabel octets drawn from octet.
func randomName(rnd *rand.Rand, octet func(*rand.Rand) byte) []byte {
	rest := rnd.IntN(MaxName) // octets in front of the root
	longest := 1 + rnd.IntN(maxLabel)
	var wire []byte
	for rest >= 2 {
		n := 1 + rnd.IntN(min(longest, rest-1))
		if rest-n-1 == 1 { // one octet left is no label
			if n < maxLabel {
				n++
			} else {
				n--
			}
		}
		wire = append(wire, byte(n))
		for range n {
			wire = append(wire, octet(rnd))
		}
		rest -= n + 1
	}
	return append(wire, 0)
}

func anyByte(rnd *rand.Rand) byte { return byte(rnd.Uint32()) }

func hostByte(rnd *rand.Rand) byte {
	const set = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_/"
	return set[rnd.IntN(len(set))]
}

func TestLower(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(5, 6))
	for n := range 71 {
		for range 200 {
			src := make([]byte, n)
			for i := range src {
				src[i] = anyByte(rnd)
			}
			checkLower(t, src)
		}
		for b := range 256 {
			checkLower(t, bytes.Repeat([]byte{byte(b)}, n))
		}
	}
}

// checkLower compares Lower with a byte-wise bytes.ToLower, from one buffer to another and in place.
func checkLower(t *testing.T, src []byte) {
	t.Helper()
	var want []byte
	for _, c := range src {
		if c < 0x80 { // bytes.ToLower would read more than this as UTF-8
			c = bytes.ToLower([]byte{c})[0]
		}
		want = append(want, c)
	}
	in := bytes.Clone(src)
	got := bytes.Repeat([]byte{0xAA}, len(src)+8)
	if changed := Lower(got, in); changed == bytes.Equal(src, want) {
		t.Fatalf("Lower(%q) says %v", src, changed)
	}
	if !bytes.Equal(got[:len(src)], want) {
		t.Fatalf("Lower(%q) = %q, want %q", src, got[:len(src)], want)
	}
	if !bytes.Equal(got[len(src):], bytes.Repeat([]byte{0xAA}, 8)) {
		t.Fatalf("Lower(%q) wrote behind len(src)", src)
	}
	if !bytes.Equal(in, src) {
		t.Fatalf("Lower(%q) changed src to %q", src, in)
	}
	if changed := Lower(in, in); changed == bytes.Equal(src, want) {
		t.Fatalf("Lower(%q) in place says %v", src, changed)
	}
	if !bytes.Equal(in, want) {
		t.Fatalf("Lower(%q) in place = %q, want %q", src, in, want)
	}
}

func TestLowerLeavesLengthOctetsAlone(t *testing.T) {
	t.Parallel()
	for n := 1; n <= maxLabel; n++ {
		label := strings.Repeat("Q", n)
		src := append([]byte{byte(n)}, label+"\x00"...)
		Lower(src, src)
		if want := string(rune(n)) + strings.ToLower(label) + "\x00"; string(src) != want {
			t.Errorf("Lower of a label of %d = %q, want %q", n, src, want)
		}
	}
}

func TestEqualFold(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 1))
	for range 20_000 {
		a := make([]byte, rnd.IntN(12))
		for i := range a {
			a[i] = byte(rnd.Uint32())
		}
		b := bytes.Clone(a)
		for range rnd.IntN(3) {
			if len(b) > 0 {
				b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
			}
		}
		if rnd.IntN(10) == 0 {
			b = append(b, 'x')
		}
		la, lb := make([]byte, len(a)), make([]byte, len(b))
		Lower(la, a)
		Lower(lb, b)
		if got, want := EqualFold(a, b), bytes.Equal(la, lb); got != want {
			t.Fatalf("EqualFold(%q, %q) = %v, want %v", a, b, got, want)
		}
	}
}

func TestInZone(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, zone string
		want       bool
	}{
		{".", ".", true},
		{"org.", ".", true},
		{"www.example.org.", ".", true},
		{"www.example.org.", "org.", true},
		{"www.example.org.", "example.org.", true},
		{"example.org.", "example.org.", true},
		{"example.org.", "www.example.org.", false},
		{".", "org.", false},
		{"www.example.org.", "example.net.", false},
		{"anexample.org.", "example.org.", false},
		{`a\007example.org.`, "example.org.", false}, // equal octets inside a label
		{`a\000.`, ".", true},
		{`a\.example.org.`, "example.org.", false},
	}
	for _, tc := range tests {
		if got := InZone(pack(t, tc.name), pack(t, tc.zone)); got != tc.want {
			t.Errorf("InZone(%q, %q) = %v, want %v", tc.name, tc.zone, got, tc.want)
		}
		if got := dns.IsSubDomain(tc.zone, tc.name); got != tc.want {
			t.Errorf("dns.IsSubDomain(%q, %q) = %v, want %v", tc.zone, tc.name, got, tc.want)
		}
	}
}

func TestInZoneOfNothing(t *testing.T) {
	t.Parallel()
	if InZone([]byte{0}, nil) || InZone(nil, nil) || InZone(nil, []byte{0}) {
		t.Error("InZone with an empty slice = true, want false")
	}
}

func TestInZoneAgreesWithDNS(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(7, 8))
	// The names have two letters, and small octets that are also valid lengths. So suffixes are often equal, at label
	// boundaries and off them.
	octet := func(rnd *rand.Rand) byte { return "\x01\x02ab"[rnd.IntN(4)] }
	in := 0
	for range 100000 {
		name := randomName(rnd, octet)
		name = name[max(0, len(name)-1-rnd.IntN(12)):]
		if SkipName(name, 0) != len(name) {
			continue
		}
		zone := name[rnd.IntN(len(name)):]
		if SkipName(zone, 0) != len(zone) {
			continue
		}
		if checkInZone(t, name, zone) {
			in++
		}
	}
	if in < 1000 {
		t.Errorf("%d names lay in their zone, want a test of at least 1000", in)
	}
}

// checkInZone compares InZone with dns.IsSubDomain for two well-formed names.
func checkInZone(t *testing.T, name, zone []byte) bool {
	t.Helper()
	want := dns.IsSubDomain(unpack(t, zone), unpack(t, name))
	if got := InZone(name, zone); got != want {
		t.Fatalf("InZone(%q, %q) = %v, want %v", name, zone, got, want)
	}
	return want
}

func pack(t *testing.T, name string) []byte {
	t.Helper()
	wire := make([]byte, MaxName)
	n, err := dns.PackDomainName(name, wire, 0, nil, false)
	if err != nil {
		t.Fatalf("PackDomainName(%q): %v", name, err)
	}
	return wire[:n]
}

func unpack(t *testing.T, wire []byte) string {
	t.Helper()
	name, n, err := dns.UnpackDomainName(wire, 0)
	if err != nil || n != len(wire) {
		t.Fatalf("UnpackDomainName(%q) = %d, %v", wire, n, err)
	}
	return name
}

func TestSkipName(t *testing.T) {
	t.Parallel()
	full := strings.Repeat("\x01a", 127) + "\x00"
	tests := []struct {
		msg  string
		off  int
		want int
	}{
		{"\x00", 0, 1},
		{"\x01a\x00", 0, 3},
		{"\x01a\x00", 2, 3},
		{"..\x03www\x00..", 2, 7},
		{full, 0, 255},
		{full + "..", 0, 255},
		{"\x01b" + full, 0, -1},
		{"\x01b" + full, 2, 257},
		{"", 0, -1},
		{"\x00", 1, -1},
		{"\x00", 2, -1},
		{"\x00", -1, -1},
		{"\x00", math.MinInt, -1},
		{"\x00", math.MaxInt, -1},
		{"\x01", 0, -1},
		{"\x01a", 0, -1},
		{"\x02a\x00", 0, -1},
		{"\xc0\x00", 0, -1},
		{"\x01a\xc0\x00", 0, -1},
		{"\x40" + strings.Repeat("a", 64) + "\x00", 0, -1},
		{"\x80" + strings.Repeat("a", 128) + "\x00", 0, -1},
		{"\x3f" + strings.Repeat("a", 63) + "\x00", 0, 65},
	}
	for _, tc := range tests {
		if got := SkipName([]byte(tc.msg), tc.off); got != tc.want {
			t.Errorf("SkipName(%q, %d) = %d, want %d", tc.msg, tc.off, got, tc.want)
		}
	}
}

// checkSkipName compares SkipName with dns.UnpackDomainName. That one follows compression pointers; packing the name
// again reveals them.
func checkSkipName(t *testing.T, msg []byte, off int) {
	t.Helper()
	want := -1
	if 0 <= off && off <= len(msg) {
		if name, end, err := dns.UnpackDomainName(msg, off); err == nil {
			plain := make([]byte, MaxName)
			if n, ok := PackName(plain, name); ok && bytes.Equal(plain[:n], msg[off:end]) {
				want = end
			}
		}
	}
	if got := SkipName(msg, off); got != want {
		t.Fatalf("SkipName(%q, %d) = %d, want %d", msg, off, got, want)
	}
}

func TestNothingAllocates(t *testing.T) {
	body := packMessage(t, []dns.RR{parse(t, records[0]), parse(t, records[7])})
	var (
		name    = `www\.example.example.org.`
		buf     = make([]byte, 512)
		zone    = pack(t, "example.org.")
		offsets = make([]uint16, 0, 8)
	)
	got := testing.AllocsPerRun(100, func() {
		n, _ := PackName(buf[HeaderLen:], name)
		key := buf[HeaderLen : HeaderLen+n]
		Lower(key, key)
		found, _ := TTLOffsets(offsets, body, 2)
		if !InZone(key, zone) || SkipName(buf, HeaderLen) < 0 || len(found) != 2 {
			t.Fatal("a function failed")
		}
		PutHeader(buf, 1, FlagQR, 1, 2, 0, 1)
		PutOPT(buf[HeaderLen+n:], 1232, 0)
	})
	if got != 0 {
		t.Errorf("%v allocations, want 0", got)
	}
}

func FuzzPackName(f *testing.F) {
	f.Fuzz(func(t *testing.T, name string) {
		checkPackName(t, name)
		checkPackName(t, name+".")
	})
}

func FuzzLower(f *testing.F) {
	f.Fuzz(func(t *testing.T, src []byte) { checkLower(t, src) })
}

func FuzzInZone(f *testing.F) {
	f.Fuzz(func(t *testing.T, name, zone []byte) {
		name, zone = bytes.Clone(name), bytes.Clone(zone)
		Lower(name, name)
		Lower(zone, zone)
		if SkipName(name, 0) == len(name) && SkipName(zone, 0) == len(zone) {
			checkInZone(t, name, zone)
			return
		}
		InZone(name, zone) // must not panic
	})
}

func FuzzSkipName(f *testing.F) {
	f.Fuzz(func(t *testing.T, msg []byte, off int) {
		checkSkipName(t, msg, off)
		checkSkipName(t, msg, 0)
	})
}

func ExamplePackName() {
	var name [MaxName]byte
	n, ok := PackName(name[:], `www.Example.org.`)
	fmt.Printf("%q %v\n", name[:n], ok)
	Lower(name[:n], name[:n])
	fmt.Printf("%q\n", name[:n])
	// Output:
	// "\x03www\aExample\x03org\x00" true
	// "\x03www\aexample\x03org\x00"
}

// The text of a name is that of the DNS library.
func TestAppendTextAgrees(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for n := range 5000 {
		var name []byte
		for labels := rng.IntN(6); labels > 0; labels-- {
			label := make([]byte, 1+rng.IntN(40))
			for i := range label {
				if label[i] = byte(rng.Uint32()); n%2 == 0 {
					label[i] = ' ' + label[i]%95
				}
			}
			name = append(append(name, byte(len(label))), label...)
		}
		name = append(name, 0)
		want, _, err := dns.UnpackDomainName(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(AppendText([]byte("x"), name)); got != "x"+want {
			t.Fatalf("%x is %q, want %q", name, got, want)
		}
	}
}
