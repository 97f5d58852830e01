package control

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestStatus(t *testing.T) {
	t.Parallel()
	one := &fakeBlock{status: Status{Zones: []string{"."}, Requests: 7, Hits: map[string]uint64{"hot": 3}}}
	two := &fakeBlock{status: Status{View: "inner", Snapshot: &SnapshotStatus{Path: "/f"}}}

	w := request{target: "/v1/status"}.do(t, one, two)
	a := decoded[statusAnswer](t, w.Body.Bytes())
	if w.Code != 200 || a.Version != Version || len(a.Blocks) != 2 || a.Blocks[0].ID != 0 || a.Blocks[1].ID != 1 ||
		a.Blocks[0].Requests != 7 || a.Blocks[0].Hits["hot"] != 3 || a.Blocks[1].Snapshot.Path != "/f" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if bytes.Contains(w.Body.Bytes(), []byte("null")) {
		t.Errorf("null in %s", w.Body)
	}
	w = request{target: "/v1/status?block=1"}.do(t, one, two)
	if a := decoded[statusAnswer](t, w.Body.Bytes()); len(a.Blocks) != 1 || a.Blocks[0].View != "inner" {
		t.Errorf("%s", w.Body)
	}
	w = request{target: "/v1/status"}.do(t)
	if a := decoded[statusAnswer](t, w.Body.Bytes()); a.Blocks == nil || len(a.Blocks) != 0 {
		t.Errorf("without blocks: %s", w.Body)
	}
}

func TestLookup(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{answers: answersOf(3)}
	w := request{target: `/v1/lookup?name=WWW\049.Example.ORG&type=a`}.do(t, b, &fakeBlock{})
	a := decoded[lookupAnswer](t, w.Body.Bytes())
	if len(a.Blocks) != 2 || len(a.Blocks[0].Answers) != 1 || a.Blocks[0].Answers[0].Records == nil || a.Blocks[1].Answers == nil {
		t.Errorf("%s", w.Body)
	}
	w = request{target: "/v1/lookup?name=www1.example.org.&type=TYPE28&block=0"}.do(t, b, &fakeBlock{})
	if a := decoded[lookupAnswer](t, w.Body.Bytes()); len(a.Blocks) != 1 || len(a.Blocks[0].Answers) != 0 {
		t.Errorf("%s", w.Body)
	}
}

// pages follows a list's cursors, and returns the names of its pages.
func pages(t *testing.T, target string, blocks ...Block) (all [][]string) {
	t.Helper()
	after := ""
	for {
		w := request{target: target + after}.do(t, blocks...)
		if w.Code != 200 || len(all) > 1000 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		a := decoded[listAnswer](t, w.Body.Bytes())
		page := []string{}
		for _, one := range a.Answers {
			page = append(page, fmt.Sprintf("%d %s", one.Block, one.Name))
		}
		all = append(all, page)
		if a.Next == "" {
			return all
		}
		after = "&after=" + a.Next
	}
}

func TestListGoesOnFromBlockToBlock(t *testing.T) {
	t.Parallel()
	blocks := []Block{&fakeBlock{answers: answersOf(600)}, &fakeBlock{}, &fakeBlock{answers: answersOf(5)}, &fakeBlock{answers: answersOf(1)}}
	var want []string
	for id, b := range blocks {
		for _, a := range b.(*fakeBlock).answers {
			want = append(want, fmt.Sprintf("%d %s", id, a.Name))
		}
	}
	for _, limit := range []int{20, 250, 300, 600, 605, 606, 10000} {
		all := pages(t, fmt.Sprintf("/v1/list?limit=%d", limit), blocks...)
		for i, page := range all[:len(all)-1] {
			if len(page) != limit {
				t.Errorf("limit %d: page %d has %d answers", limit, i, len(page))
			}
		}
		if got := slices.Concat(all...); !slices.Equal(got, want) {
			t.Errorf("limit %d: %d answers in %d pages, not %d", limit, len(got), len(all), len(want))
		}
	}
	if got := slices.Concat(pages(t, "/v1/list?limit=2&block=3&block=2", blocks...)...); len(got) != 6 {
		t.Errorf("two blocks: %q", got)
	}
	if got := slices.Concat(pages(t, "/v1/list?limit=10&kind=denial&kind=denial&block=0", blocks...)...); len(got) != 300 {
		t.Errorf("denials: %d", len(got))
	}
}

