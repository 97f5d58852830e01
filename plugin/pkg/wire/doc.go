// Package wire is the byte-level part of answering from a cache: names, TTL
// fields, the header and the OPT record, read and written where they lie.
//
// A hit does not unpack and pack a message. The question's name becomes the
// lookup key (PackName, Lower), the stored sections are copied behind a fresh
// header (PutHeader) and question, their TTL fields are overwritten in place
// (TTLOffsets at store time, PatchTTLs at hit time), and an OPT record of this
// server's own follows (PutOPT).
//
// Nothing here allocates, keeps a slice after the call or holds state, so every
// function is safe for concurrent use on distinct buffers. Names are
// uncompressed throughout: a stored section has no message around it for a
// compression pointer to point into.
//
// The tests hold each function against github.com/miekg/dns, by table, by random
// input and by fuzzing.
package wire
