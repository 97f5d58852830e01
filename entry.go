package optcache

import (
	"encoding/binary"
	"hash/maphash"
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file is the record: how one cached answer lies in memory, how it is written and how it
// is read while somebody may be writing. Which record goes where, and who stays, is decided
// elsewhere (store.go, slru.go, hotcache.go).
//
// A record is a run of 64-bit words:
//
//	word 0     seq: in the arena the number of the write that made it, never repeated in its shard,
//	           and 0 until all other words are in place; in the hot tier even while the record
//	           stands, odd while it changes
//	word 1     hash of the key
//	word 2     stored: when the answer came, in ns on the store's clock
//	word 3     TTL in seconds (32 bits), flags (16), length of the key in bytes (16)
//	word 4     length of the body in bytes, records in answer, authority, additional (16 each)
//	word 5     link: number of the policy's node (32 bits), lengths of the wildcard name (16) and
//	           of what the server overestimates (16)
//	then       the key, the body, the TTL offsets, the wildcard name, each padded to a word
//
// The key is the lower-cased wire qname, qtype, qclass and a byte with DO and CD. The body is
// the answer's three sections in wire format, without compression and without OPT: what the
// server would send, but for header and question. The TTL offsets are four to a word.
//
// With 64-byte lines a record starts on a line. Header and key share the first line or two, so
// that a lookup that fails on the key has touched no more; an A record's answer for a name of
// usual length takes two lines in all. (Header and key on lines of their own, which looks
// tidier, costs three lines for the same answer and one cache miss more on each hit.)
const (
	wordSeq = iota
	wordHash
	wordStored
	wordMeta
	wordLengths
	wordLink
	headerWords

	wordBytes = 8
	lineBytes = 64

	// maxKey is a name, qtype, qclass and the bits, padded to whole words.
	maxKey = (wire.MaxName + keyTail + wordBytes - 1) &^ (wordBytes - 1)

	// keyTail is what follows the name in a key: qtype, qclass, bits.
	keyTail = 5

	// maxMessage is the largest DNS message (RFC 1035 section 4.2.2).
	maxMessage = 65535

	// rcodeServerFailure is SERVFAIL (RFC 1035 section 4.1.1).
	rcodeServerFailure = 2

	// maxSection bounds the records of one section that a reader believes: each takes at
	// least eleven bytes.
	maxSection = maxMessage / 11
)

// recordFlags are the 16 bits of a record that are not lengths: header bits of the answer and
// what kind of answer it is.
type recordFlags uint16

const (
	flagRcode      recordFlags = 0x000f // the answer's rcode, as in the header
	flagAA         recordFlags = 1 << 4
	flagRA         recordFlags = 1 << 5
	flagAD         recordFlags = 1 << 6
	flagDenial     recordFlags = 1 << 7  // the class: set for denials and failures
	flagCompressed recordFlags = 1 << 8  // the body has compression pointers: its plain form is over 64 KiB
	flagMessage    recordFlags = 1 << 9  // the answer must go as a message, for what it carries
	flagAnswers    recordFlags = 1 << 10 // with prefer_positive: the answer answers its question

	// kindFlags tell apart the records that one key may have at a time.
	kindFlags = flagDenial | flagAnswers
)

// Bits of a key's last byte.
const (
	keyDO = 1 << iota
	keyCD
)

// class is one of the two kinds of answers that are bounded apart.
type class uint8

const (
	success class = iota // NOERROR with an answer, and delegations
	denial               // NXDOMAIN, NODATA and failures
	classes
)

func (f recordFlags) class() class {
	if f&flagDenial != 0 {
		return denial
	}
	return success
}

// kind returns what tells a record from others of the same key.
func (f recordFlags) kind() recordFlags { return f & kindFlags }

// kind returns the kind that the records of a class have without prefer_positive.
func (c class) kind() recordFlags {
	if c == denial {
		return flagDenial
	}
	return 0
}

// key is what an answer is found by. The bytes behind n up to the next word are zero.
type key struct {
	bytes [maxKey + wordBytes]byte
	n     int
	hash  uint64
}

// set makes k the key of a question. name is in wire format; its letters' case does not matter.
func (k *key) set(seed maphash.Seed, name []byte, qtype, qclass uint16, do, cd bool) {
	wire.Lower(k.bytes[:], name)
	k.seal(seed, len(name), qtype, qclass, do, cd)
}

// seal makes k, whose first n bytes are a lower-cased name, the key of a question.
func (k *key) seal(seed maphash.Seed, n int, qtype, qclass uint16, do, cd bool) {
	tail := k.bytes[n:]
	binary.BigEndian.PutUint16(tail, qtype)
	binary.BigEndian.PutUint16(tail[2:], qclass)
	tail[4] = 0
	if do {
		tail[4] |= keyDO
	}
	if cd {
		tail[4] |= keyCD
	}
	k.n = n + keyTail
	clear(k.bytes[k.n : words(k.n)*wordBytes])
	k.hash = maphash.Bytes(seed, k.bytes[:k.n])
}

// equal reports whether both are the same key.
func (k *key) equal(other *key) bool {
	return k.hash == other.hash && string(k.bytes[:k.n]) == string(other.bytes[:other.n])
}

// name returns the lower-cased wire qname. It is part of k.
func (k *key) name() []byte { return k.bytes[:k.n-keyTail] }

// qtype and qclass of the question.
func (k *key) qtype() uint16  { return binary.BigEndian.Uint16(k.bytes[k.n-keyTail:]) }
func (k *key) qclass() uint16 { return binary.BigEndian.Uint16(k.bytes[k.n-keyTail+2:]) }

// bits returns the key's last byte: keyDO and keyCD.
func (k *key) bits() byte { return k.bytes[k.n-1] }

// words returns how many words n bytes take.
func words(n int) int { return (n + wordBytes - 1) / wordBytes }

// entry is the header of a record, taken out of its words.
type entry struct {
	seq     uint64
	hash    uint64
	stored  int64  // ns on the store's clock
	ttl     uint32 // seconds
	flags   recordFlags
	counts  [3]uint16 // records in answer, authority, additional
	keyLen  int
	bodyLen int
	link    uint64

	// Where the parts begin, in words from the start of the record; see place.
	bodyAt, offsetsAt, wildcardAt, size int

	// For an insert, and not part of the record: the answer puts an end to a denial that is still
	// alive, and how often the entry that it refreshes has been asked for, and when.
	supersedes bool
	hits       uint32
	hitsAt     int64
}

func (e *entry) node() uint32     { return uint32(e.link) }
func (e *entry) wildcardLen() int { return int(e.link >> 32 & 0xffff) }

// excess is by how many bytes the server overestimates the body.
func (e *entry) excess() int { return int(e.link >> 48) }

func makeLink(node uint32, wildcardLen, excess int) uint64 {
	return uint64(node) | uint64(wildcardLen)<<32 | uint64(excess)<<48
}

// failure reports whether the answer is a cached SERVFAIL.
func (e *entry) failure() bool { return e.flags&flagRcode == rcodeServerFailure }

// records returns the number of resource records, which is the number of TTL fields.
func (e *entry) records() int {
	return int(e.counts[0]) + int(e.counts[1]) + int(e.counts[2])
}

// ttlFields is the number of TTL offsets that are stored.
func (e *entry) ttlFields() int {
	if e.flags&flagCompressed != 0 {
		return 0
	}
	return e.records()
}

// place works out from the lengths where the parts of the record are.
func (e *entry) place() {
	e.bodyAt = headerWords + words(e.keyLen)
	e.offsetsAt = e.bodyAt + words(e.bodyLen)
	e.wildcardAt = e.offsetsAt + (e.ttlFields()+3)/4
	e.size = e.wildcardAt + words(e.wildcardLen())
}

// remaining is the TTL left at now, in whole seconds since the answer came; zero and below
// when it has expired.
func (e *entry) remaining(now int64) int64 {
	return int64(e.ttl) - (now-e.stored)/1e9
}

// servable reports whether the answer may be served at now: it is alive, or was less than stale
// seconds ago.
func (e *entry) servable(now, stale int64) bool {
	left := e.remaining(now)
	return left > 0 || -left < stale
}

// rank says which of the records of one key is served, when several may be: the one of the lowest
// rank. A denial goes before a positive answer, unless it is a failure; with prefer_positive, what
// answers the question goes before all.
func (e *entry) rank() int {
	switch {
	case e.flags&flagAnswers != 0:
		return 0
	case e.flags&flagDenial == 0:
		return 2
	case e.failure():
		return 3
	}
	return 1
}

// load decodes the header of the record at w[0]. What it finds may be torn when somebody writes
// at the same time; sane says whether it may be used to find one's way.
func (e *entry) load(w []uint64) {
	w = w[:headerWords:headerWords]
	e.seq = atomic.LoadUint64(&w[wordSeq])
	e.hash = atomic.LoadUint64(&w[wordHash])
	e.stored = int64(atomic.LoadUint64(&w[wordStored]))
	meta := atomic.LoadUint64(&w[wordMeta])
	lengths := atomic.LoadUint64(&w[wordLengths])
	e.link = atomic.LoadUint64(&w[wordLink])
	e.ttl = uint32(meta)
	e.flags = recordFlags(meta >> 32)
	e.keyLen = int(meta >> 48)
	e.bodyLen = int(lengths & 0xffff)
	e.counts = [3]uint16{uint16(lengths >> 16), uint16(lengths >> 32), uint16(lengths >> 48)}
	e.place()
}

// loadEntry returns the header of the record at w[0].
func loadEntry(w []uint64) (e entry) {
	e.load(w)
	return e
}

// storeHeader writes the header, but for seq, to w.
func (e *entry) storeHeader(w []uint64) {
	w[wordHash] = e.hash
	w[wordStored] = uint64(e.stored)
	w[wordMeta] = uint64(e.ttl) | uint64(e.flags)<<32 | uint64(e.keyLen)<<48
	w[wordLengths] = uint64(e.bodyLen) |
		uint64(e.counts[0])<<16 | uint64(e.counts[1])<<32 | uint64(e.counts[2])<<48
	w[wordLink] = e.link
}

// sane reports whether the record can lie within limit words. A header that was torn by a
// writer may say anything.
func (e *entry) sane(limit int) bool {
	return e.keyLen <= maxKey && e.records() <= maxSection && e.size <= limit
}

// hasKey reports whether the record at w is that of k. It reads the words of the key only.
func (e *entry) hasKey(w []uint64, k *key) bool {
	if e.hash != k.hash || e.keyLen != k.n {
		return false
	}
	w = w[headerWords:][:words(k.n)]
	for i := range w {
		if atomic.LoadUint64(&w[i]) != binary.LittleEndian.Uint64(k.bytes[i*wordBytes:]) {
			return false
		}
	}
	return true
}

// loadBytes copies words to dst, which must have room for all of them.
func loadBytes(dst []byte, w []uint64) {
	for i := range w {
		binary.LittleEndian.PutUint64(dst[i*wordBytes:], atomic.LoadUint64(&w[i]))
	}
}

// storeWords writes the words of a finished record, seq excepted, where readers may be looking.
func storeWords(dst, src []uint64) {
	for i := wordSeq + 1; i < len(src); i++ {
		atomic.StoreUint64(&dst[i], src[i])
	}
}

// scratch is what serving one request needs in memory. It is pooled, so that a hit allocates
// nothing, and owned by one request at a time.
type scratch struct {
	_        [2 * lineBytes]byte // nothing that another core writes lies on its lines
	key      key
	entry    entry // header of the answer found
	tier     tier  // where it was found
	out      []byte
	body     int      // where the body starts in out
	offsets  []uint64 // TTL offsets of the body, four to a word
	wildcard []byte
	record   []uint64 // a record under construction
	packed   []byte   // the message it is made of
	ttlAt    []uint16
	extents  []extent // of the records of a section,
	sorted   []extent // and in another order
	events   events
	tally    tally  // what the climber has not heard of
	stripe   uint32 // which stripe of the counters this scratch counts on
	_        [2 * lineBytes]byte
}

// pooledMax is the largest buffer, in bytes, that is kept for the next request.
const pooledMax = 16 << 10

// grow makes room for n bytes in out, keeping its first keep bytes.
func (s *scratch) grow(n, keep int) {
	if cap(s.out) < n {
		out := make([]byte, n)
		copy(out, s.out[:keep])
		s.out = out
	}
	s.out = s.out[:cap(s.out)]
}

// copyAnswer copies body, TTL offsets and wildcard of the record at w, whose header is
// s.entry, behind the question in s.out. The copy is good only if the record is found
// unchanged afterwards.
func (s *scratch) copyAnswer(w []uint64) {
	e := &s.entry
	s.grow(s.body+(e.offsetsAt-e.bodyAt)*wordBytes+wire.OPTLen+wire.EDELen, s.body)
	loadBytes(s.out[s.body:], w[e.bodyAt:e.offsetsAt])

	n := e.wildcardAt - e.offsetsAt
	if cap(s.offsets) < n {
		s.offsets = make([]uint64, n)
	}
	s.offsets = s.offsets[:n]
	for i := range s.offsets {
		s.offsets[i] = atomic.LoadUint64(&w[e.offsetsAt+i])
	}

	s.wildcard = s.wildcard[:0]
	if n := e.wildcardLen(); n > 0 {
		s.wildcard = append(s.wildcard, make([]byte, words(n)*wordBytes)...)
		loadBytes(s.wildcard, w[e.wildcardAt:e.size])
		s.wildcard = s.wildcard[:n]
	}
}

// patchTTL sets the TTL of every record of the body in s.out.
func (s *scratch) patchTTL(ttl uint32) {
	body := s.out[s.body:][:s.entry.bodyLen]
	left := s.entry.ttlFields()
	for _, four := range s.offsets {
		for range min(left, 4) {
			binary.BigEndian.PutUint32(body[uint16(four):], ttl)
			four >>= 16
		}
		left -= 4
	}
}

// buildRecord puts the record of an answer for s.key together in s.record, but for the number
// of its node, and completes e.
func (s *scratch) buildRecord(e *entry, body []byte, wildcard string) {
	k := &s.key
	e.hash, e.keyLen, e.bodyLen = k.hash, k.n, len(body)
	e.link = makeLink(0, len(wildcard), e.excess())
	e.place()
	if cap(s.record) < e.size {
		s.record = make([]uint64, e.size)
	}
	s.record = s.record[:e.size]
	clear(s.record)
	e.storeHeader(s.record)
	storeBytes(s.record[headerWords:], k.bytes[:k.n])
	storeBytes(s.record[e.bodyAt:], body)
	for i, at := range s.ttlAt {
		s.record[e.offsetsAt+i/4] |= uint64(at) << (i % 4 * 16)
	}
	storeBytes(s.record[e.wildcardAt:], []byte(wildcard))
}

// storeBytes writes b to words that are zero.
func storeBytes(w []uint64, b []byte) {
	for ; len(b) >= wordBytes; b, w = b[wordBytes:], w[1:] {
		w[0] = binary.LittleEndian.Uint64(b)
	}
	if len(b) > 0 {
		var last [wordBytes]byte
		copy(last[:], b)
		w[0] = binary.LittleEndian.Uint64(last[:])
	}
}
