package fastpath

import (
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/coredns/coredns/plugin/metrics/vars"

	"golang.org/x/sys/unix"
)

// This file has the loops. A loop is a thread that serves many plain connections: it waits for them with epoll(7), beside Go's
// poller, reads, answers hits, and writes. It never waits for one connection. Other queries it gives to the slow path, whose answers
// are written to the descriptor, too. A connection that does not take its answers, has too many queries on the slow path, or ends,
// goes back to a goroutine: see stream_linux.go. There it has a socket with deadlines, which belongs to Go's poller. In a loop it
// has a bare descriptor.
//
// A hit costs less in a loop, as Go's scheduler has no part in it, and an idle connection has no goroutine.

const (
	loopsMax  = 16
	eventsMax = 256 // connections that are served before the next wait

	// waitKeeping is how long a busy loop keeps its P of the scheduler while it waits; see loop.wait.
	waitKeeping = time.Millisecond
)

var (
	loops        [loopsMax]loop
	loopsMost    = loopsMax
	lastLoop     atomic.Uint32 // to which a connection has gone
	runningLoops atomic.Int32
)

// loop is one loop. It runs while it has connections, and a tick or two longer.
type loop struct {
	mu    sync.Mutex // guards the next three. Who holds a stream's form may take it, and not the other way round
	epoll int        // the epoll instance; 0: the loop does not run
	conns []*stream  // by slot, which is what epoll tells of a connection; nil: the slot is free
	free  []int32    // slots

	// Only run uses these.
	w      *streamWorker // of the last connection; nil during a wait
	in     []byte        // as newBuffer returns
	passed bool          // a query went to the slow path since the last wait
	alone  bool          // the last wait brought one connection
	woken  time.Time     // when the last wait ended
	busy   bool          // the last wait brought something, and ended less than waitKeeping after the wait before it
	all    []*stream
}

// looper is what a stream has for a loop.
type looper struct {
	in      *loop
	fd      int    // the socket's
	slot    int32  // in the loop
	backlog []byte // answers that the socket had no room for
	stays   bool   // no loop can have the connection
}

// mayLoop reports whether a loop may have the connection: it is plain, and nothing is under way.
func (c *stream) mayLoop() bool {
	return c.tls == nil && !c.stays && loopsMost > 0 && !c.over() && !c.ending.Load() && !c.waits()
}

// enterLoop gives the connection to a loop, if it may have it. The caller's goroutine must not use it any more then.
func (c *stream) enterLoop() bool {
	if !c.mayLoop() {
		return false
	}
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return false
	}
	// The socket's own descriptor belongs to Go's poller until it is closed.
	raw.Control(func(fd uintptr) { c.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		return false
	}
	c.form.Lock()
	defer c.form.Unlock()
	if c.ending.Load() {
		unix.Close(c.fd)
		return false
	}
	c.tcp.Close()
	c.in = &loops[lastLoop.Add(1)%uint32(min(max(c.of.serves.Load().Workers(), 1), loopsMost))]
	if err := c.in.add(c); err != nil {
		c.stays = true
		c.bySocket()
		c.active = false
		c.wake()
		return false
	}
	c.conn, c.tcp, c.looped = nil, nil, true
	c.of.running.Add(1)
	return true
}

// bySocket makes a socket for Go's poller of the descriptor. The caller holds form.
func (c *stream) bySocket() {
	f := os.NewFile(uintptr(c.fd), "")
	c.conn, c.tcp = f, f
}

// leaveLoop gives the connection to a goroutine. The caller holds form.
func (c *stream) leaveLoop() {
	c.in.remove(c)
	c.bySocket()
	c.in, c.looped = nil, false
	if len(c.backlog) > 0 {
		c.sends.Lock() // catchUp unlocks it when it has sent the backlog. While a loop has the connection, nobody holds it for long
	}
	go func() {
		defer c.of.running.Done()
		c.active = false // so that begin sets deadlines
		c.begin()
	}()
}

