package control

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control/page"
)

// watching is a client that watches.
type watching struct {
	t    *testing.T
	body io.ReadCloser
	in   *bufio.Reader
}

func watch(t *testing.T, c *http.Client, header http.Header) *watching {
	t.Helper()
	q, _ := http.NewRequestWithContext(t.Context(), "GET", "http://localhost/v1/events", nil)
	q.Header = header
	r, err := c.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Body.Close() })
	if r.StatusCode != 200 || r.Header.Get("Content-Type") != "text/event-stream" || r.Header.Get("Cache-Control") != "no-store" || r.ContentLength >= 0 {
		t.Fatalf("%d %v", r.StatusCode, r.Header)
	}
	return &watching{t, r.Body, bufio.NewReader(r.Body)}
}

// next returns the next event.
func (w *watching) next() (e statusEvent, err error) {
	w.t.Helper()
	var lines []string
	for {
		line, err := w.in.ReadString('\n')
		if err != nil {
			return e, err
		}
		if line == "\n" {
			break
		}
		lines = append(lines, strings.TrimSuffix(line, "\n"))
	}
	data, ok := strings.CutPrefix(strings.Join(lines[1:], "\n"), "data: ")
	if lines[0] != "event: status" || !ok {
		w.t.Fatalf("%q", lines)
	}
	return e, json.Unmarshal([]byte(data), &e)
}

func (w *watching) wantView(view string) {
	w.t.Helper()
	for range 100 { // an event of before may be on its way
		e, err := w.next()
		if err != nil || time.Since(e.Time) > time.Minute {
			w.t.Fatal(e.Time, err)
		}
		if len(e.Blocks) == 1 && e.Blocks[0].View == view {
			return
		}
	}
	w.t.Fatalf("no event is of the block %q", view)
}

// often makes a server look at its blocks every millisecond while there are watchers.
func often(s *server) { s.feed.every = time.Millisecond }

// All watchers get what the blocks say, again and again. Nobody is asked when nobody watches.
func TestEventsSayHowBlocksAre(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	s, c := started(t, often, &fakeBlock{status: Status{View: "a"}, before: func() { asked.Add(1) }})
	one, two := watch(t, c, nil), watch(t, c, nil)
	for range 3 {
		one.wantView("a")
		two.wantView("a")
	}
	one.body.Close()
	two.wantView("a")
	two.body.Close()
	eventually(t, "nobody watches", func() bool { return watchers(s) == 0 })
	var before int64
	eventually(t, "blocks are left alone", func() bool { // a look may be under way
		was := before
		before = asked.Load()
		return was == before
	})
	watch(t, c, nil).wantView("a")
}

// A block that panics costs an event, and neither the watchers nor the server.
func TestEventsOutlivePanics(t *testing.T) {
	t.Parallel()
	var looks atomic.Int64
	_, c := started(t, often, &fakeBlock{status: Status{View: "a"}, before: func() {
		if looks.Add(1)%2 == 1 {
			panic("now and then")
		}
	}})
	w := watch(t, c, nil)
	for range 3 {
		w.wantView("a")
	}
}

func TestWatchersAreBounded(t *testing.T) {
	t.Parallel()
	s, c := started(t, often, viewBlock("a"))
	var all []*watching
	for range maxWatchers {
		all = append(all, watch(t, c, nil))
	}
	mustGet(t, c, "http://x/v1/events", 503)
	mustGet(t, c, "http://x/v1/status", 200) // watchers hold no slot
	if len(s.slots) != 0 {
		t.Errorf("%d slots are held", len(s.slots))
	}
	all[0].wantView("a")
	all[0].body.Close()
	eventually(t, "there is room for another one", func() bool {
		r, err := c.Get("http://x/v1/events")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		return r.StatusCode == 200
	})
}

// large is a block whose events are more than a connection holds.
func large() *fakeBlock {
	return &fakeBlock{status: Status{View: "a", Zones: []string{strings.Repeat("z", 1<<20)}}}
}

func watchers(s *server) int {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	return s.feed.watchers
}

