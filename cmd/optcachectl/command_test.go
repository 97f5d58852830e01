package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/optcache/optcache/test/freeport"
)

func TestStatusIsATableOfEachBlock(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.ctl("status").want(t, 0, `
optcache 1.0

Block 0: ., at dns://:53 tls://:853
  requests      1,234,567
  hits          1,100,000 (89.1 %)
    last 1 min  1,000/s, hits 91.2 %
    last 1m30s  0/s
    by tier     hot 900,000, protected 150,000, probationary 50,000
    by way      fastpath 1,000,000, bytes 90,000, plugin 10,000
  misses        134,567
    answered    half within 15.6 ms, 99 % within 2 s
  served stale  12
  prefetches    100
  evictions     0
  synthesized   4,321
  probes        12
  kept warm     7
  jittered      1,000
  held back     deferred 3, refused 1, stale 0
  upstreams     those of 1 zone are gone
  subnets       1,200 answers of 30 names, 100 each at most
    evicted     name 40, share 2
  waiting       3
  flights       2
  success       9,812 of 10,000 entries
  denial        120 of 2,500 entries
  segments      protected 9,000, window 932
  memory        12.0 MiB of 64.0 MiB (18.8 %)
  hot tier      412 of 512 entries
  window        1.0 % of the entries
  generation    2
  fast path     dns://:53
    packets     1,000,100, 1,000,000 hits, 1 dropped, by 2 workers
    batches     of up to 1: 9,000, 2: 800, 16: 30
  shared        valkey://192.0.2.7:6379, group optcache
    away        it takes longer than shared_timeout
    asked       10,000, 9,000 hits, 90 late, 9 refused, 95 of 100 within 1.23ms
    written     990, 10 dropped, 0 failed
  snapshot      /var/cache/optcache/0.dnstap.zst
    written     2026-11-25T08:00:00Z, 9,900 entries, 2.0 MiB
    failures    1

Block 1: example.org., view inside, at dns://:53
  requests      0
  hits          0
  misses        0
  served stale  0
  prefetches    0
  evictions     0
  waiting       0
  flights       0
  memory        0 bytes
  hot tier      0 of 0 entries
  window        0.0 % of the entries
  generation    0
`, "")
	s.wantAsked(t, "GET /v1/status")
	if r := s.ctl("status", "-b", "1", "--block", "3"); r.code != 0 || strings.Contains(r.stdout, "Block 0") || !strings.Contains(r.stdout, "Block 1") {
		t.Errorf("%+v", r)
	}
	s.wantAsked(t, "GET /v1/status?block=1&block=3")
}

func TestLookupShowsAnswersAndRecords(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1)
	s.ctl("lookup", "www0.example.org", "a").want(t, 0, `
BLOCK  NAME               TYPE  BITS  RCODE    KIND     SEGMENT        ACCESSES  TTL  LEFT  STORED                SOURCE    BYTES
0      www0.example.org.  A     do    NOERROR  success  protected,hot  0         300  120   2026-11-25T08:00:00Z  upstream  128
    www0.example.org. 120 IN A 192.0.2.1
`, "")
	s.wantAsked(t, "GET /v1/lookup?name=www0.example.org&type=A")
	s.ctl("lookup", "no.example.org", "-b", "1").want(t, 0, `
BLOCK  NAME             TYPE  BITS      RCODE     KIND    SEGMENT  ACCESSES  TTL  LEFT       STORED                SOURCE  BYTES
1      no.example.org.  AAAA  cd,no_rd  NXDOMAIN  denial  window   0         60   -10,stale  2026-11-25T08:00:00Z  -       96
    example.org. 0 IN SOA ns.example.org. host.example.org. 1 2 3 4 5
`, "")
	s.wantAsked(t, "GET /v1/lookup?block=1&name=no.example.org")
}

func TestLookupThatFindsNothingExits4(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1)
	s.ctl("lookup", "www0.example.org", "MX").want(t, 4, "", "optcachectl: nothing is held for www0.example.org MX\n")
	if r := s.ctl("lookup", "www9.example.org", "-o", "json"); r.code != 4 || !json.Valid([]byte(r.stdout)) {
		t.Errorf("%+v", r)
	}
}

