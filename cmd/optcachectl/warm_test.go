package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/optcache/optcache/plugin/control/api"
)

// warmFile writes a list.
func warmFile(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// warmed returns the questions of a request, as NAME TYPE.
func warmed(t *testing.T, request string) (all []string, q api.WarmRequest) {
	t.Helper()
	if err := json.Unmarshal([]byte(strings.TrimPrefix(request, "POST /v1/warm ")), &q); err != nil {
		t.Fatal(err)
	}
	for _, one := range q.Questions {
		all = append(all, one.Name+" "+one.Type)
	}
	return all, q
}

func TestWarm(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	const list = "# names\n\na.nl\nheld.nl mx txt # mail\r\n  b.nl\tHTTPS\n"
	for _, c := range []struct{ args, asks, stdout string }{
		{"a.nl b.nl", "a.nl A, a.nl AAAA, b.nl A, b.nl AAAA", "4 questions asked: 0 held already, 4 came, 0 failed\n"},
		{"held.nl -t mx", "held.nl MX", "1 question asked: 1 held already, 0 came, 0 failed\n"},
		{"-f FILE", "a.nl A, a.nl AAAA, held.nl MX, held.nl TXT, b.nl HTTPS", "5 questions asked: 2 held already, 3 came, 0 failed\n"},
		{"c.nl --file FILE --type TXT,SRV", "c.nl TXT, c.nl SRV, a.nl TXT, a.nl SRV, held.nl MX, held.nl TXT, b.nl HTTPS", "7 questions asked: 2 held already, 5 came, 0 failed\n"},
		{"-f - -b 0", "a.nl A, a.nl AAAA, held.nl MX, held.nl TXT, b.nl HTTPS", "5 questions asked: 2 held already, 3 came, 0 failed\n"},
	} {
		sys := quiet(nil)
		sys.stdin = strings.NewReader(list)
		words := strings.Fields(strings.ReplaceAll(c.args, "FILE", warmFile(t, list)))
		runOn(t.Context(), sys, append([]string{"-s", s.URL, "warm"}, words...)...).want(t, 0, c.stdout, "")
		asked := s.asked()
		if len(asked) != 2 {
			t.Fatalf("asked %q", asked)
		}
		for i, request := range asked {
			got, q := warmed(t, request)
			if strings.Join(got, ", ") != c.asks || q.Check != (i == 0) || (len(q.Blocks) == 1) != strings.Contains(c.args, "-b") {
				t.Errorf("%s: %s", c.args, request)
			}
		}
	}
}

func TestWarmSaysWhatHasFailed(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	path := warmFile(t, "a.nl A\nno.nl A\n")
	s.ctl("warm", "no2.nl", "-t", "A", "-f", path).want(t, 1, "no2.nl A: not kept: SERVFAIL\n"+path+":2: no.nl A: not kept: SERVFAIL\n"+
		"3 questions asked: 0 held already, 1 came, 2 failed\n", "optcachectl: 2 questions failed\n")
	s.ctl("warm", "-f", path, "-o", "json").want(t, 1, `
{
  "there": 0,
  "came": 1,
  "failed": 1,
  "failures": [
    {
      "at": 1,
      "block": 0,
      "name": "no.nl",
      "type": "A",
      "why": "not kept: SERVFAIL"
    }
  ]
}
`, "optcachectl: 1 question failed\n")
}

// Bad words are shown with their lines, all of them, and nothing is asked.
func TestWarmOfABadListAsksNothing(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	path := warmFile(t, "a.nl\nb..nl\nc.nl A FOO\n"+strings.Repeat("x", maxWarmWord+1)+"\nd.nl\n")
	s.ctl("warm", "e..nl", "f.nl", "-f", path, "-o", "json").want(t, 2, "", path+":4: name: \""+strings.Repeat("x", 40)+"\"… is too long\n"+
		`name: "e..nl" is no domain name`+"\n"+path+`:2: name: "b..nl" is no domain name`+"\n"+path+`:3: type: "FOO" is no type`+"\n"+
		"optcachectl: 4 words wrong; nothing is asked\n")
	if asked := s.asked(); len(asked) != 1 || !strings.Contains(asked[0], `"check":true`) {
		t.Errorf("asked %q", asked)
	}
	many := warmFile(t, strings.Repeat("b..nl\n", 1000))
	if r := s.ctl("warm", "-f", many); r.code != 2 || strings.Count(r.stderr, "\n") != mostShown+1 || !strings.Contains(r.stderr, "1,000 words wrong") {
		t.Errorf("%d: %s", r.code, r.stderr)
	}
	long := warmFile(t, "a.nl\n"+strings.Repeat("x ", maxWarmLine))
	s.ctl("warm", "-f", long).want(t, 2, "", "optcachectl: "+long+":2: the line is longer than 65536 bytes\n")
}

// A list of any length is asked in requests that the server takes.
func TestWarmOfALongList(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	var list strings.Builder
	for i := range 600 {
		fmt.Fprintf(&list, "n%d.nl A\n", i)
	}
	for range 100 { // each letter is six in JSON
		fmt.Fprintf(&list, "%s A\n", strings.Repeat("<", maxWarmWord))
	}
	s.ctl("warm", "-f", warmFile(t, list.String())).want(t, 0, "700 questions asked: 0 held already, 700 came, 0 failed\n", "")
	if n := len(s.asked()); n < 2*12 {
		t.Errorf("%d requests", n)
	}
	list.WriteString("busy.nl A\n")
	sys := quiet(nil)
	sys.shown = true
	r := runOn(t.Context(), sys, "-s", s.URL, "warm", "-f", warmFile(t, list.String()))
	if r.code != 1 || !strings.HasPrefix(r.stderr, "\r250 of 701 questions checked\x1b[K") || !strings.Contains(r.stderr, "the server is busy with other requests; 6") ||
		!strings.HasSuffix(r.stderr, " of 701 questions are asked\n") || !strings.HasPrefix(r.stdout, "6") {
		t.Errorf("%d: %s: %q", r.code, r.stdout, r.stderr)
	}
}
