package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

func TestDumpGoesToStdoutOrAFile(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.ctl("dump").want(t, 0, dumped[api.SnapshotForm], "")
	s.ctl("dump", "--text", "-b", "1", "-").want(t, 0, dumped[api.ZoneForm], "")
	s.wantAsked(t, "GET /v1/dump", "GET /v1/dump?block=1")
	s.ctl("dump", "-b", "9").want(t, 1, "", "optcachectl: there is no block 9\n")

	dir := t.TempDir()
	path := filepath.Join(dir, "cache.zst")
	for range 2 { // there is none, and there is one
		s.ctl("dump", path).want(t, 0, "13 bytes written to "+path+"\n", "")
		if got, err := os.ReadFile(path); err != nil || string(got) != dumped[api.SnapshotForm] {
			t.Errorf("%q, %v", got, err)
		}
	}
	if all, _ := os.ReadDir(dir); len(all) != 1 {
		t.Errorf("%v is left", all)
	}
	if runtime.GOOS != "windows" {
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Error(info, err)
		}
		// Where a name leads, the file is replaced there; what is no file is written.
		link := filepath.Join(dir, "link")
		if err := os.Symlink("cache.zst", link); err != nil {
			t.Fatal(err)
		}
		s.ctl("dump", "--text", link)
		if got, err := os.ReadFile(path); err != nil || string(got) != dumped[api.ZoneForm] {
			t.Errorf("%q, %v", got, err)
		}
		if r := s.ctl("dump", os.DevNull); r.code != 0 {
			t.Errorf("%+v", r)
		}
	}
}

// A dump that is cut off leaves the file that there was, and no other.
func TestDumpThatIsCutOffLeavesNoHalfFile(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	s.cut = true
	dir := t.TempDir()
	path := filepath.Join(dir, "cache.zst")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	const why = "; it is cut off after 10 bytes\n"
	s.ctl("dump", path).want(t, 1, "", "optcachectl: the connection to "+s.URL+" failed: unexpected EOF"+why)
	s.ctl("dump", filepath.Join(dir, "new")).want(t, 1, "", "optcachectl: the connection to "+s.URL+" failed: unexpected EOF"+why)
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("%q, %v", got, err)
	}
	if all, _ := os.ReadDir(dir); len(all) != 1 {
		t.Errorf("%v is left", all)
	}
	s.ctl("dump", "--text").want(t, 1, dumped[api.ZoneForm][:10], "optcachectl: the connection to "+s.URL+" failed: unexpected EOF"+why)
}

// A server that sends a piece and then nothing is waited for as long as --timeout says; one that sends in time may take longer.
func TestDumpWaitsForEachPiece(t *testing.T) {
	t.Parallel()
	hangs := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.Header.Get("Accept"))
		for range 20 {
			io.WriteString(w, "piece ")
			w.(http.Flusher).Flush()
			time.Sleep(100 * time.Millisecond) // the whole takes longer than the timeout
		}
		<-hangs
	}))
	defer s.Close()
	defer close(hangs)
	runOn(t.Context(), quiet(nil), "-s", s.URL, "dump", "--timeout", "1500ms").
		want(t, 1, strings.Repeat("piece ", 20), "optcachectl: no answer of "+s.URL+" in 1.5s; it is cut off after 120 bytes\n")
}

func TestDumpSaysHowFarItIs(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	clock := stored
	sys := quiet(nil)
	sys.shown = true
	sys.now = func() time.Time { clock = clock.Add(time.Second); return clock }
	r := runOn(t.Context(), sys, "-s", s.URL, "dump")
	if r.stdout != dumped[api.SnapshotForm] || !regexp.MustCompile(`^(\r10 bytes, \d bytes/s\x1b\[K)?\r13 bytes, \d bytes/s\x1b\[K\r\x1b\[K$`).MatchString(r.stderr) {
		t.Errorf("%q", r.stderr)
	}
	sys.screen = func() (int, int) { return 80, 24 }
	runOn(t.Context(), sys, "-s", s.URL, "dump").want(t, 2, "", "optcachectl: a snapshot is not for a terminal: give a FILE, or --text\n")
	runOn(t.Context(), sys, "-s", s.URL, "dump", "--text").want(t, 0, dumped[api.ZoneForm], "")
}