func TestListPassesItsFilterOn(t *testing.T) {
	t.Parallel()
	var got Filter
	b := &listBlock{list: func(f Filter) (Page, error) { got = f; return Page{}, nil }}
	request{target: "/v1/list?name=Example.org&subtree=true&type=aaaa&kind=failure&kind=denial&stale=true&records=true&limit=5"}.do(t, b)
	want := Filter{Name: "example.org.", Subtree: true, Type: 28, Kinds: []string{"failure", "denial"}, Stale: true, Limit: 5, Records: true}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	request{target: "/v1/list"}.do(t, b)
	if want := (Filter{Limit: listChunk}); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// listBlock is a fakeBlock with another List.
type listBlock struct {
	fakeBlock
	list func(Filter) (Page, error)
}

func (b *listBlock) List(f Filter) (Page, error) { return b.list(f) }

// A page of large answers ends early, and the list goes on behind it.
func TestListIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	big := answersOf(600)
	for i := range big {
		big[i].Records = []string{strings.Repeat("x", 10_000)}
	}
	b := &fakeBlock{answers: big}
	text := map[string]string{"Accept": "text/dns"}
	one := request{target: "/v1/list?limit=10000", header: text}.do(t, b)
	two := request{target: "/v1/list?limit=10000&after=" + one.Header().Get("Next-Cursor"), header: text}.do(t, b)
	if one.Body.Len() > 2*listBytes || two.Header().Get("Next-Cursor") != "" {
		t.Errorf("%d bytes and %d, %q", one.Body.Len(), two.Body.Len(), two.Header())
	}
	if got := strings.Count(one.Body.String()+two.Body.String(), ";"); got != len(big) {
		t.Errorf("%d answers in all", got)
	}
}

// A block that searches in vain does not hold its request for ever.
func TestListEndsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n := 0
		b := &listBlock{list: func(Filter) (Page, error) {
			n++
			time.Sleep(listTime / 10)
			return Page{Next: fmt.Sprint(n)}, nil
		}}
		w := request{target: "/v1/list"}.do(t, b)
		if a := decoded[listAnswer](t, w.Body.Bytes()); w.Code != 200 || a.Next == "" || a.Answers == nil {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		if took := time.Since(start); took != listTime {
			t.Errorf("it has taken %v", took)
		}
	})
	stuck := &listBlock{list: func(Filter) (Page, error) { return Page{Next: "same"}, nil }}
	w := request{target: "/v1/list"}.do(t, stuck)
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 500, "block 0")
}

