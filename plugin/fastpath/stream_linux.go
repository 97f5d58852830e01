package fastpath

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coredns/coredns/plugin/metrics/vars"

	"golang.org/x/sys/unix"
)

// This file serves one connection, by TCP or TLS, with a goroutine that reads. It answers the hits among what one read has brought
// with one write. All other queries go the slow path, each on its own, and their answers leave when they are ready (RFC 7766
// section 7). Which connections there are is decided in streams_linux.go.
//
// A plain connection that has asked for nothing but hits for a while, or for nothing at all, goes to a loop, and has no goroutine
// there: see loop_linux.go. An idle connection by TLS has no buffer, and a goroutine with a small stack.

const (
	headerLen = 12               // a shorter message is none, and gets no answer
	readSize  = 16 << 10         // the most that one read takes
	unsentMax = 1 << 20          // answers of the slow path that wait to be sent, of one connection, in bytes
	firstLen  = 64               // what a read by TLS takes before it takes a buffer
	lonely    = 8                // after so many records that came alone, a second one is looked for only at each eighth
	outMax    = 64 << 10         // answers are sent when there are more bytes than that
	hurry     = time.Second / 10 // the most time to send while all connections together have too much to send
	slowMax   = 256              // queries of one connection that the slow path may have at once
	slowAll   = slowAtOnce / 2   // queries of all connections that the slow path may have at once
	lastWait  = 30 * time.Second // how long a client that will ask no more may wait for its answers
)

var (
	tick       = time.Second // how often a busy connection looks at the time
	shortLived = 16          // queries of a connection that may end soon, or may ask for what is no hit
	lingerTime = time.Second // how long a client may take to close its side
)

// sending counts the bytes of all connections that are being sent. With more than sendingMax, only clients that read at once are
// kept.
var (
	sending    atomic.Int64
	sendingMax = int64(256 << 20)
)

// slots has an element for each query of a connection on the slow path.
var slots = make(chan struct{}, slowAll)

// These are the types of conn and tcp in stream.
type (
	timedConn interface {
		io.ReadWriteCloser
		SetReadDeadline(time.Time) error
		SetWriteDeadline(time.Time) error
	}
	socket interface { // in the care of Go's poller
		timedConn
		syscall.Conn
	}
)

// stream is one connection. Its methods belong to one goroutine, or to the loop that serves it, unless they say otherwise.
type stream struct {
	of     *streams
	conn   timedConn // tcp or tls; nil in a loop
	tcp    socket    // below conn: a *net.TCPConn, or an *os.File
	tls    *tls.Conn // nil for plain TCP
	remote net.Addr  // *net.TCPAddr
	local  net.Addr  // *net.TCPAddr
	born   *streamGeneration
	from   netip.AddrPort // of the client, without a zone
	client netip.Addr     // what counts as one client, see clientOf
	share  *share         // of client
	last   bool           // no further query is read

	rest   []byte    // an incomplete message, with its length
	asked  int       // queries read, without the first one
	quiet  int       // queries read since the last one for the slow path
	lone   int       // by TLS: reads since the last one that has brought a second record, or the rest of a long one
	passed [][]byte  // queries for the slow path, which are its own
	active bool      // a query has come since the last tick
	since  time.Time // the last query came before; valid unless active
	until  time.Time // when a read ends, unless the connection is ending
	eof    bool      // the client will send no more
	acked  uint64    // bytes that the client had taken at the last call of takes

	ending atomic.Bool
	ended  chan struct{} // closed when ending becomes true
	endsBy time.Time     // set before ended is closed: no wait takes longer
	broken atomic.Bool   // the connection is of no use
	unsent atomic.Int64  // bytes of answers of the slow path that wait to be sent

	form   sync.Mutex // guards conn, tcp and looped. While a loop serves the connection, it guards all fields of the stream
	looped bool       // a loop serves the connection
	looper

	sends sync.Mutex    // held during each write to conn
	mu    sync.Mutex    // guards slow and freed
	slow  int           // queries on the slow path
	freed chan struct{} // closed when slow falls; nil: nobody waits
}

