package wire

import (
	"encoding/binary"
	"math"
)

// This file has resource records: their TTL fields and owner names, and the OPT record.

// OPTLen is the length in octets of an OPT record without options: the root
// name and the fixed fields of RFC 6891 section 6.1.2.
const OPTLen = 1 + rrFixedLen

// EDELen is the length in octets of an Extended DNS Error without text, as an option of an OPT
// record: code, length and INFO-CODE (RFC 8914 section 2).
const EDELen = 2 + 2 + 2

const optionEDE = 15 // RFC 8914 section 5.1

// FlagDO is the "DNSSEC OK" bit in an OPT record's flags, RFC 3225 section 3.
const FlagDO uint16 = 1 << 15

const (
	// rrFixedLen is the length in octets of the fields between a record's owner name and its RDATA: TYPE, CLASS, TTL
	// and RDLENGTH, RFC 1035 section 4.1.3.
	rrFixedLen = 2 + 2 + 4 + 2

	// Offsets of two of those fields behind the owner name.
	rrTTL      = 4
	rrRDLength = 8

	typeOPT = 41 // RFC 6891 section 6.1.1
)

// TTLOffsets appends to dst the offset of every record's TTL field, relative to body[0]. body has count records of a
// message, one after another, without header and question. Owner names must be uncompressed; names in RDATA are not
// read.
//
// For any other body, ok is false and offsets is dst unchanged: if body ends within a record, has bytes left over, is
// longer than a message can be (65535 octets), or has an OPT record. An OPT record has flags where other records have
// their TTL, and they must not be aged.
func TTLOffsets(dst []uint16, body []byte, count int) (offsets []uint16, ok bool) {
	if len(body) > math.MaxUint16 {
		return dst, false
	}
	offsets = dst
	off := 0
	for range count {
		fixed := SkipName(body, off)
		if fixed < 0 || len(body)-fixed < rrFixedLen {
			return dst, false
		}
		if binary.BigEndian.Uint16(body[fixed:]) == typeOPT {
			return dst, false
		}
		offsets = append(offsets, uint16(fixed+rrTTL))
		off = fixed + rrFixedLen + int(binary.BigEndian.Uint16(body[fixed+rrRDLength:]))
	}
	if off != len(body) {
		return dst, false
	}
	return offsets, true
}

// RespellOwners gives each owner name in body that equals name, apart from the case of letters, the letters of name.
// body has count records, as in TTLOffsets. If body is malformed, RespellOwners stops there.
func RespellOwners(body []byte, count int, name []byte) {
	off := 0
	for range count {
		fixed := SkipName(body, off)
		if fixed < 0 || len(body)-fixed < rrFixedLen {
			return
		}
		if owner := body[off:fixed]; EqualFold(owner, name) {
			copy(owner, name)
		}
		off = fixed + rrFixedLen + int(binary.BigEndian.Uint16(body[fixed+rrRDLength:]))
	}
}

// PutOPT writes the OPT record of a reply to dst[:OPTLen]: udpSize in octets,
// extended rcode 0, version 0, flags (FlagDO) and no options. It panics when
// dst is shorter.
func PutOPT(dst []byte, udpSize, flags uint16) {
	_ = dst[OPTLen-1]
	dst[0] = 0 // the root name
	binary.BigEndian.PutUint16(dst[1:], typeOPT)
	binary.BigEndian.PutUint16(dst[3:], udpSize)
	binary.BigEndian.PutUint32(dst[5:], uint32(flags))
	binary.BigEndian.PutUint16(dst[9:], 0)
}

// AddEDE adds an Extended DNS Error with the INFO-CODE code to the OPT record at dst[0], which must have no options
// (RFC 8914 section 2). It panics when dst is shorter than OPTLen+EDELen.
func AddEDE(dst []byte, code uint16) {
	_ = dst[OPTLen+EDELen-1]
	binary.BigEndian.PutUint16(dst[9:], EDELen)
	binary.BigEndian.PutUint16(dst[11:], optionEDE)
	binary.BigEndian.PutUint16(dst[13:], 2)
	binary.BigEndian.PutUint16(dst[15:], code)
}
