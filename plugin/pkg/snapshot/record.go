package snapshot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// This file encodes and decodes the frames of a snapshot: the header and the records. It does no I/O.

// Sizes in bytes of what a frame may hold.
const (
	MaxResponse = 65535 // a DNS message's length is 16 bits over TCP (RFC 1035, 4.2.2)
	MaxInstance = 255
	MaxWildcard = 1024 // a name of 255 bytes with all of them escaped has 1,004 in presentation format
	MaxSubnet   = 64
	MaxExtra    = 65535 // of the header

	// maxFrame is the largest frame that is read, in bytes. It leaves room for fields that a later minor version may
	// add.
	maxFrame = 65535 + 4096
)

const (
	format  = "optcache-snapshot/"
	version = "1"
)

// maxSeconds is the last second of the year 9999, in Unix time.
const maxSeconds = 253402300799

// Header says which instance wrote a file, and when.
type Header struct {
	Instance string    // at most MaxInstance bytes
	Written  time.Time // from 1970 to 9999, in ns
	Extra    []byte    // the caller's, at most MaxExtra bytes
}

// Record is an answer, and what the cache knows about it. Hits is its popularity for prefetch, and HitsAge the time
// since the last of them.
type Record struct {
	Response  []byte    // DNS message in wire format, at most MaxResponse bytes
	Stored    time.Time // when it came, from 1970 to 9999, in ns
	TTL       uint32    // in seconds; 0: the file does not say
	DO, CD    bool      // bits of the request that the answer is for
	NoRD      bool      // a request with RD=0 has brought it
	ForAll    bool      // a request with a client subnet has brought it, and it is for all
	Protected bool      // segment; otherwise probationary
	Hot       bool
	Accesses  uint32
	Frequency uint8
	Hits      uint32        // popularity for prefetch
	HitsAge   time.Duration // since the last of the hits
	Wildcard  string        // at most MaxWildcard bytes
	Subnet    string        // the prefix that it is for, as text, at most MaxSubnet bytes, or AnySubnet; empty: none
}

// AnySubnet is the Subnet of an answer that is for one subnet, and was kept for all: ecs off.
const AnySubnet = "any"

// Values and tags of dnstap's protobuf messages that occur in a file.
const (
	dnstapMessage     = 1 // Dnstap.Type
	clientResponse    = 6 // Message.Type
	forwarderResponse = 8
	toolResponse      = 12

	tagIdentity = 1<<3 | uint64(protowire.BytesType)
	tagVersion  = 2<<3 | uint64(protowire.BytesType)
	tagExtra    = 3<<3 | uint64(protowire.BytesType)
	tagMessage  = 14<<3 | uint64(protowire.BytesType)
	tagType     = 15<<3 | uint64(protowire.VarintType)

	tagMessageType  = 1<<3 | uint64(protowire.VarintType)
	tagResponseSec  = 12<<3 | uint64(protowire.VarintType)
	tagResponseNsec = 13<<3 | uint64(protowire.Fixed32Type)
	tagResponse     = 14<<3 | uint64(protowire.BytesType)
)

// Tags of Extra.
const (
	tagDO        = 1<<3 | uint64(protowire.VarintType)
	tagCD        = 2<<3 | uint64(protowire.VarintType)
	tagProtected = 3<<3 | uint64(protowire.VarintType)
	tagHot       = 4<<3 | uint64(protowire.VarintType)
	tagAccesses  = 5<<3 | uint64(protowire.VarintType)
	tagFrequency = 6<<3 | uint64(protowire.VarintType)
	tagHits      = 7<<3 | uint64(protowire.VarintType)
	tagHitsAge   = 8<<3 | uint64(protowire.VarintType)
	tagWildcard  = 9<<3 | uint64(protowire.BytesType)
	tagCaller    = 10<<3 | uint64(protowire.BytesType)
	tagTTL       = 12<<3 | uint64(protowire.VarintType)
	tagNoRD      = 11<<3 | uint64(protowire.VarintType)
	tagSubnet    = 13<<3 | uint64(protowire.BytesType)
	tagForAll    = 14<<3 | uint64(protowire.VarintType)
	tagCRC       = 15<<3 | uint64(protowire.Fixed32Type)
)