func TestLoad(t *testing.T) {
	t.Parallel()
	s := newServer(t, 0)
	const table = `
1,234 answers loaded
2,000 answers not loaded, expired: it has expired since
1 answer not loaded, zone: its name is in no zone of the block
`
	for form, text := range dumped {
		path := filepath.Join(t.TempDir(), "dump")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s.ctl("load", path).want(t, 0, table, "")
		s.ctl("load", path, "-b", "1", "-o", "json").want(t, 0, `
{
  "loaded": 1234,
  "refused": {
    "expired": 2000,
    "zone": 1
  }
}
`, "")
		s.wantAsked(t, "POST /v1/load "+strings.TrimSpace(text), "POST /v1/load?block=1 "+strings.TrimSpace(text))
		for _, args := range [][]string{{"load"}, {"load", "-"}} {
			sys := quiet(nil)
			sys.stdin = strings.NewReader(text)
			runOn(t.Context(), sys, append(args, "-s", s.URL)...).want(t, 0, table, "")
			sys.stdin = strings.NewReader(text[:len(text)-1])
			runOn(t.Context(), sys, append(args, "-s", s.URL)...).want(t, 1, "", "optcachectl: body: it is cut off; nothing is changed\n")
		}
		if code := s.ctl("load", path, "--text").code; (code == 0) != (form == api.ZoneForm) {
			t.Errorf("load --text of %s: exit %d", form, code)
		}
		s.asked()
	}
	sys := quiet(nil)
	sys.stdin = io.MultiReader(strings.NewReader(dumped[api.ZoneForm]), failing{})
	runOn(t.Context(), sys, "-s", s.URL, "load").want(t, 1, "", "optcachectl: input/output error\n")
	sys.typed = true
	runOn(t.Context(), sys, "-s", s.URL, "load").want(t, 2, "", "optcachectl: no dump is typed at a terminal: give a FILE\n")
}

// failing is a file on a disk that is broken.
type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("input/output error") }

// endless is a dump without an end.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// A server that refuses a dump before it has come says why, and the dump is not sent.
func TestLoadThatIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		problem(w, http.StatusServiceUnavailable, "the server is busy with other requests")
	}))
	t.Cleanup(s.Close)
	sys := quiet(nil)
	sys.stdin = endless{}
	runOn(t.Context(), sys, "-s", s.URL, "load").want(t, 1, "", "optcachectl: the server is busy with other requests\n")
}

func TestLoadThatIsNotAnswered(t *testing.T) {
	t.Parallel()
	hangs := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-hangs
	}))
	defer s.Close()
	defer close(hangs)
	sys := quiet(nil)
	sys.stdin = strings.NewReader(dumped[api.ZoneForm])
	runOn(t.Context(), sys, "-s", s.URL, "load", "--timeout", "50ms").want(t, 1, "", "optcachectl: no answer of "+s.URL+" in 50ms\n")
}

func TestLoadOfAFileThatIsTooLarge(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "dump")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, api.MaxLoad+1)); err != nil {
		t.Fatal(err)
	}
	s := newServer(t, 0)
	s.ctl("load", path).want(t, 2, "", "optcachectl: "+path+" has 1.0 GiB, and 1.0 GiB are allowed\n")
	s.wantAsked(t)
}

// ^C leaves no half file. The signal ends the context, which the test does by itself.
func TestDumpThatIsInterruptedLeavesNoFile(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.Header.Get("Accept"))
		io.WriteString(w, "piece")
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done()
	}))
	defer s.Close()
	dir := t.TempDir()
	r := runOn(ctx, quiet(nil), "-s", s.URL, "dump", filepath.Join(dir, "cache.zst"))
	if all, err := os.ReadDir(dir); err != nil || len(all) != 0 {
		t.Errorf("%v is left, %v", all, err)
	}
	if r.code != 1 || r.stdout != "" || !strings.HasPrefix(r.stderr, "optcachectl: context canceled") {
		t.Errorf("%+v", r)
	}
}
