package control

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// This file tests what asks, dumps and loads.

func TestExplainAndWarmRefuseBadInput(t *testing.T) {
	t.Parallel()
	many := `{"questions": [` + strings.TrimSuffix(strings.Repeat(`{"name":"a","type":"A"},`, api.MaxWarm+1), ",") + `]}`
	for _, tc := range []struct {
		path, body, want string
	}{
		{"explain", `{}`, "name: is empty"},
		{"explain", `{"name": "a..b"}`, `name: "a..b" is no domain name`},
		{"explain", `{"name": "a b"}`, "has a space"},
		{"explain", `{"name": "a", "type": "FOO"}`, `type: "FOO" is no type`},
		{"explain", `{"name": "a", "type": "AXFR"}`, `type: "AXFR" is not a type of data`},
		{"explain", `{"name": "a", "type": "OPT"}`, `type: "OPT" is not a type of data`},
		{"explain", `{"name": "a", "client": "here"}`, `client: "here" is not an IP address`},
		{"explain", `{"name": "a", "blocks": [7]}`, "there is no block 7"},
		{"explain", `{"name": "a", "blocks": []}`, "blocks: is empty"},
		{"explain", `{"name": "a", "do": "yes"}`, "do: a JSON string"},
		{"explain", `{"name": "a", "ttl": 1}`, `"ttl": unknown member`},
		{"warm", `{}`, "questions: there are 0"},
		{"warm", `{"questions": []}`, "questions: there are 0"},
		{"warm", many, "questions: there are 251, and 1 to 250 are allowed"},
		{"warm", `{"questions": [{"name": "a", "type": "A"}, {"name": "b..c", "type": "A"}]}`, `questions[1]: name: "b..c" is no domain name`},
		{"warm", `{"questions": [{"name": "a", "type": "FOO"}]}`, `questions[0]: type: "FOO" is no type`},
		{"warm", `{"questions": [{"name": "a", "type": "A", "class": "CH"}]}`, "unknown field"},
		{"warm", `{"questions": [{"name": "a", "type": "A"}], "blocks": [1]}`, "there is no block 1"},
	} {
		b := new(fakeBlock)
		w := request{method: "POST", target: "/v1/" + tc.path, body: tc.body}.do(t, b)
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusBadRequest, tc.want)
		if len(b.asked) > 0 {
			t.Errorf("%s %s: it has asked %v", tc.path, tc.body, b.asked)
		}
	}
}

// A question has what the request says, and each block is asked.
func TestExplainAsksEachBlock(t *testing.T) {
	t.Parallel()
	one, two := new(fakeBlock), &fakeBlock{explains: func(q Question) (Explanation, error) {
		return Explanation{Name: q.Name, Outcome: api.Elsewhere, Why: "no zone"}, nil
	}}
	w := request{method: "POST", target: "/v1/explain",
		body: `{"name": "WWW.example.org", "type": "aaaa", "do": true, "cd": true, "no_rd": true, "client": "2001:db8::1", "tcp": true}`}.do(t, one, two)
	a := decoded[api.ExplainReply](t, w.Body.Bytes())
	if len(a.Blocks) != 2 || a.Blocks[0].Outcome != api.Hit || a.Blocks[1].Outcome != api.Elsewhere || a.Blocks[1].ID != 1 {
		t.Errorf("%s", w.Body)
	}
	want := Question{Name: "www.example.org.", Type: 28, DO: true, CD: true, NoRD: true, Client: "2001:db8::1", TCP: true}
	if !slices.Equal(one.asked, []Question{want}) || !slices.Equal(two.asked, []Question{want}) {
		t.Errorf("%+v, %+v", one.asked, two.asked)
	}
	one.explains = func(Question) (Explanation, error) { return Explanation{}, errors.New("no reply in 5s") }
	w = request{method: "POST", target: "/v1/explain", body: `{"name": "a"}`}.do(t, one)
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusInternalServerError, "block 0: no reply in 5s")
}

