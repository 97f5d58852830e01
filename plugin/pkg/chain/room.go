package chain

import (
	"context"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
)

// This file saves the copies of stacks. CoreDNS has a new goroutine for each query over UDP. Its stack is small, and Go copies it
// to one twice as large when a call does not fit. The plugins in front of a cache, and a write to a socket behind it, always need that
// once. What a copy costs goes by the frames that there are: in the cache, three times as many as in front of the plugins.

// stackRoom is what a hit needs of the stack from the outermost plugin on, in bytes: with prometheus, errors and loadbalance in
// front, 2,000 bytes for these, 1,700 for the write, and the rest for the cache.
const stackRoom = 4 << 10

// roomy is the outermost handler of a server block.
type roomy struct{ next plugin.Handler }

// Roomy is a plugin that has the stack grow before the next plugin is called.
func Roomy(next plugin.Handler) plugin.Handler { return roomy{next} }

// Name implements plugin.Handler. There is no directive of that name.
func (roomy) Name() string { return "room" }

// ServeDNS implements plugin.Handler.
func (r roomy) ServeDNS(ctx context.Context, w dns.ResponseWriter, m *dns.Msg) (int, error) {
	makeRoom(false)
	return r.next.ServeDNS(ctx, w, m)
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