// crcSize is the size in bytes of the field crc, with its tag.
const crcSize = 1 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// headerMessage is the response in the header. Its question is for TXT in class CH (RFC 1035), of a name that says
// what the file is.
var headerMessage = []byte("\x00\x00\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00" +
	"\x11optcache-snapshot\x00\x00\x10\x00\x03")

// encoder makes the frames of one file, in order.
type encoder struct {
	buf   []byte // the last frame, with its length in front
	extra []byte
	head  []byte // fields of Dnstap that are the same in all frames
	crc   uint32 // of the data frames so far
}

// header returns the header's frame. It is valid until the next call.
func (e *encoder) header(h *Header) ([]byte, error) {
	switch {
	case len(h.Instance) > MaxInstance:
		return nil, fmt.Errorf("the instance's name has %d bytes, more than %d", len(h.Instance), MaxInstance)
	case len(h.Extra) > MaxExtra:
		return nil, fmt.Errorf("the header has %d extra bytes, more than %d", len(h.Extra), MaxExtra)
	}
	e.crc = 0
	e.head = appendVarint(e.head[:0], tagType, dnstapMessage)
	e.head = appendBytes(e.head, tagVersion, format+version)
	e.head = appendBytes(e.head, tagIdentity, h.Instance)
	e.extra = appendBytes(e.extra[:0], tagCaller, h.Extra)
	return e.frame(toolResponse, headerMessage, h.Written)
}

// record returns a record's frame. It is valid until the next call.
func (e *encoder) record(r *Record) ([]byte, error) {
	switch {
	case len(r.Response) > MaxResponse:
		return nil, fmt.Errorf("a response has %d bytes, more than %d", len(r.Response), MaxResponse)
	case len(r.Wildcard) > MaxWildcard:
		return nil, fmt.Errorf("a wildcard has %d bytes, more than %d", len(r.Wildcard), MaxWildcard)
	case len(r.Subnet) > MaxSubnet:
		return nil, fmt.Errorf("a subnet has %d bytes, more than %d", len(r.Subnet), MaxSubnet)
	}
	x := e.extra[:0]
	for _, flag := range [...]struct {
		tag uint64
		set bool
	}{{tagDO, r.DO}, {tagCD, r.CD}, {tagProtected, r.Protected}, {tagHot, r.Hot}, {tagNoRD, r.NoRD}, {tagForAll, r.ForAll}} {
		if flag.set {
			x = appendVarint(x, flag.tag, 1)
		}
	}
	x = appendVarint(x, tagAccesses, uint64(r.Accesses))
	x = appendVarint(x, tagFrequency, uint64(r.Frequency))
	x = appendVarint(x, tagHits, uint64(r.Hits))
	x = appendVarint(x, tagHitsAge, protowire.EncodeZigZag(int64(r.HitsAge)))
	if r.TTL > 0 {
		x = appendVarint(x, tagTTL, uint64(r.TTL))
	}
	if r.Wildcard != "" {
		x = appendBytes(x, tagWildcard, r.Wildcard)
	}
	if r.Subnet != "" {
		x = appendBytes(x, tagSubnet, r.Subnet)
	}
	e.extra = x
	return e.frame(clientResponse, r.Response, r.Stored)
}