func TestWarmCounts(t *testing.T) {
	t.Parallel()
	kept := func(outcome, rcode string) Explanation {
		return Explanation{Outcome: outcome, Rcode: rcode, Response: &Response{Kept: true}}
	}
	b := &fakeBlock{explains: func(q Question) (Explanation, error) {
		switch q.Name {
		case "hit.":
			return Explanation{Outcome: api.Hit, Rcode: "NOERROR"}, nil
		case "stale.":
			return Explanation{Outcome: api.Stale, Rcode: "NXDOMAIN"}, nil
		case "shared.":
			return kept(api.Coalesced, "NOERROR"), nil
		case "came.":
			return kept(api.Miss, "NOERROR"), nil
		case "denied.":
			return kept(api.Miss, "NXDOMAIN"), nil
		case "failed.":
			return Explanation{Outcome: api.Miss, Rcode: "SERVFAIL", Why: "the next plugin has failed: no upstream", Response: &Response{Kept: true}}, nil
		case "failure.":
			return Explanation{Outcome: api.Hit, Rcode: "SERVFAIL"}, nil
		case "soaless.":
			return Explanation{Outcome: api.Miss, Rcode: "NXDOMAIN", Response: &Response{Why: "NXDOMAIN without SOA"}}, nil
		case "elsewhere.":
			return Explanation{Outcome: api.Elsewhere, Why: "the name is in no zone of the block"}, nil
		}
		return Explanation{}, errors.New("no reply in 5s" + strings.Repeat("!", 1000))
	}}
	none := &fakeBlock{explains: func(Question) (Explanation, error) { return Explanation{Outcome: api.Elsewhere, Why: "no zone"}, nil }}
	var body []string
	for _, name := range []string{"hit", "stale", "shared", "came", "denied", "failed", "failure", "soaless", "elsewhere", "silent"} {
		body = append(body, fmt.Sprintf(`{"name": %q, "type": ""}`, name))
	}
	w := request{method: "POST", target: "/v1/warm", body: `{"questions": [` + strings.Join(body, ",") + `]}`}.do(t, none, b)
	a := decoded[api.WarmReply](t, w.Body.Bytes())
	if a.There != 3 || a.Came != 2 || a.Failed != 5 || len(a.Failures) != 5 {
		t.Fatalf("%+v", a)
	}
	want := []string{"5 1 failed SERVFAIL: the next plugin has failed: no upstream", "6 1 failure a failure is held: SERVFAIL",
		"7 1 soaless not kept: NXDOMAIN without SOA", "8 0 elsewhere no zone", "9 1 silent no reply in 5s"}
	for i, f := range a.Failures {
		if got := fmt.Sprintf("%d %d %s %s", f.At, f.Block, f.Name, f.Why); !strings.HasPrefix(got, want[i]) || len(f.Why) > maxWords {
			t.Errorf("%q, want %q", got, want[i])
		}
	}
}

func TestWarmChecksWithoutAsking(t *testing.T) {
	t.Parallel()
	b := new(fakeBlock)
	w := request{method: "POST", target: "/v1/warm", body: `{"check": true, "questions": [{"name":"a","type":"A"},{"name":"b","type":"BAD"},{"name":"..","type":"A"}]}`}.do(t, b)
	a := decoded[api.WarmReply](t, w.Body.Bytes())
	if a.Failed != 2 || len(a.Failures) != 2 || a.Failures[0].At != 1 || a.Failures[1].At != 2 || !strings.Contains(a.Failures[0].Why, `"BAD" is no type`) || b.asked != nil {
		t.Errorf("%+v, asked %v", a, b.asked)
	}
}

// A few questions of one request are asked at once, and no more.
func TestWarmIsBounded(t *testing.T) {
	t.Parallel()
	at, open := make(chan struct{}, api.MaxWarm), make(chan struct{})
	b := &fakeBlock{explains: func(Question) (Explanation, error) {
		at <- struct{}{}
		<-open
		return Explanation{Outcome: api.Hit}, nil
	}}
	done := make(chan api.WarmReply)
	go func() {
		body := `{"questions": [` + strings.TrimSuffix(strings.Repeat(`{"name":"a","type":"A"},`, api.MaxWarm), ",") + `]}`
		done <- decoded[api.WarmReply](t, request{method: "POST", target: "/v1/warm", body: body}.do(t, b).Body.Bytes())
	}()
	for range warmers {
		<-at
	}
	select {
	case <-at:
		t.Errorf("more than %d are asked at once", warmers)
	case <-time.After(20 * time.Millisecond):
	}
	close(open)
	if a := <-done; a.There != api.MaxWarm {
		t.Errorf("%+v", a)
	}
}

