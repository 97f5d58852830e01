// Package subnet has the prefixes that answers are for (EDNS client subnet, RFC 7871), and a table that says which prefixes a name
// has answers for. It keeps no answers.
package subnet

import (
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
)

// Families of a prefix. The first two are address family numbers.
const (
	none = 0
	IPv4 = 1
	IPv6 = 2

	// Withheld is the family of questions with SOURCE 0, whose clients do not want to say where they are, and of answers that are
	// for such questions only (RFC 7871 section 7.3.1).
	Withheld = 0xff
)

// Prefix is the prefix of a question or of an answer. As a question's, it has the client's SOURCE PREFIX-LENGTH in both lengths.
// The zero value is none: the question has no subnet, or the answer is for all. Prefixes are comparable.
type Prefix struct {
	Shape
	Addr [16]byte // an IPv4 address takes the first four; bits beyond Length are zero
}

// Shape is a prefix without its address.
//
// An answer whose SCOPE is longer than the SOURCE of its question has that SOURCE as its length. It is for questions with just
// that SOURCE, because a longer one may get a better answer.
type Shape struct {
	Family uint8
	Length uint8 // in bits
	Scope  uint8 // the SCOPE PREFIX-LENGTH of the answer: Length or more
}

// most returns the length of an address of a family, in bits.
func most(family uint8) uint8 {
	switch family {
	case IPv4:
		return 32
	case IPv6:
		return 128
	}
	return 0
}

// Is reports whether there is a prefix.
func (s Shape) Is() bool { return s.Family != none }

// Bytes returns how many bytes of the address the prefix has.
func (s Shape) Bytes() int { return (int(s.Length) + 7) / 8 }

// valid reports whether an answer may have the shape.
func (s Shape) valid() bool {
	if s.Family == Withheld {
		return s.Length == 0 && s.Scope == 0
	}
	return 0 < s.Length && s.Length <= s.Scope && s.Scope <= most(s.Family)
}

// fits reports whether an answer with the shape may be for a question with the prefix p.
func (s Shape) fits(p *Prefix) bool {
	return s.Family == p.Family && (s.Length == p.Length || s.Length < p.Length && s.Scope == s.Length)
}

// Of returns the prefix of a question with SOURCE bits of an address, which has 4 or 16 bytes. exact is false if more bits of the
// address are set. ok is false if the address is none, or has fewer bits.
func Of(addr []byte, source uint8) (p Prefix, exact, ok bool) {
	switch len(addr) {
	case 4:
		p.Family = IPv4
	case 16:
		p.Family = IPv6
	}
	if !p.Is() || source > most(p.Family) {
		return Prefix{}, false, false
	}
	if source == 0 {
		p.Family = Withheld
	}
	p.Length, p.Scope = source, source
	copy(p.Addr[:], addr)
	whole := p.Addr
	p.mask()
	return p, whole == p.Addr, true
}

// mask clears the bits beyond Length.
func (p *Prefix) mask() {
	n := p.Bytes()
	if rest := p.Length % 8; rest > 0 {
		p.Addr[n-1] &= 0xff << (8 - rest)
	}
	clear(p.Addr[n:])
}

// Answered returns the prefix of an answer to a question with the prefix p that came with that SCOPE, above 0.
func (p Prefix) Answered(scope uint8) Prefix {
	p.Length, p.Scope = min(p.Length, scope), scope
	p.mask()
	return p
}

// In returns the prefix of that shape that the question's prefix p is in. ok is false if answers of that shape are not for p.
func (p Prefix) In(s Shape) (of Prefix, ok bool) {
	if !s.fits(&p) {
		return Prefix{}, false
	}
	p.Shape = s
	p.mask()
	return p, true
}

// Covers reports whether an answer with the prefix p is for a question with the prefix q.
func (p Prefix) Covers(q Prefix) bool {
	in, ok := q.In(p.Shape)
	return ok && p.Is() && in == p
}

// String returns a prefix as in 10.1.1.0/24. One for a shorter SOURCE than its SCOPE has that as well: 10.1.1.0/24/28. Withheld is
// 0/0.
func (p Prefix) String() string {
	var addr netip.Addr
	switch p.Family {
	case none:
		return ""
	case Withheld:
		return withheld
	case IPv4:
		addr = netip.AddrFrom4([4]byte(p.Addr[:4]))
	default:
		addr = netip.AddrFrom16(p.Addr)
	}
	s := fmt.Sprintf("%s/%d", addr, p.Length)
	if p.Scope != p.Length {
		s += fmt.Sprintf("/%d", p.Scope)
	}
	return s
}

const withheld = "0/0"

// MaxText is the length of the longest text of a prefix.
const MaxText = len("ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255/128/128")

// Parse returns the prefix of an answer from its text, as of String. ok is false for any other text, and for none.
func Parse(s string) (p Prefix, ok bool) {
	if s == withheld {
		return Prefix{Shape: Shape{Family: Withheld}}, true
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || len(s) > MaxText {
		return Prefix{}, false
	}
	addr, err := netip.ParseAddr(parts[0])
	if err != nil || addr.Zone() != "" {
		return Prefix{}, false
	}
	length, err := strconv.ParseUint(parts[1], 10, 8)
	if err != nil {
		return Prefix{}, false
	}
	p, exact, ok := Of(addr.AsSlice(), uint8(length))
	if len(parts) == 3 {
		scope, err := strconv.ParseUint(parts[2], 10, 8)
		if err != nil {
			return Prefix{}, false
		}
		p.Scope = uint8(scope)
	}
	// Each prefix has one text.
	return p, ok && exact && p.Family != Withheld && p.valid() && p.String() == s
}

// Tail is how many bytes follow the address in the bytes of a prefix.
const Tail = 3

// MaxBytes is the length of the longest bytes of a prefix.
const MaxBytes = 16 + Tail

// Put writes the bytes of a prefix to b, which has MaxBytes, and returns how many: the address, family, length and scope. They are
// read from their end.
func (p *Prefix) Put(b []byte) int {
	n := copy(b, p.Addr[:p.Bytes()])
	b[n], b[n+1], b[n+2] = p.Family, p.Length, p.Scope
	return n + Tail
}

// Size returns how many bytes of a prefix the end of b is. It is Tail or more.
func Size(b []byte) int { return Tail + (int(b[len(b)-2])+7)/8 }

// Read returns the prefix whose bytes Put has written to b.
func Read(b []byte) (p Prefix) {
	n := len(b) - Tail
	copy(p.Addr[:], b[:n])
	p.Family, p.Length, p.Scope = b[n], b[n+1], b[n+2]
	return p
}

// buckets returns how many buckets a table has for so many records.
func buckets(records int) int { return 1 << bits.Len(uint(max(records, 1)-1)) }