// end makes the connection end: it answers what has come, and closes. It may be called by any goroutine.
func (c *stream) end() {
	if c.ending.CompareAndSwap(false, true) {
		c.endsBy = time.Now().Add(slowGrace)
		close(c.ended)
	}
	c.form.Lock()
	defer c.form.Unlock()
	if c.looped {
		c.leaveLoop()
	}
	c.tcp.SetReadDeadline(time.Unix(1, 0))
}

// kill makes the connection end without further answers. It may be called by any goroutine. It does not close the connection: that
// could wait for the goroutine that reads.
func (c *stream) kill() {
	c.broken.Store(true)
	c.end() // it stays in no loop, and comes to none
	c.form.Lock()
	defer c.form.Unlock()
	c.tcp.SetWriteDeadline(time.Unix(1, 0))
}

// serve serves the connection until it ends or goes to a loop, or until it has been idle for a tick. Then it goes on in a new
// goroutine, whose stack is small.
func (c *stream) serve() {
	defer func() {
		if err := recover(); err != nil {
			vars.Panic.Inc()
			c.of.counts.panics.Add(1)
			log.Errorf("fastpath: a connection panicked: %v\n%s", err, debug.Stack())
			c.broken.Store(true)
			c.finish()
		}
	}()
	c.catchUp()
	for !c.over() {
		if c.quiet > shortLived && c.enterLoop() {
			return
		}
		err := c.read()
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if c.ending.Load() {
			c.readLast()
			break
		}
		wasActive := c.active
		if !c.ticked() {
			break
		}
		if !wasActive {
			if !c.enterLoop() {
				c.of.running.Go(c.park)
			}
			return
		}
	}
	c.finish()
}

// begin serves a connection that has just been taken over.
func (c *stream) begin() {
	c.wake()
	c.serve()
}

// catchUp does what a loop has left.
func (c *stream) catchUp() {
	if b := c.backlog; len(b) > 0 {
		c.backlog, c.quiet = nil, 0 // the client may be slow again
		c.sendBacklog(b)
	}
	c.passAll()
	if p := c.rest; whole(p, nil) {
		c.rest = nil
		c.answer(p, nil)
	}
}

// sendBacklog sends what a loop has had no room for, before anybody else sends.
func (c *stream) sendBacklog(b []byte) {
	defer c.sends.Unlock() // leaveLoop has locked it
	if !c.broken.Load() && c.sendInTurn(b, true) != nil {
		c.broken.Store(true)
	}
}

// park waits for a query or the deadline, and serves the connection then.
func (c *stream) park() {
	if raw, err := c.tcp.SyscallConn(); c.tls == nil && err == nil {
		raw.Read(func(fd uintptr) bool { // serve finds the error
			is := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
			n, err := unix.Poll(is[:], 0)
			return n != 0 || err != nil
		})
	}
	c.serve()
}

// over reports whether nothing more is to be read.
func (c *stream) over() bool { return c.last || c.broken.Load() || c.eof || c.exhausted() }

// exhausted reports whether the client has asked as many queries as it may.
func (c *stream) exhausted() bool {
	n := c.of.serves.Load().maxQueries
	return n >= 0 && c.asked >= n-1
}

// wake makes an idle connection active.
func (c *stream) wake() {
	if c.active {
		return
	}
	c.active = true
	if c.looped { // which has no deadlines
		return
	}
	now := time.Now()
	c.conn.SetWriteDeadline(now.Add(c.of.serves.Load().write + tick))
	c.waitUntil(now.Add(tick))
}

// waitUntil sets the time at which a read ends, unless the connection is ending.
func (c *stream) waitUntil(t time.Time) {
	c.until = t
	c.tcp.SetReadDeadline(t)
	if c.ending.Load() { // end may have come in between
		c.tcp.SetReadDeadline(time.Unix(1, 0))
	}
}

