package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// Neighbours are servers that have answers of the same kind. One of them is to give what a block of it holds.
type Neighbours struct {
	Clients []*Client // they are asked in turn
	Zones   []string  // of the block that is like the neighbour's
	View    string

	Rounds int           // how often all are asked at most
	Pause  time.Duration // after the first round. It doubles with each further one, up to MaxPause.
	Within time.Duration // for all of it
	Most   int64         // bytes of a dump

	// Begin is called before a neighbour is asked. What it returns is called when a dump comes, and reads it: a snapshot. It returns
	// how many answers it was given, whatever has become of them.
	Begin func() func(dump io.Reader) (answers int, err error)

	// Failed is told each failure; nil: nobody.
	Failed func(error)
}

// MaxPause is the longest pause between two rounds.
const MaxPause = 15 * time.Second

// ErrNothing says that the neighbours have no answers.
var ErrNothing = errors.New("they have no answers")

// errTooMuch ends a dump that is too long.
var errTooMuch = errors.New("the dump is too long")

// dumpError is an error of what reads a dump.
type dumpError struct{ error }

func (e dumpError) Unwrap() error { return e.error }

// Take takes the dump of the first neighbour that gives one with answers, and returns which one that was. A neighbour that is not
// there, is busy or breaks off is asked again; one that refuses is not. It ends early when ctx does.
func (n *Neighbours) Take(ctx context.Context) (from Address, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, n.Within, fmt.Errorf("it takes longer than %v", n.Within))
	defer cancel()
	left := slices.Clone(n.Clients)
	for round, pause := 1, n.Pause; ; round++ {
		again := left[:0]
		for _, c := range left {
			one := n.takeFrom(ctx, c)
			c.CloseIdle() // behind one address there may be several servers
			switch {
			case one == nil:
				return c.Address, nil
			case ctx.Err() != nil:
				return from, context.Cause(ctx)
			case errors.Is(one, ErrNothing):
				if err == nil {
					err = one
				}
				continue
			}
			err = fmt.Errorf("%s: %w", c.Address, one)
			if n.Failed != nil {
				n.Failed(err)
			}
			if passes(one) {
				again = append(again, c)
			}
		}
		if left = again; len(left) == 0 || round == n.Rounds {
			return from, err
		}
		select {
		case <-ctx.Done():
			return from, context.Cause(ctx)
		case <-time.After(pause/2 + rand.N(pause)): // many replicas may start at once
		}
		pause = min(2*pause, MaxPause)
	}
}

// passes reports whether a failure may pass.
func passes(err error) bool {
	if r, ok := errors.AsType[*Refusal](err); ok {
		// 409: an address of several servers has led to the one that asks.
		return r.Status >= 500 && r.Status != http.StatusNotImplemented || r.Status == http.StatusTooManyRequests || r.Status == http.StatusConflict
	}
	_, bad := errors.AsType[dumpError](err)
	return !bad
}

func (n *Neighbours) takeFrom(ctx context.Context, c *Client) error {
	begun := n.Begin()
	var status api.StatusReply
	if _, err := c.Get(ctx, "/v1/status", nil, &status); err != nil {
		return err
	}
	id, err := n.blockOf(&status)
	if err != nil {
		return dumpError{err}
	}
	read, write := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := c.Stream(ctx, "/v1/dump", url.Values{"block": {strconv.Itoa(id)}}, api.SnapshotForm, &limited{write, n.Most})
		write.CloseWithError(err)
		done <- err
	}()
	answers, err := begun(read)
	read.CloseWithError(dumpError{cmp.Or(err, io.ErrClosedPipe)}) // what comes after the end is not read
	came := <-done
	switch _, ours := errors.AsType[dumpError](came); {
	case errors.Is(came, errTooMuch):
		return dumpError{came}
	case came != nil && !ours:
		return came
	case err != nil:
		return dumpError{err}
	case answers == 0:
		return ErrNothing
	}
	return nil
}

// blockOf returns the number of the neighbour's block with the same zones and view, or that of its only one.
func (n *Neighbours) blockOf(s *api.StatusReply) (int, error) {
	sorted := func(zones []string) []string { return slices.Sorted(slices.Values(zones)) }
	for _, b := range s.Blocks {
		if b.View == n.View && slices.Equal(sorted(b.Zones), sorted(n.Zones)) {
			return b.ID, nil
		}
	}
	if len(s.Blocks) == 1 {
		return s.Blocks[0].ID, nil
	}
	return 0, fmt.Errorf("none of its %d blocks is for %s, as this one", len(s.Blocks), strings.Join(n.Zones, " "))
}

// limited is a writer for so many bytes.
type limited struct {
	to   io.Writer
	left int64
}

func (l *limited) Write(b []byte) (int, error) {
	if l.left -= int64(len(b)); l.left < 0 {
		return 0, errTooMuch
	}
	return l.to.Write(b)
}