func TestListAsZoneFile(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{answers: answersOf(3)}
	b.answers[0].Records = append(b.answers[0].Records, "x\ny")
	for accept, text := range map[string]bool{
		"text/dns": true, "text/html, TEXT/DNS;q=0.5": true, "application/json, text/dns": false, "text/dns;q=0": false, "*/*": false, "": false,
	} {
		w := request{target: "/v1/list?limit=2", header: map[string]string{"Accept": accept}}.do(t, b)
		if got := strings.HasPrefix(w.Header().Get("Content-Type"), "text/dns"); got != text {
			t.Errorf("%q: %s", accept, w.Header().Get("Content-Type"))
		}
	}
	w := request{target: "/v1/list?limit=2", header: map[string]string{"Accept": "text/dns"}}.do(t, b)
	lines := strings.Split(strings.TrimSuffix(w.Body.String(), "\n"), "\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[0], "; block 0 www0.example.org. A NOERROR") ||
		lines[1] != b.answers[0].Records[0] || lines[2] != `x\010y` || lines[4] != b.answers[1].Records[0] {
		t.Errorf("%q", lines)
	}
	next := w.Header().Get("Next-Cursor")
	w = request{target: "/v1/list?after=" + next, header: map[string]string{"Accept": "text/dns"}}.do(t, b)
	if next == "" || !strings.Contains(w.Body.String(), "www2") || w.Header().Get("Next-Cursor") != "" {
		t.Errorf("behind %q: %s", next, w.Body)
	}
}

func TestFlush(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Filter{
		`{"name":"Example.org","subtree":true,"type":"A","kinds":["denial"],"stale":false,"all":false,"blocks":[0,1]}`: {Name: "example.org.", Subtree: true, Type: 1, Kinds: []string{"denial"}},
		`{"all":true}`:                            {},
		`{"all":true,"type":"type65"}`:            {Type: 65},
		`{"stale":true}`:                          {Stale: true},
		`{"kinds":["failure","success"]}`:         {Kinds: []string{"failure", "success"}},
		` {"name":"."} `:                          {Name: "."},
		`{"name":"a\\.b.example","blocks":[1,0]}`: {Name: `a\.b.example.`},
	} {
		one, two, three := &fakeBlock{answers: answersOf(3)}, &fakeBlock{answers: answersOf(4)}, &fakeBlock{answers: answersOf(5)}
		w := request{method: "POST", target: "/v1/flush", body: text}.do(t, one, two, three)
		flushed := 12
		if strings.Contains(text, "blocks") {
			flushed = 7
		}
		if a := decoded[flushAnswer](t, w.Body.Bytes()); w.Code != 200 || a.Flushed != flushed {
			t.Errorf("%s: %d %s", text, w.Code, w.Body)
		}
		if len(one.flushed) != 1 || !reflect.DeepEqual(one.flushed[0], want) || !reflect.DeepEqual(two.flushed, one.flushed) || (len(three.flushed) == 0) != (flushed == 7) {
			t.Errorf("%s: %+v", text, one.flushed)
		}
	}
}

// A block that fails keeps no other block from its flush.
func TestFlushOfAllBlocksThoughOneFails(t *testing.T) {
	t.Parallel()
	bad, good := &fakeBlock{err: errors.New("no way")}, &fakeBlock{answers: answersOf(4)}
	w := request{method: "POST", target: "/v1/flush", body: `{"all":true}`}.do(t, bad, good, bad)
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 500, "block 0: no way; block 2: no way; 4 answers are flushed")
	if len(good.flushed) != 1 {
		t.Error("the other block is not flushed")
	}
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	with := func() *fakeBlock { return &fakeBlock{status: Status{Snapshot: &SnapshotStatus{}}} }
	one, two, three := with(), &fakeBlock{}, with()
	w := request{method: "POST", target: "/v1/snapshot", body: `{}`}.do(t, one, two, three)
	if a := decoded[snapshotAnswer](t, w.Body.Bytes()); !slices.Equal(a.Written, []int{0, 2}) || one.written != 1 || two.written != 0 || three.written != 1 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	w = request{method: "POST", target: "/v1/snapshot", body: `{"blocks":[2,1]}`}.do(t, one, two, three)
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 409, "cache_file_path")
	w = request{method: "POST", target: "/v1/snapshot", body: `{}`}.do(t, two)
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 409, "cache_file_path")
	if three.written != 1 || two.written != 0 {
		t.Error("a refused request has written")
	}
	one.err = errors.New("disk full")
	w = request{method: "POST", target: "/v1/snapshot", body: `{}`}.do(t, one, three)
	wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 500, "block 0: disk full; blocks [1] are written")
}

func TestBlocksThatFail(t *testing.T) {
	t.Parallel()
	for _, target := range []string{"/v1/lookup?name=a", "/v1/list"} {
		w := request{target: target}.do(t, &fakeBlock{err: errors.New("no way")})
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 500, "block 0: no way")
	}
}