func TestListTable(t *testing.T) {
	t.Parallel()
	newServer(t, 2).ctl("list").want(t, 0, `
BLOCK  NAME               TYPE  BITS      RCODE     KIND     SEGMENT        ACCESSES  TTL  LEFT       STORED                SOURCE    BYTES
0      www0.example.org.  A     do        NOERROR   success  protected,hot  0         300  120        2026-11-25T08:00:00Z  upstream  128
0      www1.example.org.  A     -         NOERROR   success  protected      1         300  120        2026-11-25T08:00:00Z  upstream  128
1      no.example.org.    AAAA  cd,no_rd  NXDOMAIN  denial   window         0         60   -10,stale  2026-11-25T08:00:00Z  -         96
`, "")
}

func TestListZone(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1)
	s.ctl("list", "-o", "zone").want(t, 0, `
www0.example.org. 120 IN A 192.0.2.1
; no.example.org. IN AAAA: NXDOMAIN, denial
example.org. 0 IN SOA ns.example.org. host.example.org. 1 2 3 4 5
`, "")
	s.wantAsked(t, "GET /v1/list?limit=500&records=true")
}

func TestListAsksForWhatItsFlagsMean(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.ctl("list", "example.org", "--subtree", "--type", "mx", "--kind", "success", "--kind", "denial,failure", "--stale", "--records", "-b", "0", "-b", "2", "-n", "7")
	s.wantAsked(t, "GET /v1/list?block=0&block=2&kind=success&kind=denial&kind=failure&limit=7&name=example.org&records=true&stale=true&subtree=true&type=MX")
}

func TestListPagesToTheEnd(t *testing.T) {
	t.Parallel()
	s := newServer(t, 2*pageSize)
	for _, form := range []string{"table", "json"} {
		r := s.ctl("list", "-o", form)
		lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
		if form == "table" {
			lines = lines[1:]
		}
		if r.code != 0 || len(lines) != 2*pageSize+1 || !strings.Contains(lines[2*pageSize], "no.example.org.") {
			t.Errorf("%s: exit code %d, %d lines, %s", form, r.code, len(lines), r.stderr)
		}
		s.wantAsked(t, "GET /v1/list?limit=5000", "GET /v1/list?after=5000&limit=5000", "GET /v1/list?after=10000&limit=5000")
	}
}

func TestListEndsAtItsLimit(t *testing.T) {
	t.Parallel()
	s := newServer(t, 2*pageSize)
	r := s.ctl("list", "--limit", "5003", "-o", "json")
	if n := strings.Count(r.stdout, "\n"); r.code != 0 || n != 5003 {
		t.Errorf("%d lines, %+v", n, r.code)
	}
	s.wantAsked(t, "GET /v1/list?limit=5000", "GET /v1/list?after=5000&limit=3")
	r = s.ctl("list", "--limit", "501", "-o", "zone")
	if n := strings.Count(r.stdout, "\n"); r.code != 0 || n != 501 {
		t.Errorf("%d lines, %+v", n, r.code)
	}
	s.wantAsked(t, "GET /v1/list?limit=500&records=true", "GET /v1/list?after=500&limit=1&records=true")
}

