package optcache

import (
	"bytes"
	"errors"
	"net"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"golang.org/x/sys/unix"

	"github.com/optcache/optcache/plugin/pkg/udp"
)

// lane is the fast path on one address. It stays when the Corefile is reloaded: the next generation's
// routes take the place of the last one's, between two batches.
type lane struct {
	addr   string
	routes atomic.Pointer[routes]
	counts *laneCounters

	// Under the lock of lanes.
	group   *udp.Group
	running sync.WaitGroup
	retired []*routes // whose servers are working on the last of their queries
}

// lanes are those of the process, by the server's address.
var lanes = struct {
	mu sync.Mutex // guards m, and what is said in lane
	m  map[string]*lane
}{m: make(map[string]*lane)}

// lanesSupported says what the system lacks.
var lanesSupported = sync.OnceValue(udp.Supported)

// openLane sends the queries for a server's address down the fast path. It is called before the server
// reads its first packet.
func openLane(s *dnsserver.Server, b *fastBlock) (err error) {
	lanes.mu.Lock()
	defer lanes.mu.Unlock()
	l := lanes.m[s.Addr]
	if l != nil && l.routes.Load().of == b {
		return nil // another one of several servers on the address
	}
	defer func() {
		if err != nil && l != nil { // the last generation's routes must not stay
			l.drain()
			l.close()
		}
	}()
	if l == nil {
		l = &lane{addr: s.Addr, counts: laneCountersOf(s.Addr)}
	}
	r, err := newRoutes(s, b, l.counts)
	if err != nil {
		return err
	}
	// CoreDNS does not wait for its servers to begin: by now this one may have been replaced.
	if last := l.routes.Load(); r.over() || last != nil && last.generation() > r.generation() {
		return nil
	}
	if r.slow.local, err = net.ResolveUDPAddr("udp", s.Addr[len(transport.DNS+"://"):]); err != nil {
		return err
	}
	go r.slow.serve()
	if last := l.routes.Swap(r); last != nil {
		l.retired = append(l.retired, last)
		go last.slow.shutdown()
	}
	lanes.m[s.Addr] = l
	return l.open(r)
}

// closeLanes waits until nothing on any fast path uses o any more, and closes those that still would.
func closeLanes(o *Optcache) {
	lanes.mu.Lock()
	defer lanes.mu.Unlock()
	for _, l := range lanes.m {
		for _, r := range l.retired {
			if r.use(o) {
				<-r.slow.over
			}
		}
		l.retired = slices.DeleteFunc(l.retired, func(r *routes) bool { return r.use(o) })
	}
	endLanes(func(l *lane) bool { return l.routes.Load().use(o) })
}

// reopenLanes opens the sockets anew of lanes where they have lost their numbers: a reload may leave CoreDNS with fewer of
// its own, or with more.
func reopenLanes() {
	lanes.mu.Lock()
	ended := endLanes(func(l *lane) bool { return l.group != nil && l.group.Shifted() })
	lanes.mu.Unlock()
	for _, l := range ended {
		r := l.routes.Load()
		r.of.serves(r.server)
	}
}

// endLanes ends some lanes, all at once, and returns them. The caller holds the lock of lanes.
func endLanes(which func(*lane) bool) (ended []*lane) {
	for _, l := range lanes.m {
		if which(l) {
			l.drain()
			ended = append(ended, l)
		}
	}
	for _, l := range ended {
		l.close()
	}
	return ended
}

// use reports whether o serves one of the routes.
func (r *routes) use(o *Optcache) bool {
	return slices.ContainsFunc(r.routes, func(rt route) bool { return rt.o == o })
}

// over reports whether the routes' generation has ended.
func (r *routes) over() bool {
	return r.workers == 0 || slices.ContainsFunc(r.routes, func(rt route) bool { return rt.o != nil && rt.o.stopped.Load() })
}

// generation returns the one that the routes are of.
func (r *routes) generation() (n int) {
	for i := range r.routes {
		if o := r.routes[i].o; o != nil {
			n = max(n, o.generation)
		}
	}
	return n
}

// open opens the sockets, or those that are missing, starts their workers, and has the kernel give queries
// to as many as the routes ask for. What are too many stay: somebody may still wait for a reply from there.
func (l *lane) open(r *routes) (err error) {
	if l.group == nil {
		l.group = udp.NewGroup(l.addr[len(transport.DNS+"://"):])
	}
	// With as many workers as there are CPUs, each one has its own and gets what that one receives.
	by := udp.ByQuery
	if r.workers == runtime.NumCPU() && r.workers == onlineCPUs() && r.workers > 1 {
		by = udp.ByCPU
	}
	for i := len(l.group.Sockets()); i < r.workers; i++ {
		s, err := l.group.Add()
		if err != nil {
			return err
		}
		cpu := anyCPU
		if by == udp.ByCPU {
			cpu = i
		}
		l.running.Go(func() { l.work(s, cpu) })
	}
	if err := l.group.Steer(r.workers, by); err != nil {
		return err
	}
	raiseProcsLocked()
	l.counts.workers.Store(int64(r.workers))
	return nil
}

// drain begins to end the fast path on the address. CoreDNS's own sockets take over; what ours have received is
// answered, or on its way.
func (l *lane) drain() {
	if l.group != nil {
		if err := l.group.Drain(); err != nil {
			log.Errorf("fastpath: %s: %v", l.addr, err)
		}
		l.running.Wait()
	}
	if r := l.routes.Load(); r != nil {
		l.retired = append(l.retired, r)
		go r.slow.shutdown()
	}
}

// close waits for what is on its way, and gives back what was drained.
func (l *lane) close() {
	for _, r := range l.retired {
		<-r.slow.over
	}
	if l.group != nil {
		l.group.Close()
	}
	l.counts.workers.Store(0)
	delete(lanes.m, l.addr)
	raiseProcsLocked()
}

