package snapshot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// This file reads the files in testdata. Earlier versions of this program wrote them, and one of a version that is yet to come.

// stored returns what the files hold, without the fields that came later.
func stored() []*Record {
	response := func(label string, last byte) []byte {
		return []byte("\x00\x00\x84\x00\x00\x01\x00\x01\x00\x00\x00\x00" + string(rune(len(label))) + label + "\x07example\x03org\x00\x00\x01\x00\x01" +
			"\xc0\x0c\x00\x01\x00\x01\x00\x00\x01\x2c\x00\x04\xc0\x00\x02" + string(rune(last)))
	}
	at := time.Date(2026, 11, 24, 12, 0, 0, 123456789, time.UTC)
	return []*Record{
		{Response: response("one", 1), Stored: at, Accesses: 7, Frequency: 3, Hits: 2, HitsAge: time.Minute},
		{Response: response("two", 2), Stored: at.Add(time.Second), DO: true, CD: true, Protected: true, Hot: true, Accesses: 1, Wildcard: "*.example.org."},
		{Response: response("three", 3), Stored: at.Add(2 * time.Second)},
	}
}

// Files of earlier versions are read whole, each with the fields of its time.
func TestFilesOfEarlierVersions(t *testing.T) {
	t.Parallel()
	withTTL := stored()
	withTTL[0].TTL, withTTL[1].TTL, withTTL[2].TTL, withTTL[2].NoRD = 300, 60, 5, true
	withSubnets := stored()
	for i, r := range withTTL {
		*withSubnets[i] = *r
	}
	withSubnets[0].ForAll, withSubnets[1].Subnet, withSubnets[2].Subnet = true, "192.0.2.0/24", AnySubnet
	files := map[string][]*Record{"of-2026-11-24.zst": stored(), "of-2026-11-25.zst": withTTL, "of-2026-11-29.zst": withSubnets}
	for name, want := range files {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		h, got, err := unpack(b, Limits{})
		if err != nil || len(got) != len(want) {
			t.Fatalf("%s: %d records, %v", name, len(got), err)
		}
		checkPrefix(t, got, want)
		if h.Instance != "example.org." || !h.Written.Equal(want[0].Stored.Add(time.Minute)) || string(h.Extra) != "\x14" {
			t.Errorf("%s: %+v", name, h)
		}
	}
	if all, err := filepath.Glob("testdata/of-2*.zst"); err != nil || len(all) != len(files) {
		t.Errorf("%v: files %q", err, all)
	}
}

// A file of a later version is refused before any record is read, by an error that says so.
func TestFileOfALaterVersion(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join("testdata", "of-version-2.zst"))
	if err != nil {
		t.Fatal(err)
	}
	h, got, err := unpack(b, Limits{})
	if h != nil || len(got) != 0 || Reason(err) != otherVersion || !strings.Contains(err.Error(), `version "2" of the format, and this program reads 1`) {
		t.Errorf("%v, %d records, %v", h, len(got), err)
	}
}