func TestDescriptionAndHealth(t *testing.T) {
	t.Parallel()
	w := request{target: "/v1/openapi.json"}.do(t)
	if w.Code != 200 || !bytes.Equal(w.Body.Bytes(), description) || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("%d %s", w.Code, w.Header())
	}
	if w = (request{target: "/healthz"}).do(t); w.Code != 204 || w.Body.Len() != 0 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestHeadersOfAllAnswers(t *testing.T) {
	t.Parallel()
	for _, target := range []string{"/v1/status", "/healthz", "/v1/openapi.json", "/", "/page/main.js", "//v1/status", "/v1/../healthz", "/v1/list?limit=0", "/v1/flush"} {
		h := request{target: target}.do(t).Header()
		if h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Cache-Control") != "no-store" || !strings.HasPrefix(h.Get("Content-Security-Policy"), "default-src 'none'") {
			t.Errorf("%s: %v", target, h)
		}
	}
}

// Each bad input is a clear error, and changes nothing.
func TestBadInput(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 64) + ".example"
	for _, c := range []struct {
		method, target, body string
		status               int
		detail               string
	}{
		{"GET", "/v1/nothing", "", 404, `"/v1/nothing"`},
		{"GET", "/page", "", 404, "path"},
		{"GET", "/page/", "", 404, "path"},
		{"GET", "/page/index.html", "", 404, "path"},
		{"GET", "/page/vendor/LICENSE.uplot", "", 404, "path"},
		{"GET", "/page/../page.go", "", 404, "path"},
		{"GET", "/?x", "", 400, `"x"`},
		{"POST", "/", "{}", 405, "is for GET"},
		{"POST", "/page/main.js", "{}", 405, "is for GET"},
		{"GET", "/v1/events?x", "", 400, `"x"`},
		{"POST", "/v1/events", "{}", 405, "is for GET"},
		{"GET", "//v1/status", "", 404, "path"},
		{"GET", "/v1/../v1/status", "", 404, "path"},
		{"GET", "/v1/status/", "", 404, "path"},
		{"POST", "/v1/status", "{}", 405, "is for GET"},
		{"GET", "/v1/flush", "", 405, "is for POST"},
		{"DELETE", "/v1/list", "", 405, "is for GET"},
		{"OPTIONS", "/v1/list", "", 405, "is for GET"},

		{"GET", "/v1/status?x=1", "", 400, `"x": unknown parameter`},
		{"GET", "/v1/status?block=1", "", 400, "block: there is no block 1"},
		{"GET", "/v1/status?block=-1", "", 400, `block: "-1"`},
		{"GET", "/v1/status?block=", "", 400, `block: ""`},
		{"GET", "/v1/status?block=99999999999999999999", "", 400, "block"},
		{"GET", "/v1/status?a=%zz", "", 400, "query"},
		{"GET", "/v1/status?a;b", "", 400, "query"},
		{"GET", "/healthz?x", "", 400, `"x"`},
		{"GET", "/v1/openapi.json?x", "", 400, `"x"`},

		{"GET", "/v1/lookup", "", 400, "name: is empty"},
		{"GET", "/v1/lookup?name=", "", 400, "name: is empty"},
		{"GET", "/v1/lookup?name=a..b", "", 400, `name: "a..b"`},
		{"GET", "/v1/lookup?name=.a", "", 400, "name"},
		{"GET", "/v1/lookup?name=" + long, "", 400, "name"},
		{"GET", "/v1/lookup?name=" + strings.Repeat("a.", 128), "", 400, "name"},
		{"GET", "/v1/lookup?name=" + strings.Repeat("a.", 1000), "", 400, "name: it is too long"},
		{"GET", "/v1/lookup?name=a%20b", "", 400, "name"},
		{"GET", "/v1/lookup?name=a%00b", "", 400, "name"},
		{"GET", "/v1/lookup?name=a%0Ab", "", 400, "name"},
		{"GET", "/v1/lookup?name=m%C3%BCller.example", "", 400, "xn--"},
		{"GET", "/v1/lookup?name=a&name=b", "", 400, "name: is given 2 times"},
		{"GET", "/v1/lookup?name=a&type=", "", 400, "type: is empty"},
		{"GET", "/v1/lookup?name=a&type=AAAAA", "", 400, `type: "AAAAA"`},
		{"GET", "/v1/lookup?name=a&type=None", "", 400, "type"},
		{"GET", "/v1/lookup?name=a&type=TYPE0", "", 400, "type"},
		{"GET", "/v1/lookup?name=a&type=TYPE65536", "", 400, "type"},
		{"GET", "/v1/lookup?name=a&type=TYPE-1", "", 400, "type"},
		{"GET", "/v1/lookup?name=a&type=1", "", 400, "type"},
		{"GET", "/v1/lookup?name=a&subtree=true", "", 400, `"subtree"`},

		{"GET", "/v1/list?limit=0", "", 400, "limit"},
		{"GET", "/v1/list?limit=10001", "", 400, "10000"},
		{"GET", "/v1/list?limit=ten", "", 400, "limit"},
		{"GET", "/v1/list?subtree=true", "", 400, "subtree: it needs a name"},
		{"GET", "/v1/list?name=a&subtree=1", "", 400, `subtree: "1"`},
		{"GET", "/v1/list?stale=yes", "", 400, "stale"},
		{"GET", "/v1/list?records", "", 400, "records"},
		{"GET", "/v1/list?kind=positive", "", 400, "kind"},
		{"GET", "/v1/list?name=", "", 400, "name"},
		{"GET", "/v1/list?type=x", "", 400, "type"},
		{"GET", "/v1/list?after=", "", 400, "after"},
		{"GET", "/v1/list?after=!", "", 400, "after"},
		{"GET", "/v1/list?after=" + cursorOf(0, "x"), "", 400, "after: it is no cursor"},
		{"GET", "/v1/list?after=" + cursorOf(7, "1"), "", 400, "after: the cursor is of block 7"},
		{"GET", "/v1/list?after=" + cursorOf(-1, "1"), "", 400, "after"},
		{"GET", "/v1/list?after=" + cursorOf(0, "1") + "=", "", 400, "after"},

		{"POST", "/v1/flush", "", 400, "body: a JSON object is expected"},
		{"POST", "/v1/flush", "null", 400, "object"},
		{"POST", "/v1/flush", "[]", 400, "object"},
		{"POST", "/v1/flush", "{}", 400, "name, kinds, stale or all is needed"},
		{"POST", "/v1/flush", `{"type":"A"}`, 400, "is needed"},
		{"POST", "/v1/flush", `{"stale":false,"all":false}`, 400, "is needed"},
		{"POST", "/v1/flush", `{"all":true}{}`, 400, "behind"},
		{"POST", "/v1/flush", `{"all":true} x`, 400, "behind"},
		{"POST", "/v1/flush", `{"all":true`, 400, "body"},
		{"POST", "/v1/flush", `{"all":`, 400, "all"},
		{"POST", "/v1/flush", `{"all":true,}`, 400, "body"},
		{"POST", "/v1/flush", `{"all":true,"zone":"x"}`, 400, `"zone": unknown member`},
		{"POST", "/v1/flush", `{"ALL":true}`, 400, `"ALL": unknown member`},
		{"POST", "/v1/flush", `{"all":false,"all":true}`, 400, "all: is given twice"},
		{"POST", "/v1/flush", `{"all":null,"stale":true}`, 400, "all: is null"},
		{"POST", "/v1/flush", `{"all":"true"}`, 400, "all: a JSON string"},
		{"POST", "/v1/flush", `{"all":1}`, 400, "all: a JSON number"},
		{"POST", "/v1/flush", `{"blocks":[0.5],"all":true}`, 400, "blocks"},
		{"POST", "/v1/flush", `{"blocks":[-1],"all":true}`, 400, "blocks: there is no block -1"},
		{"POST", "/v1/flush", `{"blocks":[0,1],"all":true}`, 400, "blocks: there is no block 1"},
		{"POST", "/v1/flush", `{"blocks":[],"all":true}`, 400, "blocks: is empty"},
		{"POST", "/v1/flush", `{"kinds":[],"name":"a"}`, 400, "kinds: is empty"},
		{"POST", "/v1/flush", `{"kinds":["all"]}`, 400, "kinds"},
		{"POST", "/v1/flush", `{"kinds":[null]}`, 400, "kinds"},
		{"POST", "/v1/flush", `{"name":"","stale":true}`, 400, "name: is empty"},
		{"POST", "/v1/flush", `{"name":"a..b"}`, 400, "name"},
		{"POST", "/v1/flush", `{"name":"a\u0000b"}`, 400, "name"},
		{"POST", "/v1/flush", `{"name":"a","type":"nope"}`, 400, "type"},
		{"POST", "/v1/flush", `{"subtree":true,"all":true}`, 400, "subtree: it needs a name"},
		{"POST", "/v1/flush", `{"all":true,"name":"a"}`, 400, "all: it cannot be with"},
		{"POST", "/v1/flush", `{"all":true,"stale":true}`, 400, "all: it cannot be with"},
		{"POST", "/v1/flush", "{\"name\":\"a\xff\"}", 400, "UTF-8"},
		{"POST", "/v1/flush?block=0", `{"all":true}`, 400, `"block": unknown parameter`},
		{"POST", "/v1/flush", `{"name":"` + strings.Repeat("a", maxBody) + `"}`, 413, "65536"},
		{"POST", "/v1/flush", strings.Repeat("[", 60000), 400, "object"},
		{"POST", "/v1/flush", `{"blocks":` + strings.Repeat("[", 60000), 400, "blocks"},

		{"POST", "/v1/snapshot", "", 400, "body"},
		{"POST", "/v1/snapshot", `{"name":"a"}`, 400, `"name": unknown member`},
		{"POST", "/v1/snapshot", `{"blocks":[1]}`, 400, "blocks: there is no block 1"},
		{"POST", "/v1/snapshot?x", `{}`, 400, `"x"`},
	} {
		b := &fakeBlock{answers: answersOf(3), status: Status{Snapshot: &SnapshotStatus{}}}
		w := request{method: c.method, target: c.target, body: c.body}.do(t, b)
		t.Run(fmt.Sprintf("%s %.60s %.60q", c.method, c.target, c.body), func(t *testing.T) {
			wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), c.status, c.detail)
			if c.status == 405 && w.Header().Get("Allow") == "" {
				t.Error("no Allow")
			}
			if len(b.flushed)+b.written > 0 {
				t.Error("something has changed")
			}
		})
	}
}