// passAtOnce gives the queries in passed to the slow path, without a wait. It keeps those for which it would have to wait.
func (c *stream) passAtOnce(l *loop) {
	for len(c.passed) > 0 {
		if !c.tryAdmit() {
			return
		}
		if !c.of.serves.Load().slow.tryPut(c.slowQuery(c.passed[0])) {
			c.passedEnded(false)
			return
		}
		c.passed, l.passed = c.passed[1:], true
	}
	c.passed = nil
}

// tryAdmit is admit without a wait.
func (c *stream) tryAdmit() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slow >= slowMax {
		return false
	}
	select {
	case c.share.slots <- struct{}{}:
	default:
		return false
	}
	select {
	case slots <- struct{}{}:
	default:
		<-c.share.slots
		return false
	}
	c.slow++
	return true
}

// sendLooped is sendSlow for a connection in a loop. It reports false, without doing anything, if the connection is in none.
func (c *stream) sendLooped(b []byte) bool {
	c.form.Lock()
	defer c.form.Unlock()
	if !c.looped {
		return false
	}
	c.sendNow(b)
	if c.over() || c.mustLeave() {
		c.leaveLoop()
	}
	return true
}

// mustLeave reports whether the connection is in a loop, and there is something to wait for.
func (c *stream) mustLeave() bool { return c.looped && (len(c.passed) > 0 || len(c.backlog) > 0) }

// sendNow sends messages, each with its length, as far as the socket has room. It keeps the rest in backlog.
func (c *stream) sendNow(b []byte) {
	if len(c.backlog) == 0 {
		n, err := atOnce(unix.SYS_WRITE, c.fd, b)
		if err != 0 && err != unix.EAGAIN {
			c.broken.Store(true)
			return
		}
		b = b[n:]
	}
	c.backlog = append(c.backlog, b...)
}

// atOnce reads or writes without a word to Go's scheduler: the descriptor must not block. b must not be empty.
func atOnce(call uintptr, fd int, b []byte) (int, syscall.Errno) {
	for {
		n, _, err := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if err == 0 {
			return int(n), 0
		}
		if err != unix.EINTR {
			return 0, err
		}
	}
}

// add adds a connection, and starts the loop if need be. The connection's form is held.
func (l *loop) add(c *stream) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoll == 0 {
		epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			return err
		}
		l.epoll = epoll
		runningLoops.Add(1)
		RaiseProcs()
		go l.run(epoll)
	}
	if len(l.free) == 0 {
		l.free = append(l.free, int32(len(l.conns)))
		l.conns = append(l.conns, nil)
	}
	last := len(l.free) - 1
	slot := l.free[last]
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, c.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: slot}); err != nil {
		return err
	}
	c.slot, l.conns[slot], l.free = slot, c, l.free[:last]
	return nil
}

// remove removes a connection. The connection's form is held.
func (l *loop) remove(c *stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, c.fd, nil)
	l.conns[c.slot] = nil
	l.free = append(l.free, c.slot)
}

// worker returns a worker for a connection. Without a loop it is a new one, which the caller must free.
func (l *loop) worker(c *stream) *streamWorker {
	if l == nil {
		return newStreamWorker(c)
	}
	if l.w != nil && l.w.generation != c.of.serves.Load() {
		l.freeWorker()
	}
	if l.w == nil {
		l.w = newStreamWorker(c)
	}
	l.w.c = c
	return l.w
}

func (l *loop) freeWorker() {
	if l.w != nil {
		l.w.free()
		l.w = nil
	}
}

