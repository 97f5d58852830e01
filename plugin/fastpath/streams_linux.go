package fastpath

import (
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/chain"
)

// This file says which connections the fast path serves: how they are taken from CoreDNS's server, pass from one generation of the
// Corefile to the next, and end. What happens on a connection is in stream_linux.go.
//
// CoreDNS listens, accepts, and makes the TLS connection. When the first query of a connection reaches the chain, Take takes the
// connection over (dns.ResponseWriter.Hijack). So there is no second listener, and a reload, SO_REUSEPORT, and the
// certificates work as without a fast path.

// Bounds of connections. A connection beyond them is not kept: its first query is answered, and then it is closed.
var (
	// streamsMax is how many connections the process keeps.
	streamsMax = 32768

	// streamsPerClient is how many of them one client may have. An IPv6 client is a /64 network.
	streamsPerClient = streamsMax / 4

	// slowPerClient is how many queries of one client's connections the slow path may have at once. More wait.
	slowPerClient = slowAll / 8
)

// share is what one client uses.
type share struct {
	conns int           // guarded by allStreams.mu
	slots chan struct{} // has an element for each query of the client's connections on the slow path
}

// streams are the connections to one address that the fast path serves.
type streams struct {
	addr   string // of the server, such as dns://:53
	serves atomic.Pointer[streamGeneration]
	counts *counters
	ending atomic.Bool // all connections must end

	// Guarded by allStreams.mu.
	conns   map[*stream]struct{}
	running sync.WaitGroup // of the connections in conns
	retired []*streamGeneration
}

// streamGeneration is what one generation of the Corefile gives to the connections of an address. Only workers changes.
type streamGeneration struct {
	generation
	number     int           // of the Corefile
	idle       time.Duration // the most time between two queries
	write      time.Duration // the most time to send an answer
	maxQueries int           // of one connection; -1: no limit
	workers    sync.Pool     // of *streamWorker that nobody uses now
}

// allStreams are the connections of the process.
var allStreams = struct {
	mu       sync.Mutex // guards the others, and the fields of streams that say so
	m        map[string]*streams
	n        int // connections
	byClient map[netip.Addr]*share
	expected map[string]int // addresses that a starting Corefile serves, with the number of its generation
}{m: make(map[string]*streams), byClient: make(map[netip.Addr]*share), expected: make(map[string]int)}

// clientOf returns what counts as one client: an IPv4 address, or an IPv6 network of 64 bits.
func clientOf(ip netip.Addr) netip.Addr {
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return ip
}

// ExpectStreams says that the generation of a Corefile that is about to start will serve connections to an address. Connections
// of the generation before then wait a moment for it, and go on there, when CloseStreams is called.
func ExpectStreams(addr string, number int) {
	allStreams.mu.Lock()
	defer allStreams.mu.Unlock()
	allStreams.expected[addr] = number
}

// ForgetExpected takes all calls of ExpectStreams back: the start has failed.
func ForgetExpected() {
	allStreams.mu.Lock()
	defer allStreams.mu.Unlock()
	clear(allStreams.expected)
}

// OpenStreams has the connections to the address of s served by the Service that service returns. number is the generation of
// the Corefile. Only the first call for a generation has an effect. A plain connection of the generation before is served by
// the new one from its next query on.
func OpenStreams(s *dnsserver.Server, number int, service func() (Service, error)) error {
	allStreams.mu.Lock()
	defer allStreams.mu.Unlock()
	_, err := openStreamsLocked(s, number, service)
	return err
}

// openStreamsLocked is OpenStreams for a caller that holds allStreams.mu. It returns the connections to the address, which may be
// served by a newer generation, or nil if there is nothing that serves.
func openStreamsLocked(s *dnsserver.Server, number int, service func() (Service, error)) (*streams, error) {
	l := allStreams.m[s.Addr]
	if l != nil {
		if l.ending.Load() {
			return nil, nil
		}
		if l.serves.Load().number >= number {
			return l, nil
		}
	}
	g := &streamGeneration{number: number, idle: s.IdleTimeout, write: s.WriteTimeout, maxQueries: s.MaxTCPQueries}
	if g.maxQueries == 0 {
		g.maxQueries = 128 // as package dns has it
	}
	var err error
	if g.Service, err = service(); err != nil {
		return nil, err
	}
	accept, ok := chain.AcceptFunc(s)
	if !ok {
		return nil, errors.New("this version of CoreDNS does not say which opcodes a server takes")
	}
	if g.over() {
		return nil, nil
	}
	if l == nil {
		l = &streams{addr: s.Addr, counts: countersOf(s.Addr), conns: make(map[*stream]struct{})}
		allStreams.m[s.Addr] = l
	}
	g.slow = newSlowPath(s, accept, l.counts)
	go g.slow.serve()
	if last := l.serves.Swap(g); last != nil {
		l.retired = append(l.retired, last)
		go last.slow.shutdown()
	}
	return l, nil
}