// frame returns a frame with its length in front, and with e.extra and the CRC.
func (e *encoder) frame(kind uint64, response []byte, at time.Time) ([]byte, error) {
	sec := at.Unix()
	if sec < 0 || sec > maxSeconds {
		return nil, fmt.Errorf("the time %v is not between the years 1970 and 9999", at)
	}
	size := 1 + protowire.SizeVarint(kind) +
		1 + protowire.SizeVarint(uint64(sec)) +
		1 + 4 +
		1 + protowire.SizeBytes(len(response))
	b := append(e.buf[:0], 0, 0, 0, 0)
	b = append(b, e.head...)
	b = protowire.AppendVarint(b, tagMessage)
	b = protowire.AppendVarint(b, uint64(size))
	b = appendVarint(b, tagMessageType, kind)
	b = appendVarint(b, tagResponseSec, uint64(sec))
	b = protowire.AppendVarint(b, tagResponseNsec)
	b = protowire.AppendFixed32(b, uint32(at.Nanosecond()))
	b = appendBytes(b, tagResponse, response)
	b = protowire.AppendVarint(b, tagExtra)
	b = protowire.AppendVarint(b, uint64(len(e.extra)+crcSize))
	b = append(b, e.extra...)
	b = protowire.AppendVarint(b, tagCRC)
	e.crc = crc32.Update(e.crc, castagnoli, b[4:])
	b = protowire.AppendFixed32(b, e.crc)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	e.buf = b
	return b, nil
}

// The numbers of all fields are less than 16, so that a tag fits a byte.
func appendVarint(b []byte, tag, v uint64) []byte {
	return protowire.AppendVarint(append(b, byte(tag)), v)
}

func appendBytes[T string | []byte](b []byte, tag uint64, v T) []byte {
	b = protowire.AppendVarint(append(b, byte(tag)), uint64(len(v)))
	return append(b, v...)
}

// decoder decodes the frames of one file, in order. Its methods never allocate an amount that a frame asks for.
type decoder struct {
	record Record
	crc    uint32 // of the frames so far
}

var (
	errFrame = errors.New("a frame is malformed")
	errCRC   = errors.New("a frame has a wrong checksum")
)

// header decodes the header's frame. The result points into b.
func (d *decoder) header(b []byte) (*Header, error) {
	m, ok := parse(b)
	if !ok || !bytes.HasPrefix(m.version, []byte(format)) {
		return nil, failure{foreign, errors.New("no snapshot of a DNS cache")}
	}
	v := m.version[len(format):]
	if major, _, _ := bytes.Cut(v, []byte(".")); string(major) != version {
		return nil, failure{otherVersion, fmt.Errorf("the snapshot has version %.20q of the format, and this program reads %s", v, version)}
	}
	d.crc = 0
	if err := d.check(b); err != nil {
		return nil, err
	}
	if m.kind != toolResponse || !m.timed() {
		return nil, errFrame
	}
	h := &Header{Instance: string(m.identity), Written: m.time()}
	for x := m.extra; len(x) > 0; {
		var f field
		if f, x, ok = next(x); !ok {
			return nil, errFrame
		}
		if f.tag == tagCaller {
			h.Extra = f.bytes
		}
	}
	return h, nil
}

// next decodes a record's frame. The record is valid until the next call, and points into b.
func (d *decoder) next(b []byte) (*Record, error) {
	if err := d.check(b); err != nil {
		return nil, err
	}
	m, ok := parse(b)
	if !ok || m.kind != clientResponse && m.kind != forwarderResponse || !m.timed() || len(m.response) > MaxResponse {
		return nil, errFrame
	}
	r := &d.record
	*r = Record{Response: m.response, Stored: m.time()}
	for x := m.extra; len(x) > 0; {
		var f field
		if f, x, ok = next(x); !ok {
			return nil, errFrame
		}
		limit := uint64(math.MaxUint64)
		switch f.tag {
		case tagDO:
			r.DO = f.value != 0
		case tagCD:
			r.CD = f.value != 0
		case tagNoRD:
			r.NoRD = f.value != 0
		case tagForAll:
			r.ForAll = f.value != 0
		case tagProtected:
			r.Protected = f.value != 0
		case tagHot:
			r.Hot = f.value != 0
		case tagAccesses:
			r.Accesses, limit = uint32(f.value), math.MaxUint32
		case tagFrequency:
			r.Frequency, limit = uint8(f.value), math.MaxUint8
		case tagHits:
			r.Hits, limit = uint32(f.value), math.MaxUint32
		case tagHitsAge:
			r.HitsAge = time.Duration(protowire.DecodeZigZag(f.value))
		case tagTTL:
			r.TTL, limit = uint32(f.value), math.MaxUint32
		case tagWildcard:
			if len(f.bytes) > MaxWildcard {
				return nil, errFrame
			}
			r.Wildcard = string(f.bytes)
		case tagSubnet:
			if len(f.bytes) > MaxSubnet {
				return nil, errFrame
			}
			r.Subnet = string(f.bytes)
		}
		if f.value > limit {
			return nil, errFrame
		}
	}
	return r, nil
}