func TestListEndsWhereTheServerGoesInCircles(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"answers":[],"next":"x"}`))
	}))
	t.Cleanup(s.Close)
	r := runOn(t.Context(), quiet(nil), "-s", s.URL, "list", "-o", "json")
	r.want(t, 1, "", "optcachectl: the list does not go on: the server has sent the same cursor twice\n")
}

func TestListSaysHowFarItIs(t *testing.T) {
	t.Parallel()
	s := newServer(t, pageSize)
	sys := quiet(nil)
	sys.shown = true
	if r := runOn(t.Context(), sys, "-s", s.URL, "list"); r.code != 0 || r.stderr != "\r5,000 answers\x1b[K\r\x1b[K" {
		t.Errorf("%d, %q", r.code, r.stderr)
	}
}

// JSON is the server's, with members that the command does not know.
func TestJSONIsWhatTheServerSays(t *testing.T) {
	t.Parallel()
	bodies := map[string]string{
		"/v1/status":   `{"version":"2","blocks":[],"new":1}`,
		"/v1/lookup":   `{"blocks":[{"id":0,"answers":[{"name":"a.","new":1}]}],"new":2}`,
		"/v1/list":     `{"answers":[{"block":0, "name":"a.","new":1}, {"block":1}]}`,
		"/v1/flush":    `{"flushed":3,"new":1}`,
		"/v1/snapshot": `{"written":[0],"new":1}`,
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Write([]byte(bodies[r.URL.Path]))
	}))
	t.Cleanup(s.Close)
	for _, args := range [][]string{{"status"}, {"lookup", "a"}, {"flush", "a"}, {"snapshot"}} {
		r := runOn(t.Context(), quiet(nil), append(args, "-s", s.URL, "-o", "json")...)
		var compact bytes.Buffer
		if err := json.Compact(&compact, []byte(r.stdout)); err != nil || r.code != 0 || compact.String() != bodies["/v1/"+args[0]] {
			t.Errorf("%v: %+v, %v", args, r, err)
		}
	}
	runOn(t.Context(), quiet(nil), "-s", s.URL, "list", "-o", "json").want(t, 0, `{"block":0,"name":"a.","new":1}`+"\n"+`{"block":1}`+"\n", "")
}

func TestFlush(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	for _, c := range []struct{ args, body, stdout string }{
		{"www.example.org", `{"name":"www.example.org"}`, "1 answer flushed\n"},
		{"www.example.org aaaa", `{"name":"www.example.org","type":"AAAA"}`, "1 answer flushed\n"},
		{"example.org --subtree -b 0 -b 1", `{"name":"example.org","subtree":true,"blocks":[0,1]}`, "1,234 answers flushed\n"},
		{"--denials", `{"kinds":["denial"]}`, "1 answer flushed\n"},
		{"--failures", `{"kinds":["failure"]}`, "1 answer flushed\n"},
		{"--stale", `{"stale":true}`, "1 answer flushed\n"},
		{"example.org --subtree --denials --failures --stale", `{"name":"example.org","subtree":true,"kinds":["denial","failure"],"stale":true}`, "1,234 answers flushed\n"},
		{"--all --yes", `{"all":true}`, "1,234 answers flushed\n"},
		{"--all -y -o json", `{"all":true}`, "{\n  \"flushed\": 1234\n}\n"},
	} {
		s.ctl(append([]string{"flush"}, strings.Fields(c.args)...)...).want(t, 0, c.stdout, "")
		s.wantAsked(t, "POST /v1/flush "+c.body)
	}
}

func TestFlushOfEverythingAsks(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	question := "Flush everything at " + s.URL + "? [y/N] "
	for _, c := range []struct {
		typed  string
		code   int
		stdout string
		stderr string
	}{
		{"y\n", 0, "1,234 answers flushed\n", ""},
		{"YES\n", 0, "1,234 answers flushed\n", ""},
		{"n\n", 1, "", "optcachectl: nothing is flushed\n"},
		{"\n", 1, "", "optcachectl: nothing is flushed\n"},
		{"yesterday\n", 1, "", "optcachectl: nothing is flushed\n"},
		{"", 1, "", "\noptcachectl: nothing is flushed\n"},
	} {
		sys := quiet(nil)
		sys.typed, sys.shown, sys.stdin = true, true, strings.NewReader(c.typed)
		runOn(t.Context(), sys, "-s", s.URL, "flush", "--all").want(t, c.code, c.stdout, question+c.stderr)
		if asked := s.asked(); (len(asked) == 1) != (c.code == 0) {
			t.Errorf("%q: asked %q", c.typed, asked)
		}
	}
	sys := quiet(nil)
	sys.typed, sys.shown, sys.stdin = true, true, strings.NewReader("n\n")
	runOn(t.Context(), sys, "-s", s.URL, "flush", "--all", "-b", "0", "-b", "2").
		want(t, 1, "", "Flush all of block 0 2 at "+s.URL+"? [y/N] optcachectl: nothing is flushed\n")

	s.ctl("flush", "--all").want(t, 2, "", "optcachectl: --all needs --yes where no terminal is to ask at\n")
	s.wantAsked(t)
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.ctl("snapshot").want(t, 0, "block 0: snapshot written\nblock 1: snapshot written\n", "")
	s.wantAsked(t, "POST /v1/snapshot {}")
	s.ctl("snapshot", "-b", "0").want(t, 0, "block 0: snapshot written\n", "")
	s.wantAsked(t, `POST /v1/snapshot {"blocks":[0]}`)
	s.ctl("snapshot", "-b", "1").want(t, 1, "", "optcachectl: block 1 has no cache_file_path\n")
}

// A server that starts has each server beside it write its files, and starts in any case.
func TestSnapshotOfAllSockets(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pattern := filepath.Join(dir, "*", "s")
	ctl := func(args ...string) result {
		return runOn(t.Context(), quiet(nil), append([]string{"snapshot", "--sockets", pattern}, args...)...)
	}
	ctl().want(t, 0, "", "optcachectl: no server listens at "+pattern+"\n")

	for _, pod := range []string{"a", "b", "gone", "file"} {
		if err := os.Mkdir(filepath.Join(dir, pod), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file", "s"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var failing atomic.Bool
	s := newServer(t, 0)
	for _, name := range []string{"a", "b", "gone"} {
		l, err := net.Listen("unix", filepath.Join(dir, name, "s"))
		if err != nil {
			t.Skip(err) // a path that is too long, or a system without
		}
		if name == "gone" {
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			l.Close()
			continue
		}
		web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if name == "a" && failing.Load() {
				problem(w, 500, "the disk is full")
				return
			}
			s.handler().ServeHTTP(w, r)
		})}
		go web.Serve(l)
		t.Cleanup(func() { web.Close() })
	}
	written := "block 0: snapshot written\nblock 1: snapshot written\n"
	gone := "optcachectl: " + dir + "/gone/s: no connection to unix://" + dir + "/gone/s: connection refused\n"
	ctl().want(t, 0, written+written, gone)
	s.wantAsked(t, "POST /v1/snapshot {}", "POST /v1/snapshot {}")
	failing.Store(true)
	ctl().want(t, 0, written, "optcachectl: "+dir+"/a/s: the disk is full\n"+gone)

	ctl("-b", "0").want(t, 2, "", "optcachectl: --sockets goes with neither --server nor --block: it asks all blocks of all servers\n")
	ctl("-s", s.URL).want(t, 2, "", "optcachectl: --sockets goes with neither --server nor --block: it asks all blocks of all servers\n")
	for _, pattern = range []string{"run/*", "/run/["} {
		ctl().want(t, 2, "", "optcachectl: --sockets \""+pattern+"\": not a pattern of an absolute path\n")
	}
}

func TestWrongUsageExits2AndAsksNothing(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for args, stderr := range map[string]string{
		"":                            "a command is missing; optcachectl --help shows them",
		"flsh":                        `unknown command "flsh" for "optcachectl"`,
		"status now":                  `unknown command "now" for "optcachectl status"`,
		"status --colour":             "unknown flag: --colour",
		"status -o zone":              `invalid argument "zone" for "-o, --output" flag: it is one of table, json`,
		"status -b -1":                `invalid argument "-1" for "-b, --block" flag: it is the number of a block, as status shows it`,
		"status --watch -o json":      "--watch shows a table",
		"top --watch -o json":         "--watch shows a table",
		"top --hits --misses":         "only one of --hits, --misses and --clients can be shown",
		"top --misses --clients":      "only one of --hits, --misses and --clients can be shown",
		"top -n 0":                    "--limit 0: below 1",
		"hot -n 0":                    "--limit 0: below 1",
		"list --sort ttl -n 10001":    "--limit 10001: a sorted list has 10000 answers at the most",
		"status --timeout 0s":         "--timeout 0s: not above zero",
		"lookup":                      "accepts between 1 and 2 arg(s), received 0",
		"lookup a A b":                "accepts between 1 and 2 arg(s), received 3",
		"lookup <>":                   "NAME is empty; the root is a dot",
		"lookup a <>":                 "TYPE is empty",
		"list a b":                    "accepts at most 1 arg(s), received 2",
		"list --subtree":              "--subtree needs a NAME",
		"list --limit -1":             "--limit -1: below zero",
		"flush":                       "flush needs a NAME, --denials, --failures, --stale or --all",
		"flush --yes":                 "flush needs a NAME, --denials, --failures, --stale or --all",
		"flush --subtree --denials":   "--subtree needs a NAME",
		"flush a --all --yes":         "--all goes with nothing else",
		"flush --stale --all -y":      "--all goes with nothing else",
		"flush --subtree --all --yes": "--subtree needs a NAME",
		"dump a b":                    "accepts at most 1 arg(s), received 2",
		"dump <>":                     "FILE is empty",
		"dump " + dir:                 "open " + dir + ": is a directory",
		"dump " + dir + "/none/a":     "open " + dir + "/none/a: no such file or directory",
		"load a b":                    "accepts at most 1 arg(s), received 2",
		"load " + dir + "/none":       "open " + dir + "/none: no such file or directory",
		"load " + dir:                 dir + " is a folder",
		"warm":                        "warm needs a NAME, or a --file with names",
		"warm -":                      "-: stdin is read with --file -",
		"warm -f -":                   "warm needs a NAME, or a --file with names",
		"warm -f " + dir + "/none":    "open " + dir + "/none: no such file or directory",
		"snapshot a":                  `unknown command "a" for "optcachectl snapshot"`,
		"status --token-file " + file("empty", "\n"):        dir + "/empty does not have a token: one word of printable ASCII",
		"status --token-file " + file("lines", "a\nb\n"):    dir + "/lines does not have a token: one word of printable ASCII",
		"status --token-file " + dir + "/none":              "open " + dir + "/none: no such file or directory",
		"status --ca " + file("ca", "x"):                    "a CA is for an https URL, and the address is " + s.URL,
		"status -s https://localhost:1 --ca " + dir + "/ca": dir + "/ca has no certificate",
		"status -s nowhere":                                 `address "nowhere": not unix:///PATH, HOST:PORT, or an http or https URL`,
		"status -s unix://a":                                `address "unix://a": the socket's path is not absolute: unix:///PATH has three slashes`,
		"status -s ftp://a":                                 `address "ftp://a": not unix:///PATH, HOST:PORT, or an http or https URL`,
		"status -s http://":                                 `address "http://": no host`,
		"status -s http://u@a":                              `address "http://u@a": a URL has no user, query or fragment here`,
		"status -s http://a/?b=c":                           `address "http://a/?b=c": a URL has no user, query or fragment here`,
		"status -s http://a:b":                              `address "http://a:b": invalid port ":b" after host`,
		"status -s a:":                                      `address "a:": the port is not a number from 1 to 65535`,
	} {
		if runtime.GOOS == "windows" && strings.Contains(args, dir) {
			continue // errors of files have other words
		}
		words := strings.Fields(args)
		for i, w := range words {
			words[i] = strings.ReplaceAll(w, "<>", "")
		}
		s.ctl(words...).want(t, 2, "", "optcachectl: "+stderr+"\n")
	}
	s.wantAsked(t)
}

