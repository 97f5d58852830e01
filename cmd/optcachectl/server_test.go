package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// This file has a control interface with canned answers, and runs the command against it.

var stored = time.Date(2026, 11, 25, 8, 0, 0, 0, time.UTC)

// server is a control interface. What it holds is names www0.example.org, www1.example.org … in block 0, and one denial in block 1.
type server struct {
	*httptest.Server
	names int

	mu       sync.Mutex
	requests []string // as METHOD URL BODY
	auth     []string // the header Authorization of each
	status   []api.StatusReply
	cut      bool // dumps are cut off
}

func newServer(t *testing.T, names int) *server {
	t.Helper()
	s := &server{names: names}
	s.Server = httptest.NewServer(s.handler())
	t.Cleanup(s.Close)
	return s
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.getStatus)
	mux.HandleFunc("GET /v1/lookup", s.getLookup)
	mux.HandleFunc("GET /v1/list", s.getList)
	mux.HandleFunc("GET /v1/top", s.getTop)
	mux.HandleFunc("POST /v1/flush", s.postFlush)
	mux.HandleFunc("POST /v1/snapshot", s.postSnapshot)
	mux.HandleFunc("GET /v1/dump", s.getDump)
	mux.HandleFunc("POST /v1/load", s.postLoad)
	mux.HandleFunc("POST /v1/warm", s.postWarm)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		s.mu.Lock()
		u, _ := url.QueryUnescape(r.URL.String())
		s.requests = append(s.requests, strings.TrimSpace(r.Method+" "+u+" "+string(body)))
		s.auth = append(s.auth, r.Header.Get("Authorization"))
		s.mu.Unlock()
		mux.ServeHTTP(w, r)
	})
}

// asked returns what was asked since the last call.
func (s *server) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.requests = nil }()
	return s.requests
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func problem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(api.Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: detail})
}

func ratio(f float64) *float64 { return &f }

func (s *server) getStatus(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.status) > 0 {
		reply(w, s.status[0])
		s.status = s.status[1:]
		return
	}
	all := api.StatusReply{Version: "1.0", Blocks: []api.BlockStatus{
		{ID: 0, Recent: []api.Recent{
			{Minutes: 1, Seconds: 62.5, Requests: 62500, QPS: 1000, HitRatio: ratio(0.912)}, {Minutes: 5, Seconds: 90.2, QPS: 0}}, Status: api.Status{
			Zones: []string{"."}, Servers: []string{"dns://:53", "tls://:853"}, Generation: 2,
			Entries: map[string]int64{"success": 9812, "denial": 120}, Capacity: map[string]int64{"success": 10000, "denial": 2500},
			Segments: map[string]int64{"protected": 9000, "window": 932}, HotEntries: 412, MissTimes: map[string]uint64{"0.01562": 70, "0.0625": 25, "2": 4, "+Inf": 1},
			FastPath: map[string]api.FastPathStatus{"dns://:53": {Workers: 2, Packets: 1_000_100, Hits: 1_000_000, Dropped: 1, Batches: map[string]uint64{"1": 9000, "16": 30, "2": 800}}},
			Memory:   12 << 20, MemoryLimit: 64 << 20, HotCapacity: 512, WindowShare: 0.01,
			Climber:  api.Climber{Sample: 50_000, Left: 1234, Window: api.Hill{Share: 0.25, Step: -0.098, Value: ratio(0.9512)}, Hot: &api.Hill{Share: 0.1, Step: 0.05}},
			Requests: 1234567, Hits: map[string]uint64{"hot": 900000, "protected": 150000, "probationary": 50000}, Misses: 134567,
			Stale: 12, Prefetch: 100, Sent: map[string]uint64{"fastpath": 1000000, "bytes": 90000, "plugin": 10000}, Waiting: 3, Flights: 2,
			Upstream: api.UpstreamStatus{Synthesized: 4321, Probes: 12, KeptWarm: 7, Jittered: 1000, Limited: map[string]uint64{"deferred": 3, "refused": 1, "stale": 0}, Gone: 1},
			Subnets:  &api.SubnetStatus{Answers: 1200, Names: 30, Most: 100, Evicted: map[string]uint64{"name": 40, "share": 2}},
			Shared: &api.SharedStatus{Servers: "valkey://192.0.2.7:6379", Group: "optcache", Away: true, Trouble: "it takes longer than shared_timeout", P95: 0.00123,
				Asked: map[string]uint64{"hit": 9000, "miss": 900, "late": 90, "refused": 9, "skipped": 1}, Writes: map[string]uint64{"written": 990, "dropped": 10}},
			Snapshot: &api.SnapshotStatus{Path: "/var/cache/optcache/0.dnstap.zst", Written: stored, Entries: 9900, Bytes: 2 << 20, Failures: 1},
		}},
		{ID: 1, Status: api.Status{Zones: []string{"example.org."}, View: "inside", Servers: []string{"dns://:53"}}},
	}}
	if only := r.URL.Query()["block"]; len(only) > 0 {
		all.Blocks = slices.DeleteFunc(all.Blocks, func(b api.BlockStatus) bool { return !slices.Contains(only, strconv.Itoa(b.ID)) })
	}
	reply(w, all)
}