// ticked is called when a read has taken until its deadline. It reports whether the connection may go on.
func (c *stream) ticked() bool {
	now, g := time.Now(), c.of.serves.Load()
	if c.active {
		c.active, c.since = false, now
		c.conn.SetWriteDeadline(now.Add(g.write + tick))
		c.waitUntil(now.Add(min(tick, g.idle)))
		return true
	}
	rest := g.idle - now.Sub(c.since)
	if c.waits() { // the client waits for an answer, so it is not idle
		rest = tick
		if c.takes() { // package dns sends the first query's answer itself, with this deadline
			c.conn.SetWriteDeadline(now.Add(g.write + tick))
		}
	}
	if rest <= 0 {
		return false
	}
	c.waitUntil(now.Add(rest))
	return true
}

// takes reports whether the client has taken something since the last call, or everything that was sent.
func (c *stream) takes() (yes bool) {
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return false
	}
	raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			yes = info.Bytes_acked != c.acked || info.Unacked == 0 && info.Notsent_bytes == 0
			c.acked = info.Bytes_acked
		}
	})
	return yes
}

// read reads what has come, or waits for it, and answers it.
func (c *stream) read() error {
	if c.tls != nil {
		return c.readTLS()
	}
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		c.broken.Store(true)
		return err
	}
	err = raw.Read(c.ready)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.broken.Store(true)
	}
	return err
}

// ready is called when there may be something to read. It returns false to be called again when more has come.
//
// A read that does not fill the buffer has emptied the socket. So ready does not try again on a connection that has been in use
// for a while: Go's poller tells of what comes later. It may not tell of a FIN that came together with the data. That one is
// found at the next tick.
func (c *stream) ready(fd uintptr) (done bool) {
	for {
		b := newBuffer()
		n, err := ignoringEINTR(int(fd), (*b)[readSize:])
		if err == unix.EAGAIN {
			freeBuffer(b)
			return false
		}
		if err != nil || n == 0 {
			if c.eof = err == nil; !c.eof {
				c.broken.Store(true)
			}
			freeBuffer(b)
			return true
		}
		c.got(b, n)
		if n == readSize || c.over() || c.ending.Load() { // RawConn.Read looks at the deadline only when it begins
			return true
		}
		if c.quiet > shortLived && c.mayLoop() {
			return true
		}
		if c.asked > shortLived {
			return false
		}
	}
}

