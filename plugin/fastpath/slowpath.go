package fastpath

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/chain"
)

// This file has the slow path: a queue of queries, and CoreDNS's server at its end. Queries come from datagrams and from streams.

// bySlowPath is the key of a value in the context of each request on the slow path.
type bySlowPath struct{}

// BySlowPath reports whether the request of ctx has reached the chain by the slow path.
func BySlowPath(ctx context.Context) bool { return ctx.Value(bySlowPath{}) != nil }

// lengthLen is the size of the length before each message on a stream (RFC 1035 section 4.2.2).
const lengthLen = 2

// The slow path is bounded. A datagram beyond the bounds is dropped, as by a socket whose buffer is full. A query of a stream
// waits: see stream.pass.
const (
	// slowQueue is how many queries may wait for the server.
	slowQueue = 4096

	// slowAtOnce is how many queries the server may work on at the same time.
	slowAtOnce = 16384
)

// slowGrace is how long a slow path that a reload has replaced may work on its last queries.
var slowGrace = 5 * time.Second

// slowPath is a dns.Server that hands queries to CoreDNS's server for the address. To the dns.Server, the slowPath is a listener,
// and each query is a connection of its own, on which one message comes. Its methods are safe for concurrent use.
type slowPath struct {
	server   *dns.Server
	local    net.Addr // of datagrams
	counts   *counters
	queue    chan net.Conn // each has a *slowQuery
	mu       sync.RWMutex  // guards closed
	closed   bool          // put takes no more queries
	stop     chan struct{} // closed to end the reading
	stopOnce sync.Once
	waiting  atomic.Int64  // queries from put to the end
	now      atomic.Int64  // queries that the server works on
	done     chan struct{} // closed when serve has returned
	over     chan struct{} // closed when shutdown has returned, maybe before done
}

// slowQuery is a query on the slow path. It implements net.Conn for the dns.Server.
type slowQuery struct {
	from, local net.Addr // *net.UDPAddr or *net.TCPAddr: plugins tell the transport by it
	packet      []byte   // owned by the query

	// reply sends a message with its length in two bytes before it, as on a stream. It must not keep the bytes. The server may
	// call it several times, and from several goroutines.
	reply func([]byte) error

	// ended is called once, when there is no further reply. closed says that a plugin has closed the client's connection. It is
	// nil for a datagram.
	ended func(closed bool)

	path *slowPath
	read int // messages that the dns.Server has asked for; one goroutine does
	once sync.Once
}

// tlsQuery is a slowQuery by TLS. Plugins may ask for the state of its connection.
type tlsQuery struct {
	*slowQuery
	conn *tls.Conn
}

// ConnectionState is what package dns looks for.
func (q tlsQuery) ConnectionState() tls.ConnectionState { return q.conn.ConnectionState() }

// newSlowPath returns a slow path to s. accept is the MsgAcceptFunc of s; see chain.AcceptFunc.
func newSlowPath(s *dnsserver.Server, accept dns.MsgAcceptFunc, counts *counters) *slowPath {
	l := &slowPath{
		counts: counts,
		queue:  make(chan net.Conn, slowQueue),
		stop:   make(chan struct{}),
		done:   make(chan struct{}),
		over:   make(chan struct{}),
	}
	l.server = &dns.Server{
		Listener:       l,
		DecorateWriter: chain.Roomy,
		Net:            "tcp",
		MaxTCPQueries:  -1,
		TsigSecret:     s.TsigSecret,
		MsgAcceptFunc:  accept,
		DecorateReader: func(dns.Reader) dns.Reader { return slowReader{} },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
			defer l.now.Add(-1)
			if _, datagram := w.RemoteAddr().(*net.UDPAddr); l.now.Add(1) > slowAtOnce && datagram {
				counts.dropped.Add(1)
			} else {
				ctx := context.WithValue(context.Background(), dnsserver.Key{}, s)
				ctx = context.WithValue(ctx, dnsserver.LoopKey{}, 0)
				ctx = context.WithValue(ctx, bySlowPath{}, true)
				s.ServeDNS(ctx, w, r)
			}
		}),
	}
	return l
}

// serve hands queries to the server until shutdown or Close.
func (l *slowPath) serve() {
	defer close(l.done)
	if err := l.server.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
		log.Errorf("fastpath: the server behind it has ended: %v", err)
	}
}