func answer(i int, records bool) api.Answer {
	a := api.Answer{Name: fmt.Sprintf("www%d.example.org.", i), Type: "A", Class: "IN", Rcode: "NOERROR", Kind: "success", Segment: "protected", Hot: i == 0,
		DO: i == 0, Hits: uint32(i), TTL: 300, Left: 120, Stored: stored, Bytes: 128, Source: "upstream"}
	if records {
		a.Records = []string{a.Name + " 120 IN A 192.0.2.1"}
	}
	return a
}

func denial(records bool) api.Answer {
	a := api.Answer{Name: "no.example.org.", Type: "AAAA", Class: "IN", Rcode: "NXDOMAIN", Kind: "denial", Segment: "window", CD: true, NoRD: true,
		TTL: 60, Left: -10, Stale: true, Stored: stored, Bytes: 96}
	if records {
		a.Records = []string{"example.org. 0 IN SOA ns.example.org. host.example.org. 1 2 3 4 5"}
	}
	return a
}

func (s *server) getLookup(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	found := api.LookupReply{Blocks: []api.BlockAnswers{{ID: 0, Answers: []api.Answer{}}, {ID: 1, Answers: []api.Answer{}}}}
	switch {
	case strings.Contains(q.Get("name"), ".."):
		problem(w, http.StatusBadRequest, fmt.Sprintf("name %q is not a domain name", q.Get("name")))
		return
	case q.Get("name") == "www0.example.org" && (q.Get("type") == "" || q.Get("type") == "A"):
		found.Blocks[0].Answers = append(found.Blocks[0].Answers, answer(0, true))
	case q.Get("name") == "asked.example.org":
		found.Blocks[1].UnderWay = []api.UnderWay{{Type: "AAAA", DO: true, Reason: "miss", Seconds: 1.25, Asking: 1, Waiting: 12, Detached: true}}
	case q.Get("name") == "no.example.org":
		found.Blocks[1].Answers = append(found.Blocks[1].Answers, denial(true))
	}
	reply(w, found)
}

// getList pages through the names, then has the denial. A cursor is a number.
func (s *server) getList(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	limit, err := strconv.Atoi(q.Get("limit"))
	if err != nil || limit < 1 || limit > api.MaxPage {
		problem(w, http.StatusBadRequest, fmt.Sprintf("limit %q is not a number from 1 to %d", q.Get("limit"), api.MaxPage))
		return
	}
	at, _ := strconv.Atoi(q.Get("after"))
	records := q.Get("records") == "true"
	page := api.ListReply{Answers: []api.ListedAnswer{}}
	for ; at <= s.names && len(page.Answers) < limit; at++ {
		if at == s.names {
			page.Answers = append(page.Answers, api.ListedAnswer{Block: 1, Answer: denial(records)})
		} else {
			page.Answers = append(page.Answers, api.ListedAnswer{Block: 0, Answer: answer(at, records)})
		}
	}
	if at <= s.names {
		page.Next = strconv.Itoa(at)
	}
	reply(w, page)
}

func (s *server) postFlush(w http.ResponseWriter, r *http.Request) {
	var f api.FlushRequest
	if err := json.NewDecoder(r.Body).Decode(&f); err != nil || r.Header.Get("Content-Type") != "application/json" {
		problem(w, http.StatusBadRequest, "the body is no JSON")
		return
	}
	if slices.Contains(f.Blocks, 9) {
		problem(w, http.StatusNotFound, "there is no block 9")
		return
	}
	n := int64(1)
	if f.All || f.Subtree {
		n = 1234
	}
	reply(w, api.FlushReply{Flushed: n})
}

func (s *server) postSnapshot(w http.ResponseWriter, r *http.Request) {
	var f api.SnapshotRequest
	if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
		problem(w, http.StatusBadRequest, "the body is no JSON")
		return
	}
	switch {
	case len(f.Blocks) == 0:
		f.Blocks = []int{0, 1}
	case f.Blocks[0] == 1:
		problem(w, http.StatusConflict, "block 1 has no cache_file_path")
		return
	}
	reply(w, api.SnapshotReply{Written: f.Blocks})
}

// result is what a run of the command has left.
type result struct {
	code           int
	stdout, stderr string
}

// quiet is a machine without a terminal, and with this environment.
func quiet(env map[string]string) system {
	return system{
		stdin:  strings.NewReader(""),
		getenv: func(name string) string { return env[name] },
		now:    time.Now,
		every:  func(time.Duration) <-chan time.Time { panic("there is no terminal") },
		screen: func() (int, int) { return 0, 0 },
	}
}

func runOn(ctx context.Context, sys system, args ...string) result {
	var stdout, stderr bytes.Buffer
	if sys.stdout == nil {
		sys.stdout = &stdout
	}
	sys.stderr = &stderr
	code := run(ctx, sys, args)
	return result{code, stdout.String(), stderr.String()}
}