// raiseProcs raises GOMAXPROCS by one for each worker. A worker holds on to its share while it waits for
// packets; without one to spare, Go's monitor would take it away and give it back for each batch, which costs
// a third of the time of a hit, and the long way would wait for the workers.
func raiseProcs() {
	lanes.mu.Lock()
	defer lanes.mu.Unlock()
	raiseProcsLocked()
}

func raiseProcsLocked() {
	n := ownProcs()
	for _, l := range lanes.m {
		if l.group != nil {
			n += len(l.group.Sockets())
		}
	}
	if n != runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(n)
	}
}

// anyCPU is for a worker that the system may put where it wants.
const anyCPU = -1

// onlineCPUs is how many CPUs the system has; 0 if it does not say.
func onlineCPUs() int {
	var set unix.CPUSet
	if unix.SchedGetaffinity(1, &set) != nil { // process 1 may run on all of them, as a rule
		return 0
	}
	return set.Count()
}

// work is a worker's life, on a thread of its own.
func (l *lane) work(s *udp.Socket, cpu int) {
	runtime.LockOSThread() // and never unlocked: with the goroutine, the thread ends
	if cpu != anyCPU {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			log.Warningf("fastpath: a worker cannot be bound to CPU %d: %v", cpu, err)
		}
	}
	w := newWorker(l, s) // here, so that its memory is near the CPU
	for !w.run() {
	}
}

// worker answers the packets of one socket.
type worker struct {
	lane    *lane
	socket  *udp.Socket
	batch   *udp.Batch
	queries [batchSize]fastQuery
	why     [batchSize]pass

	routes    *routes     // of the last batch
	reporters []*reporter // for each of the routes; nil where nothing is reported
	reports   bool        // there is one
	passed    [passes]uint64
}

func newWorker(l *lane, s *udp.Socket) *worker {
	w := &worker{lane: l, socket: s, batch: udp.NewBatch(batchSize)}
	stripe := nextStripe.Add(1)
	for i := range w.queries {
		w.queries[i].s = newScratch()
		w.queries[i].s.stripe = stripe
	}
	return w
}

// run works until the socket is drained, which it reports, or something panics.
func (w *worker) run() (ended bool) {
	defer func() {
		if err := recover(); err != nil {
			vars.Panic.Inc()
			w.lane.counts.panics.Add(1)
			log.Errorf("fastpath: a worker panicked: %v\n%s", err, debug.Stack())
		}
	}()
	for {
		n, err := w.batch.Receive(w.socket)
		switch {
		case errors.Is(err, net.ErrClosed):
			return true
		case err != nil:
			log.Errorf("fastpath: %s: %v", w.lane.addr, err)
			time.Sleep(100 * time.Millisecond) // an error that stays must not fill the log
		case n > 0:
			w.serve(n)
		}
	}
}

// serve answers the n packets of a batch, or passes them on.
func (w *worker) serve(n int) {
	r := w.lane.routes.Load()
	if r != w.routes {
		w.follow(r)
	}
	var start time.Time
	if w.reports {
		start = time.Now()
	}
	// All packets' memory is on its way before the first one's is needed.
	for i := range n {
		w.why[i] = w.queries[i].prepare(w.batch.Packet(i), r.routes)
	}
	hits := 0
	var now int64
	var clock *Optcache // whose time it is
	for i := range n {
		f := &w.queries[i]
		if w.why[i] == passNot {
			if f.route.o != clock {
				clock = f.route.o
				now = clock.clock()
			}
			f.ipv4 = w.batch.Peer(i).IPv4()
			w.why[i] = f.answer(now)
		}
		if w.why[i] == passNot {
			hits++
			w.batch.Reply(i, f.reply)
		} else {
			w.passed[w.why[i]]++
			w.pass(i, r)
		}
	}
	w.batch.Send(w.socket)
	w.account(n, hits, start)
}

// pass sends a packet the long way.
func (w *worker) pass(i int, r *routes) {
	peer, socket := *w.batch.Peer(i), w.socket
	m := &letter{
		from:   peer.Addr(),
		packet: bytes.Clone(w.batch.Packet(i)),
		reply:  func(b []byte) error { return socket.SendTo(b, &peer) },
	}
	for !r.slow.put(m) { // there are others by now
		r = w.lane.routes.Load()
	}
}

// account counts what has been done with n packets.
func (w *worker) account(n, hits int, start time.Time) {
	c := w.lane.counts
	c.batch(n)
	c.hits.Add(uint64(hits))
	for why := range w.passed {
		if w.passed[why] > 0 {
			c.passed[why].Add(w.passed[why])
			w.passed[why] = 0
		}
	}
	if w.batch.Failed > 0 {
		c.sendErrors.Add(w.batch.Failed)
		w.batch.Failed = 0
	}
	if w.batch.Truncated > 0 {
		c.truncated.Add(w.batch.Truncated)
		w.batch.Truncated = 0
	}
	var took time.Duration
	if w.reports {
		took = time.Since(start)
	}
	for i := range n {
		f := &w.queries[i]
		if w.why[i] == passNot {
			if report := w.reporters[f.route.index]; report != nil {
				report.report(f, took)
			}
		}
		if cap(f.s.out) > pooledMax {
			f.s.out = make([]byte, 1024)
		}
	}
}

// follow makes the worker go by other routes.
func (w *worker) follow(r *routes) {
	w.routes, w.reports = r, false
	w.reporters = make([]*reporter, len(r.routes))
	for i := range r.routes {
		if o := r.routes[i].report; o != nil {
			w.reporters[i] = newReporter(r.server.Addr, o)
			w.reports = true
		}
	}
}
