package wire

import (
	"encoding/binary"
	"math/bits"
	"strings"
)

// This file has names: packing, lower case, comparison, and how to skip them.

// MaxName is the length limit of a name's wire form in octets, length octets
// and the root's included, RFC 1035 section 3.1.
const MaxName = 255

// maxLabel is the length limit of a label in octets, RFC 1035 section 3.1. Any
// larger length octet is a compression pointer or reserved.
const maxLabel = 63

// Eight bytes are compared at once, in one word. These constants are one byte value, repeated.
const (
	ones  = 0x0101010101010101
	highs = 0x80 * ones // the high bit of each byte
	lows  = 0x7F * ones // the other bits
)

// PackName writes the uncompressed wire form of name to dst and returns its
// length. name is fully qualified presentation format as in
// dns.Msg.Question[0].Name: a backslash makes an octet of three decimal digits
// or takes the meaning from one other character, RFC 1035 section 5.1. The case
// of letters is kept.
//
// dst must have room for MaxName bytes; all of them may be overwritten. When
// ok is false, name is not a fully qualified name of at most MaxName octets.
//
// PackName takes what dns.PackDomainName takes into MaxName bytes and gives the
// same wire form, save that it refuses
//   - the empty string (dns: no bytes, no error),
//   - a backslash before a digit that is not the first of three (dns: the digit),
//   - three digits above 255 (dns: modulo 256),
//   - bytes above 127 in a name that has a backslash too (dns: miscounts the
//     backslashes in front of the last dot, so that an escaped one may pass).
//
// None of these comes out of dns.UnpackDomainName.
func PackName(dst []byte, name string) (n int, ok bool) {
	dst = dst[:MaxName]
	last := len(name) - 1
	if last < 0 || name[last] != '.' {
		return 0, false
	}
	if last == 0 {
		dst[0] = 0
		return 1, true
	}
	if len(name) >= MaxName {
		return packEscaped(dst, name) // fits only if escapes make it shorter
	}

	// Without escapes the wire form is name moved by one, each dot overwritten
	// with the length of the label behind it.
	copy(dst[1:], name)
	begin := 0 // of the label at hand, in name; its length octet in dst
	i := 0
	for ; i+8 <= len(name); i += 8 {
		w := load64(name[i : i+8])
		if hasBackslash(w) {
			return packEscaped(dst, name)
		}
		for dots := dotMask(w); dots != 0; dots &= dots - 1 {
			end := i + bits.TrailingZeros64(dots)/8
			if end == begin || end-begin > maxLabel {
				return 0, false
			}
			dst[begin] = byte(end - begin)
			begin = end + 1
		}
	}
	for ; i < len(name); i++ {
		switch name[i] {
		case '\\':
			return packEscaped(dst, name)
		case '.':
			if i == begin || i-begin > maxLabel {
				return 0, false
			}
			dst[begin] = byte(i - begin)
			begin = i + 1
		}
	}
	dst[begin] = 0
	return begin + 1, true
}

// packEscaped is PackName for names with a backslash, one octet at a time.
func packEscaped(dst []byte, name string) (n int, ok bool) {
	begin := 0 // length octet of the label at hand
	n = 1      // where the next octet goes
	for i := 0; i < len(name); i++ {
		c := name[i]
		if c == '.' {
			if n-begin-1 == 0 || n-begin-1 > maxLabel || n == MaxName {
				return 0, false
			}
			dst[begin] = byte(n - begin - 1)
			begin = n
			n++
			continue
		}
		if c >= 0x80 {
			return 0, false
		}
		if c == '\\' {
			var width int
			if c, width = unescape(name[i+1:]); width == 0 {
				return 0, false
			}
			i += width
		}
		if n == MaxName {
			return 0, false
		}
		dst[n] = c
		n++
	}
	if n != begin+1 {
		return 0, false // the last dot was escaped
	}
	dst[begin] = 0
	return n, true
}

