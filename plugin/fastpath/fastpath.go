// Package fastpath answers queries over UDP without CoreDNS's server. On an address with a fast path, a listener has sockets
// of its own beside those of CoreDNS, and one worker for each of them. A worker receives datagrams in batches, and gives each
// batch to an Answerer. The answerer replies to a datagram, or passes it on to the slow path.
//
// On the slow path, a datagram goes through a queue to the server that CoreDNS has on this address. The server handles it as if
// it came from the server's own socket, and the reply leaves by the listener's sockets. So each query gets the reply that it
// would get without a fast path.
//
// The package does not know what a cache is: the Service that it is given makes the answerers. Listeners need Linux.
//
// This file has the types that a user of the package needs, and what is the same on all systems.
package fastpath

import (
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	clog "github.com/coredns/coredns/plugin/pkg/log"
)

var log = clog.NewWithPlugin("optcache")

// Reason says why a datagram goes the slow path.
type Reason uint8

const (
	Answered Reason = iota // none: the datagram has a reply
	NotPlain               // it is not a plain query; see query.Parse
	Zone                   // the fast path does not serve its qname
	Miss                   // there is no answer
	Stale                  // the answer has expired
	Prefetch               // the answer must be refreshed
	Message                // the answer cannot be sent as it is stored
	Size                   // the reply must be compressed or truncated to fit
	Outer                  // a plugin in front acts on the query, or must see its reply
	View                   // an expression of the plugin view goes by more than the query
	reasons
)

// String returns the reason as in the metrics' label reason.
func (r Reason) String() string {
	return [reasons]string{"", "packet", "zone", "miss", "stale", "prefetch", "answer", "size", "plugin", "view"}[r]
}

// BatchSize is the largest number of datagrams in a batch.
const BatchSize = 64

// Batch is the datagrams that a worker has received at once. The answerer must call Reply or Pass once for each of them.
type Batch interface {
	Len() int                    // number of datagrams, 1 to BatchSize
	Packet(i int) []byte         // belongs to the batch, and is valid until Answerer.Sent returns
	Client(i int) netip.AddrPort // the client's address without a zone
	Local() net.Addr             // the server's address as plugins see it: *net.UDPAddr or *net.TCPAddr
	Stream() bool                // the datagrams are messages on a connection, by TCP or TLS
	Reply(i int, b []byte)       // the caller must not change b until Answerer.Sent is called
	Pass(i int, why Reason)      // sends a copy of the datagram down the slow path
	Lost(i int) bool             // the reply could not be sent; for Answerer.Sent
}

// Answerer answers the datagrams of one worker. Its methods are not called concurrently.
type Answerer interface {
	Answer(Batch)
	Sent() // is called after Answer, when the replies have been sent
}

// Service answers the queries for one address, for one generation of the Corefile. Its methods are safe for concurrent use.
type Service interface {
	NewAnswerer() Answerer // for one worker
	Workers() int          // number of workers that the address should have; 0: there is nothing to answer
	Asked() bool           // somebody has asked for a fast path; see shared_linux.go and steeringOf for what it means
	Generation() int       // of the Corefile; a later one has a greater number
	Over() bool            // the generation has ended
}

// NoticeEvery is the shortest time between two calls of Realign for queries of one server block that have missed the fast path.
const NoticeEvery = 250 * time.Millisecond

// ending is true when the process is about to end.
var ending atomic.Bool

// End says that the process is about to end. From then on, Close closes all listeners.
func End() { ending.Store(true) }

// OwnProcs returns GOMAXPROCS without the share of the workers: as it was at the first call.
var OwnProcs = sync.OnceValue(func() int { return runtime.GOMAXPROCS(0) })