func TestRefusalIsOneLineWithTheServersDetail(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.ctl("lookup", "a..b").want(t, 1, "", `optcachectl: name "a..b" is not a domain name`+"\n")
	s.ctl("flush", "a", "-b", "9").want(t, 1, "", "optcachectl: there is no block 9\n")

	for _, c := range []struct {
		name, form, body string
		status           int
		stderr           string
	}{
		{"no problem+json", "text/html", "<h1>no</h1>", 404, "URL answers /v1/status with 404 Not Found"},
		{"problem without detail", "application/problem+json", `{"title":"Too Many Requests"}`, 429, "Too Many Requests"},
		{"several lines, and what a terminal obeys", "application/problem+json", `{"detail":"a\nb\u001b[2J\u009b"}`, 500, "a b?[2J?"},
		{"token wanted", "application/problem+json", `{"detail":"A token is needed."}`, 401, "A token is needed; give a token with --token-file"},
		{"redirect", "text/plain", "", 302, "URL answers /v1/status with 302 Found"},
		{"empty success", "", "", 204, "URL answers /v1/status with 204 No Content"},
		{"page of something else", "text/html", "<h1>hello</h1>", 200, `URL is no control interface: it answers "text/html", not "application/json"`},
		{"cut off", "application/json", `{"blocks":[`, 200, "the answer is not understood: unexpected end of JSON input"},
		{"other JSON", "application/json", `[]`, 200, "the answer is not understood: json: cannot unmarshal array into Go value of type api.StatusReply"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", c.form)
				w.Header().Set("Location", "/v1/list")
				w.WriteHeader(c.status)
				w.Write([]byte(c.body))
			}))
			defer s.Close()
			want := "optcachectl: " + strings.Replace(c.stderr, "URL", s.URL, 1) + "\n"
			runOn(t.Context(), quiet(nil), "-s", s.URL, "status").want(t, 1, "", want)
		})
	}
}

