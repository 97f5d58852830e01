package control

import "sync"

// gate counts what is between enter and leave, until it is closed. It is safe for concurrent use.
type gate struct {
	mu     sync.Mutex // guards what follows
	inside int
	shut   bool
	empty  chan struct{} // closed when the gate is, and nothing is inside
}

func newGate() *gate { return &gate{empty: make(chan struct{})} }

// enter returns false if the gate is closed.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut {
		return false
	}
	g.inside++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.shut && g.inside == 0 {
		close(g.empty)
	}
}

// close returns what is closed when nothing is inside any more.
func (g *gate) close() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.shut {
		if g.shut = true; g.inside == 0 {
			close(g.empty)
		}
	}
	return g.empty
}
