// Package snapshot writes the answers of a DNS cache to a file and reads them back, so that a cache
// does not start empty.
//
// The file is a zstd stream (RFC 8878) of Frame Streams with the content type
// "protobuf:dnstap.Dnstap"; each data frame is a dnstap message. So "zstd -dc FILE | dnstap-read
// /dev/stdin" shows what is inside.
//
// In all frames Dnstap.version is "optcache-snapshot/1", and Dnstap.identity the instance that wrote the
// file. The first frame is the header, a TOOL_RESPONSE to a made-up question, with the time of writing as its response
// time. Each other one is an answer, a CLIENT_RESPONSE, with the time when it came as its response time. What
// dnstap has no place for is a protobuf message in Dnstap.extra:
//
//	message Extra {
//	  bool do = 1;         // bits of the request that the answer is for
//	  bool cd = 2;
//	  bool protected = 3;  // segment
//	  bool hot = 4;
//	  uint32 accesses = 5;
//	  uint32 frequency = 6; // at most 255
//	  uint32 hits = 7;
//	  sint64 hits_age = 8; // ns
//	  string wildcard = 9;
//	  bytes caller = 10;   // in the header only
//	  fixed32 crc = 15;
//	}
//
// Extra is the last field of a frame, and crc the last one in it: the last four bytes of a frame
// are the CRC-32C of all bytes of data frames before them, without the other frames' last four. So a
// frame passes only where it was written, after those that were written before it; a byte that has
// changed, and a frame that is lost, doubled or moved, end the reading. The checksum of zstd is there
// too: it covers the end.
//
// A reader skips fields that it does not know, and takes any minor version ("optcache-snapshot/1.2").
//
// Whoever can write the file decides what the cache answers; a CRC does not change that. It is
// read as something that may hold anything, but is trusted in what it says.
package snapshot