// A server that was reached, and then fails, may have done what it was asked.
func TestNoConnectionExits3AndABrokenOne1(t *testing.T) {
	t.Parallel()
	address := freeport.Address(t, "127.0.0.1")
	if r := runOn(t.Context(), quiet(nil), "-s", address, "status"); r.code != 3 || !strings.HasPrefix(r.stderr, "optcachectl: no connection to "+address+": ") {
		t.Errorf("%+v", r)
	}
	socket := "unix://" + filepath.ToSlash(filepath.Join(t.TempDir(), "s"))
	if runtime.GOOS != "windows" {
		runOn(t.Context(), quiet(nil), "-s", socket, "flush", "a").want(t, 3, "", "optcachectl: no connection to "+socket+": no such file or directory\n")
	}

	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	defer s.Close()
	if r := runOn(t.Context(), quiet(nil), "-s", s.URL, "flush", "a"); r.code != 1 || r.stderr != "optcachectl: the connection to "+s.URL+" failed: EOF\n" {
		t.Errorf("%+v", r)
	}

	hangs := make(chan struct{})
	s = httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hangs }))
	defer s.Close()
	defer close(hangs)
	runOn(t.Context(), quiet(nil), "-s", s.URL, "snapshot", "--timeout", "50ms").want(t, 1, "", "optcachectl: no answer of "+s.URL+" in 50ms\n")
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "ctl") // t.TempDir may be longer than the address of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "a b%20.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Skip(err)
	}
	s := &server{}
	s.Server = httptest.NewUnstartedServer(s.handler())
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	address := "unix://" + filepath.ToSlash(path)
	runOn(t.Context(), quiet(nil), "flush", "a", "--server", address).want(t, 0, "1 answer flushed\n", "")
	runOn(t.Context(), quiet(map[string]string{addressVariable: address}), "flush", "a").want(t, 0, "1 answer flushed\n", "")
}