// check returns an error if b is not the frame that was written after the previous one.
func (d *decoder) check(b []byte) error {
	n := len(b) - 4
	if n < 1 || b[n-1] != byte(tagCRC) {
		return errFrame
	}
	d.crc = crc32.Update(d.crc, castagnoli, b[:n])
	if d.crc != binary.LittleEndian.Uint32(b[n:]) {
		return errCRC
	}
	return nil
}

// message is a dnstap message. Its slices point into the frame.
type message struct {
	version, identity, extra, response []byte

	kind uint64
	sec  uint64
	nsec uint64
}

// timed reports whether the message has a time that Header and Record allow.
func (m *message) timed() bool { return m.sec <= maxSeconds && m.nsec < 1e9 }

func (m *message) time() time.Time { return time.Unix(int64(m.sec), int64(m.nsec)) }

// parse reads a dnstap message. It returns false if the message is malformed, or has no response.
func parse(b []byte) (m message, ok bool) {
	var f field
	var kind uint64
	for len(b) > 0 {
		if f, b, ok = next(b); !ok {
			return m, false
		}
		switch f.tag {
		case tagIdentity:
			m.identity = f.bytes
		case tagVersion:
			m.version = f.bytes
		case tagExtra:
			m.extra = f.bytes
		case tagType:
			kind = f.value
		case tagMessage:
			if !m.parse(f.bytes) {
				return m, false
			}
		}
	}
	return m, kind == dnstapMessage && m.response != nil
}

func (m *message) parse(b []byte) (ok bool) {
	var f field
	for len(b) > 0 {
		if f, b, ok = next(b); !ok {
			return false
		}
		switch f.tag {
		case tagMessageType:
			m.kind = f.value
		case tagResponseSec:
			m.sec = f.value
		case tagResponseNsec:
			m.nsec = f.value
		case tagResponse:
			m.response = f.bytes
		}
	}
	return true
}

// field is a field of a protobuf message.
type field struct {
	tag   uint64
	value uint64 // of a number
	bytes []byte // of bytes and strings; not nil
}

// next returns the first field of a message, and the bytes after it.
func next(b []byte) (f field, rest []byte, ok bool) {
	// Fast path for a tag and a number of one byte each, which most are.
	if len(b) > 1 && b[0] >= 1<<3 && b[0] < 0x80 && b[0]&7 == byte(protowire.VarintType) && b[1] < 0x80 {
		return field{tag: uint64(b[0]), value: uint64(b[1])}, b[2:], true
	}
	num, typ, n := protowire.ConsumeTag(b)
	if n < 0 {
		return f, nil, false
	}
	f.tag = protowire.EncodeTag(num, typ)
	b = b[n:]
	switch typ {
	case protowire.VarintType:
		f.value, n = protowire.ConsumeVarint(b)
	case protowire.Fixed32Type:
		var v uint32
		v, n = protowire.ConsumeFixed32(b)
		f.value = uint64(v)
	case protowire.BytesType:
		f.bytes, n = protowire.ConsumeBytes(b)
	default:
		n = protowire.ConsumeFieldValue(num, typ, b)
	}
	if n < 0 {
		return f, nil, false
	}
	return f, b[n:], true
}
