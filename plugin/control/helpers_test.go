package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clog "github.com/coredns/coredns/plugin/pkg/log"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control/api"
)

func init() {
	clog.Discard()
	servers.every = 0 // only requests ask blocks, but for the tests of the history
}

// fakeBlock is a Block whose answers are a slice. Its cursors are places in it.
type fakeBlock struct {
	status   Status
	answers  []Answer
	top      map[string]Top
	underWay []UnderWay
	err      error  // of each command
	before   func() // each command

	mu      sync.Mutex
	flushed []Filter
	written int
	asked   []Question
	loaded  []byte // by the last load

	explains func(Question) (Explanation, error) // nil: a hit
	dumps    func(io.Writer) (int, error)        // nil: "dumped"
}

func (b *fakeBlock) begin() error {
	if b.before != nil {
		b.before()
	}
	return b.err
}

func (b *fakeBlock) Status() Status { b.begin(); return b.status }

func (b *fakeBlock) Lookup(name string, qtype uint16) (found []Answer, err error) {
	for _, a := range b.answers {
		if t, _ := recordType(a.Type); a.Name == name && (qtype == 0 || qtype == t) {
			found = append(found, a)
		}
	}
	return found, b.begin()
}

func (b *fakeBlock) List(f Filter) (p Page, err error) {
	if err := b.begin(); err != nil {
		return p, err
	}
	at := 0
	if f.After != "" {
		if at, err = strconv.Atoi(f.After); err != nil || at < 1 || at > len(b.answers) {
			return p, fmt.Errorf("block: %w", ErrCursor)
		}
	}
	for ; at < len(b.answers) && len(p.Answers) < f.Limit; at++ {
		a := b.answers[at]
		if f.Kinds != nil && !slices.Contains(f.Kinds, a.Kind) {
			continue
		}
		if !f.Records {
			a.Records = nil
		}
		p.Answers = append(p.Answers, a)
	}
	if at < len(b.answers) {
		p.Next = strconv.Itoa(at)
	}
	return p, nil
}

func (b *fakeBlock) UnderWay(string, uint16) ([]UnderWay, error) { return b.underWay, nil }

func (b *fakeBlock) Top(by string, n int) (t Top, err error) {
	if err := b.begin(); err != nil {
		return t, err
	}
	t, counted := b.top[by]
	if !counted {
		return t, fmt.Errorf("block: %w", ErrNotCounted)
	}
	t.Items = t.Items[:min(n, len(t.Items))]
	return t, nil
}

func (b *fakeBlock) Flush(f Filter) (int, error) {
	b.mu.Lock()
	b.flushed = append(b.flushed, f)
	b.mu.Unlock()
	return len(b.answers), b.begin()
}

func (b *fakeBlock) Ask(q Question, _ bool) (Explanation, error) {
	b.mu.Lock()
	b.asked = append(b.asked, q)
	b.mu.Unlock()
	if b.explains != nil {
		return b.explains(q)
	}
	return Explanation{Name: q.Name, Type: dns.Type(q.Type).String(), Outcome: api.Hit, Rcode: "NOERROR"}, b.begin()
}

func (b *fakeBlock) Dump(w io.Writer, text bool) (int, error) {
	if err := b.begin(); err != nil {
		return 0, err
	}
	if b.dumps != nil {
		return b.dumps(w)
	}
	_, err := fmt.Fprintf(w, "dumped text=%t", text)
	return len(b.answers), err
}

func (b *fakeBlock) Load(from Rewinder, text bool) (Loaded, error) {
	first, err := io.ReadAll(from)
	if err != nil {
		return Loaded{}, err
	}
	from.Rewind()
	again, err := io.ReadAll(from)
	if err != nil || !bytes.Equal(first, again) {
		return Loaded{}, fmt.Errorf("%d bytes, then %d: %w", len(first), len(again), err)
	}
	if bytes.HasPrefix(first, []byte("bad")) {
		return Loaded{}, fmt.Errorf("%w: line 1: %q", ErrBadDump, first)
	}
	b.mu.Lock()
	b.loaded = first
	b.mu.Unlock()
	return Loaded{Loaded: len(first)}, b.begin()
}

func (b *fakeBlock) Snapshot() error {
	b.mu.Lock()
	b.written++
	b.mu.Unlock()
	return b.begin()
}

