package fastpath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"golang.org/x/sys/unix"

	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/udp"
)

// This file has the listeners: how they open, pass from one generation of the Corefile to the next, and close, and how they
// keep the kernel's choice among the sockets of an address right. What a worker does with a batch is in worker_linux.go.

// listener is the fast path on one address. A reload keeps the listener, its sockets and its workers. It swaps the
// generation, and each worker uses the new one from its next batch on.
type listener struct {
	addr   string // of the server, such as dns://:53
	serves atomic.Pointer[generation]
	counts *counters

	group *udp.Group // set once, before the first worker starts

	// Guarded by listeners.mu.
	running sync.WaitGroup // of the workers
	retired []*generation  // replaced; their slow paths may still have queries
	struck  time.Time      // when a plain query missed the fast path while a younger process was there; see Realign
	company                // other processes on the address; see shared_linux.go
}

// listeners are the listeners of the process, by the server's address.
var listeners = struct {
	mu sync.Mutex // guards m, and the fields of listener that say so
	m  map[string]*listener
}{m: make(map[string]*listener)}

// Supported returns an error that says what the system lacks for a fast path, or nil.
var Supported = sync.OnceValue(udp.Supported)

// generation is the service and the slow path that one generation of the Corefile gives to an address.
type generation struct {
	Service
	of   any // the same for all servers of one generation on the address; see Open
	slow *slowPath

	// answerers are those of the listener's workers, by number. Each worker makes its own, and no other uses it. The generation
	// has them, and not the workers, so that no worker that waits keeps the memory of a generation that has been replaced.
	answerers []Answerer
}

// answerer returns the answerer of a worker. Only that worker calls it.
func (g *generation) answerer(number int) Answerer {
	a := &g.answerers[number]
	if *a == nil {
		*a = g.NewAnswerer()
	}
	return *a
}

// limited has the arguments of the last call of LimitWaits that had an effect.
var limited struct {
	mu      sync.Mutex // guards the others
	of      any
	restart bool
}

// LimitWaits makes sure that no reader of CoreDNS's sockets waits without end while a reload hands the sockets to the next
// generation; see udp.LimitWaits. Each server block of a Corefile calls it, and the first call does the work for all. of tells
// Corefiles apart. restart is true before a reload, and false at a start. The error is always nil; a failure is logged.
func LimitWaits(of any, restart bool) error {
	limited.mu.Lock()
	defer limited.mu.Unlock()
	if limited.of == of && limited.restart == restart {
		return nil
	}
	limited.of, limited.restart = of, restart
	if err := udp.LimitWaits(); err != nil {
		log.Warningf("a reload may have to wait for a query: %v", err)
	}
	return nil
}

// Open gives the queries for the address of s to the Service that service returns. If the address has a listener, Open replaces
// the listener's generation; otherwise it opens a listener. If Open fails, the address has no listener afterwards.
//
// Open must be called before s reads its first packet. Several servers of one generation may share an address. They pass the
// same of, and the first call does the work for all.
func Open(s *dnsserver.Server, of any, service func() (Service, error)) (err error) {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	l := listeners.m[s.Addr]
	if l != nil && l.serves.Load().of == of {
		return nil // another server on the address has done it
	}
	defer func() {
		if err != nil {
			countersOf(s.Addr).setOff(offOpen)
		}
		if err != nil && l != nil { // the last generation must not answer for the new one
			endListeners(func(other *listener) bool { return other == l })
		}
	}()
	g := &generation{of: of}
	if g.Service, err = service(); err != nil {
		return err
	}
	// CoreDNS does not wait until its servers serve. So a later reload may have replaced this generation already.
	if g.over() {
		return nil
	}
	if l == nil {
		l = &listener{addr: s.Addr, counts: countersOf(s.Addr)}
	}
	accept, ok := chain.AcceptFunc(s)
	if !ok {
		return errors.New("this version of CoreDNS does not say which opcodes a server takes")
	}
	g.slow = newSlowPath(s, accept, l.counts)
	if last := l.serves.Load(); last != nil && last.Generation() > g.Generation() {
		return nil
	}
	if g.slow.local, err = localAddr(s.Addr[len(transport.DNS+"://"):]); err != nil {
		return err
	}
	n := g.Workers()
	if l.group != nil { // the workers of the generation before go on
		n = max(n, len(l.group.Sockets()))
	}
	g.answerers = make([]Answerer, n)
	go g.slow.serve()
	if last := l.serves.Swap(g); last != nil {
		l.retired = append(l.retired, last)
		go last.slow.shutdown()
	}
	listeners.m[s.Addr] = l
	return l.open(g)
}

