package chain

import "github.com/miekg/dns"

// This file saves the copies of stacks. CoreDNS has a new goroutine for each query over UDP. Its stack is small, and Go copies it
// to one twice as large when a call does not fit. The chain always needs that twice. What a copy costs goes by the frames that there
// are, so the stack grows at once, when there is next to nothing on it. The slow path of the fast path has goroutines of that kind,
// too. Queries by other transports than UDP have what CoreDNS gives them.

// stackRoom is what a hit needs of the stack from the server's first call on, in bytes: with prometheus, errors and loadbalance in
// front, 1,000 bytes for the server, 2,000 for these plugins, 1,700 for the write, and the rest for the cache.
const stackRoom = 5 << 10

// Roomy is a dns.DecorateWriter that decorates nothing. Package dns calls it at the beginning of the goroutine of a query over UDP.
func Roomy(w dns.Writer) dns.Writer {
	makeRoom(false)
	return w
}

// makeRoom has the stack grow if it has less than stackRoom left: Go looks for that when the function is called, whatever happens in
// it. Only with fill it writes to that room, which would take time.
//
//go:noinline
func makeRoom(fill bool) byte {
	if !fill {
		return 0
	}
	var room [stackRoom]byte
	return room[fillRoom(&room)]
}

//go:noinline
func fillRoom(room *[stackRoom]byte) int { return int(room[0]) }
