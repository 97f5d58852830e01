package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	dnstap "github.com/dnstap/golang-dnstap"
	framestream "github.com/farsightsec/golang-framestream"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"
)

// This file tests that what is written is read back, and has what the tests of the package share.

var written = time.Date(2026, 5, 4, 3, 2, 1, 123456789, time.UTC)

var testHeader = Header{Instance: "ns1.example.org", Written: written, Extra: []byte("extra\x00bytes")}

// answer returns a response to a query for the address of a name.
func answer(name string, ip [4]byte) []byte {
	b := []byte{0, 0, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0}
	for _, label := range strings.Split(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	b = append(b, 0, 0, 1, 0, 1)
	return append(append(b, 0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4), ip[:]...)
}

// typical returns n records like those of a cache of addresses.
func typical(n int) []*Record {
	rng := rand.New(rand.NewPCG(1, 2))
	records := make([]*Record, n)
	for i := range records {
		v := rng.Uint32()
		records[i] = &Record{
			Response:  answer(fmt.Sprintf("host%d.zone%d.example", i, rng.IntN(5000)), [4]byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)}),
			Stored:    written.Add(-time.Duration(rng.Int64N(int64(time.Hour)))),
			TTL:       rng.Uint32N(7200), // 0: a file of an earlier version
			DO:        i%3 == 0,
			Protected: i%4 != 0,
			Accesses:  uint32(rng.ExpFloat64() * 10),
			Frequency: uint8(rng.IntN(16)),
			Hits:      uint32(rng.ExpFloat64() * 5),
			HitsAge:   time.Duration(rng.Int64N(int64(time.Hour))),
		}
	}
	return records
}

// unusual returns records at the limits of their type.
func unusual() []*Record {
	big := make([]byte, MaxResponse)
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range big {
		big[i] = byte(rng.Uint32())
	}
	return []*Record{
		{Response: []byte{}, Stored: time.Unix(0, 0)},
		{Response: big, Stored: time.Unix(maxSeconds, 999999999)},
		{Response: make([]byte, MaxResponse), Stored: written, DO: true},
		{Response: big[:17], Stored: written, CD: true},
		{Response: big[:17], Stored: written, NoRD: true},
		{Response: big[:17], Stored: written, Protected: true},
		{Response: big[:17], Stored: written, Hot: true},
		{Response: big[:17], Stored: written, DO: true, CD: true, Protected: true, Hot: true,
			TTL: math.MaxUint32, Accesses: math.MaxUint32, Frequency: math.MaxUint8, Hits: math.MaxUint32, HitsAge: math.MaxInt64,
			Wildcard: strings.Repeat("x", MaxWildcard)},
		{Response: big[:17], Stored: written, HitsAge: math.MinInt64, Wildcard: "*.example.org."},
	}
}

// pack returns the bytes of a file.
func pack(t testing.TB, h Header, records []*Record) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := write(&b, h, slices.Values(records)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack reads a file from its bytes. The results belong to the caller.
func unpack(b []byte, l Limits) (h *Header, records []*Record, err error) {
	n, err := read(bytes.NewReader(b), l, func(got *Header) error {
		h = &Header{got.Instance, got.Written, bytes.Clone(got.Extra)}
		return nil
	}, func(r *Record) error {
		records = append(records, clone(r))
		return nil
	})
	if n != len(records) {
		panic("read counts wrong")
	}
	return h, records, err
}

func clone(r *Record) *Record {
	c := *r
	c.Response = append([]byte{}, r.Response...)
	return &c
}

func same(a, b *Record) bool {
	x, y := *a, *b
	x.Stored, y.Stored = x.Stored.UTC(), y.Stored.UTC()
	return reflect.DeepEqual(x, y)
}

// checkPrefix fails the test if got is not a prefix of want.
func checkPrefix(t testing.TB, got, want []*Record) {
	t.Helper()
	if len(got) > len(want) {
		t.Fatalf("%d records of %d", len(got), len(want))
	}
	for i := range got {
		if !same(got[i], want[i]) {
			t.Fatalf("record %d is %+v, want %+v", i, got[i], want[i])
		}
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for name, records := range map[string][]*Record{
		"empty":   nil,
		"unusual": unusual(),
		"typical": typical(5000),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "cache")
			stats, err := Write(path, testHeader, slices.Values(records))
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if want := (Stats{len(records), info.Size()}); stats != want {
				t.Errorf("written: %+v, want %+v", stats, want)
			}
			if info.Mode() != 0o600 {
				t.Errorf("mode %v", info.Mode())
			}
			var got []*Record
			read, err := Read(path, Limits{}, func(h *Header) error {
				if h.Instance != testHeader.Instance || !h.Written.Equal(written) || !bytes.Equal(h.Extra, testHeader.Extra) {
					t.Errorf("header %+v", h)
				}
				return nil
			}, func(r *Record) error {
				got = append(got, clone(r))
				return nil
			})
			if err != nil || read != stats {
				t.Errorf("read: %+v, %v, want %+v", read, err, stats)
			}
			checkPrefix(t, got, records)
		})
	}
}