// localAddr returns the address that CoreDNS's socket for addr has.
func localAddr(addr string) (net.Addr, error) {
	a, err := net.ResolveUDPAddr("udp", addr)
	if err != nil || len(a.IP) > 0 && !a.IP.IsUnspecified() {
		return a, err
	}
	host, _, _ := net.SplitHostPort(addr)
	c, err := net.ListenPacket("udp", net.JoinHostPort(host, "0")) // the system says of which family the wildcard address is
	if err != nil {
		return nil, err
	}
	defer c.Close()
	a.IP = c.LocalAddr().(*net.UDPAddr).IP
	return a, nil
}

// Serving reports whether there is a fast path on a server's address.
func Serving(addr string) bool {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	return listeners.m[addr] != nil
}

// Close closes the listeners whose service is one that uses selects, and returns when no listener uses such a service any more.
// If the process is about to end, Close closes all listeners at once, so that they wait at the same time, and not in turn.
func Close(uses func(Service) bool) {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	for _, l := range listeners.m {
		for _, r := range l.retired {
			if uses(r.Service) {
				<-r.slow.over
			}
		}
		l.retired = slices.DeleteFunc(l.retired, func(r *generation) bool { return uses(r.Service) })
	}
	endListeners(func(l *listener) bool { return ending.Load() || uses(l.serves.Load().Service) })
}

// RealignAll reopens the sockets of all listeners whose sockets have other numbers in the kernel than before. That may happen
// in a reload, because it may change the number of CoreDNS's own sockets.
func RealignAll() {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	for _, l := range listeners.m {
		if l.group != nil && l.group.Standing() == udp.Shifted {
			l.reopen()
		}
	}
}

// strikeAgain is how long a first query that has missed the fast path is remembered; see Realign.
const strikeAgain = 8 * NoticeEvery

// Realign must be called when a plain query for a server's address has missed the fast path. There are two causes. Another
// process has replaced the kernel's program that chooses sockets, or sockets have closed and the program's numbers mean other
// ones.
//
// The youngest process on the address acts at once. An older one would take the queries from the younger process, so it acts
// only if a query misses the fast path again within strikeAgain.
func Realign(addr string) {
	if !listeners.mu.TryLock() { // listeners are changing; a later query calls again
		return
	}
	defer listeners.mu.Unlock()
	l := listeners.m[addr]
	if l == nil || l.group == nil || len(l.group.Sockets()) == 0 {
		return
	}
	standing := l.group.Standing()
	if standing == udp.Shifted {
		l.reopen()
		return
	}
	if now := time.Now(); standing != udp.Steady && now.Sub(l.struck) > strikeAgain {
		l.struck = now
		return
	}
	l.struck = time.Time{}
	if standing == udp.Overtaken {
		l.reopen()
		return
	}
	if err := l.steer(); err != nil {
		log.Errorf("fastpath: %s: %v", l.addr, err)
	}
}

// reopen replaces the listener's sockets and workers, and keeps the generation. Until the new sockets are open, CoreDNS's own
// get the queries. Replies to queries on the slow path leave by the new sockets. The caller holds listeners.mu.
func (l *listener) reopen() {
	const tries = 3 // other processes may open and close sockets meanwhile
	for try := 1; ; try++ {
		l.drain()
		if err := l.open(l.serves.Load()); err != nil {
			log.Errorf("fastpath: %s: %v; queries go the slow path", l.addr, err)
			l.drain()
			l.counts.setOff(offOpen)
			return
		}
		if try == tries || l.group.Standing() != udp.Shifted {
			return
		}
	}
}

// endListeners drains the listeners that which selects, all at once, and closes them. The caller holds listeners.mu.
func endListeners(which func(*listener) bool) {
	var ended []*listener
	for _, l := range listeners.m {
		if which(l) {
			ended = append(ended, l)
		}
	}
	for _, l := range ended {
		if ending.Load() && l.group != nil {
			if err := l.group.Retire(); err != nil {
				log.Errorf("fastpath: %s: %v", l.addr, err)
			}
		}
	}
	drainListeners(ended...)
	for _, l := range ended {
		if r := l.serves.Load(); r != nil {
			l.retired = append(l.retired, r)
			go r.slow.shutdown()
		}
	}
	for _, l := range ended {
		l.close()
	}
}

// over reports whether the generation has ended.
func (g *generation) over() bool { return g.Workers() == 0 || g.Over() }

// open opens sockets until there are as many as g has workers, and starts a worker for each new one. Then it has the kernel
// give queries to that many. Sockets beyond that number stay open without queries, because they may still have packets and
// replies.
func (l *listener) open(g *generation) (err error) {
	if l.group == nil {
		l.group = udp.NewGroup(l.addr[len(transport.DNS+"://"):])
	}
	l.watch(g)
	if l.yielded {
		return nil
	}
	for i := len(l.group.Sockets()); i < g.Workers(); i++ {
		s, err := l.group.Add()
		if s != nil { // even with an error, for the socket may have packets
			cpu := anyCPU
			if steeringOf(g) == udp.ByCPU {
				cpu = i
			}
			l.running.Go(func() { l.work(i, s, cpu) })
		}
		if err != nil {
			return err
		}
	}
	if err := l.steer(); err != nil {
		return err
	}
	raiseProcsLocked()
	l.counts.workers.Store(int64(g.Workers()))
	l.counts.off.Store(nil)
	return nil
}