// What takes long leaves the slots of other requests alone, and is bounded by itself.
func TestLongRequestsLeaveOthersAlone(t *testing.T) {
	t.Parallel()
	at, open := make(chan struct{}, 10), make(chan struct{})
	b := &fakeBlock{explains: func(Question) (Explanation, error) {
		at <- struct{}{}
		<-open
		return Explanation{Outcome: api.Hit}, nil
	}}
	_, c := started(t, nil, b)
	done := make(chan int)
	ask := func() {
		r, err := c.Post("http://x/v1/explain", "application/json", strings.NewReader(`{"name": "a"}`))
		if err != nil {
			t.Error(err)
			done <- 0
			return
		}
		r.Body.Close()
		done <- r.StatusCode
	}
	for range maxLong {
		go ask()
		<-at
	}
	go ask()
	if code := <-done; code != http.StatusServiceUnavailable {
		t.Errorf("one more: %d", code)
	}
	mustGet(t, c, "http://x/v1/status", 200)
	close(open)
	for range maxLong {
		if code := <-done; code != 200 {
			t.Errorf("%d", code)
		}
	}
	go ask()
	if code := <-done; code != 200 {
		t.Errorf("a slot is lost: %d", code)
	}
}

func TestDumpForms(t *testing.T) {
	t.Parallel()
	for accept, want := range map[string]string{
		"": "application/zstd", "*/*": "application/zstd", "application/json": "application/zstd", "text/plain": "text/plain; charset=us-ascii",
		"text/dns, */*": "text/dns; charset=us-ascii", "text/plain;q=0": "application/zstd",
	} {
		w := request{target: "/v1/dump", header: map[string]string{"Accept": accept}}.do(t, &fakeBlock{})
		if got := w.Header().Get("Content-Type"); w.Code != 200 || got != want || w.Body.String() != fmt.Sprintf("dumped text=%t", strings.HasPrefix(want, "text")) {
			t.Errorf("%q: %d, %q, %q", accept, w.Code, got, w.Body)
		}
		if w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%q: %v", accept, w.Header())
		}
	}
	w := request{target: "/v1/dump"}.do(t, &fakeBlock{}, &fakeBlock{})
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusBadRequest, "block: a dump is of one block: name one of the 2")
	if w := (request{target: "/v1/dump?block=1"}).do(t, &fakeBlock{}, &fakeBlock{}); w.Code != 200 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	w = request{target: "/v1/dump?block=2"}.do(t, &fakeBlock{})
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusBadRequest, "there is no block 2")
	w = request{target: "/v1/dump"}.do(t, &fakeBlock{err: errors.New("out of order")})
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusInternalServerError, "out of order")
}

// A dump that fails in the middle does not look whole: the connection ends without the last chunk.
func TestDumpThatFails(t *testing.T) {
	t.Parallel()
	_, c := started(t, nil, &fakeBlock{dumps: func(w io.Writer) (int, error) {
		w.Write(bytes.Repeat([]byte("x"), 1<<20))
		return 7, errors.New("a reload has replaced the block meanwhile")
	}})
	r, err := c.Get("http://x/v1/dump")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if n, err := io.Copy(io.Discard, r.Body); err == nil || r.StatusCode != 200 {
		t.Errorf("%d, %d bytes, %v", r.StatusCode, n, err)
	}
}

// A client that does not read its dump is cut off. It holds nothing that other requests need.
func TestDumpToSlowReader(t *testing.T) {
	t.Parallel()
	over := make(chan error, 1)
	s, c := started(t, func(s *server) { s.web.WriteTimeout = 2 * time.Second }, &fakeBlock{dumps: func(w io.Writer) (int, error) {
		for chunk := make([]byte, 1<<20); ; {
			if _, err := w.Write(chunk); err != nil {
				over <- err
				return 0, err
			}
		}
	}})
	slow := dial(t, s, "GET /v1/dump HTTP/1.1\r\nHost: x\r\n\r\n")
	defer slow.Close()
	mustGet(t, c, "http://x/v1/status", 200)
	select {
	case err := <-over:
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it ended by %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it goes on")
	}
	eventually(t, "the slot is free", func() bool { return len(s.long) == 0 })
}

