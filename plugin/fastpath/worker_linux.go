package fastpath

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/coredns/coredns/plugin/metrics/vars"

	"github.com/optcache/optcache/plugin/pkg/udp"
)

// This file has the worker: the loop that receives a batch, has it answered, and sends the replies. Which workers there are is
// decided in listener_linux.go.

// worker answers the datagrams of one socket. It implements Batch. One goroutine uses it.
type worker struct {
	of     *listener
	number int  // among the listener's workers, from 0
	bound  bool // to a thread
	socket *udp.Socket
	batch  *udp.Batch

	generation *generation     // that answers the batch; nil between two batches, as a worker may wait for long
	n          int             // datagrams in the batch
	passed     [reasons]uint64 // datagrams since the last account, by reason
}

func newWorker(l *listener, number int, s *udp.Socket) *worker {
	return &worker{of: l, number: number, socket: s, batch: udp.NewBatch(BatchSize)}
}

// run answers batches until the socket is drained and empty; then it returns true. It returns false after a panic, and may be
// called again.
func (w *worker) run() (ended bool) {
	defer w.recovered()
	for {
		n, err := w.batch.Receive(w.socket)
		switch {
		case errors.Is(err, net.ErrClosed):
			return true
		case err != nil:
			log.Errorf("fastpath: %s: %v", w.of.addr, err)
			time.Sleep(100 * time.Millisecond) // an error that persists must not fill the log
		case n > 0:
			w.serve(n)
		}
	}
}

// recovered ends a panic. It must be deferred.
func (w *worker) recovered() {
	w.generation = nil
	if err := recover(); err != nil {
		vars.Panic.Inc()
		w.of.counts.panics.Add(1)
		log.Errorf("fastpath: a worker panicked: %v\n%s", err, debug.Stack())
	}
}

// serve answers the n datagrams of a batch. A reload takes effect here, between two batches.
func (w *worker) serve(n int) {
	w.generation = w.of.serves.Load()
	a := w.generation.answerer(w.number)
	w.n = n
	clear(w.passed[:]) // of a batch that ended in a panic
	a.Answer(w)
	w.batch.Send(w.socket)
	alone := n == 1 && w.passed[Answered] == 0 && !w.bound
	w.account()
	a.Sent()
	w.generation = nil
	if alone {
		// The server has this processor now for the query: to wake another thread for it costs as much as the query does. Where
		// more come at once, the threads are awake.
		runtime.Gosched()
	}
}

// Len implements Batch.
func (w *worker) Len() int { return w.n }

// Packet implements Batch.
func (w *worker) Packet(i int) []byte { return w.batch.Packet(i) }

// Client implements Batch.
func (w *worker) Client(i int) netip.AddrPort { return w.batch.Peer(i).AddrPort() }

// Local implements Batch.
func (w *worker) Local() net.Addr { return w.generation.slow.local }

// Reply implements Batch.
func (w *worker) Reply(i int, b []byte) {
	w.passed[Answered]++
	w.batch.Reply(i, b)
}

// Stream implements Batch.
func (w *worker) Stream() bool { return false }

// Lost implements Batch.
func (w *worker) Lost(i int) bool { return w.batch.Lost(i) }

// Pass implements Batch.
func (w *worker) Pass(i int, why Reason) {
	w.passed[why]++
	peer, group := *w.batch.Peer(i), w.of.group // the group may have other sockets when the reply is ready
	from := peer.Addr()
	q := &slowQuery{
		from:   &from,
		local:  w.generation.slow.local,
		packet: bytes.Clone(w.batch.Packet(i)),
		reply:  func(b []byte) error { return group.SendTo(b[lengthLen:], &peer) },
	}
	for g := w.generation; !g.slow.put(q, nil); { // closed: a reload has replaced the generation
		g = w.of.serves.Load()
	}
}

// account adds what happened to the batch to the listener's counters.
func (w *worker) account() {
	c := w.of.counts
	c.batch(w.n)
	for why, n := range w.passed {
		if n > 0 {
			c.passed[why].Add(n)
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
}