func TestOnlyJSONChangesSomething(t *testing.T) {
	t.Parallel()
	for _, contentType := range []string{"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx", "application/json;"} {
		b := &fakeBlock{}
		w := request{method: "POST", target: "/v1/flush", body: `{"all":true}`, header: map[string]string{"Content-Type": contentType}}.do(t, b)
		if contentType == "application/json;" {
			if w.Code != 200 {
				t.Errorf("%q: %d", contentType, w.Code)
			}
			continue
		}
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusUnsupportedMediaType, "application/json")
		if b.flushed != nil {
			t.Errorf("%q has flushed", contentType)
		}
	}
}

func TestNamesHaveOneForm(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		".": ".", "a": "a.", "A.B.": "a.b.", `\065.b`: "a.b.", `a\032b`: `a\ b.`, `\000`: `\000.`, `*.Example`: "*.example.", `a\.b`: `a\.b.`, `a\b`: "ab.",
		strings.Repeat("a", 63) + ".": strings.Repeat("a", 63) + ".", strings.Repeat("a.", 127): strings.Repeat("a.", 127),
	} {
		got, err := domainName(given)
		if err != nil || got != want {
			t.Errorf("%q: %q, %v; %q is expected", given, got, err, want)
		}
		if again, err := domainName(got); err != nil || again != got {
			t.Errorf("%q again: %q, %v", got, again, err)
		}
	}
	for _, bad := range []string{`\`, `a\`, `a.\`, "..", ""} {
		if got, err := domainName(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}