// A watcher that does not read keeps nothing from the others.
func TestWatchersThatDoNotRead(t *testing.T) {
	t.Parallel()
	s, c := started(t, func(s *server) { s.feed.every, s.feed.patience = 50*time.Millisecond, time.Minute }, large())
	dial(t, s, "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "it watches", func() bool { return watchers(s) == 1 })
	other := watch(t, c, nil)
	for range 3 {
		other.wantView("a")
	}
	if n := watchers(s); n != 2 {
		t.Errorf("%d watch", n)
	}
}

func TestWatchersThatDoNotReadAreCutOff(t *testing.T) {
	t.Parallel()
	s, _ := started(t, func(s *server) { s.feed.every, s.feed.patience = 50*time.Millisecond, 2*time.Second }, large())
	dial(t, s, "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "it watches", func() bool { return watchers(s) == 1 })
	eventually(t, "it is cut off", func() bool { return watchers(s) == 0 })
}

func TestEndDoesNotWaitForWatchers(t *testing.T) {
	t.Parallel()

	s, c := started(t, often, large())
	dial(t, s, "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n") // and does not read
	w := watch(t, c, nil)
	w.wantView("a")
	start := time.Now()
	s.end()
	if took := time.Since(start); took > s.grace/2 {
		t.Errorf("the end took %v", took)
	}
	for {
		if _, err := w.next(); err != nil {
			break
		}
	}
	eventually(t, "nobody watches", func() bool { return watchers(s) == 0 })
	if s.statusEvent() != nil {
		t.Error("a block is asked after the end")
	}
}

// A watcher outlives a reload, and sees the blocks of after it. The generation of before does not wait for it. If the next one
// wants a token, the watcher ends.
func TestWatchersAndReloads(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	withToken := o
	withToken.TokenFile = filepath.Join(t.TempDir(), "token")
	writeFile(t, withToken.TokenFile, "secret", 0o600)
	one, two, three := "one "+t.Name(), "two "+t.Name(), "three "+t.Name()
	if err := Listen(o, one, blocksOf(viewBlock("a"))); err != nil {
		t.Fatal(err)
	}
	c := clientOf(t, Addrs(one)[0])
	w := watch(t, c, nil)
	w.wantView("a")
	listening(t, o, two, viewBlock("b"))
	start := time.Now()
	Release(one)
	if took := time.Since(start); took > endGrace/2 {
		t.Errorf("the release took %v", took)
	}
	w.wantView("b")
	listening(t, withToken, three, viewBlock("c"))
	for {
		e, err := w.next()
		if err != nil {
			break
		}
		if e.Blocks[0].View == "c" {
			t.Fatal("it sees what needs a token")
		}
	}
	mustGet(t, c, "http://x/v1/events", 401)
	watch(t, c, http.Header{"Authorization": {"Bearer secret"}}).wantView("c")
}

// The page's files are for everybody who may reach the listener, and have a strict policy; what is of the cache needs the token.
func TestPageAndToken(t *testing.T) {
	t.Parallel()
	o := Options{Address: "192.0.2.1:8053", TokenFile: filepath.Join(t.TempDir(), "token")}
	writeFile(t, o.TokenFile, "secret", 0o600)
	s := newServer(newHold(o, t, blocksOf(viewBlock("a"))))
	for path, f := range page.Files {
		for _, method := range []string{"GET", "HEAD"} {
			w := request{method: method, target: path}.ask(t, s)
			if w.Code != 200 || !bytes.Equal(w.Body.Bytes(), f.Body) || w.Header().Get("Content-Type") != f.Type || w.Header().Get("Content-Security-Policy") != page.Policy {
				t.Errorf("%s %s: %d %v", method, path, w.Code, w.Header())
			}
		}
	}
	for _, target := range []string{"/v1/status", "/v1/events", "/v1/openapi.json", "/healthz", "/page/other.js"} {
		if w := (request{target: target}).ask(t, s); w.Code != 401 {
			t.Errorf("%s: %d", target, w.Code)
		}
	}
	if w := (request{method: "POST", target: "/", body: "{}"}).ask(t, s); w.Code != 405 {
		t.Errorf("POST /: %d", w.Code)
	}
	// Without a token, the page is as well guarded as the rest.
	local := newServer(newHold(Options{Address: "127.0.0.1:8053"}, t, blocksOf()))
	for header, value := range map[string]string{"Host": "rebound.example", "Origin": "http://example.org", "Sec-Fetch-Site": "cross-site"} {
		q := request{target: "/page/main.js", header: map[string]string{"Host": "localhost"}}
		q.header[header] = value
		if w := q.ask(t, local); w.Code != 403 {
			t.Errorf("%s: %s: %d", header, value, w.Code)
		}
	}
}

// What the page loads is there, and comes from nowhere else.
func TestPageIsWhole(t *testing.T) {
	t.Parallel()
	index := string(page.Files["/"].Body)
	if index == "" {
		t.Fatal("no page")
	}
	for _, attribute := range []string{`src="`, `href="`} {
		for _, rest := range strings.Split(index, attribute)[1:] {
			at, _, _ := strings.Cut(rest, `"`)
			if _, ok := page.Files[at]; !ok && !strings.HasPrefix(at, "#") {
				t.Errorf("%q is not there", at)
			}
		}
	}
	for path, f := range page.Files {
		text := string(f.Body)
		if strings.HasSuffix(path, ".js") && !strings.Contains(path, "/vendor/") {
			for _, rest := range strings.Split(text, " from '")[1:] {
				at, _, _ := strings.Cut(rest, "'")
				if _, ok := page.Files["/page/"+strings.TrimPrefix(at, "./")]; !ok {
					t.Errorf("%s: %q is not there", path, at)
				}
			}
		}
		for _, word := range []string{"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=\"", "onclick=\""} {
			if strings.Contains(text, word) {
				t.Errorf("%s has %s", path, word)
			}
		}
	}
	if fmt.Sprint(page.Policy) == "" || strings.Contains(page.Policy, "unsafe") {
		t.Errorf("%s", page.Policy)
	}
}