func ignoringEINTR(fd int, p []byte) (n int, err error) {
	for {
		if n, err = syscall.Read(fd, p); err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}

// readTLS is read for TLS. The first bytes go to a small buffer, so that a connection that waits has no large one.
//
// Package tls returns one record at a time. A client that asks several queries at once may send a record for each. So readTLS also
// takes what tls has read from the socket already. Then there is one write for all answers.
func (c *stream) readTLS() error {
	var first [firstLen]byte
	n, err := c.conn.Read(first[:])
	if n > 0 {
		b := newBuffer()
		free := (*b)[readSize:]
		copy(free, first[:n])
		if c.lone++; err == nil && (n == firstLen || c.lone <= lonely || c.lone%lonely == 0) {
			var more int
			more, err = c.readBuffered(free[n:])
			n += more
		}
		c.got(b, n)
	}
	switch {
	case err == nil || errors.Is(err, os.ErrDeadlineExceeded):
	case errors.Is(err, io.EOF):
		c.eof = true
	default:
		c.broken.Store(true)
	}
	return err
}

// readBuffered reads what package tls can return without a read from the socket.
func (c *stream) readBuffered(to []byte) (n int, err error) {
	c.tcp.SetReadDeadline(time.Unix(1, 0))
	for n < len(to) && err == nil {
		var more int
		more, err = c.conn.Read(to[n:])
		n += more
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	c.waitUntil(c.until)
	if n > 0 {
		c.lone = 0
	}
	return n, err
}

// readLast answers what has come before the connection ends.
func (c *stream) readLast() {
	for deadline := time.Now().Add(lingerTime); !c.over() && time.Now().Before(deadline); {
		c.tcp.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if c.read() != nil {
			return
		}
	}
}

// got answers the n bytes that have been read to the second half of b, which it frees.
func (c *stream) got(b *[]byte, n int) {
	defer freeBuffer(b)
	c.answer(c.join(*b, n), nil)
}

// join returns the messages of c.rest and of the n bytes that have been read to the second half of b. It returns nil if none is
// whole. A message in many pieces is copied twice: to c.rest, and when it is whole.
func (c *stream) join(b []byte, n int) []byte {
	p := b[readSize : readSize+n]
	if at := readSize - len(c.rest); at >= 0 && whole(c.rest, p) {
		copy(b[at:], c.rest)
		c.rest = nil
		return b[at : readSize+n]
	}
	c.rest = append(c.rest, p...)
	if !whole(c.rest, nil) {
		return nil
	}
	p, c.rest = c.rest, nil
	return p
}

// answer answers the messages in p, and keeps what is behind them. In a loop, which must be l, it stops where it would have to
// wait: see mustLeave.
func (c *stream) answer(p []byte, l *loop) {
	for len(p) > 0 && !c.last && !c.broken.Load() && !c.exhausted() && !c.mustLeave() {
		w := l.worker(c)
		rest := w.serve(p)
		c.passed, w.passed = w.passed, nil
		if l == nil {
			w.free() // before there is a wait
			c.passAll()
		} else {
			c.passAtOnce(l)
		}
		if len(rest) == len(p) {
			break
		}
		p = rest
	}
	if len(p) > 0 {
		c.rest = bytes.Clone(p)
	}
}

// passAll gives the queries that there are to the slow path.
func (c *stream) passAll() {
	passed := c.passed
	c.passed = nil
	for _, packet := range passed {
		c.pass(packet)
	}
}

// whole reports whether the bytes of a and then b begin with a message.
func whole(a, b []byte) bool {
	var length [lengthLen]byte
	n := len(a) + len(b)
	copy(length[copy(length[:], a):], b)
	return n >= lengthLen && n >= lengthLen+int(binary.BigEndian.Uint16(length[:]))
}

// send sends messages, each with its length. Any goroutine may call it, unless a loop has the connection.
func (c *stream) send(b []byte) error { return c.sendInTurn(b, false) }

// sendInTurn is send. held says that the caller holds sends. If not, sendInTurn waits for sends, and the time to write begins then.
func (c *stream) sendInTurn(b []byte, held bool) error {
	hurried := sending.Add(int64(len(b))) > sendingMax
	defer sending.Add(-int64(len(b)))
	if hurried {
		c.limitWrite(true)
		defer c.limitWrite(false)
	}
	if !held {
		if !c.sends.TryLock() {
			c.sends.Lock()
			c.limitWrite(hurried)
		}
		defer c.sends.Unlock()
	}
	if c.broken.Load() { // limitWrite may have undone the deadline by which kill ends writes
		return net.ErrClosed
	}
	_, err := c.conn.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.of.counts.slowReaders.Add(1)
	}
	return err
}

// limitWrite sets the deadline of a write. hurried says that all connections together have too much to send.
func (c *stream) limitWrite(hurried bool) {
	d := hurry
	if !hurried {
		d = c.of.serves.Load().write + tick
	}
	c.conn.SetWriteDeadline(time.Now().Add(d))
}

// pass gives a query to the slow path. If the connection, its client, or all connections together, have as many there as they may,
// it waits.
func (c *stream) pass(packet []byte) {
	if c.quiet = 0; c.last || c.broken.Load() {
		return
	}
	if !c.admit() {
		if c.last = true; !c.ending.Load() {
			c.broken.Store(true)
		}
		return
	}
	q := c.slowQuery(packet)
	for {
		g := c.of.serves.Load()
		if g.slow.put(q, c.tls) {
			return
		}
		if g == c.of.serves.Load() { // it has ended, and so has the connection
			c.passedEnded(true)
			return
		}
	}
}

// slowQuery returns a query of the connection for the slow path.
func (c *stream) slowQuery(packet []byte) *slowQuery {
	return &slowQuery{from: c.remote, local: c.local, packet: packet, reply: c.sendSlow, ended: c.passedEnded}
}

// passedEnded is slowEnded for a query that pass gave to the slow path. Any goroutine may call it.
func (c *stream) passedEnded(closed bool) {
	<-slots
	<-c.share.slots
	c.slowEnded(closed)
}

// admit waits until one more query may go the slow path. It returns false if that takes too long.
func (c *stream) admit() bool {
	begun := time.Now()
	defer func() {
		if now := time.Now(); now.Sub(begun) > tick { // no tick has renewed this
			c.conn.SetWriteDeadline(now.Add(c.of.serves.Load().write + tick))
		}
	}()
	if !c.await(slowMax, lastWait) {
		return false
	}
	c.mu.Lock()
	c.slow++
	c.mu.Unlock()
	if !c.enter(c.share.slots) {
		c.slowEnded(false)
		return false
	}
	if !c.enter(slots) {
		<-c.share.slots
		c.slowEnded(false)
		return false
	}
	return true
}

// enter waits until an element fits into to. It returns false if that takes too long.
func (c *stream) enter(to chan struct{}) bool {
	select {
	case to <- struct{}{}:
		return true
	default:
	}
	over, ended := time.After(lastWait), c.ended
	for {
		select {
		case to <- struct{}{}:
			return true
		case <-ended:
			over, ended = c.lastMoment(), nil
		case <-over:
			return false
		}
	}
}

// lastMoment is when an ending connection waits no more.
func (c *stream) lastMoment() <-chan time.Time {
	if c.broken.Load() {
		return time.After(0)
	}
	return time.After(time.Until(c.endsBy))
}

// await waits until fewer than n queries are on the slow path. It returns false if that takes longer than d.
func (c *stream) await(n int, d time.Duration) bool {
	var over <-chan time.Time
	ended := c.ended
	for {
		c.mu.Lock()
		if c.slow < n {
			c.mu.Unlock()
			return true
		}
		if c.freed == nil {
			c.freed = make(chan struct{})
		}
		freed := c.freed
		c.mu.Unlock()
		if over == nil {
			over = time.After(d)
		}
		select {
		case <-freed:
		case <-ended:
			over, ended = c.lastMoment(), nil
		case <-over:
			return false
		}
	}
}

// sendSlow sends an answer of the slow path. Any goroutine may call it.
func (c *stream) sendSlow(b []byte) error {
	if c.unsent.Add(int64(len(b))) > unsentMax { // the client does not read
		c.of.counts.slowReaders.Add(1)
		c.kill()
		return net.ErrClosed
	}
	defer c.unsent.Add(-int64(len(b)))
	if c.broken.Load() {
		return net.ErrClosed
	}
	if c.sendLooped(b) {
		return nil
	}
	c.limitWrite(false)
	err := c.send(b)
	if err != nil {
		c.kill()
	}
	return err
}

// slowEnded says that a query has left the slow path. closed says that a plugin has closed the connection. Any goroutine may call
// it.
func (c *stream) slowEnded(closed bool) {
	if closed {
		c.kill()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slow--
	if c.freed != nil {
		close(c.freed)
		c.freed = nil
	}
}

// waits reports whether the client waits for an answer of the slow path.
func (c *stream) waits() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.slow > 0
}

// finish waits for the answers of the slow path, and closes the connection. The client gets a FIN behind the last answer. What it
// sends meanwhile is read, for otherwise the kernel would reset the connection, and the client could lose answers.
func (c *stream) finish() {
	defer c.of.remove(c)
	defer c.tcp.Close()
	if c.broken.Load() {
		return
	}
	for waited := time.Duration(0); !c.await(1, slowGrace); {
		if waited += slowGrace; waited >= lastWait || c.ending.Load() {
			return
		}
	}
	if c.broken.Load() {
		return
	}
	if c.tls != nil {
		c.conn.SetWriteDeadline(time.Now().Add(lingerTime))
		c.tls.CloseWrite()
	}
	if c.closeWrite() != nil || c.eof {
		return
	}
	c.tcp.SetReadDeadline(time.Now().Add(lingerTime))
	var discarded [512]byte
	for {
		if _, err := c.tcp.Read(discarded[:]); err != nil {
			return
		}
	}
}

// closeWrite sends a FIN.
func (c *stream) closeWrite() error {
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return err
	}
	if failed := raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) }); failed != nil {
		return failed
	}
	return err
}

