package wire

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
)

// This file makes a message fit: it compresses names (RFC 1035 section 4.1.4), and cuts records off the end.

// Bounds of Fit.
const (
	// MaxFit is the largest limit that Fit works with. Below it, no offset is too large for a pointer, even if it is counted in
	// characters of escaped names.
	MaxFit = 15 << 10

	fitSlots = 256 // a power of two
	fitMost  = 192 // names that fitter remembers
)

// layout says how the RDATA of a type is built: so many octets, then names, then the rest.
type layout struct {
	known    bool
	compress bool // names are compressed (RFC 3597 section 4)
	before   uint8
	names    uint8
	rest     rest
	after    uint8 // octets of the rest, if it is exact
}

// rest says what is behind the names, which decides on how the DNS library estimates its length.
type rest uint8

const (
	exact  rest = iota // so many octets as layout.after says
	opaque             // any octets
	base64             // the library rounds up to three octets
	text               // character strings: the library counts escaped characters
	bitmap             // of types: the library takes none for two octets
	nsec3              // all of the RDATA of NSEC3 behind the iterations
)

// layouts has the types that Fit knows.
var layouts = [...]layout{
	1:  {known: true, after: 4},                            // A
	2:  {known: true, compress: true, names: 1},            // NS
	5:  {known: true, compress: true, names: 1},            // CNAME
	6:  {known: true, compress: true, names: 2, after: 20}, // SOA
	12: {known: true, compress: true, names: 1},            // PTR
	15: {known: true, compress: true, before: 2, names: 1}, // MX
	16: {known: true, rest: text},                          // TXT
	28: {known: true, after: 16},                           // AAAA
	33: {known: true, before: 6, names: 1},                 // SRV
	39: {known: true, names: 1},                            // DNAME
	43: {known: true, before: 4, rest: opaque},             // DS
	44: {known: true, before: 2, rest: opaque},             // SSHFP
	46: {known: true, before: 18, names: 1, rest: base64},  // RRSIG
	47: {known: true, names: 1, rest: bitmap},              // NSEC
	48: {known: true, before: 4, rest: base64},             // DNSKEY
	50: {known: true, before: 4, rest: nsec3},              // NSEC3
	52: {known: true, before: 3, rest: opaque},             // TLSA
	59: {known: true, before: 4, rest: opaque},             // CDS
	60: {known: true, before: 4, rest: base64},             // CDNSKEY
	64: {known: true, before: 2, names: 1, rest: opaque},   // SVCB
	65: {known: true, before: 2, names: 1, rest: opaque},   // HTTPS
}

// toQname is a pointer to the name in the question.
var toQname = []byte{0xc0, HeaderLen}

// fitSeed makes that no client can choose names that collide.
var fitSeed = maphash.MakeSeed()

// Fit copies the message msg to dst with compressed names, and leaves out the records at its end that do not fit into limit
// octets. msg has one question, and then as many records in answer, authority and additional section as counts says. No name
// in it is compressed, and there is no OPT. n is the length of the copy. Its header is that of msg: the caller sets counts and
// TC. counts becomes what was kept, and cut says that it is less than before.
//
// The copy has the same octets as one that github.com/miekg/dns makes of the same message by Msg.Truncate and Msg.Pack. That
// library cuts by an estimate, which is above the length of some records.
//
// ok is false, and dst of no use, if msg has a type that Fit does not know, or too many different names, or if it is malformed.
// dst must have limit octets. limit is at most MaxFit. Fit reads no more of msg than what fits.
func Fit(dst, msg []byte, counts *[3]uint16, limit int) (n int, cut, ok bool) {
	end := SkipName(msg, HeaderLen)
	if limit > MaxFit || end < 0 || len(msg) < end+QuestionTail {
		return 0, false, false
	}
	f := fitter{dst: dst[:limit], src: msg}
	f.put(msg[:HeaderLen])
	f.name(HeaderLen, end, true)
	f.put(msg[end : end+QuestionTail])
	at := end + QuestionTail
	n = f.n
	for section := range counts {
		for i := range counts[section] {
			if !cut && f.length < limit {
				if at, ok = f.record(at); !ok {
					return 0, false, false
				}
				if f.length <= limit {
					n = f.n
					continue
				}
			}
			counts[section], cut = i, true
			break
		}
	}
	return n, cut, true
}

// fitter is the state of Fit.
type fitter struct {
	dst, src []byte
	n        int // octets in dst
	length   int // of the copy, as the DNS library estimates it: n or more. More than len(dst): dst is no good
	used     int // slots in use
	full     bool
	names    [fitSlots]fitName // by hash, open addressing
}