// steer has the kernel give plain queries to the sockets of as many workers as the generation asks for.
func (l *listener) steer() error {
	g := l.serves.Load()
	err := l.group.Steer(g.Workers(), steeringOf(g))
	for _, after := range [...]time.Duration{2 * NoticeEvery, strikeAgain} {
		time.AfterFunc(after, l.lookAgain)
	}
	return err
}

// lookAgain checks the listener some time after steer. Another process may have set the kernel's program at about the same
// time, and not have seen all sockets. Then the youngest process may get no queries at all, and no query tells it so. So it
// steers once more in any case.
func (l *listener) lookAgain() {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	if listeners.m[l.addr] != l || l.group == nil || len(l.group.Sockets()) == 0 {
		return
	}
	switch l.group.Standing() {
	case udp.Shifted:
		l.reopen()
	case udp.Steady:
		g := l.serves.Load()
		if err := l.group.Steer(g.Workers(), steeringOf(g)); err != nil {
			log.Errorf("fastpath: %s: %v", l.addr, err)
		}
	}
}

// steeringOf returns how the kernel chooses among the workers of a generation. If somebody has asked for one worker for each CPU,
// each is bound to a CPU, and gets the packets that this CPU has received. Otherwise the machine may have other things to do, and
// a worker must be free to leave a CPU that is busy.
func steeringOf(g *generation) udp.Steering {
	if n := g.Workers(); g.Asked() && n > 1 && n == runtime.NumCPU() && hasCPUs(n) {
		return udp.ByCPU
	}
	return udp.ByQuery
}

// drain stops the listener's workers, and closes its sockets. CoreDNS's own sockets get the queries from then on. Before a
// worker ends, it answers what its socket has received, or puts it on the slow path. Replies from there leave by CoreDNS's
// sockets.
func (l *listener) drain() { drainListeners(l) }

// drainListeners drains several listeners, all at once.
func drainListeners(all ...*listener) {
	var groups []*udp.Group
	for _, l := range all {
		if l.group != nil {
			groups = append(groups, l.group)
		}
	}
	if err := udp.Drain(groups...); err != nil {
		log.Errorf("fastpath: %v", err)
	}
	for _, l := range all {
		l.running.Wait()
		if l.group != nil {
			l.group.Close()
		}
		l.counts.workers.Store(0)
	}
}

// close waits for the queries on the slow path, and removes the listener, which must be drained.
func (l *listener) close() {
	for _, r := range l.retired {
		<-r.slow.over
	}
	if l.group != nil {
		l.group.Release()
	}
	l.unwatch()
	delete(listeners.m, l.addr)
	raiseProcsLocked()
}

// RaiseProcs sets GOMAXPROCS to OwnProcs and one more for each worker and each loop. They keep their P of the Go scheduler while
// they wait in the kernel. Without a spare P, Go's monitor would take the P away and give it back for each batch.
// That costs a third of the time of a hit, and the slow path would have to wait for the workers.
func RaiseProcs() {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	raiseProcsLocked()
}

// raiseProcsLocked is RaiseProcs for a caller that holds listeners.mu.
func raiseProcsLocked() {
	n := OwnProcs() + int(runningLoops.Load())
	for _, l := range listeners.m {
		if l.group != nil {
			n += len(l.group.Sockets())
		}
	}
	if n != runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(n)
	}
}

// anyCPU is for a worker that is not bound to a CPU.
const anyCPU = -1

// hasCPUs reports whether the CPUs of the system are 0 to n-1, and this process may run on all of them. A container may see a
// process 1 and a number of CPUs of its own, so this asks for the system's list.
func hasCPUs(n int) bool {
	online, err := os.ReadFile("/sys/devices/system/cpu/online")
	var set unix.CPUSet
	if err != nil || strings.TrimSpace(string(online)) != fmt.Sprintf("0-%d", n-1) || unix.SchedGetaffinity(0, &set) != nil {
		return false
	}
	for i := range n {
		if !set.IsSet(i) {
			return false
		}
	}
	return true
}

// work runs a worker until its socket is drained: on a thread of its own, if it is bound to a CPU.
func (l *listener) work(number int, s *udp.Socket, cpu int) {
	if cpu != anyCPU {
		runtime.LockOSThread() // without unlock, so that Go does not use the thread for anything else
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			log.Warningf("fastpath: a worker cannot be bound to CPU %d: %v", cpu, err)
		}
	}
	w := newWorker(l, number, s) // here, so that the memory of a worker that is bound to a CPU is on the CPU's NUMA node
	w.bound = cpu != anyCPU
	for !w.run() {
	}
}