// ctl runs the command against a server.
func (s *server) ctl(args ...string) result {
	return runOn(context.Background(), quiet(nil), append([]string{"-s", s.URL}, args...)...)
}

// want compares a result. stdout is compared without an empty line in front, so that it can be written in backquotes.
func (r result) want(t *testing.T, code int, stdout, stderr string) {
	t.Helper()
	stdout = strings.TrimPrefix(stdout, "\n")
	if r.code != code || r.stdout != stdout || r.stderr != stderr {
		t.Errorf("exit code %d, stdout:\n%s\nstderr: %s\nwant exit code %d, stdout:\n%s\nstderr: %s", r.code, r.stdout, r.stderr, code, stdout, stderr)
	}
}

func (s *server) wantAsked(t *testing.T, want ...string) {
	t.Helper()
	if got := s.asked(); !slices.Equal(got, want) {
		t.Errorf("asked\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// screen keeps each picture that is drawn on it.
type screen struct{ drawn []string }

func (s *screen) Write(b []byte) (int, error) {
	s.drawn = append(s.drawn, string(b))
	return len(b), nil
}

func decodeStatus(t *testing.T, text string) (r api.StatusReply) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// discard is for servers whose clients hang up.
func discard() *log.Logger { return log.New(io.Discard, "", 0) }

func (s *server) getTop(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if q.Get("by") == "clients" && q.Has("block") {
		problem(w, http.StatusConflict, "by: clients are not counted: top_clients in the Corefile turns that on")
		return
	}
	all := api.TopReply{By: q.Get("by"), Blocks: []api.BlockTop{{ID: 0, Top: api.Top{Since: stored, Total: 10_000, Bound: 9, OneIn: 64, Skipped: 2, Items: []api.TopItem{
		{Name: "www.example.org.", Type: "A", Count: 6400}, {Name: "evil\x1b[2J.example.", Type: "AAAA", Count: 100, Error: 9}}}}}}
	switch q.Get("by") {
	case "misses":
		all.Blocks[0].OneIn, all.Blocks[0].Skipped = 1, 0
	case "clients":
		all.Blocks[0].Items = []api.TopItem{{Client: "192.0.2.0/24", Count: 5000}, {Client: "2001:db8::/56", Count: 10}}
	}
	reply(w, all)
}

// dumped is what a dump is of, by its media type.
var dumped = map[string]string{api.SnapshotForm: "(\xb5/\xfd\x00snapshot", api.ZoneForm: ";optcache-text/1 written=2026-11-25T08:00:00Z\n;end answers=0\n"}

// getDump sends a dump in two pieces. Only the first comes if it is cut off.
func (s *server) getDump(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("block") == "9" {
		problem(w, http.StatusNotFound, "there is no block 9")
		return
	}
	form := r.Header.Get("Accept")
	w.Header().Set("Content-Type", form)
	io.WriteString(w, dumped[form][:10])
	w.(http.Flusher).Flush()
	if s.cut {
		panic(http.ErrAbortHandler)
	}
	io.WriteString(w, dumped[form][10:])
}

func (s *server) postLoad(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	switch want, ok := dumped[r.Header.Get("Content-Type")]; {
	case !ok:
		problem(w, http.StatusUnsupportedMediaType, "Content-Type: application/zstd or text/dns is expected")
	case string(body) != want:
		problem(w, http.StatusBadRequest, "body: it is cut off; nothing is changed")
	default:
		reply(w, api.LoadReply{Loaded: 1234, Refused: map[string]int{"zone": 1, "expired": 2000}})
	}
}

// postWarm takes names with two dots one after another, and the type FOO, for wrong. It holds what begins with held, and cannot get
// what begins with no.
func (s *server) postWarm(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var q api.WarmRequest
	if err := json.Unmarshal(body, &q); err != nil || len(q.Questions) == 0 || len(q.Questions) > api.MaxWarm || len(body) > api.MaxRequest {
		problem(w, http.StatusBadRequest, fmt.Sprintf("body: %d questions in %d bytes: %v", len(q.Questions), len(body), err))
		return
	}
	a := api.WarmReply{Failures: []api.WarmFailure{}}
	for i, one := range q.Questions {
		fail := func(why string) {
			a.Failed++
			a.Failures = append(a.Failures, api.WarmFailure{At: i, Name: one.Name, Type: one.Type, Why: why})
		}
		switch {
		case strings.Contains(one.Name, ".."):
			fail(fmt.Sprintf("name: %q is no domain name", one.Name))
		case one.Type == "FOO":
			fail(`type: "FOO" is no type`)
		case q.Check:
		case strings.HasPrefix(one.Name, "busy"):
			problem(w, http.StatusServiceUnavailable, "the server is busy with other requests")
			return
		case strings.HasPrefix(one.Name, "no"):
			fail("not kept: SERVFAIL")
		case strings.HasPrefix(one.Name, "held"):
			a.There++
		default:
			a.Came++
		}
	}
	reply(w, a)
}