// streamWorker answers the messages of a connection, as long as it has any. It implements Batch.
type streamWorker struct {
	c          *stream
	generation *streamGeneration // that made answerer
	answerer   Answerer

	packets [BatchSize][]byte
	n       int
	out     []byte   // answers that have not been sent
	passed  [][]byte // copies of the queries for the slow path
	counted [reasons]uint64
}

// buffers are buffers that nobody uses now.
var buffers = sync.Pool{New: func() any { b := make([]byte, 2*readSize); return &b }}

func newBuffer() *[]byte   { return buffers.Get().(*[]byte) }
func freeBuffer(b *[]byte) { buffers.Put(b) }

func newStreamWorker(c *stream) *streamWorker {
	g := c.of.serves.Load()
	w, ok := g.workers.Get().(*streamWorker)
	if !ok {
		w = &streamWorker{generation: g, answerer: g.NewAnswerer()}
	}
	w.c = c
	return w
}

func (w *streamWorker) free() {
	w.c = nil
	clear(w.packets[:w.n])
	if w.out = w.out[:0]; cap(w.out) > 2*outMax {
		w.out = nil
	}
	w.generation.workers.Put(w)
}

// serve answers the messages in p until one must go the slow path. It returns what it has not read: an incomplete message, or what
// comes after those for the slow path.
func (w *streamWorker) serve(p []byte) (rest []byte) {
	for {
		w.n = 0
		c := w.c
		for w.n < BatchSize && len(p) >= lengthLen && !c.exhausted() {
			n := lengthLen + int(binary.BigEndian.Uint16(p))
			if len(p) < n {
				break
			}
			c.asked++
			c.quiet++
			if n >= lengthLen+headerLen {
				w.packets[w.n] = p[lengthLen:n]
				w.n++
			}
			p = p[n:]
			c.wake()
		}
		if w.n > 0 {
			w.answerer.Answer(w)
		}
		done := w.n < BatchSize || len(w.passed) > 0 || len(c.backlog) > 0 || c.broken.Load()
		if done {
			w.flush()
		}
		if w.n > 0 {
			w.account()
			w.answerer.Sent()
		}
		if done {
			return p
		}
	}
}

