package snapshot

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/encoding/protowire"
)

// This file tests reading damaged and malicious files.

// small returns a few records whose fields are all set.
func small() []*Record {
	records := typical(4)
	records[1].Wildcard = "*.example."
	records[2].Hot, records[2].CD, records[2].NoRD = true, true, true
	// Equal records make matches in the compressed bytes that reach over whole records.
	return append(records, clone(records[1]), clone(records[1]), clone(records[2]))
}

// TestEveryFlippedBit flips every bit of a file.
func TestEveryFlippedBit(t *testing.T) {
	t.Parallel()
	want := small()
	file := pack(t, testHeader, want)
	harmless := 0
	for i := range file {
		for bit := range 8 {
			file[i] ^= 1 << bit
			_, got, err := unpack(file, Limits{})
			file[i] ^= 1 << bit
			checkPrefix(t, got, want)
			if err != nil {
				continue
			}
			if len(got) != len(want) {
				t.Fatalf("byte %d, bit %d: %d records and no error", i, bit, len(got))
			}
			harmless++
		}
	}
	// Harmless are, for instance, the bit of a zstd frame's header that has no meaning, and a larger window.
	t.Logf("%d of %d flipped bits do no harm", harmless, 8*len(file))
}

// TestFlippedBitUnpacked flips bits in the unpacked bytes, as a fault in memory would. Only the CRC of the frames can
// detect these.
func TestFlippedBitUnpacked(t *testing.T) {
	t.Parallel()
	want := small()
	plain := unzip(t, pack(t, testHeader, want))
	for i := range plain {
		bit := byte(1) << (i % 8)
		plain[i] ^= bit
		_, got, err := unpack(zip(t, plain), Limits{})
		plain[i] ^= bit
		checkPrefix(t, got, want)
		if err == nil {
			t.Fatalf("byte %d: no error", i)
		}
	}
}

func TestMovedFrames(t *testing.T) {
	t.Parallel()
	want := typical(10)
	plain := unzip(t, pack(t, testHeader, want))
	frames := split(plain)
	for name, change := range map[string]func(f [][]byte) [][]byte{
		"doubled": func(f [][]byte) [][]byte { return slices.Insert(f, 6, f[5]) },
		"lost":    func(f [][]byte) [][]byte { return slices.Delete(f, 6, 7) },
		"swapped": func(f [][]byte) [][]byte { f[6], f[7] = f[7], f[6]; return f },
	} {
		_, got, err := unpack(zip(t, slices.Concat(change(slices.Clone(frames))...)), Limits{})
		checkPrefix(t, got, want)
		if Reason(err) != corrupt || len(got) < 4 {
			t.Errorf("%s: %d records, %v", name, len(got), err)
		}
	}
}

func TestEveryLength(t *testing.T) {
	t.Parallel()
	want := small()
	file := pack(t, testHeader, want)
	for n := range file {
		_, got, err := unpack(file[:n], Limits{})
		checkPrefix(t, got, want)
		if r := Reason(err); r != cutOff && r != corrupt {
			t.Fatalf("%d of %d bytes: %v", n, len(file), err)
		}
	}
	plain := unzip(t, file)
	for n := range plain {
		_, got, err := unpack(zip(t, plain[:n]), Limits{})
		checkPrefix(t, got, want)
		if Reason(err) != cutOff {
			t.Fatalf("%d of %d bytes, compressed: %v", n, len(plain), err)
		}
	}
}

