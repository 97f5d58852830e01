package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func TestTopIsATable(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	sys := quiet(nil)
	sys.now = func() time.Time { return stored.Add(100 * time.Second) }
	runOn(t.Context(), sys, "-s", s.URL, "top").want(t, 0, `
Block 0: 10,000 hits since 2026-11-25T08:00:00Z; an error is 9 at the most; up to 1 in 64 was counted; 2 were not counted
NAME               TYPE  COUNT       ERROR  SHARE   PER SECOND
www.example.org.   A     6,400 ±640  0      64.0 %  64.0
evil?[2J.example.  AAAA  100 ±80     9      1.0 %   1.0
`, "")
	s.wantAsked(t, "GET /v1/top?by=hits&limit=20")
	runOn(t.Context(), sys, "-s", s.URL, "top", "--misses", "-n", "2", "-b", "0").want(t, 0, `
Block 0: 10,000 misses since 2026-11-25T08:00:00Z; an error is 9 at the most
NAME               TYPE  COUNT  ERROR  SHARE   PER SECOND
www.example.org.   A     6,400  0      64.0 %  64.0
evil?[2J.example.  AAAA  100    9      1.0 %   1.0
`, "")
	s.wantAsked(t, "GET /v1/top?block=0&by=misses&limit=2")
	runOn(t.Context(), sys, "-s", s.URL, "top", "--clients").want(t, 0, `
Block 0: 10,000 clients since 2026-11-25T08:00:00Z; an error is 9 at the most; up to 1 in 64 was counted; 2 were not counted
CLIENT         COUNT       ERROR  SHARE   PER SECOND
192.0.2.0/24   5,000 ±566  0      50.0 %  50.0
2001:db8::/56  10 ±25      0      0.1 %   0.1
`, "")
	s.ctl("top", "--clients", "-b", "0").want(t, 1, "", "optcachectl: by: clients are not counted: top_clients in the Corefile turns that on\n")
	if r := s.ctl("top", "-o", "json"); r.code != 0 || !json.Valid([]byte(r.stdout)) {
		t.Errorf("%+v", r)
	}
}

func TestHotAndSortedListsAreOneRequest(t *testing.T) {
	t.Parallel()
	s := newServer(t, 3)
	s.ctl("hot")
	s.wantAsked(t, "GET /v1/list?hot=true&limit=50&sort=accesses")
	s.ctl("list", "--sort", "bytes", "--hot")
	s.wantAsked(t, "GET /v1/list?hot=true&limit=100&sort=bytes")
	s.ctl("list", "--sort", "ttl", "-n", "9000")
	s.wantAsked(t, "GET /v1/list?limit=9000&sort=ttl")
}

func TestClimbIsATable(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.ctl("climb", "-b", "0").want(t, 0, `
BLOCK  SIZE OF   SHARE   NEXT STEP  VALUE   REQUESTS LEFT
0      window    25.0 %  -9.80 %    0.9512  1,234 of 50,000
0      hot tier  10.0 %  +5.00 %    -       1,234 of 50,000
`, "")
	if r := s.ctl("climb", "-o", "json"); r.code != 0 || !strings.Contains(r.stdout, `"left": 1234`) || strings.Contains(r.stdout, "requests") {
		t.Errorf("%+v", r)
	}
}

func TestLookupShowsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	newServer(t, 0).ctl("lookup", "asked.example.org").want(t, 4, `
block 1 asks for AAAA do, for 1.2 s: miss, 12 wait, flushed meanwhile
`, "optcachectl: nothing is held for asked.example.org\n")
}

// Where there is no terminal, the pictures come one after another.
func TestWatchWithoutATerminal(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ticks := make(chan time.Time, 1)
	ticks <- time.Time{}
	sys := quiet(nil)
	sys.now = func() time.Time { return stored }
	sys.every = func(time.Duration) <-chan time.Time { return ticks }
	looks := 0
	sys.screen = func() (int, int) {
		if looks++; looks == 2 {
			cancel() // ^C
		}
		return 0, 0
	}
	r := runOn(ctx, sys, "-s", s.URL, "top", "--watch")
	if r.code != 0 || strings.Count(r.stdout, "Block 0") != 2 || strings.Contains(r.stdout, "\x1b") {
		t.Errorf("%+v", r)
	}
}
