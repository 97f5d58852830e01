package control

import (
	"encoding/json"
	"net/http"
	"slices"
	"testing"

	"github.com/miekg/dns"
)

// Whatever a client sends, the answer is well formed, is no fault of the server's, and nothing is flushed that the
// request does not name.
func FuzzControl(f *testing.F) {
	for _, seed := range [][4]string{
		{"GET", "/v1/status", "block=0", ""},
		{"GET", "/v1/lookup", `name=WWW.example\046org&type=TYPE65`, ""},
		{"GET", "/v1/list", "name=example.org&subtree=true&kind=denial&stale=true&records=true&limit=2&after=" + cursorOf(1, "2"), ""},
		{"POST", "/v1/flush", "", `{"name":"example.org","subtree":true,"type":"A","kinds":["denial"],"stale":false,"all":false,"blocks":[0]}`},
		{"POST", "/v1/flush", "", `{"all":true}`},
		{"POST", "/v1/flush", "", `{"all":false,"all":true}`},
		{"POST", "/v1/snapshot", "", `{"blocks":[0,1]}`},
		{"PUT", "//healthz/..", "%zz", "\xff"},
	} {
		f.Add(seed[0], seed[1], seed[2], seed[3])
	}
	f.Fuzz(func(t *testing.T, method, path, query, text string) {
		if !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT"}, method) {
			t.Skip("the HTTP server lets no such method through")
		}
		one := &fakeBlock{answers: answersOf(3), status: Status{Snapshot: &SnapshotStatus{}}}
		two := &fakeBlock{answers: answersOf(5), status: Status{Snapshot: &SnapshotStatus{}}}
		w := request{method: method, target: path + "?" + query, body: text}.do(t, one, two)
		switch {
		case w.Code >= 500:
			t.Fatalf("%d %s", w.Code, w.Body)
		case w.Code >= 400:
			var p problem
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Status != w.Code || p.Detail == "" {
				t.Fatalf("%d %q: %v", w.Code, w.Body, err)
			}
		case w.Code == http.StatusNoContent:
		case !json.Valid(w.Body.Bytes()):
			t.Fatalf("%d %q", w.Code, w.Body)
		}
		changed := append(one.flushed, two.flushed...)
		if n := len(changed) + one.written + two.written; n > 0 && (method != "POST" || w.Code != 200) {
			t.Fatalf("%s, %d: %d changes", method, w.Code, n)
		}
		for _, filter := range changed {
			checkFlushed(t, filter, text)
		}
	})
}

// checkFlushed holds a filter against the request that it came of, which is read here in another way.
func checkFlushed(t *testing.T, f Filter, text string) {
	t.Helper()
	var members map[string]any
	if err := json.Unmarshal([]byte(text), &members); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	if all := f.Name == "" && f.Kinds == nil && !f.Stale; all != (members["all"] == true) {
		t.Fatalf("%q: %+v", text, f)
	}
	if f.Name != "" && f.Name != dns.CanonicalName(f.Name) {
		t.Fatalf("%q is not canonical", f.Name)
	}
	if (f.Name != "") != (members["name"] != nil) || (f.Kinds != nil) != (members["kinds"] != nil) || f.Stale != (members["stale"] == true) ||
		f.Subtree != (members["subtree"] == true) || (f.Type != 0) != (members["type"] != nil) {
		t.Fatalf("%q: %+v", text, f)
	}
	if f.Name != "" {
		if _, err := dns.PackDomainName(f.Name, make([]byte, 255), 0, nil, false); err != nil {
			t.Fatalf("%q: %v", f.Name, err)
		}
	}
}
