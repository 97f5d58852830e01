// Package wire is the byte-level part of answering from a cache. It reads and writes names, TTL fields, the header
// and the OPT record in place.
//
// A hit does not unpack and pack a message. The qname becomes the lookup key (PackName, Lower). The stored sections
// are copied behind a new header (PutHeader) and the question. Their TTL fields are overwritten at the offsets that
// TTLOffsets has found. This server's own OPT record follows (PutOPT).
//
// No function here allocates, except that TTLOffsets may grow its slice. None keeps a slice after the call or holds
// state, so that all are safe for concurrent use on distinct buffers. Names are uncompressed throughout: a stored
// section has no message around it for a compression pointer to point into.
//
// The tests compare each function with github.com/miekg/dns, by table, by random input and by fuzzing.
package wire