func TestHeaderMayBeEmpty(t *testing.T) {
	t.Parallel()
	h, _, err := unpack(pack(t, Header{Written: written}, nil), Limits{})
	if err != nil || h.Instance != "" || len(h.Extra) != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	long := Header{strings.Repeat("i", MaxInstance), written, make([]byte, MaxExtra)}
	if h, _, err = unpack(pack(t, long, nil), Limits{}); err != nil || len(h.Extra) != MaxExtra || h.Instance != long.Instance {
		t.Errorf("the longest: %v", err)
	}
}

func TestWriteRefusesWhatCannotBeRead(t *testing.T) {
	t.Parallel()
	ok := Record{Stored: written}
	for name, test := range map[string]struct {
		header Header
		record Record
	}{
		"instance": {Header{strings.Repeat("i", MaxInstance+1), written, nil}, ok},
		"extra":    {Header{"", written, make([]byte, MaxExtra+1)}, ok},
		"written":  {Header{}, ok},
		"response": {testHeader, Record{Stored: written, Response: make([]byte, MaxResponse+1)}},
		"stored":   {testHeader, Record{}},
		"wildcard": {testHeader, Record{Stored: written, Wildcard: strings.Repeat("x", MaxWildcard+1)}},
	} {
		path := filepath.Join(t.TempDir(), "cache")
		_, err := Write(path, test.header, slices.Values([]*Record{&test.record}))
		if err == nil || !strings.Contains(err.Error(), path) || Reason(err) != other {
			t.Errorf("%s: %v", name, err)
		}
		checkFolder(t, path)
	}
}

// checkFolder fails the test if the folder of path has other files than names.
func checkFolder(t *testing.T, path string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, names) {
		t.Errorf("there are %q, want %q", got, names)
	}
}

func TestCallersErrorsEndIt(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "cache")
	if _, err := Write(path, testHeader, slices.Values(typical(3))); err != nil {
		t.Fatal(err)
	}
	mine := errors.New("mine")
	_, err := Read(path, Limits{}, func(*Header) error { return mine }, nil)
	if !errors.Is(err, mine) || Reason(err) != other {
		t.Errorf("header: %v", err)
	}
	calls := 0
	stats, err := Read(path, Limits{}, nil, func(*Record) error { calls++; return mine })
	if !errors.Is(err, mine) || Reason(err) != other || calls != 1 || stats.Records != 0 {
		t.Errorf("each: %v after %d calls, %+v", err, calls, stats)
	}
}

// TestDnstapReadsIt reads a file with the dnstap libraries.
func TestDnstapReadsIt(t *testing.T) {
	t.Parallel()
	records := append(typical(100), unusual()...)
	z, err := zstd.NewReader(bytes.NewReader(pack(t, testHeader, records)))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	r, err := framestream.NewReader(z, &framestream.ReaderOptions{ContentTypes: [][]byte{[]byte(contentType)}})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxFrame)
	next := func() *dnstap.Dnstap {
		n, err := r.ReadFrame(buf)
		if err != nil {
			t.Fatal(err)
		}
		var d dnstap.Dnstap
		if err := proto.Unmarshal(buf[:n], &d); err != nil {
			t.Fatal(err)
		}
		if string(d.GetVersion()) != "optcache-snapshot/1" || string(d.GetIdentity()) != testHeader.Instance || d.GetType() != dnstap.Dnstap_MESSAGE {
			t.Fatalf("a frame has %q, %q, %v", d.GetVersion(), d.GetIdentity(), d.GetType())
		}
		if unknown := d.ProtoReflect().GetUnknown(); len(unknown) > 0 {
			t.Fatalf("unknown fields: %x", unknown)
		}
		return &d
	}
	at := func(m *dnstap.Message) time.Time {
		return time.Unix(int64(m.GetResponseTimeSec()), int64(m.GetResponseTimeNsec()))
	}
	if m := next().GetMessage(); m.GetType() != dnstap.Message_TOOL_RESPONSE || !at(m).Equal(written) {
		t.Errorf("header: %v", m)
	}
	for i, want := range records {
		m := next().GetMessage()
		if m.GetType() != dnstap.Message_CLIENT_RESPONSE || !at(m).Equal(want.Stored) || !bytes.Equal(m.GetResponseMessage(), want.Response) {
			t.Errorf("record %d: %v", i, m)
		}
	}
	if _, err := r.ReadFrame(buf); err != framestream.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func TestDnstapReadShowsEveryRecord(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"zstd", "dnstap-read", "sh"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	const n = 300
	path := filepath.Join(t.TempDir(), "cache")
	if _, err := Write(path, testHeader, slices.Values(typical(n))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `zstd -dc "$1" | dnstap-read /dev/stdin`, "sh", path)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil || stderr.Len() > 0 {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	lines := strings.Split(strings.TrimSpace(stdout.String()), "\n")
	if len(lines) != 1+n {
		t.Fatalf("%d lines, want %d, of them the first\n%s", len(lines), 1+n, lines[0])
	}
	if !strings.Contains(lines[0], "TR") || !strings.Contains(lines[0], "optcache-snapshot/CH/TXT") {
		t.Errorf("header: %s", lines[0])
	}
	for i, line := range lines[1:] {
		if !strings.Contains(line, "CR") || !strings.Contains(line, fmt.Sprintf("host%d.", i)) {
			t.Errorf("record %d: %s", i, line)
		}
	}
}
