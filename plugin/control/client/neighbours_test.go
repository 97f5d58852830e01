package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// neighbour is a control interface. Each request is answered by the next of its turns, and then by the last one.
type neighbour struct {
	*httptest.Server
	mu     sync.Mutex // guards the rest
	turns  []http.HandlerFunc
	asked  []string // paths and queries
	blocks []api.BlockStatus
}

func newNeighbour(t testing.TB, turns ...http.HandlerFunc) *neighbour {
	n := &neighbour{turns: turns, blocks: []api.BlockStatus{{ID: 0, Status: api.Status{Zones: []string{"."}}}}}
	n.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if r.URL.Path == "/v1/status" {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(api.StatusReply{Blocks: n.blocks})
			return
		}
		n.asked = append(n.asked, r.URL.RequestURI())
		turn := n.turns[0]
		if len(n.turns) > 1 {
			n.turns = n.turns[1:]
		}
		turn(w, r)
	}))
	t.Cleanup(n.Close)
	return n
}

func (n *neighbour) times() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.asked)
}

func (n *neighbour) client(t testing.TB, change func(*Options)) *Client {
	t.Helper()
	at, err := ParseAddress(n.URL)
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Address: at, Timeout: 10 * time.Second, Instance: "me"}
	if change != nil {
		change(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// gives answers with a dump of that text, and refuses with a status.
func gives(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", api.SnapshotForm)
		io.WriteString(w, text)
	}
}

func refuses(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
}

// breaksOff sends a part of a dump.
func breaksOff(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", api.SnapshotForm)
	io.WriteString(w, "a")
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

// sets asks, and returns what has been read: each byte of a dump is an answer, but for x, which is an error.
func take(t testing.TB, all []*Client, change func(*Neighbours)) (read string, from Address, failures []error, err error) {
	t.Helper()
	n := &Neighbours{Clients: all, Zones: []string{"."}, Rounds: 3, Pause: time.Millisecond, Within: time.Minute, Most: 100,
		Begin: func() func(io.Reader) (int, error) {
			return func(dump io.Reader) (int, error) {
				b, err := io.ReadAll(dump)
				read += string(b)
				if err == nil && strings.Contains(string(b), "x") {
					err = errors.New("it is no dump")
				}
				return len(b), err
			}
		},
		Failed: func(err error) { failures = append(failures, err) },
	}
	if change != nil {
		change(n)
	}
	from, err = n.Take(t.Context())
	return read, from, failures, err
}

func TestNeighboursInTurn(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		first, second []http.HandlerFunc
		read          string // what is taken; "": nothing
		times         [2]int // how often each is asked
		failures      int
		err           string
	}{
		"the first":                      {[]http.HandlerFunc{gives("one")}, []http.HandlerFunc{gives("two")}, "one", [2]int{1, 0}, 0, ""},
		"the first is busy":              {[]http.HandlerFunc{refuses(503)}, []http.HandlerFunc{gives("two")}, "two", [2]int{1, 1}, 1, ""},
		"both are busy for a while":      {[]http.HandlerFunc{refuses(503), gives("one")}, []http.HandlerFunc{refuses(429), gives("two")}, "one", [2]int{2, 1}, 2, ""},
		"both are busy":                  {[]http.HandlerFunc{refuses(503)}, []http.HandlerFunc{refuses(429)}, "", [2]int{3, 3}, 6, "429"},
		"the first refuses":              {[]http.HandlerFunc{refuses(401)}, []http.HandlerFunc{refuses(503), gives("two")}, "two", [2]int{1, 2}, 2, ""},
		"both refuse":                    {[]http.HandlerFunc{refuses(401)}, []http.HandlerFunc{refuses(404)}, "", [2]int{1, 1}, 2, "404"},
		"it is this server":              {[]http.HandlerFunc{refuses(409), gives("one")}, []http.HandlerFunc{refuses(404)}, "one", [2]int{2, 1}, 2, ""},
		"one breaks off":                 {[]http.HandlerFunc{breaksOff, gives("one")}, []http.HandlerFunc{refuses(404)}, "aone", [2]int{2, 1}, 2, ""},
		"one has no answers":             {[]http.HandlerFunc{gives("")}, []http.HandlerFunc{gives("two")}, "two", [2]int{1, 1}, 0, ""},
		"both have no answers":           {[]http.HandlerFunc{gives("")}, []http.HandlerFunc{gives("")}, "", [2]int{1, 1}, 0, "no answers"},
		"one sends something else":       {[]http.HandlerFunc{gives("x")}, []http.HandlerFunc{gives("two")}, "xtwo", [2]int{1, 1}, 1, ""},
		"one sends too much":             {[]http.HandlerFunc{gives(strings.Repeat("a", 101))}, []http.HandlerFunc{gives("two")}, "two", [2]int{1, 1}, 1, ""},
		"one sends as much as it may":    {[]http.HandlerFunc{gives(strings.Repeat("a", 100))}, []http.HandlerFunc{gives("two")}, strings.Repeat("a", 100), [2]int{1, 0}, 0, ""},
		"one sends elsewhere":            {[]http.HandlerFunc{func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/else", http.StatusFound) }}, []http.HandlerFunc{gives("two")}, "two", [2]int{1, 1}, 1, ""},
		"one is no control interface":    {[]http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }}, []http.HandlerFunc{gives("two")}, "two", [2]int{1, 1}, 1, ""},
		"none, as all of them are empty": {[]http.HandlerFunc{refuses(503), gives("")}, []http.HandlerFunc{gives("")}, "", [2]int{2, 1}, 1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second := newNeighbour(t, tc.first...), newNeighbour(t, tc.second...)
			read, from, failures, err := take(t, []*Client{first.client(t, nil), second.client(t, nil)}, nil)
			if tc.read == "" && err == nil || tc.read != "" && err != nil || tc.err != "" && !strings.Contains(fmt.Sprint(err), tc.err) {
				t.Errorf("%q: %v", read, err)
			}
			if read != tc.read && tc.read != "" && !strings.HasSuffix(read, tc.read) || err == nil && from.String() == "" {
				t.Errorf("read %q of %s, want %q", read, from, tc.read)
			}
			if got := [2]int{first.times(), second.times()}; got != tc.times || len(failures) != tc.failures {
				t.Errorf("asked %v times, want %v; failures: %v", got, tc.times, failures)
			}
		})
	}
}

