// Package snapshot writes the answers of a DNS cache to a file and reads them back, so that a cache does not start
// empty.
//
// The file is a zstd stream (RFC 8878) of Frame Streams with the content type "protobuf:dnstap.Dnstap". Each data
// frame is a dnstap message, so that "zstd -dc FILE | dnstap-read /dev/stdin" shows the content.
//
// In all frames Dnstap.version is "optcache-snapshot/1", and Dnstap.identity is the instance that wrote the file. The
// first frame is the header: a TOOL_RESPONSE to a made-up question, whose response time is the time of writing. Each
// other frame is an answer: a CLIENT_RESPONSE, whose response time is when the answer came. Dnstap.extra is a
// protobuf message with the fields that dnstap has no place for:
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
//	  uint32 ttl = 12;     // s; earlier files have none
//	  bool no_rd = 11;     // a request with RD=0 has brought the answer
//	  string subnet = 13;  // the prefix of the clients that the answer is for, if it is not for all; "any": of some clients
//	  bool for_all = 14;   // a request with a client subnet has brought the answer, which is for all
//	  fixed32 crc = 15;
//	}
//
// Extra is the last field of a frame, and crc is the last field of Extra. So the last four bytes of a frame are a
// CRC-32C. It covers all bytes of the data frames up to there, without the CRCs of the other frames. A frame is valid
// only in the place where it was written, after the same frames. Reading ends at a byte that has changed, and where a
// frame has been lost, doubled or moved. The checksum of zstd covers the end of the file.
//
// A reader skips fields that it does not know, and accepts any minor version ("optcache-snapshot/1.2"). A field without which
// an answer would be served wrongly needs a new major version, once there is a release whose readers do not know it: a reader
// refuses such a file whole. The folder testdata has a file of each version, as its program wrote it.
//
// A CRC is not a signature: a user who can write the file decides what the cache answers. Therefore Read accepts only
// files of the process's user and of root. The caller must check the responses all the same, because the file can
// hold anything.
package snapshot
