package dumptext

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/snapshot"
)

var noon = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

// response packs a response with these records as its answer section.
func response(t testing.TB, name string, qtype uint16, rcode int, records ...dns.RR) []byte {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, qtype)
	m.Id, m.RecursionDesired, m.Response, m.Compress, m.Rcode, m.Answer = 0, false, true, true, rcode, records
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func rr(t testing.TB, line string) dns.RR {
	t.Helper()
	r, err := dns.NewRR(line)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// generic is a record of a type without a form of its own, with this RDATA in hexadecimal.
func generic(qtype uint16, rdata string) dns.RR {
	return &dns.RFC3597{Hdr: dns.RR_Header{Name: "a.test.", Rrtype: qtype, Class: dns.ClassINET, Ttl: 60}, Rdata: rdata}
}

// written returns the text of records.
func written(t testing.TB, h snapshot.Header, all ...*snapshot.Record) string {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, h, slices.Values(all)); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// readBack reads a text. Records are valid during the call only, so that it keeps copies.
func readBack(text string, l snapshot.Limits) (h snapshot.Header, all []*snapshot.Record, err error) {
	n, err := Read(strings.NewReader(text), l, func(got *snapshot.Header) error { h = *got; return nil }, func(r *snapshot.Record) error {
		one := *r
		one.Response = bytes.Clone(r.Response)
		all = append(all, &one)
		return nil
	})
	if n != len(all) {
		return h, all, fmt.Errorf("%d answers are passed on, and Read returns %d", len(all), n)
	}
	return h, all, err
}

// sameMessage reports whether two responses say the same.
func sameMessage(t testing.TB, a, b []byte) bool {
	t.Helper()
	canonical := func(wire []byte) []byte {
		m := new(dns.Msg)
		if err := m.Unpack(wire); err != nil {
			t.Fatal(err)
		}
		m.Compress = false
		out, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	return bytes.Equal(canonical(a), canonical(b))
}

func TestOddRecordsComeBack(t *testing.T) {
	t.Parallel()
	for name, response := range map[string][]byte{
		"no records":               response(t, ".", dns.TypeNS, dns.RcodeSuccess),
		"nxdomain":                 response(t, "no.test.", dns.TypeA, dns.RcodeNameError),
		"an rcode without a name":  response(t, "no.test.", dns.TypeA, 13),
		"a type without a name":    response(t, "a.test.", 65280, dns.RcodeSuccess, generic(65280, "00ff")),
		"empty rdata":              response(t, "a.test.", 65280, dns.RcodeSuccess, generic(65280, "")),
		"letters of either case":   response(t, "wWw.TeSt.", dns.TypeA, dns.RcodeSuccess, rr(t, "WwW.tEsT. 60 IN A 192.0.2.1")),
		"blanks in names":          response(t, `a\ b\009\010.test.`, dns.TypeA, dns.RcodeSuccess, rr(t, `a\032b\009\010.test. 60 IN A 192.0.2.1`)),
		"what names quote":         response(t, `\"\;\(\)\$\@\\\..test.`, dns.TypeCNAME, dns.RcodeSuccess, rr(t, `\"\;\(\)\$\@\\\..test. 60 IN CNAME \000\255.\$INCLUDE.test.`)),
		"a name like a directive":  response(t, `$ORIGIN.`, dns.TypeA, dns.RcodeSuccess, rr(t, `\$ORIGIN. 60 IN A 192.0.2.1`)),
		"a name like a comment":    response(t, `\;end.`, dns.TypeA, dns.RcodeSuccess, rr(t, `\;end. 60 IN A 192.0.2.1`)),
		"a name like a class":      response(t, "IN.", dns.TypeA, dns.RcodeSuccess, rr(t, "IN. 60 IN A 192.0.2.1")),
		"texts":                    response(t, "a.test.", dns.TypeTXT, dns.RcodeSuccess, rr(t, `a.test. 60 IN TXT "" "a;b" "(" "\"\\" "\000\010\013\255" "`+strings.Repeat("x", 255)+`"`)),
		"services":                 response(t, "a.test.", dns.TypeHTTPS, dns.RcodeSuccess, rr(t, `a.test. 60 IN HTTPS 1 . alpn="h2,h3" port=443 ipv4hint=192.0.2.1 ech="AAAA" key65000="\000\255 "`)),
		"nsec of types with gaps":  response(t, "a.test.", dns.TypeNSEC, dns.RcodeSuccess, rr(t, `a.test. 60 IN NSEC \000.a.test. A TYPE1234 TYPE65280`)),
		"nsec3 without salt":       response(t, "a.test.", dns.TypeNSEC3, dns.RcodeSuccess, rr(t, `a.test. 60 IN NSEC3 1 0 0 - 2t7b4g4vsa5smi47k61mv5bv1a22bojr`)),
		"a signature":              response(t, "a.test.", dns.TypeRRSIG, dns.RcodeSuccess, rr(t, `a.test. 60 IN RRSIG A 8 2 60 20380101000000 20261101000000 1 test. AAAA`)),
		"locations":                response(t, "a.test.", dns.TypeLOC, dns.RcodeSuccess, rr(t, `a.test. 60 IN LOC 52 22 23.000 N 4 53 32.000 E -2.00m 0.00m 10000m 10m`)),
		"caa, naptr, srv and uri":  response(t, "a.test.", dns.TypeANY, dns.RcodeSuccess, rr(t, `a.test. 60 IN CAA 128 issue "a;b"`), rr(t, `a.test. 60 IN NAPTR 1 2 "s" "" "!^.*$!\\1!" .`), rr(t, `a.test. 60 IN SRV 0 0 0 .`), rr(t, `a.test. 60 IN URI 1 1 "a b"`)),
		"empty strings":            response(t, "a.test.", dns.TypeHINFO, dns.RcodeSuccess, rr(t, `a.test. 60 IN HINFO "" ""`)),
		"another class":            response(t, "a.test.", dns.TypeTXT, dns.RcodeSuccess, rr(t, `a.test. 60 CH TXT "a"`)),
		"a ttl of a zero, and max": response(t, "a.test.", dns.TypeA, dns.RcodeSuccess, rr(t, "a.test. 0 IN A 192.0.2.1"), rr(t, "a.test. 2147483647 IN A 192.0.2.2")),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &snapshot.Record{Response: response, TTL: 300, Stored: noon.Add(-30*time.Second + 5), DO: true, Wildcard: `*.a\ b.test.`}
			h, all, err := readBack(written(t, snapshot.Header{Written: noon, Instance: ".:53 a"}, r), snapshot.Limits{})
			if err != nil || len(all) != 1 || !h.Written.Equal(noon) {
				t.Fatalf("%+v, %d answers, %v\n%s", h, len(all), err, written(t, snapshot.Header{Written: noon}, r))
			}
			got := all[0]
			if !sameMessage(t, got.Response, r.Response) || got.TTL != 300 || !got.Stored.Equal(r.Stored) || !got.DO || got.CD || got.NoRD || got.Wildcard != `*.a\032b.test.` {
				t.Errorf("%+v\n%s", got, written(t, snapshot.Header{Written: noon}, r))
			}
		})
	}
}