// The block that is alike is asked for. Requests name the process and have the token of the file.
func TestNeighboursBlock(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte("hush\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	block := func(id int, view string, zones ...string) api.BlockStatus {
		return api.BlockStatus{ID: id, Status: api.Status{View: view, Zones: zones}}
	}
	for name, tc := range map[string]struct {
		blocks []api.BlockStatus
		asked  []string
	}{
		"the only one":       {[]api.BlockStatus{block(3, "", "example.org.")}, []string{"/v1/dump?block=3"}},
		"of the same zones":  {[]api.BlockStatus{block(0, "", "."), block(1, "v", "b.", "a."), block(2, "", "a.", "b.")}, []string{"/v1/dump?block=2"}},
		"none is alike":      {[]api.BlockStatus{block(0, "", "."), block(1, "v", "a.", "b.")}, nil},
		"there is no block":  {nil, nil},
		"of the same as one": {[]api.BlockStatus{block(1, "", "a.", "b."), block(0, "", "a.", "b.")}, []string{"/v1/dump?block=1"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNeighbour(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get(api.InstanceHeader) != "me" || r.Header.Get("Authorization") != "Bearer hush" {
					t.Errorf("headers: %v", r.Header)
				}
				gives("one")(w, r)
			})
			n.blocks = tc.blocks
			_, _, _, err := take(t, []*Client{n.client(t, func(o *Options) { o.TokenFile = path })}, func(n *Neighbours) { n.Zones = []string{"a.", "b."} })
			if !slices.Equal(n.asked, tc.asked) || (err == nil) != (tc.asked != nil) {
				t.Errorf("asked %v, %v", n.asked, err)
			}
		})
	}
}

// A neighbour that is silent costs its time, and no more. The whole has a bound, and ends with its context.
func TestNeighboursThatHang(t *testing.T) {
	t.Parallel()
	hang := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", api.SnapshotForm)
		io.WriteString(w, "a")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	silent := func(t testing.TB, patience time.Duration) *Client {
		return newNeighbour(t, hang).client(t, func(o *Options) { o.Timeout = patience })
	}
	_, from, failures, err := take(t, []*Client{silent(t, 50*time.Millisecond), newNeighbour(t, gives("two")).client(t, nil)}, nil)
	if err != nil || len(failures) != 1 || !strings.Contains(failures[0].Error(), "no answer of") {
		t.Errorf("%v of %s, failures %v", err, from, failures)
	}
	if _, _, _, err = take(t, []*Client{silent(t, time.Minute)}, func(n *Neighbours) { n.Within = 50 * time.Millisecond }); err == nil || !strings.Contains(err.Error(), "longer than 50ms") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n := &Neighbours{Clients: []*Client{silent(t, time.Minute)}, Zones: []string{"."}, Rounds: 3, Pause: time.Hour, Within: time.Hour, Most: 100, Begin: func() func(io.Reader) (int, error) {
		return func(dump io.Reader) (int, error) {
			cancel()
			b, err := io.ReadAll(dump)
			return len(b), err
		}
	}}
	if _, err := n.Take(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestPlainAddresses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"unix:///run/a": false, "https://192.0.2.1": false, "127.0.0.1:1": false, "[::1]:1": false, "http://localhost:1": false, ":1": false,
		"http://[::ffff:127.0.0.1]:1": false, "192.0.2.1:1": true, "http://dns.example": true, "localhost.example:1": true,
	} {
		if a, err := ParseAddress(text); err != nil || a.Plain() != want {
			t.Errorf("%s: %v, %v", text, a.Plain(), err)
		}
	}
}