func TestAddressComesFromTheFlagThenTheEnvironment(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	hostPort := strings.TrimPrefix(s.URL, "http://")
	env := map[string]string{addressVariable: hostPort}
	runOn(t.Context(), quiet(env), "flush", "a").want(t, 0, "1 answer flushed\n", "")
	_, port, _ := net.SplitHostPort(hostPort)
	runOn(t.Context(), quiet(env), "-s", "http://127.0.0.1:"+port+"/", "flush", "a").want(t, 0, "1 answer flushed\n", "")
	env[addressVariable] = "wrong"
	runOn(t.Context(), quiet(env), "-s", hostPort, "flush", "a").want(t, 0, "1 answer flushed\n", "")
	runOn(t.Context(), quiet(env), "flush", "a").want(t, 2, "", `optcachectl: address "wrong": not unix:///PATH, HOST:PORT, or an http or https URL`+"\n")
}

func TestTokenIsSent(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	env := map[string]string{tokenVariable: write("env", "from-env")}
	runOn(t.Context(), quiet(env), "-s", s.URL, "flush", "a")
	runOn(t.Context(), quiet(env), "-s", s.URL, "flush", "a", "--token-file", write("flag", "from-flag\r\n"))
	s.ctl("flush", "a")
	if want := []string{"Bearer from-env", "Bearer from-flag", ""}; !slices.Equal(s.auth, want) {
		t.Errorf("%q", s.auth)
	}
}

func TestTLSTrustsTheCAOnly(t *testing.T) {
	t.Parallel()
	s := &server{}
	s.Server = httptest.NewUnstartedServer(s.handler())
	s.Config.ErrorLog = discard()
	s.StartTLS()
	t.Cleanup(s.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	s.ctl("flush", "a", "--ca", ca).want(t, 0, "1 answer flushed\n", "")
	if r := s.ctl("flush", "a"); r.code != 3 || !strings.Contains(r.stderr, "certificate") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("%+v", r)
	}
}

// full is a disk that is full.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

