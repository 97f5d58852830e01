// Package dumptext writes the answers of a snapshot as text, and reads the text back. It has the records as lines of a zone file
// (RFC 1035 section 5), and what a zone file has no place for in comments:
//
//	;optcache-text/1 written=2026-11-29T12:00:00Z instance=.
//	;answer www.example.org. IN A rcode=NOERROR flags=ra,ad,do ttl=300 stored=2026-11-29T11:59:30.5Z records=1,0,0
//	www.example.org.	300	IN	A	192.0.2.1
//	;end left_out=0 answers=1
//
// An answer is the question, the header bits of the response and of the request, the TTL in seconds with which it was kept, when
// it came, and how many records its answer, authority and additional section have. An answer that is for some clients only has their
// prefix, too, as in subnet=192.0.2.0/24, or subnet=any with ecs off. The records follow, one a line. Empty lines and other
// comments mean nothing. A text without its last line is cut off.
//
// The text does not say how popular an answer was: which segment it was in, and how often it was asked for. It has no checksum.
package dumptext

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/subnet"
)

const (
	version = ";optcache-text/1"

	// maxLine is the longest line that is read, in bytes. A record of 64 KiB with four letters for each byte has 256 KiB.
	maxLine = 512 << 10
)

// The bits of an answer, by their words.
type bits struct{ aa, ra, ad, do, cd, noRD, forAll bool }

func (b *bits) words() [7]struct {
	word string
	bit  *bool
} {
	return [7]struct {
		word string
		bit  *bool
	}{{"aa", &b.aa}, {"ra", &b.ra}, {"ad", &b.ad}, {"do", &b.do}, {"cd", &b.cd}, {"no_rd", &b.noRD}, {"for_all", &b.forAll}}
}

// Write writes the header and the records. An answer that has no text which can be read back is left out, and counted in the
// last line.
func Write(to io.Writer, h snapshot.Header, records iter.Seq[*snapshot.Record]) error {
	w := bufio.NewWriterSize(to, 64<<10)
	fmt.Fprintf(w, "%s written=%s instance=%s\n", version, h.Written.UTC().Format(time.RFC3339Nano), word(h.Instance))
	answers, leftOut := 0, 0
	var block bytes.Buffer
	for r := range records {
		block.Reset()
		if !answer(&block, r) {
			leftOut++
			continue
		}
		answers++
		if _, err := w.Write(block.Bytes()); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, ";end left_out=%d answers=%d\n", leftOut, answers)
	return w.Flush()
}

// word is a name without blanks: they are written as \DDD.
func word(s string) string {
	return strings.NewReplacer(`\ `, `\032`, " ", `\032`, "\t", `\009`, "\n", `\010`, "\r", `\013`).Replace(s)
}

// answer writes one answer. It returns false if the text could not be read back.
func answer(w *bytes.Buffer, r *snapshot.Record) bool {
	var m dns.Msg
	if err := m.Unpack(r.Response); err != nil || len(m.Question) != 1 {
		return false
	}
	q := m.Question[0]
	b := bits{m.Authoritative, m.RecursionAvailable, m.AuthenticatedData, r.DO, r.CD, r.NoRD, r.ForAll}
	var set []string
	for _, f := range b.words() {
		if *f.bit {
			set = append(set, f.word)
		}
	}
	rcode, known := dns.RcodeToString[m.Rcode]
	if !known {
		rcode = strconv.Itoa(m.Rcode)
	}
	fmt.Fprintf(w, ";answer %s %s %s rcode=%s flags=%s ttl=%d stored=%s records=%d,%d,%d", word(q.Name), dns.Class(q.Qclass), dns.Type(q.Qtype),
		rcode, strings.Join(set, ","), r.TTL, r.Stored.UTC().Format(time.RFC3339Nano), len(m.Answer), len(m.Ns), len(m.Extra))
	if r.Wildcard != "" {
		fmt.Fprintf(w, " wildcard=%s", word(r.Wildcard))
	}
	if r.Subnet != "" {
		fmt.Fprintf(w, " subnet=%s", word(r.Subnet))
	}
	w.WriteByte('\n')
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			line, ok := lineOf(rr)
			if !ok {
				return false
			}
			w.WriteString(line)
			w.WriteByte('\n')
		}
	}
	return true
}