func TestLoad(t *testing.T) {
	t.Parallel()
	post := func(media, target, body string, blocks ...Block) (int, http.Header, []byte) {
		w := request{method: "POST", target: "/v1/load" + target, body: body, header: map[string]string{"Content-Type": media}}.do(t, blocks...)
		return w.Code, w.Header(), w.Body.Bytes()
	}
	for _, media := range []string{"application/zstd", "text/dns", "text/dns; charset=us-ascii"} {
		b := new(fakeBlock)
		if code, _, body := post(media, "", "good"); code != 400 { // no block at all
			t.Errorf("%d %s", code, body)
		}
		code, _, body := post(media, "", "good", b)
		if a := decoded[api.LoadReply](t, body); code != 200 || a.Loaded != 4 || a.Refused == nil || string(b.loaded) != "good" {
			t.Errorf("%s: %d %s", media, code, body)
		}
	}
	b := new(fakeBlock)
	for _, media := range []string{"application/json", "text/plain", "application/x-www-form-urlencoded", "x", ""} {
		code, header, body := post(media, "", "good", b)
		wantProblem(t, code, header, body, http.StatusUnsupportedMediaType, "application/zstd or text/dns is expected")
	}
	code, header, body := post("text/dns", "", "good", b, b)
	wantProblem(t, code, header, body, http.StatusBadRequest, "a dump is of one block")
	code, header, body = post("text/dns", "", "bad", b)
	wantProblem(t, code, header, body, http.StatusBadRequest, `body: line 1: "bad"; nothing is changed`)
	code, header, body = post("text/dns", "?name=x", "good", b)
	wantProblem(t, code, header, body, http.StatusBadRequest, "unknown parameter")
	if b.loaded != nil {
		t.Errorf("%q is loaded", b.loaded)
	}
}

// A dump larger than what is kept in memory comes whole, and leaves no file.
func TestLoadOfManyBytes(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	b := new(fakeBlock)
	_, c := started(t, nil, b)
	sent := bytes.Repeat([]byte("0123456789abcdef"), (spoolMemory+1<<20)/16)
	r, err := c.Post("http://x/v1/load", "application/zstd", io.MultiReader(bytes.NewReader(sent))) // in chunks
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(r.Body)
	r.Body.Close()
	if r.StatusCode != 200 || !bytes.Equal(b.loaded, sent) {
		t.Errorf("%d %s: %d bytes of %d", r.StatusCode, text, len(b.loaded), len(sent))
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// The file for what is beyond memory cannot be made.
func TestLoadWithoutRoom(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()+"/none")
	_, c := started(t, nil, new(fakeBlock))
	r, err := c.Post("http://x/v1/load", "application/zstd", bytes.NewReader(make([]byte, spoolMemory+1)))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	wantProblem(t, r.StatusCode, r.Header, text, http.StatusInternalServerError, "the dump cannot be kept until it is whole")
}

// A client goes away in the middle of its dump. Nothing is loaded.
func TestLoadThatIsCutOff(t *testing.T) {
	t.Parallel()
	b := new(fakeBlock)
	s, _ := started(t, nil, b)
	c := dial(t, s, "POST /v1/load HTTP/1.1\r\nHost: x\r\nContent-Type: text/dns\r\nContent-Length: 100\r\n\r\nhalf")
	c.(interface{ CloseWrite() error }).CloseWrite()
	text, _ := io.ReadAll(c)
	if !strings.Contains(string(text), "400 Bad Request") || !strings.Contains(string(text), "it is cut off after 4 bytes; nothing is changed") {
		t.Errorf("%s", text)
	}
	eventually(t, "the slot is free", func() bool { return len(s.long) == 0 })
	if b.loaded != nil {
		t.Errorf("%q is loaded", b.loaded)
	}
}
