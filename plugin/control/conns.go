package control

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"
)

// phase is what a connection is at.
type phase int

const (
	waiting phase = iota // for the client: for its request, or the rest of it
	writing              // an answer
	working              // blocks are called
)

// conn is a connection.
type conn struct {
	raw   net.Conn // below TLS: closing it does not wait for the client
	peer  string
	phase phase
	since time.Time // it is in that phase
}

// connKey is the key, in a request's context, of its connection.
type connKey struct{}

// conns are the connections of a server. They are bounded: a new one displaces the one that has waited for its client
// longest, so that clients who hold connections keep nobody out. It is safe for concurrent use.
type conns struct {
	max int

	mu     sync.Mutex // guards what follows, and the connections' phases
	all    map[net.Conn]*conn
	busy   int           // connections that do not wait
	closed chan struct{} // not nil: the server ends; closed when busy is 0
}

func newConns(most int) conns { return conns{max: most, all: make(map[net.Conn]*conn)} }

// add is an http.Server's ConnContext.
func (cs *conns) add(ctx context.Context, c net.Conn) context.Context {
	raw := c
	if t, ok := c.(*tls.Conn); ok {
		raw = t.NetConn()
	}
	this := &conn{raw: raw, peer: peerOf(raw), since: time.Now()}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if len(cs.all) >= cs.max {
		cs.displace()
	}
	cs.all[c] = this
	if cs.closed != nil {
		raw.Close()
	}
	return context.WithValue(ctx, connKey{}, this)
}

// displace closes the connection that has waited longest, or else the one that has written longest.
func (cs *conns) displace() {
	var victim net.Conn
	for c, this := range cs.all {
		if this.phase == working {
			continue
		}
		if best := cs.all[victim]; best == nil || this.phase < best.phase || this.phase == best.phase && this.since.Before(best.since) {
			victim = c
		}
	}
	if victim != nil {
		cs.all[victim].raw.Close()
		cs.enter(cs.all[victim], waiting)
		delete(cs.all, victim)
	}
}

// changed is an http.Server's ConnState.
func (cs *conns) changed(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.all, c)
}

// phase says what a connection is at from now on. It returns false if the server ends, and the request must not begin.
func (cs *conns) phase(c *conn, p phase) bool {
	if c == nil {
		return true
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if p == working && cs.closed != nil {
		return false
	}
	cs.enter(c, p)
	if p == waiting && cs.closed != nil {
		c.raw.Close()
	}
	return true
}

func (cs *conns) enter(c *conn, p phase) {
	if c.phase != waiting {
		cs.busy--
	}
	if p != waiting {
		cs.busy++
	}
	c.phase, c.since = p, time.Now()
	if cs.closed != nil && cs.busy == 0 {
		select {
		case <-cs.closed:
		default:
			close(cs.closed)
		}
	}
}

// close closes the connections that wait for their clients. The channel that it returns is closed when there is none
// that has anything else to do.
func (cs *conns) close() <-chan struct{} {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.closed == nil {
		cs.closed = make(chan struct{})
		if cs.busy == 0 {
			close(cs.closed)
		}
		for _, c := range cs.all {
			if c.phase == waiting {
				c.raw.Close()
			}
		}
	}
	return cs.closed
}