// lineOf returns the line of a record: in the form of its type or, where that cannot be read back, of RFC 3597.
func lineOf(rr dns.RR) (string, bool) {
	line := notDirective(rr.String())
	if isOf(line, rr) {
		return line, true
	}
	var generic dns.RFC3597
	if err := generic.ToRFC3597(rr); err != nil {
		return "", false
	}
	line = notDirective(generic.String())
	return line, isOf(line, rr)
}

// notDirective keeps a name from being taken for $ORIGIN or the like.
func notDirective(line string) string {
	if strings.HasPrefix(line, "$") {
		return `\` + line
	}
	return line
}

// isOf reports whether a line is read back as the record.
func isOf(line string, rr dns.RR) bool {
	if strings.ContainsAny(line, "\n\r") || len(line) >= maxLine {
		return false
	}
	back, err := record(line)
	if err != nil {
		return false
	}
	return same(back, rr)
}

// same reports whether two records are the same on the wire.
func same(a, b dns.RR) bool {
	x, ok := packed(a)
	y, ok2 := packed(b)
	return ok && ok2 && bytes.Equal(x, y)
}

func packed(rr dns.RR) ([]byte, bool) {
	b := make([]byte, dns.Len(rr))
	n, err := dns.PackRR(rr, b, 0, nil, false)
	return b[:n], err == nil
}

// record reads the line of a record.
func record(line string) (dns.RR, error) {
	if strings.HasPrefix(line, "$") { // $GENERATE makes records by the thousand
		return nil, errors.New("a directive is not a record")
	}
	if strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") {
		return nil, errors.New("a record begins with its name")
	}
	rr, err := dns.NewRR(line)
	if parse := (*dns.ParseError)(nil); errors.As(err, &parse) {
		return nil, errors.New(strings.TrimPrefix(parse.Error(), "dns: "))
	}
	switch {
	case err != nil:
		return nil, err
	case rr == nil:
		return nil, errors.New("there is no record")
	case lacksData(rr):
		return nil, errors.New("the record has no data")
	}
	return rr, nil
}

// lacksData reports whether nothing stands behind the type, as in dynamic updates (RFC 2136). The parser takes that for a record of
// zeros. Where zeros are data, the record's own text says them.
func lacksData(rr dns.RR) bool {
	empty, known := dns.TypeToRR[rr.Header().Rrtype]
	if !known {
		return false
	}
	zeros := empty()
	*zeros.Header() = *rr.Header()
	if dns.Len(zeros) != dns.Len(rr) || zeros.String() != rr.String() {
		return false
	}
	back, err := dns.NewRR(rr.String())
	return err != nil || !same(back, rr)
}

// Read reads a text. It calls header first, which may be nil, and then each for every answer. Their arguments are valid only
// during the call. If one returns an error, Read returns it. It returns the number of answers that it has passed on. An error of
// the text names the line and the word.
func Read(from io.Reader, l snapshot.Limits, header func(*snapshot.Header) error, each func(*snapshot.Record) error) (n int, err error) {
	in := &reader{lines: bufio.NewScanner(from)}
	in.lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	first, ok := in.next()
	if !ok && in.lines.Err() == nil {
		return 0, errors.New("line 1: it is empty")
	}
	h, err := headerOf(first)
	if err != nil {
		return 0, in.fault(err)
	}
	if header != nil {
		if err := header(h); err != nil {
			return 0, err
		}
	}
	size := int64(0)
	for {
		line, ok := in.next()
		switch {
		case !ok && in.lines.Err() != nil:
			return n, in.fault(in.lines.Err())
		case !ok:
			return n, fmt.Errorf("line %d: the text is cut off: its last line, %q, is missing", in.at, ";end")
		case strings.HasPrefix(line, ";end "):
			return n, in.end(line, n)
		case strings.HasPrefix(line, ";answer "):
			if l.Records > 0 && n == l.Records {
				return n, in.fault(fmt.Errorf("more than %d answers", l.Records))
			}
			r, err := in.answer(line)
			if err != nil {
				return n, in.fault(err)
			}
			if size += int64(len(r.Response)); l.Bytes > 0 && size > l.Bytes {
				return n, in.fault(fmt.Errorf("more than %d bytes of answers", l.Bytes))
			}
			if err := each(r); err != nil {
				return n, err
			}
			n++
		case strings.TrimSpace(line) == "" || strings.HasPrefix(line, ";"):
		default:
			return n, in.fault(fmt.Errorf("%q: a record before the line %q that it belongs to", clipped(line), ";answer"))
		}
	}
}

// reader reads lines.
type reader struct {
	lines *bufio.Scanner
	at    int // the number of the line, from 1
}

func (in *reader) next() (line string, ok bool) {
	in.at++
	if !in.lines.Scan() {
		return "", false
	}
	return in.lines.Text(), true
}

// fault adds the line to an error.
func (in *reader) fault(err error) error {
	if errors.Is(err, bufio.ErrTooLong) {
		err = fmt.Errorf("it is longer than %d bytes", maxLine)
	}
	return fmt.Errorf("line %d: %w", in.at, err)
}

func clipped(s string) string { return s[:min(len(s), 80)] }

// fields reads the words KEY=VALUE of a line.
func fields(words []string, known ...string) (map[string]string, error) {
	all := make(map[string]string)
	for _, w := range words {
		key, value, ok := strings.Cut(w, "=")
		found := false
		for _, k := range known {
			found = found || k == key
		}
		if _, twice := all[key]; !ok || !found || twice {
			return nil, fmt.Errorf("%q is not expected", clipped(w))
		}
		all[key] = value
	}
	return all, nil
}

func headerOf(line string) (*snapshot.Header, error) {
	words := strings.Fields(line)
	if len(words) == 0 || words[0] != version {
		return nil, fmt.Errorf("%q: it is not a dump: %q is expected", clipped(line), version)
	}
	all, err := fields(words[1:], "written", "instance")
	if err != nil {
		return nil, err
	}
	h := &snapshot.Header{Instance: all["instance"]}
	h.Written, err = moment("written", all["written"])
	return h, err
}

func moment(key, s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() < 1970 || t.Year() > 9999 {
		return t, fmt.Errorf("%s=%q is not a time such as 2026-11-29T12:00:00Z", key, clipped(s))
	}
	return t, nil
}

// end reads the last line.
func (in *reader) end(line string, n int) error {
	all, err := fields(strings.Fields(line)[1:], "answers", "left_out")
	if err != nil {
		return in.fault(err)
	}
	if all["answers"] != strconv.Itoa(n) {
		return in.fault(fmt.Errorf("answers=%q, and there are %d: some are missing", clipped(all["answers"]), n))
	}
	for {
		line, ok := in.next()
		switch {
		case !ok && in.lines.Err() != nil:
			return in.fault(in.lines.Err())
		case !ok:
			return nil
		case strings.TrimSpace(line) != "":
			return in.fault(fmt.Errorf("%q: something follows the end", clipped(line)))
		}
	}
}

// answer reads the line of an answer, and the records behind it.
func (in *reader) answer(line string) (*snapshot.Record, error) {
	words := strings.Fields(line)
	if len(words) < 4 {
		return nil, fmt.Errorf("%q: name, class and type are expected", clipped(line))
	}
	m := new(dns.Msg)
	if _, ok := dns.IsDomainName(words[1]); !ok || !dns.IsFqdn(words[1]) {
		return nil, fmt.Errorf("%q is not a domain name with a dot at its end", clipped(words[1]))
	}
	class, ok := number(words[2], "CLASS", dns.StringToClass)
	if !ok {
		return nil, fmt.Errorf("%q is not a class", clipped(words[2]))
	}
	qtype, ok := number(words[3], "TYPE", dns.StringToType)
	if !ok {
		return nil, fmt.Errorf("%q is not a type", clipped(words[3]))
	}
	m.Question = []dns.Question{{Name: words[1], Qtype: qtype, Qclass: class}}
	m.Response = true
	all, err := fields(words[4:], "rcode", "flags", "ttl", "stored", "records", "wildcard", "subnet")
	if err != nil {
		return nil, err
	}
	if m.Rcode, ok = dns.StringToRcode[all["rcode"]]; !ok {
		code, err := strconv.ParseUint(all["rcode"], 10, 4)
		if err != nil {
			return nil, fmt.Errorf("rcode=%q is not an rcode", clipped(all["rcode"]))
		}
		m.Rcode = int(code)
	}
	if m.Rcode > 0xf { // the rest is in OPT, and no such response is kept
		return nil, fmt.Errorf("rcode=%q is not one of those that are kept", all["rcode"])
	}
	var b bits
	for flag := range strings.SplitSeq(all["flags"], ",") {
		found := flag == "" && all["flags"] == ""
		for _, f := range b.words() {
			if f.word == flag {
				found, *f.bit = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("flags=%q: %q is none of aa, ra, ad, do, cd, no_rd, for_all", clipped(all["flags"]), clipped(flag))
		}
	}
	m.Authoritative, m.RecursionAvailable, m.AuthenticatedData = b.aa, b.ra, b.ad
	ttl, err := strconv.ParseUint(all["ttl"], 10, 31)
	if err != nil {
		return nil, fmt.Errorf("ttl=%q is not a TTL in seconds", clipped(all["ttl"]))
	}
	r := &snapshot.Record{TTL: uint32(ttl), DO: b.do, CD: b.cd, NoRD: b.noRD, ForAll: b.forAll, Wildcard: all["wildcard"], Subnet: all["subnet"]}
	if r.Stored, err = moment("stored", all["stored"]); err != nil {
		return nil, err
	}
	if len(r.Wildcard) > snapshot.MaxWildcard {
		return nil, fmt.Errorf("wildcard=%q is too long", clipped(r.Wildcard))
	}
	if _, ok := subnet.Parse(r.Subnet); !ok && r.Subnet != "" && r.Subnet != snapshot.AnySubnet {
		return nil, fmt.Errorf("subnet=%q is not a prefix such as 192.0.2.0/24", clipped(r.Subnet))
	}
	counts, ok := threeNumbers(all["records"])
	if !ok {
		return nil, fmt.Errorf("records=%q is not three numbers", clipped(all["records"]))
	}
	size := 0
	for i, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
		for range counts[i] {
			line, ok := in.next()
			if !ok && in.lines.Err() != nil {
				return nil, in.lines.Err()
			}
			if !ok || strings.HasPrefix(line, ";") {
				return nil, fmt.Errorf("a record is missing: the answer for %s %s has records=%s", words[1], words[3], all["records"])
			}
			rr, err := record(line)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", clipped(line), err)
			}
			if size += dns.Len(rr); size > 16*snapshot.MaxResponse { // as much as compression can save
				return nil, fmt.Errorf("%q: the answer is larger than a message", clipped(line))
			}
			*section = append(*section, rr)
		}
	}
	m.Compress = true
	if r.Response, err = m.Pack(); err != nil {
		return nil, fmt.Errorf("the answer for %s %s is not a message: %w", words[1], words[3], err)
	}
	if len(r.Response) > snapshot.MaxResponse {
		return nil, fmt.Errorf("the answer for %s %s is larger than a message", words[1], words[3])
	}
	return r, nil
}

// threeNumbers reads how many records the sections have.
func threeNumbers(s string) (all [3]uint64, ok bool) {
	words := strings.Split(s, ",")
	if len(words) != len(all) {
		return all, false
	}
	for i, word := range words {
		var err error
		if all[i], err = strconv.ParseUint(word, 10, 16); err != nil {
			return all, false
		}
	}
	return all, true
}

// number reads the word for a class or a type, by its name or, as in TYPE65, by its number.
func number(word, prefix string, names map[string]uint16) (uint16, bool) {
	if n, ok := names[word]; ok {
		return n, true
	}
	digits, ok := strings.CutPrefix(word, prefix)
	n, err := strconv.ParseUint(digits, 10, 16)
	return uint16(n), ok && err == nil
}
