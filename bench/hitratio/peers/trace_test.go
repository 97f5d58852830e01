package main

import (
	"compress/gzip"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// writeTrace writes the lines as a gzip'd trace and returns its path.
func writeTrace(t *testing.T, name, lines string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z := gzip.NewWriter(f)
	if _, err := z.Write([]byte(lines)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadTraceWithTimes(t *testing.T) {
	t.Parallel()
	got, err := readTrace(writeTrace(t, "dns.txt.gz", "0 0 300\n0.5 1 60\n7 0 300\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := &trace{name: "dns", timed: true, keys: 2, requests: []request{
		{ttl: 300}, {at: 500 * time.Millisecond, key: 1, ttl: 60}, {at: 7 * time.Second, ttl: 300},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestReadTraceOfPlainKeys(t *testing.T) {
	t.Parallel()
	got, err := readTrace(writeTrace(t, "plain.txt.gz", "0\n1\n0"))
	if err != nil {
		t.Fatal(err)
	}
	want := &trace{name: "plain", keys: 2, requests: []request{{ttl: untimedTTL}, {key: 1, ttl: untimedTTL}, {ttl: untimedTTL}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestBadLinesAreNamed(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ lines, at, word string }{
		{"", ":0:", "no requests"},
		{"0\n\n1\n", ":2:", "want a key"},
		{"0\n1 2\n", ":2:", "want a key"},
		{"x\n", ":1:", `bad key "x"`},
		{"-1\n", ":1:", `bad key "-1"`},
		{"0\n2\n", ":2:", "first appearance"},
		{"1 2\n", ":1:", "want a key"},
		{"0 0 30\n1 0\n", ":2:", "time key ttl"},
		{"0 0 30\n5 0 30\n4 0 30\n", ":3:", `"4" goes back`},
		{"0 0 30\nsoon 0 30\n", ":2:", `bad time "soon"`},
		{"-1 0 30\n", ":1:", `bad time "-1"`},
		{"NaN 0 30\n", ":1:", `bad time "NaN"`},
		{"1e300 0 30\n", ":1:", `bad time "1e300"`},
		{"0 0 30\n0 0 -5\n", ":2:", `bad TTL "-5"`},
		{"0 0 30\n0 0 4294967296\n", ":2:", "bad TTL"},
		{"0\n" + strings.Repeat("9", 1<<17), ":2:", "token too long"},
	} {
		path := writeTrace(t, "bad.txt.gz", tc.lines)
		_, err := readTrace(path)
		if err == nil || !strings.HasPrefix(err.Error(), path+tc.at) || !strings.Contains(err.Error(), tc.word) {
			t.Errorf("%.20q: got error %v, want %s with %s", tc.lines, err, tc.at, tc.word)
		}
	}
}

func TestBadFilesAreNamed(t *testing.T) {
	t.Parallel()
	plain := filepath.Join(t.TempDir(), "plain.txt")
	if err := os.WriteFile(plain, []byte("0\n1\n2\n3\n4\n5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readTrace(plain); err == nil || !strings.Contains(err.Error(), plain) {
		t.Errorf("not gzip'd: got error %v", err)
	}

	cut := writeTrace(t, "cut.txt.gz", strings.Repeat("0\n", 1000))
	whole, err := os.ReadFile(cut)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cut, whole[:len(whole)-6], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readTrace(cut); err == nil || !strings.Contains(err.Error(), cut) {
		t.Errorf("cut short: got error %v", err)
	}

	if _, err := readTrace(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("not there: got error %v", err)
	}
}

func TestReadTraceWithSizes(t *testing.T) {
	t.Parallel()
	tr, _, err := parseTrace(strings.NewReader("0 0 30 1200\n1 1 30 0\n1.5 0 30 65000\n"))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint16{1200, 0, 65000} {
		if got := tr.requests[i].bytes; got != want {
			t.Errorf("request %d: %d bytes, want %d", i, got, want)
		}
	}
	for _, bad := range []string{"0 0 30 65001\n", "0 0 30 -1\n", "0 0 30 x\n", "0 0 30 1\n1 1 30\n", "0 0 30\n1 1 30 5\n"} {
		if _, _, err := parseTrace(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