// answersOf returns n answers with names of their own.
func answersOf(n int) (all []Answer) {
	for i := range n {
		name := fmt.Sprintf("www%d.example.org.", i)
		all = append(all, Answer{
			Name: name, Type: "A", Class: "IN", Rcode: "NOERROR", Kind: kinds[i%2], Segment: "probationary", TTL: 300, Left: 200,
			Records: []string{name + "\t200\tIN\tA\t192.0.2.1"},
		})
	}
	return all
}

func blocksOf(all ...Block) func() []Block { return func() []Block { return all } }

// request is a request to a handler, without a connection.
type request struct {
	method, target, body string
	header               map[string]string
}

// do asks a server with these blocks, as by a unix socket.
func (q request) do(t testing.TB, blocks ...Block) *httptest.ResponseRecorder {
	t.Helper()
	return q.ask(t, newServer(newHold(Options{Address: "unix:///control.sock"}, t, blocksOf(blocks...))))
}

func (q request) ask(t testing.TB, s *server) *httptest.ResponseRecorder {
	t.Helper()
	if q.method == "" {
		q.method = http.MethodGet
	}
	r := httptest.NewRequest(q.method, "/", strings.NewReader(q.body))
	path, query, _ := strings.Cut(q.target, "?")
	r.URL.Path, r.URL.RawPath, r.URL.RawQuery = path, "", query
	if q.method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	for name, value := range q.header {
		r.Header.Set(name, value)
	}
	if host := q.header["Host"]; host != "" {
		r.Host = host
	}
	if path == "/v1/events" {
		gone, leave := context.WithCancel(r.Context())
		leave() // after the first event
		r = r.WithContext(gone)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

// wantProblem checks that an answer is a problem whose detail has some text.
func wantProblem(t testing.TB, code int, header http.Header, body []byte, status int, detail string) {
	t.Helper()
	var p problem
	if err := json.Unmarshal(body, &p); err != nil {
		t.Fatalf("%d, %q: %v", code, body, err)
	}
	if code != status || p.Status != status || p.Title != http.StatusText(status) || p.Type != "about:blank" || !strings.Contains(p.Detail, detail) {
		t.Errorf("%d, %+v; %d and %q are expected", code, p, status, detail)
	}
	if strings.Contains(p.Detail, "\n") {
		t.Errorf("%q has several lines", p.Detail)
	}
	if got := header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("Content-Type: %s", got)
	}
}

func decoded[T any](t testing.TB, body []byte) (value T) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&value); err != nil {
		t.Fatalf("%q: %v", body, err)
	}
	return value
}

// socketDir is a directory whose path is short enough for sockets.
func socketDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if len(dir) > maxSocketPath-20 {
		t.Fatalf("%s is too long for a socket: the test's name must be shorter", dir)
	}
	return dir
}

// atSocket returns options for a socket that is not there yet.
func atSocket(t testing.TB) Options {
	return Options{Address: unixScheme + filepath.Join(socketDir(t), "c.sock")}
}

// listening calls Listen, and Release at the end of the test.
func listening(t testing.TB, o Options, key any, blocks ...Block) {
	t.Helper()
	if err := Listen(o, key, blocksOf(blocks...)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Release(key) })
}

// clientOf returns a client that dials an address, whatever the URL has.
func clientOf(t testing.TB, at net.Addr) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, at.Network(), at.String())
		},
		MaxIdleConnsPerHost: 100,
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// get returns the status and the body of an answer.
func get(c *http.Client, url string) (int, []byte, error) {
	r, err := c.Get(url)
	if err != nil {
		return 0, nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, b, err
}

func mustGet(t testing.TB, c *http.Client, url string, status int) []byte {
	t.Helper()
	code, b, err := get(c, url)
	if err != nil || code != status {
		t.Fatalf("%s: %d %v %s; %d is expected", url, code, err, b, status)
	}
	return b
}

// started returns a server on a socket of its own, outside of the registry. change is called before it listens.
func started(t testing.TB, change func(*server), blocks ...Block) (*server, *http.Client) {
	t.Helper()
	o := atSocket(t)
	l, err := listen(o, false)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(newHold(o, t, blocksOf(blocks...)))
	if change != nil {
		change(s)
	}
	s.start(l)
	t.Cleanup(s.end)
	return s, clientOf(t, l.Addr())
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within a minute: " + what)
		}
	}
}

// logged returns what is logged meanwhile. Tests that use it are not parallel.
func logged(t testing.TB, do func()) string {
	t.Helper()
	var b bytes.Buffer
	stdlog.SetOutput(&b)
	defer stdlog.SetOutput(io.Discard)
	do()
	return b.String()
}

func writeFile(t testing.TB, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}