func TestSomethingBehindTheEnd(t *testing.T) {
	t.Parallel()
	file := pack(t, testHeader, small())
	for name, b := range map[string][]byte{
		"bytes":    append(slices.Clone(file), "more"...),
		"file":     slices.Concat(file, file),
		"unpacked": zip(t, append(unzip(t, file), 0)),
	} {
		if _, _, err := unpack(b, Limits{}); Reason(err) != corrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// bomb returns a file without an end: the beginning, and then times copies of chunk.
func bomb(t testing.TB, begin, chunk []byte, times int) []byte {
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	z.Write(begin)
	for range times {
		z.Write(chunk)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestBombs reads files that unpack to much more than their size. It does not run in parallel, because it measures
// memory.
func TestBombs(t *testing.T) {
	begin := unzip(t, pack(t, testHeader, nil))
	begin = begin[:len(begin)-len(stopFrame)]

	// Valid frames in order, with the right CRCs, and otherwise the same bytes.
	var e encoder
	head, err := e.header(&testHeader)
	if err != nil {
		t.Fatal(err)
	}
	valid := append(slices.Clone(startFrame), head...)
	for range 2000 {
		b, err := e.record(&Record{Response: make([]byte, MaxResponse), Stored: written})
		if err != nil {
			t.Fatal(err)
		}
		valid = append(valid, b...)
	}
	records := bomb(t, valid, nil, 0)
	// Blocks of zstd's type RLE: 128 KiB in 4 bytes.
	zeros := []byte(magic + "\x00\x58")
	for range 1 << 15 { // 4 GiB
		zeros = append(zeros, 0x02, 0x00, 0x10, 0x00)
	}
	limits := Limits{Records: 500, Bytes: 16 << 20}
	for name, test := range map[string]struct {
		file   []byte
		limits Limits
		reason string
	}{
		"zeros":                   {zeros, limits, foreign},
		"zeros behind the header": {bomb(t, begin, make([]byte, 1<<20), 64), limits, corrupt},
		"records":                 {records, Limits{Records: 100}, tooLarge},
		"bytes":                   {records, Limits{Bytes: 16 << 20}, tooLarge},
		"one header":              {records, Limits{Bytes: 100}, tooLarge},
		"empty blocks":            {append([]byte(magic+"\x00\x58"), make([]byte, 3<<20)...), Limits{Bytes: 1 << 20}, tooLarge},
		"window of 2 GiB":         {[]byte(magic + "\x00\xa8\x02\x00\x10\x00"), limits, tooLarge},
		"size of 2^63 bytes":      {[]byte(magic + "\xe0\x00\x00\x00\x00\x00\x00\x00\x80\x02\x00\x10\x00"), limits, tooLarge},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		begun := time.Now()
		n, err := read(bytes.NewReader(test.file), test.limits, nil, func(*Record) error { return nil })
		took := time.Since(begun)
		runtime.ReadMemStats(&after)
		if Reason(err) != test.reason {
			t.Errorf("%s: %v after %d records, want %s", name, err, n, test.reason)
		}
		if test.limits.Records > 0 && n > test.limits.Records {
			t.Errorf("%s: %d records", name, n)
		}
		if got := after.TotalAlloc - before.TotalAlloc; got > 64<<20 {
			t.Errorf("%s: allocated %d MiB", name, got>>20)
		}
		if took > 5*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
	}
}

func TestHugeFrames(t *testing.T) {
	t.Parallel()
	begin := unzip(t, pack(t, testHeader, nil))
	begin = begin[:len(begin)-len(stopFrame)]
	for _, n := range []uint32{maxFrame + 1, 1 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		file := zip(t, binary.BigEndian.AppendUint32(slices.Clone(begin), n))
		if _, _, err := unpack(file, Limits{}); Reason(err) != corrupt {
			t.Errorf("%d bytes: %v", n, err)
		}
		file = zip(t, binary.BigEndian.AppendUint32(append(slices.Clone(begin), 0, 0, 0, 0), n))
		if _, _, err := unpack(file, Limits{}); Reason(err) != corrupt {
			t.Errorf("control frame of %d bytes: %v", n, err)
		}
	}
}

func TestForeignFiles(t *testing.T) {
	t.Parallel()
	dnstapOfOthers := slices.Concat(startFrame, withLength([]byte{byte(tagVersion), 3, 'B', 'I', 'N', 15 << 3, 1}), stopFrame)
	for name, b := range map[string][]byte{
		"text":                []byte("; a zone\n"),
		"gzip":                []byte("\x1f\x8b\x08\x00"),
		"zstd":                zip(t, []byte(strings.Repeat("text", 100))),
		"other content":       zip(t, control(controlStart, "protobuf:dnstap.Dnstop")),
		"dnstap uncompressed": dnstapOfOthers,
		"dnstap":              zip(t, dnstapOfOthers),
		"no header":           zip(t, slices.Concat(startFrame, stopFrame)),
	} {
		if _, _, err := unpack(b, Limits{}); Reason(err) != foreign {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVersions(t *testing.T) {
	t.Parallel()
	for v, want := range map[string]string{"1": "", "1.7": "", "2": otherVersion, "10": otherVersion, "": otherVersion, "1x": otherVersion} {
		head := reseal(0, appendBytes(split(unzip(t, pack(t, testHeader, nil)))[1][4:], tagVersion, format+v))
		_, _, err := unpack(zip(t, slices.Concat(startFrame, withLength(head), stopFrame)), Limits{})
		if Reason(err) != want {
			t.Errorf("%q: %v", v, err)
		}
	}
}

// TestFieldsOfLaterVersions reads fields that this version does not know.
func TestFieldsOfLaterVersions(t *testing.T) {
	t.Parallel()
	want := typical(1)
	frames := split(unzip(t, pack(t, testHeader, want)))
	more := protowire.AppendTag(nil, 1000, protowire.BytesType)
	more = protowire.AppendString(more, "what it is")
	more = protowire.AppendTag(more, 1001, protowire.Fixed64Type)
	more = protowire.AppendFixed64(more, 7)
	more = protowire.AppendTag(more, 1002, protowire.StartGroupType)
	more = appendVarint(more, tagFrequency, 1000)
	more = protowire.AppendTag(more, 1002, protowire.EndGroupType)
	var e encoder
	head, _ := e.header(&testHeader)
	plain := append(slices.Clone(startFrame), head...)
	crc := e.crc
	body := frames[2][4:]
	m, ok := parse(body)
	if !ok {
		t.Fatal("cannot parse")
	}
	// The unknown fields are in the dnstap message, and in Extra.
	body = append(slices.Clone(body), more...)
	body = appendBytes(body, tagExtra, slices.Concat(m.extra, more))
	plain = slices.Concat(plain, withLength(reseal(crc, body)), stopFrame)
	_, got, err := unpack(zip(t, plain), Limits{})
	if err != nil || len(got) != 1 {
		t.Fatalf("%d records, %v", len(got), err)
	}
	checkPrefix(t, got, want)
}

// TestValuesOutOfRange reads frames with the right CRC and wrong values.
func TestValuesOutOfRange(t *testing.T) {
	t.Parallel()
	message := func(fields ...[]byte) []byte {
		return appendBytes(appendVarint(nil, tagType, dnstapMessage), tagMessage, slices.Concat(fields...))
	}
	kind, response := appendVarint(nil, tagMessageType, clientResponse), appendBytes(nil, tagResponse, "dns")
	extra := func(x []byte) []byte { return appendBytes(message(kind, response), tagExtra, x) }
	for name, test := range map[string]struct {
		body   []byte
		reason string
	}{
		"fine":        {extra(appendVarint(nil, tagFrequency, 255)), ""},
		"forwarder":   {message(appendVarint(nil, tagMessageType, forwarderResponse), response), ""},
		"frequency":   {extra(appendVarint(nil, tagFrequency, 256)), corrupt},
		"accesses":    {extra(appendVarint(nil, tagAccesses, 1<<32)), corrupt},
		"hits":        {extra(appendVarint(nil, tagHits, 1<<32)), corrupt},
		"TTL":         {extra(appendVarint(nil, tagTTL, 1<<32)), corrupt},
		"wildcard":    {extra(appendBytes(nil, tagWildcard, make([]byte, MaxWildcard+1))), corrupt},
		"extra":       {extra([]byte{0xff}), corrupt},
		"seconds":     {message(kind, response, appendVarint(nil, tagResponseSec, 1<<63)), corrupt},
		"nanoseconds": {message(kind, response, protowire.AppendFixed32([]byte{byte(tagResponseNsec)}, 1e9)), corrupt},
		"response":    {message(kind, appendBytes(nil, tagResponse, make([]byte, MaxResponse+1))), corrupt},
		"no response": {message(kind), corrupt},
		"query":       {message(appendVarint(nil, tagMessageType, 5), response), corrupt},
		"no message":  {appendVarint(nil, tagType, dnstapMessage), corrupt},
		"no type":     {appendBytes(nil, tagMessage, slices.Concat(kind, response)), corrupt},
		"empty":       {nil, corrupt},
	} {
		var e encoder
		head, err := e.header(&testHeader)
		if err != nil {
			t.Fatal(err)
		}
		plain := slices.Concat(startFrame, head, withLength(reseal(e.crc, test.body)), stopFrame)
		if _, _, err := unpack(zip(t, plain), Limits{}); Reason(err) != test.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// reseal appends another Extra to a frame, with the right CRC at its end. The last Extra is the one that counts.
func reseal(crc uint32, body []byte) []byte {
	m, _ := parse(body)
	body = append(slices.Clone(body), byte(tagExtra))
	body = protowire.AppendVarint(body, uint64(len(m.extra)+crcSize))
	body = append(append(body, m.extra...), byte(tagCRC))
	crc = crc32.Update(crc, castagnoli, body)
	return protowire.AppendFixed32(body, crc)
}

func withLength(frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

// split returns the frames of Frame Streams with their lengths: the start frame, the header, the records, and the
// stop frame.
func split(plain []byte) (frames [][]byte) {
	for len(plain) > 0 {
		n := 4 + int(binary.BigEndian.Uint32(plain))
		if n == 4 {
			n = 8 + int(binary.BigEndian.Uint32(plain[4:]))
		}
		frames = append(frames, plain[:n:n])
		plain = plain[n:]
	}
	return frames
}

// zipper is shared by all tests, because to make an encoder takes longer than to use it.
var zipper, _ = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(2), zstd.WithEncoderLevel(zstd.SpeedFastest),
	zstd.WithWindowSize(64<<10), zstd.WithZeroFrames(true))

func zip(t testing.TB, plain []byte) []byte {
	t.Helper()
	return zipper.EncodeAll(plain, nil)
}

func unzip(t testing.TB, file []byte) []byte {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzRead reads any bytes, as a file and as the unpacked content of a file.
func FuzzRead(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte(magic))
	for _, records := range [][]*Record{nil, small()} {
		file := pack(f, testHeader, records)
		f.Add(file)
		f.Add(file[:len(file)/2])
		f.Add(unzip(f, file))
	}
	f.Add(slices.Concat(startFrame, stopFrame))
	limits := Limits{Records: 1000, Bytes: 4 << 20}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, file := range [][]byte{b, zip(t, b)} {
			_, records, err := unpack(file, limits)
			if err != nil {
				if Reason(err) == other || Reason(err) == disk {
					t.Errorf("%v", err)
				}
				continue
			}
			// Records that have been read can be written.
			_, again, err := unpack(pack(t, testHeader, records), Limits{})
			if err != nil || len(again) != len(records) {
				t.Fatalf("%d records of %d, %v", len(again), len(records), err)
			}
			checkPrefix(t, again, records)
		}
		// The frames are decoded without the CRC, too.
		if m, ok := parse(b); ok && len(m.response) > len(b) {
			t.Errorf("a response of %d bytes", len(m.response))
		}
		var d decoder
		d.next(reseal(0, b))
		d.header(reseal(0, b))
	})
}