func TestBitsComeBack(t *testing.T) {
	t.Parallel()
	for i := range 1 << 6 {
		on := func(bit int) bool { return i>>bit&1 > 0 }
		m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
		m.Id, m.RecursionDesired, m.Response = 0, false, true
		m.Authoritative, m.RecursionAvailable, m.AuthenticatedData = on(0), on(1), on(2)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		r := &snapshot.Record{Response: b, Stored: noon, DO: on(3), CD: on(4), NoRD: on(5)}
		_, all, err := readBack(written(t, snapshot.Header{Written: noon}, r), snapshot.Limits{})
		if err != nil || len(all) != 1 || !bytes.Equal(all[0].Response, b) || all[0].DO != r.DO || all[0].CD != r.CD || all[0].NoRD != r.NoRD {
			t.Fatalf("%b: %+v, %v", i, all, err)
		}
	}
}

// What is no message is left out and counted, and the rest can be read.
func TestWhatHasNoTextIsLeftOut(t *testing.T) {
	t.Parallel()
	good := &snapshot.Record{Response: response(t, "a.test.", dns.TypeA, 0, rr(t, "a.test. 60 IN A 192.0.2.1")), Stored: noon}
	text := written(t, snapshot.Header{Written: noon}, &snapshot.Record{Response: []byte("no message"), Stored: noon}, good, &snapshot.Record{Stored: noon})
	if _, all, err := readBack(text, snapshot.Limits{}); err != nil || len(all) != 1 || !strings.HasSuffix(text, ";end left_out=2 answers=1\n") {
		t.Errorf("%d answers, %v\n%s", len(all), err, text)
	}
}

// A text that is cut off anywhere is an error, and so is one with an answer too few or too many.
func TestCutOffText(t *testing.T) {
	t.Parallel()
	a := &snapshot.Record{Response: response(t, "a.test.", dns.TypeA, 0, rr(t, "a.test. 60 IN A 192.0.2.1"), rr(t, "a.test. 60 IN A 192.0.2.2")), Stored: noon}
	text := written(t, snapshot.Header{Written: noon}, a, a)
	for n := range len(text) - 1 {
		if _, _, err := readBack(text[:n], snapshot.Limits{}); err == nil || !strings.HasPrefix(err.Error(), "line ") {
			t.Fatalf("%d bytes of %d: %v", n, len(text), err)
		}
	}
}

