package wire

import "encoding/binary"

// This file has the header of a message and the fixed part of a question.

// HeaderLen is the length of a message header in octets, RFC 1035 section 4.1.1.
const HeaderLen = 12

// Masks for the header's second 16-bit word, RFC 1035 section 4.1.1; AD and CD
// from RFC 4035 section 3.2. The opcode's four bits lie between QR and AA.
const (
	FlagQR uint16 = 1 << 15 // message is a response
	FlagAA uint16 = 1 << 10 // answer is authoritative
	FlagTC uint16 = 1 << 9  // message is truncated
	FlagRD uint16 = 1 << 8  // recursion is desired
	FlagRA uint16 = 1 << 7  // recursion is available
	FlagAD uint16 = 1 << 5  // data is authenticated
	FlagCD uint16 = 1 << 4  // checking is disabled
)

// PutHeader writes a message header to dst[:HeaderLen]: the message ID, the
// word of flags, opcode and rcode, and the record counts of the question,
// answer, authority and additional sections. It panics when dst is shorter.
func PutHeader(dst []byte, id, bits, qd, an, ns, ar uint16) {
	_ = dst[HeaderLen-1]
	binary.BigEndian.PutUint16(dst[0:], id)
	binary.BigEndian.PutUint16(dst[2:], bits)
	binary.BigEndian.PutUint16(dst[4:], qd)
	binary.BigEndian.PutUint16(dst[6:], an)
	binary.BigEndian.PutUint16(dst[8:], ns)
	binary.BigEndian.PutUint16(dst[10:], ar)
}

// QuestionTail is the length in bytes of the fields after the name in a question: qtype and qclass.
const QuestionTail = 4

// FlagIf returns flag, a mask for the header's second word, if it is on, and 0 otherwise.
func FlagIf(on bool, flag uint16) uint16 {
	if on {
		return flag
	}
	return 0
}