// unescape reads the characters after a backslash. It returns the octet that they stand for, and how many they are: 0
// if they are no escape.
func unescape(s string) (c byte, width int) {
	if s == "" || s[0] >= 0x80 {
		return 0, 0
	}
	if !isDigit(s[0]) {
		return s[0], 1
	}
	if len(s) < 3 || !isDigit(s[1]) || !isDigit(s[2]) {
		return 0, 0
	}
	v := 100*int(s[0]-'0') + 10*int(s[1]-'0') + int(s[2]-'0')
	if v > 255 {
		return 0, 0
	}
	return byte(v), 3
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// load64 is binary.LittleEndian.Uint64 for a string of eight bytes. On a little-endian machine it compiles to one
// load.
func load64(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// hasBackslash reports whether a byte of w is a backslash. The subtraction may also mark bytes above the first
// backslash wrongly, but it marks none if there is no backslash.
func hasBackslash(w uint64) bool {
	x := w ^ '\\'*ones
	return (x-ones)&^x&highs != 0
}

// dotMask returns a word with the high bit of each byte of w that is a dot. It marks no other byte, because no sum
// here carries from one byte into the next.
func dotMask(w uint64) uint64 {
	x := w ^ '.'*ones
	return ^(x&lows + lows | x) & highs
}

// Lower copies src to dst with ASCII letters in lower case, and reports whether it has changed a letter. It may be
// used on wire names as they are: a length octet is at most 63, and 'A' is 65. dst must be at least as long as src.
// It may be src itself, but must not overlap src otherwise.
func Lower(dst, src []byte) (changed bool) {
	dst = dst[:len(src)]
	if len(src) < 8 {
		for i, c := range src {
			if 'A' <= c && c <= 'Z' {
				c |= 0x20
				changed = true
			}
			dst[i] = c
		}
		return changed
	}
	var diff uint64
	i := 0
	for ; i+8 <= len(src); i += 8 {
		w := binary.LittleEndian.Uint64(src[i : i+8 : i+8])
		l := lower64(w)
		diff |= w ^ l
		binary.LittleEndian.PutUint64(dst[i:i+8:i+8], l)
	}
	// The rest is done as a word that reaches back over bytes already done. If dst is src, these are in lower case by
	// now, and stay so.
	i = len(src) - 8
	w := binary.LittleEndian.Uint64(src[i:])
	l := lower64(w)
	binary.LittleEndian.PutUint64(dst[i:], l)
	return diff|(w^l) != 0
}

// lower64 sets the bit 0x20 in each byte of w from 'A' to 'Z'. The sums carry only into a byte's own high bit: fromA
// for bytes from 'A' on, behindZ for bytes after 'Z'.
func lower64(w uint64) uint64 {
	x := w & lows
	fromA := x + (0x80-'A')*ones
	behindZ := x + (0x80-'Z'-1)*ones
	return w | (fromA&^behindZ&^w&highs)>>2
}

// EqualFold reports whether two wire names are equal, apart from the case of ASCII letters.
func EqualFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i, c := range a {
		d := b[i]
		if c == d {
			continue
		}
		if c |= 0x20; c != d|0x20 || c < 'a' || 'z' < c {
			return false
		}
	}
	return true
}

// InZone reports whether name is zone or below it. Both are well-formed wire names in lower case. For other input the
// result means nothing, but InZone never panics.
func InZone(name, zone []byte) bool {
	below := len(name) - len(zone) // octets of name in front of zone
	if below < 0 || len(zone) == 0 || string(name[below:]) != string(zone) {
		return false
	}
	// Equal octets are not enough: zone must begin where a label begins.
	off := 0
	for off < below {
		off += 1 + int(name[off])
	}
	return off == below
}

// AppendText appends a well-formed wire name to dst in presentation format, as dns.UnpackDomainName gives it.
func AppendText(dst, name []byte) []byte {
	if len(name) <= 1 {
		return append(dst, '.')
	}
	for off := 0; off < len(name) && name[off] > 0; off += 1 + int(name[off]) {
		for _, c := range name[off+1:][:name[off]] {
			switch {
			case strings.IndexByte(". '@;()\"\\", c) >= 0:
				dst = append(dst, '\\', c)
			case c < ' ' || c > '~':
				dst = append(dst, '\\', '0'+c/100, '0'+c/10%10, '0'+c%10)
			default:
				dst = append(dst, c)
			}
		}
		dst = append(dst, '.')
	}
	return dst
}

// SkipName returns the offset behind the uncompressed name at msg[off:]. It returns -1 if off is not in msg, or if
// the name runs past the end of msg, is longer than MaxName, or has a length octet above 63 (compressed or reserved).
func SkipName(msg []byte, off int) int {
	if off < 0 {
		return -1
	}
	limit := min(len(msg), off+MaxName)
	for off < limit {
		c := int(msg[off])
		off++
		if c == 0 {
			return off
		}
		if c > maxLabel {
			return -1
		}
		off += c
	}
	return -1
}