// flush sends the answers that there are.
func (w *streamWorker) flush() {
	c := w.c
	switch {
	case len(w.out) == 0 || c.broken.Load():
	case c.looped:
		c.sendNow(w.out)
	case c.send(w.out) != nil:
		c.broken.Store(true)
	}
	w.out = w.out[:0]
}

// Len implements Batch.
func (w *streamWorker) Len() int { return w.n }

// Packet implements Batch.
func (w *streamWorker) Packet(i int) []byte { return w.packets[i] }

// Client implements Batch.
func (w *streamWorker) Client(int) netip.AddrPort { return w.c.from }

// Local implements Batch.
func (w *streamWorker) Local() net.Addr { return w.c.local }

// Lost implements Batch. Replies are sent later, if there are further batches.
func (w *streamWorker) Lost(int) bool { return w.c.broken.Load() }

// Stream implements Batch.
func (w *streamWorker) Stream() bool { return true }

// Reply implements Batch.
func (w *streamWorker) Reply(_ int, b []byte) {
	w.counted[Answered]++
	w.out = binary.BigEndian.AppendUint16(w.out, uint16(len(b)))
	w.out = append(w.out, b...)
	if len(w.out) > outMax {
		w.flush()
	}
}

// Pass implements Batch.
func (w *streamWorker) Pass(i int, why Reason) {
	w.counted[why]++
	w.passed = append(w.passed, bytes.Clone(w.packets[i]))
}

// account adds what happened to the batch to the address's counters.
func (w *streamWorker) account() {
	c := w.c.of.counts
	for why, n := range w.counted {
		if n > 0 {
			c.streamed[why].Add(n)
			w.counted[why] = 0
		}
	}
}
