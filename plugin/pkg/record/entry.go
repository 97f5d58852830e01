// Package record is the record of one cached answer: how it lies in memory, how it is written, and how it is read while a
// writer may be changing it. The package also has the key that a record is found by. Where a record is stored, and which
// records stay, is decided elsewhere.
package record

import (
	"encoding/binary"
	"hash/maphash"
	"math"
	"sync/atomic"

	"github.com/optcache/optcache/plugin/pkg/subnet"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// A record is a run of 64-bit words:
//
//	word 0     seq. In a region: the number of the write that made the record, never repeated in its shard, and 0
//	           until all other words are in place. In the hot tier: even while the record is complete, odd while it
//	           changes
//	word 1     hash of the key
//	word 2     stored: when the answer came, in ns on the store's clock
//	word 3     TTL in seconds (32 bits), flags (16), length of the key in bytes (16)
//	word 4     length of the body in bytes, records in answer, authority, additional (16 each)
//	word 5     link: number of the policy's node (32 bits), length of the wildcard name in bytes (16), and by how many
//	           bytes the server overestimates the reply's size (16)
//	then       the key, the body, the TTL offsets, the wildcard name, each padded to a word. With flagSigned one more
//	           word, until: when the first signature ends, in ns on the store's clock
//
// The key is the lower-cased qname in wire format, qtype, qclass, and a byte with DO, CD and the absence of RD. Behind the qname
// stands the prefix that the answer is for (package subnet), if it is not for all. The body is
// the answer's three sections in wire format, without compression and without OPT. With header and question, that is what
// the server would send to a client that asked in lower case. There are four TTL offsets to a word.
//
// With cache_line_optimization a record starts on a line of 64 bytes. Header and key share the first line or two, so a
// lookup that fails on the key touches no more. An answer with one A record for a name of usual length takes two lines in
// all. With header and key on lines of their own it would take three, and each hit would have one cache miss more.
const (
	WordSeq = iota
	wordHash
	wordStored
	wordMeta
	wordLengths
	WordLink
	HeaderWords

	WordBytes = 8
	LineBytes = 64

	// MaxKey is the length of the longest key, in bytes, padded to whole words.
	MaxKey = (wire.MaxName + subnet.MaxBytes + KeyTail + WordBytes - 1) &^ (WordBytes - 1)

	// KeyTail is the number of bytes that end a key: qtype, qclass and a byte of bits.
	KeyTail = 5

	// MaxMessage is the largest DNS message (RFC 1035 section 4.2.2).
	MaxMessage = 65535

	// RcodeServerFailure is SERVFAIL (RFC 1035 section 4.1.1).
	RcodeServerFailure = 2

	// MaxSection is the largest number of resource records that a message has room for: each takes 11 bytes or more. A
	// header with more of them is torn.
	MaxSection = MaxMessage / 11
)

// Flags are 16 bits of a record's header. They have bits of the answer's DNS header, and say what kind of answer it is.
type Flags uint16

const (
	FlagRcode      Flags = 0x000f // the answer's rcode, as in the header
	FlagAA         Flags = 1 << 4
	FlagRA         Flags = 1 << 5
	FlagAD         Flags = 1 << 6
	FlagDenial     Flags = 1 << 7  // the class: set for denials and failures
	FlagCompressed Flags = 1 << 8  // the body has compression pointers: without them it would be over 64 KiB
	FlagMessage    Flags = 1 << 9  // the content of the answer requires that it is sent as a message, not as bytes
	FlagAnswers    Flags = 1 << 10 // with prefer_positive: the answer answers its question
	FlagVoid       Flags = 1 << 11 // the answer neither answers nor denies: a failure, or NOERROR that says nothing
	FlagForAll     Flags = 1 << 13 // a question with a client subnet has brought the answer, which is for all subnets
	FlagNoStale    Flags = 1 << 14 // the answer is not served once it has expired, whatever the store does with others
	FlagOneSubnet  Flags = 1 << 15 // the answer is for one subnet, and is kept for all: ecs off
	flagSigned     Flags = 1 << 12 // the request had DO, and the answer has signatures: the record has the word until

	// kindFlags tell apart the records that one key may have at a time.
	kindFlags = FlagDenial | FlagAnswers | FlagVoid
)

// Bits of a key's last byte.
const (
	KeyDO = 1 << iota
	KeyCD
	KeyNoRD   // the answer came for a request with RD=0, and is only for such requests
	keySubnet // there is a prefix that the answer is for
)

// Class is one of the two classes of answers. Each has bounds of its own.
type Class uint8

const (
	Success Class = iota // NOERROR with an answer, and delegations
	Denial               // NXDOMAIN, NODATA and failures
	Classes
)

// Class returns the class of the answer.
func (f Flags) Class() Class {
	if f&FlagDenial != 0 {
		return Denial
	}
	return Success
}

// Kind returns the flags that tell a record from others of the same key. A key has one record of a kind at most.
func (f Flags) Kind() Flags { return f & kindFlags }

// Owners is how many stores can share memory: see Seed.
const Owners = 1 << ownerBits

// Bits of a hash that say whose record it is. The index, the hot tier and the policy look at bits from 16 on, and the lowest bits
// choose the shard.
const (
	ownerShift = 8
	ownerBits  = 8
	ownerMask  = (Owners - 1) << ownerShift
)

// Seed is what a store makes the hashes of its keys with. Stores that share memory have different owners. So the same question
// has different hashes in two of them, and neither finds the other's answer: a record has a key only if the hashes are the same.
type Seed struct {
	seed  maphash.Seed
	owner uint64
}

// MakeSeed returns a new seed of an owner, 0 to Owners-1.
func MakeSeed(owner int) Seed { return Seed{maphash.MakeSeed(), 0}.Of(owner) }

// Of returns the seed for another owner.
func (s Seed) Of(owner int) Seed { return Seed{s.seed, uint64(owner) << ownerShift & ownerMask} }

// Sum returns a hash of b that has nothing of the owner.
func (s Seed) Sum(b []byte) uint64 { return maphash.Bytes(s.seed, b) }

func (s Seed) hash(b []byte) uint64 { return maphash.Bytes(s.seed, b)&^ownerMask | s.owner }

// Own returns the hash, in the store of the seed, of a key that has that hash in another store. Both seeds are of one MakeSeed.
func (s Seed) Own(hash uint64) uint64 { return hash&^ownerMask | s.owner }

// Owner returns the owner of a seed.
func (s Seed) Owner() int { return Owner(s.owner) }

// Owner returns the owner of a record with that hash.
func Owner(hash uint64) int { return int(hash >> ownerShift & (Owners - 1)) }

// WithoutOwner returns what a hash has beside the owner.
func WithoutOwner(hash uint64) uint64 { return hash &^ ownerMask }

// Key is the key of an answer. Its bytes from Len up to the next whole word are zero.
type Key struct {
	Bytes [MaxKey + WordBytes]byte
	Len   int
	Hash  uint64
	Mixed bool // the question's name had letters in upper case
}

// Set makes k the key of a question. name is in wire format; its letters' case does not matter.
func (k *Key) Set(seed Seed, name []byte, qtype, qclass uint16, do, cd bool) {
	k.Mixed = wire.Lower(k.Bytes[:], name)
	k.Seal(seed, len(name), qtype, qclass, do, cd)
}

// Seal makes k the key of a question. The first n bytes of k are the question's name in wire format, lower-cased.
func (k *Key) Seal(seed Seed, n int, qtype, qclass uint16, do, cd bool) {
	tail := k.Bytes[n:]
	binary.BigEndian.PutUint16(tail, qtype)
	binary.BigEndian.PutUint16(tail[2:], qclass)
	tail[4] = 0
	if do {
		tail[4] |= KeyDO
	}
	if cd {
		tail[4] |= KeyCD
	}
	k.Len = n + KeyTail
	clear(k.Bytes[k.Len : Words(k.Len)*WordBytes])
	k.Hash = seed.hash(k.Bytes[:k.Len])
}

// Load makes k the key of the record at w, whose header is e.
func (k *Key) Load(e *Entry, w []uint64) {
	LoadBytes(k.Bytes[:], w[HeaderWords:][:Words(e.KeyLen)])
	k.Len, k.Hash = e.KeyLen, e.Hash
}

// SetRD makes k, the key of a question, the key of the answer to that question with that RD bit.
func (k *Key) SetRD(seed Seed, rd bool) {
	k.Bytes[k.Len-1] &^= KeyNoRD
	if !rd {
		k.Bytes[k.Len-1] |= KeyNoRD
	}
	k.Hash = seed.hash(k.Bytes[:k.Len])
}

// Rehash gives k the hash that it has in the store of that seed.
func (k *Key) Rehash(seed Seed) { k.Hash = seed.hash(k.Bytes[:k.Len]) }

// RD reports whether answers with that key come from requests with RD=1.
func (k *Key) RD() bool { return k.Bits()&KeyNoRD == 0 }

// Equal reports whether both are the same key.
func (k *Key) Equal(other *Key) bool {
	return k.Hash == other.Hash && string(k.Bytes[:k.Len]) == string(other.Bytes[:other.Len])
}

// Name returns the lower-cased wire qname. It is part of k.
func (k *Key) Name() []byte { return k.Bytes[:k.nameLen()] }

func (k *Key) nameLen() int {
	n := k.Len - KeyTail
	if k.Bits()&keySubnet != 0 {
		n -= subnet.Size(k.Bytes[:n])
	}
	return n
}

// Subnet returns the prefix that the answer is for. It is none if the answer is for all.
func (k *Key) Subnet() (p subnet.Prefix) {
	if k.Bits()&keySubnet != 0 {
		p = subnet.Read(k.Bytes[k.nameLen() : k.Len-KeyTail])
	}
	return p
}

// SetSubnet makes k the key of an answer that is for a prefix only; none: for all.
func (k *Key) SetSubnet(seed Seed, p subnet.Prefix) {
	n, tail := k.nameLen(), [KeyTail]byte(k.Bytes[k.Len-KeyTail:])
	tail[KeyTail-1] &^= keySubnet
	if p.Is() {
		n += p.Put(k.Bytes[n:])
		tail[KeyTail-1] |= keySubnet
	}
	k.Len = n + copy(k.Bytes[n:], tail[:])
	clear(k.Bytes[k.Len : Words(k.Len)*WordBytes])
	k.Hash = seed.hash(k.Bytes[:k.Len])
}

// Qtype returns the question's type.
func (k *Key) Qtype() uint16 { return binary.BigEndian.Uint16(k.Bytes[k.Len-KeyTail:]) }

// Qclass returns the question's class.
func (k *Key) Qclass() uint16 { return binary.BigEndian.Uint16(k.Bytes[k.Len-KeyTail+2:]) }

// Bits returns the key's last byte: KeyDO, KeyCD, KeyNoRD, and whether there is a prefix.
func (k *Key) Bits() byte { return k.Bytes[k.Len-1] }

// Words returns how many words n bytes take.
func Words(n int) int { return (n + WordBytes - 1) / WordBytes }

// Entry is the header of a record, decoded. An Entry is also what a caller passes with a new answer.
type Entry struct {
	Seq     uint64
	Hash    uint64
	Stored  int64  // ns on the store's clock
	TTL     uint32 // seconds
	Flags   Flags
	Counts  [3]uint16 // records in answer, authority, additional
	KeyLen  int
	BodyLen int
	Link    uint64

	// bodyAt, offsetsAt and wildcardAt are where these parts begin. Size is the length of the record. All four are in words
	// from the start of the record; see place.
	bodyAt, offsetsAt, wildcardAt, Size int

	until int64 // with flagSigned: when the first signature ends, in ns on the store's clock

	// Hits and HitsAt are not part of the record. For an insert they say how often the entry that the answer refreshes
	// has been asked for, and when last, in ns on the store's clock.
	Hits   uint32
	HitsAt int64

	// Asked is, for an insert, when the question was asked that the answer came of, in ns on the store's clock.
	Asked int64
}

// Node returns the number of the policy's node.
func (e *Entry) Node() uint32 { return uint32(e.Link) }

// WildcardLen returns the length of the wildcard name in bytes.
func (e *Entry) WildcardLen() int { return int(e.Link >> 32 & 0xffff) }

// Excess returns by how many bytes the server overestimates the body.
func (e *Entry) Excess() int { return int(e.Link >> 48) }

// MakeLink returns the word link. wildcardLen and excess are 0 to 65535.
func MakeLink(node uint32, wildcardLen, excess int) uint64 {
	return uint64(node) | uint64(wildcardLen)<<32 | uint64(excess)<<48
}

// ServerFailure reports whether the answer is a cached SERVFAIL.
func (e *Entry) ServerFailure() bool { return e.Flags&FlagRcode == RcodeServerFailure }

// Failure reports whether the answer is a failure of any rcode.
func (e *Entry) Failure() bool { return e.Flags&FlagVoid != 0 && e.Flags&FlagDenial != 0 }

// NameError is NXDOMAIN (RFC 1035 section 4.1.1).
const NameError = 3

// Denies reports whether the answer says that the qname itself does not exist. NXDOMAIN behind a CNAME says that of another name.
func (e *Entry) Denies() bool {
	return e.Flags&FlagRcode == NameError && e.Flags&FlagVoid == 0 && e.Counts[0] == 0
}

// Signed reports whether the question had DO, and the answer has signatures.
func (e *Entry) Signed() bool { return e.Flags&flagSigned != 0 }

// Records returns the number of resource records, which is the number of TTL fields.
func (e *Entry) Records() int {
	return int(e.Counts[0]) + int(e.Counts[1]) + int(e.Counts[2])
}

// TtlFields returns the number of TTL offsets that the record has. There are none for a compressed body.
func (e *Entry) TtlFields() int {
	if e.Flags&FlagCompressed != 0 {
		return 0
	}
	return e.Records()
}

// place works out from the lengths where the parts of the record are.
func (e *Entry) place() {
	e.bodyAt = HeaderWords + Words(e.KeyLen)
	e.offsetsAt = e.bodyAt + Words(e.BodyLen)
	e.wildcardAt = e.offsetsAt + (e.TtlFields()+3)/4
	e.Size = e.wildcardAt + Words(e.WildcardLen())
	if e.Flags&flagSigned != 0 {
		e.Size++
	}
}

// Unsigned is the argument of Sign for an answer without signatures.
const Unsigned = math.MaxInt64

// Sign notes that the answer has signatures, the first of which ends signedFor seconds after Stored. With Unsigned it does
// nothing.
func (e *Entry) Sign(signedFor int64) {
	if signedFor != Unsigned {
		e.Flags |= flagSigned
		e.until = e.Stored + signedFor*1e9
	}
}

// LoadUntil completes e, the header of the record at w, with the end of its signatures. e must be sane.
func (e *Entry) LoadUntil(w []uint64) {
	if e.Flags&flagSigned != 0 {
		e.until = int64(atomic.LoadUint64(&w[e.Size-1]))
	}
}

// Remaining returns the TTL that is left at now, in seconds. It counts whole seconds since the answer came. It is 0 or less
// when the answer has expired.
func (e *Entry) Remaining(now int64) int64 {
	return int64(e.TTL) - (now-e.Stored)/1e9
}

// Servable reports whether the answer may be served at now: the answer is alive, or expired less than stale seconds ago.
//
// Three kinds of answers are never served stale. One is an answer that neither answers nor denies: RFC 8767 prolongs answers,
// and a failure must be kept for 5 minutes at most (RFC 9520 section 3.2). Another is an answer whose signatures have
// ended: a validating client would take it for a forgery. The third one has FlagNoStale.
func (e *Entry) Servable(now, stale int64) bool {
	left := e.Remaining(now)
	return left > 0 || -left < stale && e.Flags&(FlagVoid|FlagNoStale) == 0 && e.SignaturesGood(now)
}

// SignaturesGood reports whether the answer has no signatures at now that have ended. It looks only at answers to requests with DO.
func (e *Entry) SignaturesGood(now int64) bool { return e.Flags&flagSigned == 0 || now < e.until }

// Shown returns ttl as a client may see it at now, in seconds. It is not more than the time until the first signature ends
// (RFC 4035 section 5.3.3).
func (e *Entry) Shown(ttl uint32, now int64) uint32 {
	if e.Flags&flagSigned != 0 {
		return uint32(min(int64(ttl), max((e.until-now)/1e9, 0)))
	}
	return ttl
}

// When several records of one key may be served, the one of the lowest rank is.
const (
	RankAnswer   = iota // with prefer_positive: the answer answers its question
	rankDenial          // a denial
	rankPositive        // another positive answer
	RankVoid            // neither answers nor denies
)

// Good reports whether the answer is alive at now, and answers or denies.
func (e *Entry) Good(now int64) bool { return e.Remaining(now) > 0 && e.Flags&FlagVoid == 0 }

// Rank returns the rank of the answer, RankAnswer to RankVoid.
func (e *Entry) Rank() int {
	switch {
	case e.Flags&FlagVoid != 0:
		return RankVoid
	case e.Flags&FlagAnswers != 0:
		return RankAnswer
	case e.Flags&FlagDenial != 0:
		return rankDenial
	}
	return rankPositive
}

// Replaces reports whether e replaces old, another record of its key. It does if e is not older, with two exceptions: a
// record that neither answers nor denies (RankVoid) replaces only records of its rank, and a record that prefer_positive
// prefers (RankAnswer) is replaced only by records of its rank.
func (e *Entry) Replaces(old *Entry) bool {
	mine, its := e.Rank(), old.Rank()
	return old.Stored <= e.Stored && (mine == its || mine != RankVoid && its != RankAnswer)
}

// Load decodes the header of the record at w[0]. The header may be torn if a writer changes the record at the same time.
// The reader must call Sane before it uses lengths and counts. LoadUntil loads the rest.
func (e *Entry) Load(w []uint64) {
	w = w[:HeaderWords:HeaderWords]
	e.Seq = atomic.LoadUint64(&w[WordSeq])
	e.Hash = atomic.LoadUint64(&w[wordHash])
	e.Stored = int64(atomic.LoadUint64(&w[wordStored]))
	meta := atomic.LoadUint64(&w[wordMeta])
	lengths := atomic.LoadUint64(&w[wordLengths])
	e.Link = atomic.LoadUint64(&w[WordLink])
	e.TTL = uint32(meta)
	e.Flags = Flags(meta >> 32)
	e.KeyLen = int(meta >> 48)
	e.BodyLen = int(lengths & 0xffff)
	e.Counts = [3]uint16{uint16(lengths >> 16), uint16(lengths >> 32), uint16(lengths >> 48)}
	e.place()
}

// LoadEntry returns the header of the record at w[0]; see Load.
func LoadEntry(w []uint64) (e Entry) {
	e.Load(w)
	return e
}

// StoreHeader writes the header, except seq, to w. No other goroutine may use w.
func (e *Entry) StoreHeader(w []uint64) {
	w[wordHash] = e.Hash
	w[wordStored] = uint64(e.Stored)
	w[wordMeta] = uint64(e.TTL) | uint64(e.Flags)<<32 | uint64(e.KeyLen)<<48
	w[wordLengths] = uint64(e.BodyLen) |
		uint64(e.Counts[0])<<16 | uint64(e.Counts[1])<<32 | uint64(e.Counts[2])<<48
	w[WordLink] = e.Link
}

// Sane reports whether the record can lie within limit words. A torn header may have any lengths and counts.
func (e *Entry) Sane(limit int) bool {
	return e.KeyLen <= MaxKey && e.Records() <= MaxSection && e.Size <= limit
}

// HasKey reports whether the record at w, whose header is e, is a record of k. It reads only the words of the key.
func (e *Entry) HasKey(w []uint64, k *Key) bool {
	if e.Hash != k.Hash || e.KeyLen != k.Len {
		return false
	}
	w = w[HeaderWords:][:Words(k.Len)]
	for i := range w {
		if atomic.LoadUint64(&w[i]) != binary.LittleEndian.Uint64(k.Bytes[i*WordBytes:]) {
			return false
		}
	}
	return true
}

// LoadBytes copies all of w to dst, which must have WordBytes for each word.
func LoadBytes(dst []byte, w []uint64) {
	for i := range w {
		binary.LittleEndian.PutUint64(dst[i*WordBytes:], atomic.LoadUint64(&w[i]))
	}
}

// StoreWords copies the words of a finished record, except seq, to a place that readers may be reading.
func StoreWords(dst, src []uint64) {
	for i := WordSeq + 1; i < len(src); i++ {
		atomic.StoreUint64(&dst[i], src[i])
	}
}

// Buffer has the memory that is needed to read or make one record. A Buffer is used again for the next record. It is not
// safe for concurrent use.
type Buffer struct {
	Key      Key
	Entry    Entry    // header of the answer that was found
	Out      []byte   // the reply: room for header and question, then the body
	Body     int      // where the body starts in Out
	Offsets  []uint64 // TTL offsets of the body, four to a word
	Wildcard []byte   // name of the wildcard that the answer was made from; empty if there is none
	Words    []uint64 // a record under construction
	Packed   []byte   // the message that the record is made from
	TTLAt    []uint16 // TTL offsets of the record under construction, from the start of its body
}

// NewBuffer returns a buffer with room for most answers.
func NewBuffer() Buffer {
	return Buffer{
		Out:     make([]byte, 1024),
		Offsets: make([]uint64, 0, 2*LineBytes/WordBytes), // whole lines
	}
}

// TooLarge reports whether the buffer has a part larger than PooledMax.
func (s *Buffer) TooLarge() bool {
	return cap(s.Out) > PooledMax || cap(s.Packed) > PooledMax || cap(s.Words) > PooledMax/WordBytes
}

// Shrink replaces the parts of a buffer that is too large by small ones.
func (s *Buffer) Shrink() {
	if s.TooLarge() {
		s.Out, s.Packed, s.Words = make([]byte, 1024), nil, nil
	}
}

// PooledMax is the largest part of a buffer, in bytes, that is kept for the next request.
const PooledMax = 16 << 10

// Grow makes room for n bytes in Out. It keeps the first keep bytes.
func (s *Buffer) Grow(n, keep int) {
	if cap(s.Out) < n {
		out := make([]byte, n)
		copy(out, s.Out[:keep])
		s.Out = out
	}
	s.Out = s.Out[:cap(s.Out)]
}

// CopyAnswer copies the record at w, whose header is s.Entry. The body goes to s.Out, behind the question, and TTL offsets
// and wildcard name to s.Offsets and s.Wildcard. The header must be sane. The copy is good only if the record is unchanged
// afterwards, which the caller checks.
func (s *Buffer) CopyAnswer(w []uint64) {
	e := &s.Entry
	e.LoadUntil(w)
	s.Grow(s.Body+(e.offsetsAt-e.bodyAt)*WordBytes+wire.OPTLen+wire.EDELen, s.Body)
	LoadBytes(s.Out[s.Body:], w[e.bodyAt:e.offsetsAt])

	n := e.wildcardAt - e.offsetsAt
	if cap(s.Offsets) < n {
		s.Offsets = make([]uint64, n)
	}
	s.Offsets = s.Offsets[:n]
	for i := range s.Offsets {
		s.Offsets[i] = atomic.LoadUint64(&w[e.offsetsAt+i])
	}

	s.Wildcard = s.Wildcard[:0]
	if n := e.WildcardLen(); n > 0 {
		s.Wildcard = append(s.Wildcard, make([]byte, Words(n)*WordBytes)...)
		LoadBytes(s.Wildcard, w[e.wildcardAt:][:Words(n)])
		s.Wildcard = s.Wildcard[:n]
	}
}

// PatchTTL sets the TTL, in seconds, of each resource record of the body in s.Out.
func (s *Buffer) PatchTTL(ttl uint32) {
	body := s.Out[s.Body:][:s.Entry.BodyLen]
	left := s.Entry.TtlFields()
	for _, four := range s.Offsets {
		for range min(left, 4) {
			binary.BigEndian.PutUint32(body[uint16(four):], ttl)
			four >>= 16
		}
		left -= 4
	}
}

// BuildRecord makes the record of an answer for s.Key in s.Words, and completes e with key, lengths and layout. It leaves
// out seq and the number of the policy's node. s.TTLAt has the TTL offsets of body.
func (s *Buffer) BuildRecord(e *Entry, body []byte, wildcard string) {
	k := &s.Key
	e.Hash, e.KeyLen, e.BodyLen = k.Hash, k.Len, len(body)
	e.Link = MakeLink(0, len(wildcard), e.Excess())
	e.place()
	if cap(s.Words) < e.Size {
		s.Words = make([]uint64, e.Size)
	}
	s.Words = s.Words[:e.Size]
	clear(s.Words)
	e.StoreHeader(s.Words)
	storeBytes(s.Words[HeaderWords:], k.Bytes[:k.Len])
	storeBytes(s.Words[e.bodyAt:], body)
	for i, at := range s.TTLAt {
		s.Words[e.offsetsAt+i/4] |= uint64(at) << (i % 4 * 16)
	}
	storeBytes(s.Words[e.wildcardAt:], []byte(wildcard))
	if e.Flags&flagSigned != 0 {
		s.Words[e.Size-1] = uint64(e.until)
	}
}

// storeBytes writes b to words that are zero.
func storeBytes(w []uint64, b []byte) {
	for ; len(b) >= WordBytes; b, w = b[WordBytes:], w[1:] {
		w[0] = binary.LittleEndian.Uint64(b)
	}
	if len(b) > 0 {
		var last [WordBytes]byte
		copy(last[:], b)
		w[0] = binary.LittleEndian.Uint64(last[:])
	}
}