// Take takes over the connection that w, the writer of CoreDNS's server s, belongs to. w must not have been used yet. The fast path
// then reads the connection's next queries, and w stays good for the first one. The caller must call done when that one has
// been answered. done is nil if the connection has not been taken. See OpenStreams for number and service. In a reload, the server
// of the old generation may still accept a plain connection when the new one serves already: it goes to the new one.
func Take(s *dnsserver.Server, w dns.ResponseWriter, number int, service func() (Service, error)) (done func(), err error) {
	conn, ok := chain.Conn(w)
	if !ok {
		return nil, nil
	}
	secure, isTLS := conn.(*tls.Conn)
	var under net.Conn = conn
	if isTLS {
		under = secure.NetConn()
	}
	tcp, ok := under.(*net.TCPConn)
	if !ok {
		return nil, nil
	}
	allStreams.mu.Lock()
	defer allStreams.mu.Unlock()
	if ending.Load() { // CoreDNS ends the connection
		return nil, nil
	}
	l, err := openStreamsLocked(s, number, service)
	if l == nil || err != nil {
		return nil, err
	}
	if isTLS && l.serves.Load().number != number { // it ends with its generation, and CoreDNS sees to that
		return nil, nil
	}
	c := &stream{of: l, conn: tcp, tcp: tcp, remote: conn.RemoteAddr(), local: conn.LocalAddr(), slow: 1, ended: make(chan struct{})}
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		from := a.AddrPort()
		c.from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	}
	c.client = clientOf(c.from.Addr())
	if isTLS {
		c.conn, c.tls, c.born = secure, secure, l.serves.Load()
	}
	c.share = allStreams.byClient[c.client]
	if c.share == nil {
		c.share = &share{slots: make(chan struct{}, slowPerClient)}
		allStreams.byClient[c.client] = c.share
	}
	if allStreams.n >= streamsMax || c.share.conns >= streamsPerClient {
		l.counts.refused.Add(1)
		c.last = true
	}
	allStreams.n++
	c.share.conns++
	l.conns[c] = struct{}{}
	l.counts.streams.Add(1)
	w.Hijack()
	l.running.Go(c.begin)
	return func() { c.slowEnded(false) }, nil
}

// remove forgets a connection that has been closed.
func (l *streams) remove(c *stream) {
	allStreams.mu.Lock()
	defer allStreams.mu.Unlock()
	delete(l.conns, c)
	l.counts.streams.Add(-1)
	allStreams.n--
	if c.share.conns--; c.share.conns <= 0 {
		delete(allStreams.byClient, c.client)
	}
}

// expectedWait is how long CloseStreams waits for servers that are about to start.
const expectedWait = time.Second

// CloseStreams ends the connections whose service is one that uses selects. It answers what has been asked, tells the clients
// (FIN), and returns when no connection uses such a service any more, or when the bounds of stream.finish are reached. If the
// process is about to end, it ends all connections at once.
func CloseStreams(uses func(Service) bool) {
	old := func(g *streamGeneration) bool { return uses(g.Service) }
	for begun := time.Now(); !ending.Load() && time.Since(begun) < expectedWait && newerExpected(old); {
		time.Sleep(time.Millisecond)
	}
	allStreams.mu.Lock()
	var ended []*streams
	var slow []*slowPath
	for addr, l := range allStreams.m {
		for _, g := range l.retired {
			if old(g) {
				slow = append(slow, g.slow)
			}
		}
		l.retired = slices.DeleteFunc(l.retired, old)
		if ending.Load() || old(l.serves.Load()) {
			l.ending.Store(true)
			ended = append(ended, l)
			delete(allStreams.m, addr)
		}
		for c := range l.conns {
			if l.ending.Load() || c.born != nil && old(c.born) {
				c.end()
			}
		}
	}
	allStreams.mu.Unlock()
	for _, l := range ended {
		l.running.Wait()
		g := l.serves.Load()
		go g.slow.shutdown()
		slow = append(slow, g.slow)
	}
	for _, p := range slow {
		<-p.over
	}
}

// newerExpected reports whether an address, served by a generation that old selects, waits for a newer one.
func newerExpected(old func(*streamGeneration) bool) bool {
	allStreams.mu.Lock()
	defer allStreams.mu.Unlock()
	for addr, l := range allStreams.m {
		if g := l.serves.Load(); old(g) && allStreams.expected[addr] > g.number && len(l.conns) > 0 {
			return true
		}
	}
	return false
}
