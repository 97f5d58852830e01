package main

import (
	"fmt"
	"io"
	"time"
)

// progressInterval is between two times that progress is shown.
const progressInterval = 100 * time.Millisecond

// progress says on the terminal of stderr how far something is. It is one line, which is erased in the end.
type progress struct {
	g     *globals
	on    bool
	begun time.Time
	next  time.Time // when it may be shown again
	drawn bool
}

// startProgress begins to count time. Nothing is shown unless on is true and stderr is a terminal.
func (g *globals) startProgress(on bool) *progress {
	now := g.now()
	return &progress{g: g, on: on && g.shown, begun: now, next: now}
}

// say shows a line, unless one has been shown just now.
func (p *progress) say(line func() string) {
	if !p.on {
		return
	}
	now := p.g.now()
	if now.Before(p.next) {
		return
	}
	p.next, p.drawn = now.Add(progressInterval), true
	fmt.Fprintf(p.g.stderr, "\r%s%s", line(), eraseLine)
}

// bytes shows how many bytes have come or gone, and how many a second.
func (p *progress) bytes(n int64) {
	p.say(func() string {
		line := size(n)
		if took := p.g.now().Sub(p.begun); took > 0 {
			line += fmt.Sprintf(", %s/s", size(int64(float64(n)/took.Seconds())))
		}
		return line
	})
}

// end erases the line. Another one may follow.
func (p *progress) end() {
	if p.drawn {
		p.drawn = false
		io.WriteString(p.g.stderr, "\r"+eraseLine)
	}
}