// run serves the connections until there are none.
func (l *loop) run(epoll int) {
	l.in = make([]byte, 2*readSize)
	var events [eventsMax]unix.EpollEvent
	var ready [eventsMax]*stream
	l.woken = time.Now()
	for looked := l.woken; ; {
		n, err := l.wait(epoll, events[:], tick-l.woken.Sub(looked))
		if err != nil && err != unix.EINTR {
			log.Errorf("fastpath: epoll: %v", err)
			time.Sleep(tick) // an error that persists must not fill the log
		}
		n = max(n, 0)
		l.mu.Lock()
		for i, event := range events[:n] {
			ready[i] = l.conns[event.Fd] // or another connection that has its slot now, for which serve finds nothing
		}
		l.mu.Unlock()
		for i, c := range ready[:n] {
			if c != nil {
				l.serve(c)
			}
			ready[i] = nil
		}
		l.freeWorker()
		if l.woken.Sub(looked) >= tick {
			if looked = l.woken; !l.look(looked) {
				return
			}
		}
	}
}

// wait waits for something to read. It takes d at most, and waitKeeping more if the loop is busy.
//
// Go's scheduler takes the P from a thread that waits in a system call, wakes another thread for it, finds nothing to do, and has that
// thread sleep again. This costs as much as a query. So a busy loop does not tell the scheduler that it waits, and keeps its P. This
// wait takes waitKeeping at most. The signal by which the runtime preempts a goroutine ends it earlier.
func (l *loop) wait(epoll int, events []unix.EpollEvent, d time.Duration) (n int, err error) {
	if l.passed { // the slow path's goroutines need the P
		l.busy = false
		if l.alone { // as in worker.serve
			runtime.Gosched()
		}
		l.passed = false
	}
	if l.busy {
		r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)),
			uintptr(waitKeeping/time.Millisecond), 0, 0)
		if errno == 0 {
			n = int(r)
		}
	}
	if n == 0 {
		n, err = unix.EpollWait(epoll, events, int((max(d, 0)+time.Millisecond-1)/time.Millisecond))
	}
	now := time.Now()
	l.alone, l.busy, l.woken = n == 1, n > 0 && now.Sub(l.woken) < waitKeeping, now
	return n, err
}

// serve answers what has come on a connection, if the loop still has it.
func (l *loop) serve(c *stream) {
	c.form.Lock()
	defer c.form.Unlock()
	if !c.looped {
		return
	}
	defer func() {
		if err := recover(); err != nil {
			vars.Panic.Inc()
			c.of.counts.panics.Add(1)
			log.Errorf("fastpath: a connection panicked: %v\n%s", err, debug.Stack())
			l.w = nil
			c.broken.Store(true)
			c.leaveLoop()
		}
	}()
	n, err := atOnce(unix.SYS_READ, c.fd, l.in[readSize:])
	switch {
	case err == unix.EAGAIN:
		return
	case err != 0:
		c.broken.Store(true)
	case n == 0:
		c.eof = true
	default:
		c.answer(c.join(l.in, n), l)
	}
	if c.over() || c.mustLeave() {
		c.leaveLoop()
	}
}

// look is called each tick. It ends idle connections. It returns false if there have been none since the last call: then the loop
// has ended.
func (l *loop) look(now time.Time) bool {
	l.mu.Lock()
	if len(l.free) == len(l.conns) {
		defer l.mu.Unlock()
		if l.conns == nil {
			unix.Close(l.epoll)
			l.epoll = 0
			runningLoops.Add(-1)
			RaiseProcs()
			return false
		}
		l.conns, l.free = nil, nil // of many connections, maybe
		return true
	}
	l.all = append(l.all[:0], l.conns...)
	l.mu.Unlock()
	for _, c := range l.all {
		if c != nil {
			c.lookAtTime(now)
		}
	}
	clear(l.all)
	return true
}

// lookAtTime ends the connection if it is in a loop, and has been idle for too long.
func (c *stream) lookAtTime(now time.Time) {
	c.form.Lock()
	defer c.form.Unlock()
	switch {
	case !c.looped:
	case c.active:
		c.active, c.since = false, now
	case c.waits(): // the client waits for an answer, so it is not idle
	case now.Sub(c.since) >= c.of.serves.Load().idle:
		c.last = true
		c.leaveLoop()
	}
}