func TestOutputThatCannotBeWrittenExits1(t *testing.T) {
	t.Parallel()
	s := newServer(t, 1)
	for _, args := range []string{"status", "status -o json", "lookup www0.example.org", "list", "list -o json", "list -o zone", "flush a", "snapshot"} {
		sys := quiet(nil)
		sys.stdout = full{}
		if r := runOn(t.Context(), sys, append([]string{"-s", s.URL}, strings.Fields(args)...)...); r.code != 1 || r.stderr != "optcachectl: no space left on device\n" {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

// What names and records bring cannot steer a terminal.
func TestTablesAreHarmless(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"blocks":[{"id":0,"zones":["\u001b[2J\n"],"view":"\u0007","servers":["\u202e"],"sent":{"\u001b":1},"snapshot":{"path":"\u001b"},`+
			`"answers":[{"name":"\u001b[2J\n","kind":"\u0007","rcode":"\t","records":["\u001b","\ud800"]}]}]}`)
	}))
	t.Cleanup(s.Close)
	for _, args := range []string{"status", "lookup a"} {
		r := runOn(t.Context(), quiet(nil), append([]string{"-s", s.URL}, strings.Fields(args)...)...)
		if r.code != 0 || strings.ContainsAny(r.stdout, "\x1b\a\t\u202e") {
			t.Errorf("%s: %q", args, r.stdout)
		}
	}
}

// A program that answers something else is not the server.
func TestAlive(t *testing.T) {
	t.Parallel()
	var code atomic.Int32 // 0: it hangs
	hang := make(chan bool)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != "/healthz":
			http.NotFound(w, r)
		case code.Load() == 0:
			<-hang
		default:
			w.WriteHeader(int(code.Load()))
		}
	}))
	defer s.Close()
	defer close(hang)
	alive := func(more ...string) result {
		return runOn(t.Context(), quiet(nil), append([]string{"alive", "-s", s.URL}, more...)...)
	}
	code.Store(http.StatusNoContent)
	alive().want(t, 0, "", "")
	code.Store(http.StatusOK)
	if r := alive(); r.code != 1 || r.stderr == "" {
		t.Errorf("%+v", r)
	}
	code.Store(0)
	alive("--timeout", "100ms").want(t, 1, "", "optcachectl: no answer of "+s.URL+" in 100ms\n")
	if r := runOn(t.Context(), quiet(nil), "alive", "-s", "unix://"+t.TempDir()+"/none"); r.code != 3 {
		t.Errorf("%+v", r)
	}
}

func TestHelpAndCompletion(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ args, want string }{
		{"--help", "OPTCACHE_CONTROL"},
		{"--help", "\n  4  lookup found nothing.\n"},
		{"flush --help", "--subtree"},
		{"--version", "optcachectl version "},
		{"completion bash", "__start_optcachectl"},
		{"completion zsh", "#compdef optcachectl"},
		{"completion fish", "complete -c optcachectl"},
		{"completion powershell", "Register-ArgumentCompleter"},
		{"__complete flush example.org A", "AAAA\n"},
		{"__complete list --kind d", "denial\n"},
		{"__complete warm --type AA", "AAAA\n"},
		{"__complete load d", ":0\n"}, // files
		{"__complete list -o z", "zone\n"},
	} {
		r := runOn(t.Context(), quiet(nil), strings.Fields(c.args)...)
		if r.code != 0 || !strings.Contains(r.stdout, c.want) {
			t.Errorf("%s: %d\n%s%s", c.args, r.code, r.stdout, r.stderr)
		}
	}
	for _, c := range append(newRoot(quiet(nil)).Commands(), newRoot(quiet(nil))) {
		if c.Name() == "completion" {
			continue
		}
		for line := range strings.SplitSeq(c.Long, "\n") {
			if len(line) > helpWidth {
				t.Errorf("%s --help is wider than %d columns: %s", c.Name(), helpWidth, line)
			}
		}
	}
}

// A picture has the rates since the one before, and is cut to the screen.
func TestWatchDrawsInPlace(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	const picture = `{"version":"1","blocks":[{"id":0,"zones":["a."],"requests":%d,"hits":{"hot":%d},"misses":%d}]}`
	for _, n := range [][]any{{100, 90, 10}, {1100, 1060, 40}, {5, 5, 0}} {
		s.status = append(s.status, decodeStatus(t, fmt.Sprintf(picture, n...)))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	screen := &screen{}
	ticks := make(chan time.Time, 2)
	ticks <- time.Time{}
	ticks <- time.Time{}
	clock := stored
	sys := quiet(nil)
	sys.stdout = screen
	sys.every = func(d time.Duration) <-chan time.Time {
		if d != watchInterval {
			t.Error(d)
		}
		return ticks
	}
	sys.now = func() time.Time { clock = clock.Add(2 * time.Second); return clock }
	sys.screen = func() (int, int) {
		if len(ticks) == 0 && len(screen.drawn) == 2 {
			cancel() // ^C, but the third picture is drawn still
		}
		return 38, 8
	}
	if r := runOn(ctx, sys, "-s", s.URL, "status", "--watch"); r.code != 0 || r.stderr != "" {
		t.Fatalf("%+v", r)
	}
	if len(screen.drawn) != 3 {
		t.Fatalf("%q", screen.drawn)
	}
	const end = "\x1b[K\r\n"
	want := "\x1b[Hoptcache 1" + end + end + "Block 0: a." + end +
		"  requests      1,100           500/s" + end +
		"  hits          1,060 (96.4 %)  485/s" + end +
		"    by tier     hot 1,060" + end +
		"  misses        40              15/s" + end + "\x1b[J"
	if got := screen.drawn[1]; got != want {
		t.Errorf("drew\n%q\nwant\n%q", got, want)
	}
	if first := screen.drawn[0]; !strings.HasPrefix(first, "\x1b[H\x1b[J\x1b[H") || strings.Contains(first, "/s") {
		t.Errorf("first %q", first)
	}
	// A server that started anew counts from zero.
	if third := screen.drawn[2]; strings.Contains(third, "/s") || !strings.Contains(third, "requests      5\x1b") {
		t.Errorf("third %q", third)
	}
}

func TestWatchEndsWithTheServer(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	ticks := make(chan time.Time, 1)
	sys := quiet(nil)
	sys.every = func(time.Duration) <-chan time.Time { return ticks }
	calls := 0
	sys.screen = func() (int, int) {
		if calls++; calls == 1 {
			s.CloseClientConnections()
			s.Listener.Close()
			ticks <- time.Time{}
		}
		return 80, 24
	}
	if r := runOn(t.Context(), sys, "-s", s.URL, "status", "-w"); r.code != 3 || !strings.HasPrefix(r.stderr, "optcachectl: no connection to ") {
		t.Errorf("%d %s", r.code, r.stderr)
	}
}

// The man page is the one that the help makes. Its date is the Makefile's.
func TestManPageIsCurrent(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join("..", "..", "man", "optcachectl.1"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), `.TH "OPTCACHECTL" "1" "`)
	date, _, ok := strings.Cut(rest, `"`)
	if !ok {
		t.Fatal("man/optcachectl.1 has no title")
	}
	if r := runOn(t.Context(), quiet(nil), "man", date); r.code != 0 || r.stdout != strings.ReplaceAll(string(page), "\r\n", "\n") {
		t.Error("man/optcachectl.1 is not what the help says: run `make man`")
	}
}

// docs/control.md has each command with its flags, and each exit code.
func TestDocumentHasEveryCommand(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "control.md"))
	if err != nil {
		t.Fatal(err)
	}
	has := func(words string) {
		if !strings.Contains(string(doc), words) {
			t.Errorf("docs/control.md does not have %q", words)
		}
	}
	for _, c := range exitCodes {
		if row := "\n| " + c.code + " | " + strings.TrimSuffix(c.meaning, "."); !strings.Contains(strings.ReplaceAll(string(doc), "`", ""), row) {
			t.Errorf("docs/control.md does not have %q", row)
		}
	}
	for _, v := range variables {
		has("`" + v.name + "`")
	}
	root := newRoot(quiet(nil))
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name != "server" {
			has("--" + f.Name)
		}
	})
	for _, c := range root.Commands() {
		if c.Hidden || c.RunE == nil { // completion and help are cobra's
			continue
		}
		has("\n| `" + c.Name())
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if name, short := "--"+f.Name, "-"+f.Shorthand; f.Name != "help" && !strings.Contains(string(doc), name) && (f.Shorthand == "" || !strings.Contains(string(doc), "`"+short)) {
				t.Errorf("docs/control.md does not have %s of %s", name, c.Name())
			}
		})
	}
}