// fitName is a name in the copy, which pointers may point to.
type fitName struct {
	at  uint32 // where it is in src; 0: the slot is free
	to  uint16 // where it is in dst
	tag uint16 // of its hash
}

// put copies octets. What is beyond the end of dst is only counted.
func (f *fitter) put(b []byte) {
	f.n += copy(f.dst[f.n:], b)
	f.length += len(b)
}

// name copies the name src[at:end]. Each name, and each parent of it, that is not in the copy yet becomes a target of pointers.
func (f *fitter) name(at, end int, compress bool) {
	if compress && end-at > 1 && f.used > 0 && bytes.HasPrefix(f.src[HeaderLen:], f.src[at:end]) { // the qname, as most owners are
		f.put(toQname)
		return
	}
	for i := at; f.src[i] != 0; i += 1 + int(f.src[i]) {
		to := f.place(f.src[i:end], i, f.n+i-at)
		if to > 0 && compress {
			f.put(f.src[at:i])
			f.put([]byte{0xc0 | byte(to>>8), byte(to)})
			return
		}
	}
	f.put(f.src[at:end])
}

// place returns where in dst the name is, which stands at src[at]. If it is not there, place notes that it will be at dst[to],
// and returns 0.
func (f *fitter) place(name []byte, at, to int) int {
	h := maphash.Bytes(fitSeed, name)
	tag := uint16(h >> 48)
	for i := h % fitSlots; ; i = (i + 1) % fitSlots {
		switch s := &f.names[i]; {
		case s.at == 0:
			if f.used == fitMost {
				f.full = true
				return 0
			}
			f.used++
			*s = fitName{at: uint32(at), to: uint16(to), tag: tag}
			return 0
		case s.tag == tag && bytes.HasPrefix(f.src[s.at:], name):
			return int(s.to)
		}
	}
}

// record copies the record src[at:], and returns where the next one is.
func (f *fitter) record(at int) (next int, ok bool) {
	fixed := SkipName(f.src, at)
	if fixed < 0 || len(f.src)-fixed < rrFixedLen {
		return 0, false
	}
	data := fixed + rrFixedLen
	length := int(binary.BigEndian.Uint16(f.src[fixed+rrRDLength:]))
	t := int(binary.BigEndian.Uint16(f.src[fixed:]))
	if length == 0 || len(f.src)-data < length || t >= len(layouts) || !layouts[t].known {
		return 0, false
	}
	f.name(at, fixed, true)
	f.put(f.src[fixed:data])
	start := f.n
	if !f.rdata(&layouts[t], data, data+length) || f.full {
		return 0, false
	}
	if f.length <= len(f.dst) {
		binary.BigEndian.PutUint16(f.dst[start-2:], uint16(f.n-start))
	}
	return data + length, true
}

// rdata copies the RDATA src[at:end].
func (f *fitter) rdata(l *layout, at, end int) (ok bool) {
	before := int(l.before)
	if end-at < before {
		return false
	}
	f.put(f.src[at : at+before])
	at += before
	for range l.names {
		behind := SkipName(f.src[:end], at)
		if behind < 0 {
			return false
		}
		f.name(at, behind, l.compress)
		at = behind
	}
	b := f.src[at:end]
	f.put(b)
	more, ok := l.rest.excess(b)
	f.length += more
	return ok && (l.rest != exact || len(b) == int(l.after))
}

// excess returns by how many octets the DNS library overestimates the rest b of a record. ok is false if b is malformed.
func (r rest) excess(b []byte) (n int, ok bool) {
	switch r {
	case base64:
		return (len(b)+2)/3*3 - len(b), true
	case bitmap:
		if len(b) == 0 {
			n = 2
		}
	case nsec3: // salt, hash and bitmap; the library counts the characters of the hash in base 32, and two octets too many
		for range 2 {
			if len(b) == 0 || len(b) <= int(b[0]) {
				return 0, false
			}
			n = (8*int(b[0])+4)/5 - int(b[0]) + 2
			b = b[1+int(b[0]):]
		}
		more, _ := bitmap.excess(b)
		n += more
	case text:
		for len(b) > 0 {
			if len(b) <= int(b[0]) {
				return 0, false
			}
			for _, c := range b[1:][:b[0]] {
				switch {
				case c == '"' || c == '\\':
					n++
				case c < ' ' || c > '~':
					n += 3
				}
			}
			b = b[1+int(b[0]):]
		}
	}
	return n, true
}