const (
	headLine   = ";optcache-text/1 written=2026-11-29T12:00:00Z instance=.\n"
	answerLine = ";answer a.test. IN A rcode=NOERROR flags=ra ttl=300 stored=2026-11-29T11:59:30.5Z records=1,0,0\n"
	recordLine = "a.test. 60 IN A 192.0.2.1\n"
	endLine    = ";end left_out=0 answers=1\n"
)

// Faults of a text name the line and the word.
func TestBadTextNamesLineAndWord(t *testing.T) {
	t.Parallel()
	if _, all, err := readBack(headLine+"; a comment\n\n"+answerLine+recordLine+"\n"+endLine+"\n", snapshot.Limits{}); err != nil || len(all) != 1 {
		t.Fatalf("the text that the others are made of: %v", err)
	}
	with := func(old, new string) string {
		if !strings.Contains(answerLine, old) {
			t.Fatalf("%q is not there", old)
		}
		return headLine + strings.Replace(answerLine, old, new, 1) + recordLine + endLine
	}
	for text, want := range map[string]string{
		"":                                     "line 1: it is empty",
		"$ORIGIN a.test.\n":                    `line 1: "$ORIGIN a.test.": it is not a dump`,
		";optcache-text/2 written=x\n":         `line 1: ";optcache-text/2 written=x": it is not a dump`,
		";optcache-text/1 written=yesterday\n": `line 1: written="yesterday" is not a time`,
		";optcache-text/1 by=me\n":             `line 1: "by=me" is not expected`,
		";optcache-text/1 instance=a instance=b\n":             `line 1: "instance=b" is not expected`,
		headLine + recordLine + endLine:                        `line 2: "a.test. 60 IN A 192.0.2.1": a record before`,
		with("a.test.", "a..test."):                            `line 2: "a..test." is not a domain name`,
		with("a.test.", "a.test"):                              `line 2: "a.test" is not a domain name`,
		with(" IN ", " NI "):                                   `line 2: "NI" is not a class`,
		with(" A ", " ADDRESS "):                               `line 2: "ADDRESS" is not a type`,
		with(" A ", " TYPE65536 "):                             `line 2: "TYPE65536" is not a type`,
		with("=NOERROR", "=GOOD"):                              `line 2: rcode="GOOD" is not an rcode`,
		with("=NOERROR", "=BADCOOKIE"):                         `line 2: rcode="BADCOOKIE" is not one of those`,
		with("=ra", "=ra,rd"):                                  `line 2: flags="ra,rd": "rd" is none of`,
		with("ttl=300", "ttl=-1"):                              `line 2: ttl="-1" is not a TTL`,
		with("ttl=300", "ttl=2147483648"):                      `line 2: ttl="2147483648" is not a TTL`,
		with("ttl=300", "life=300"):                            `line 2: "life=300" is not expected`,
		with("ttl=300", "ttl"):                                 `line 2: "ttl" is not expected`,
		with("2026-11-29T11:59:30.5Z", "1969-01-01T00:00:00Z"): `line 2: stored="1969-01-01T00:00:00Z" is not a time`,
		with("1,0,0", "1,0"):                                   `line 2: records="1,0" is not three numbers`,
		with("1,0,0", "1,0,x"):                                 `line 2: records="1,0,x" is not three numbers`,
		with("1,0,0", "65536,0,0"):                             `line 2: records="65536,0,0" is not three numbers`,
		with("1,0,0", "2,0,0"):                                 "line 4: a record is missing",
		with("1,0,0", "0,0,0"):                                 `line 3: "a.test. 60 IN A 192.0.2.1": a record before`,
		with("1,0,0", "1,0,0 wildcard="+strings.Repeat("w", snapshot.MaxWildcard+1)):  "line 2: wildcard=",
		headLine + ";answer a.test. IN\n" + endLine:                                   `line 2: ";answer a.test. IN": name, class and type are expected`,
		headLine + answerLine + "a.test. 60 IN A 192.0.2\n" + endLine:                 `line 3: "a.test. 60 IN A 192.0.2": `,
		headLine + answerLine + "a.test. 60 IN A 192.0.2.1 x\n" + endLine:             `line 3: "a.test. 60 IN A 192.0.2.1 x": `,
		headLine + answerLine + "$GENERATE 1-9 $.test. A 192.0.2.$\n" + endLine:       `line 3: "$GENERATE 1-9 $.test. A 192.0.2.$": a directive`,
		headLine + answerLine + "$INCLUDE /etc/passwd\n" + endLine:                    `line 3: "$INCLUDE /etc/passwd": a directive`,
		headLine + answerLine + " A 192.0.2.1\n" + endLine:                            `line 3: " A 192.0.2.1": a record begins with its name`,
		headLine + answerLine + "a.test. 60 IN A\n" + endLine:                         `line 3: "a.test. 60 IN A": the record has no data`,
		headLine + answerLine + "a.test. 60 IN TXT\n" + endLine:                       `line 3: "a.test. 60 IN TXT": the record has no data`,
		headLine + answerLine + "a.test. 60 IN MX\n" + endLine:                        `line 3: "a.test. 60 IN MX": the record has no data`,
		headLine + answerLine + "\n" + endLine:                                        `line 3: "": there is no record`,
		headLine + answerLine + recordLine + ";end left_out=0 answers=2\n":            `line 4: answers="2", and there are 1`,
		headLine + answerLine + recordLine + ";end all\n":                             `line 4: "all" is not expected`,
		headLine + answerLine + recordLine + endLine + "more\n":                       `line 5: "more": something follows the end`,
		headLine + answerLine + recordLine:                                            `line 4: the text is cut off: its last line, ";end", is missing`,
		headLine + answerLine + strings.Repeat("a", maxLine+1) + "\n" + endLine:       "line 3: it is longer than 524288 bytes",
		headLine + answerLine + recordLine + endLine + strings.Repeat("a", maxLine+1): "line 5: it is longer than",
	} {
		_, _, err := readBack(text, snapshot.Limits{})
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.200q\n  %v, want %s", text, err, want)
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	text := headLine + answerLine + recordLine + answerLine + recordLine + ";end left_out=0 answers=2\n"
	for want, l := range map[string]snapshot.Limits{
		"line 4: more than 1 answers":           {Records: 1},
		"line 5: more than 50 bytes of answers": {Bytes: 50},
	} {
		if _, all, err := readBack(text, l); err == nil || err.Error() != want || len(all) != 1 {
			t.Errorf("%+v: %d answers, %v; want %s", l, len(all), err, want)
		}
	}
	// An answer that is larger than a message takes no more memory than one.
	large := headLine + strings.Replace(answerLine, "1,0,0", "65535,0,0", 1) + strings.Repeat(`a.test. 60 IN TXT "`+strings.Repeat("x", 255)+"\"\n", 65535)
	if _, _, err := readBack(large, snapshot.Limits{}); err == nil || !strings.Contains(err.Error(), "larger than a message") {
		t.Errorf("%v", err)
	}
}

// An error of the caller ends reading, and is returned as it is.
func TestErrorsOfTheCaller(t *testing.T) {
	t.Parallel()
	enough := errors.New("enough")
	text := headLine + answerLine + recordLine + endLine
	if n, err := Read(strings.NewReader(text), snapshot.Limits{}, func(*snapshot.Header) error { return enough }, nil); err != enough || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := Read(strings.NewReader(text), snapshot.Limits{}, nil, func(*snapshot.Record) error { return enough }); err != enough || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	if err := Write(failing{enough}, snapshot.Header{Written: noon}, slices.Values[[]*snapshot.Record](nil)); err != enough {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// FuzzRead reads any text: it never panics, and what it takes is the same when it is written and read again.
func FuzzRead(f *testing.F) {
	for _, seed := range []string{"", headLine, headLine + endLine, headLine + answerLine + recordLine + endLine, headLine + strings.Replace(answerLine, "1,0,0", "1,1,1 wildcard=*.test.", 1) +
		recordLine + `a.test. 60 CH TXT "a;\010" "("` + "\n" + `\@.test. 60 TYPE65280 \# 2 00ff` + "\n" + endLine} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		h, all, err := readBack(text, snapshot.Limits{Records: 100, Bytes: 1 << 20})
		if err != nil {
			if !strings.HasPrefix(err.Error(), "line ") {
				t.Errorf("%v names no line", err)
			}
			return
		}
		again := written(t, h, all...)
		h2, same, err := readBack(again, snapshot.Limits{})
		if err != nil || !h2.Written.Equal(h.Written) {
			t.Fatalf("%v\n%s", err, again)
		}
		if len(same) != len(all) { // nothing that was read as text is without one
			t.Fatalf("%d answers of %d\n%s", len(same), len(all), again)
		}
		for i, r := range all {
			s := same[i]
			if !sameMessage(t, r.Response, s.Response) || r.TTL != s.TTL || !r.Stored.Equal(s.Stored) || r.DO != s.DO || r.CD != s.CD || r.NoRD != s.NoRD {
				t.Errorf("%+v\n%+v\n%s", r, s, again)
			}
		}
	})
}