// shutdown takes no more queries, and waits up to slowGrace for those that it has. It must be called once at most.
func (l *slowPath) shutdown() {
	defer close(l.over)
	ctx, cancel := context.WithTimeout(context.Background(), slowGrace)
	defer cancel()
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	for l.waiting.Load() > 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	l.server.ShutdownContext(ctx)
	l.Close()
	select {
	case <-l.done:
	case <-ctx.Done(): // the dns.Server goes on waiting for its handlers
	}
}

// put queues a query. If the queue is full, it drops a datagram, and waits for room for a query of a stream: the server takes
// from the queue without a wait. It reports false, without doing anything, after the start of shutdown.
func (l *slowPath) put(q *slowQuery, secure *tls.Conn) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return false
	}
	conn := q.conn(l, secure)
	if l.enqueueLocked(conn) {
		return true
	}
	if q.ended == nil {
		l.counts.dropped.Add(1)
		return true
	}
	l.waiting.Add(1)
	select {
	case l.queue <- conn:
	case <-l.stop:
		q.Close()
	}
	return true
}

// tryPut is put for a query of a plain stream, without a wait. Where put would wait, and after the end, it does nothing, and reports
// false.
func (l *slowPath) tryPut(q *slowQuery) bool {
	if !l.mu.TryRLock() {
		return false
	}
	defer l.mu.RUnlock()
	return !l.closed && l.enqueueLocked(q.conn(l, nil))
}

// enqueueLocked queues a query if there is room. The caller holds mu.
func (l *slowPath) enqueueLocked(conn net.Conn) bool {
	l.waiting.Add(1)
	select {
	case l.queue <- conn:
		return true
	default:
		l.waiting.Add(-1)
		return false
	}
}

// Accept implements net.Listener.
func (l *slowPath) Accept() (net.Conn, error) {
	select {
	case q := <-l.queue:
		return q, nil
	case <-l.stop:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (l *slowPath) Addr() net.Addr { return l.local }

// Close implements net.Listener. It ends the reading; queries that were read still get their replies.
func (l *slowPath) Close() error {
	l.stopOnce.Do(func() { close(l.stop) })
	return nil
}

// slowReader implements dns.Reader: the dns.Server reads the message of a query by it, and then the end.
type slowReader struct{}

func (slowReader) ReadTCP(conn net.Conn, _ time.Duration) ([]byte, error) {
	return conn.(interface{ message() ([]byte, error) }).message()
}

func (slowReader) ReadUDP(*net.UDPConn, time.Duration) ([]byte, *dns.SessionUDP, error) {
	return nil, nil, net.ErrClosed
}

// conn returns the query as the dns.Server of l gets it: as a connection of its own. secure is the client's connection, if that is by
// TLS.
func (q *slowQuery) conn(l *slowPath, secure *tls.Conn) net.Conn {
	q.path = l
	if secure != nil {
		return tlsQuery{q, secure}
	}
	return q
}

func (q *slowQuery) message() ([]byte, error) {
	if q.read++; q.read > 1 {
		return nil, io.EOF
	}
	return q.packet, nil
}

// Write implements net.Conn. The dns.Server calls it with a whole message.
func (q *slowQuery) Write(b []byte) (int, error) {
	err := q.reply(b)
	if err == nil {
		return len(b), nil
	}
	if q.ended == nil { // a client may close its connection
		q.path.counts.sendErrors.Add(1)
	}
	return 0, err
}

// Close implements net.Conn. The dns.Server calls it when the query has been served. If a plugin calls it, it comes before the
// dns.Server asks for the next message.
func (q *slowQuery) Close() error {
	q.once.Do(func() {
		q.path.waiting.Add(-1)
		if q.ended != nil {
			closed := q.read == 1
			select {
			case <-q.path.stop: // the dns.Server reads no more, and no plugin need have called Close
				closed = false
			default:
			}
			q.ended(closed)
		}
	})
	return nil
}

func (q *slowQuery) Read([]byte) (int, error)         { return 0, io.EOF }
func (q *slowQuery) LocalAddr() net.Addr              { return q.local }
func (q *slowQuery) RemoteAddr() net.Addr             { return q.from }
func (q *slowQuery) SetDeadline(time.Time) error      { return nil }
func (q *slowQuery) SetReadDeadline(time.Time) error  { return nil }
func (q *slowQuery) SetWriteDeadline(time.Time) error { return nil }
