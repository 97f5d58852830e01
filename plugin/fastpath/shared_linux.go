package fastpath

import (
	"time"
)

// This file is about processes that share an address for long. The kernel gives queries to the workers of one process only, the
// youngest. In a rolling update that is what everybody wants. But some people run several servers on an address, so that each
// takes a share. A fast path that nobody has asked for must not end that: it yields, and the kernel spreads the queries over all
// sockets, as without it.

const (
	// lookEvery is how often a listener looks for other processes on its address.
	lookEvery = 20 * time.Second

	// yieldAfter is how often in a row it must find one before it yields. An update ends sooner as a rule.
	yieldAfter = 3
)

// company is what a listener knows of other processes on its address. It is guarded by listeners.mu.
type company struct {
	timer   *time.Timer // of the next look; nil: nobody looks, because the fast path was asked for
	found   int         // looks in a row that have found another process
	yielded bool        // the listener has closed its sockets because of it
}

// watch begins to look for other processes if nobody has asked for the fast path of g, and otherwise ends it.
func (l *listener) watch(g *generation) {
	switch {
	case g.Asked():
		l.unwatch()
	case l.timer == nil:
		l.timer = time.AfterFunc(lookEvery, l.look)
	}
}

func (l *listener) unwatch() {
	if l.timer != nil {
		l.timer.Stop()
	}
	l.company = company{}
}

// look counts the sockets of other processes, and yields or comes back.
func (l *listener) look() {
	listeners.mu.Lock()
	defer listeners.mu.Unlock()
	if listeners.m[l.addr] != l || l.timer == nil || l.group == nil {
		return
	}
	l.timer.Reset(lookEvery)
	others, err := l.group.Strangers()
	switch {
	case err != nil: // the system does not tell
	case others == 0:
		if l.found = 0; l.yielded {
			l.yielded = false
			log.Infof("fastpath: %s: on again, for no other process serves the address any more", l.addr)
			l.reopen()
		}
	case l.yielded:
	default:
		if l.found++; l.found == yieldAfter {
			log.Infof("fastpath: %s: off, for another process serves the address, too, and would get no queries; write fastpath on to have them all",
				l.addr)
			l.yielded = true
			l.drain()
			raiseProcsLocked()
			l.counts.setOff(offShared)
		}
	}
}
