package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/optcache/optcache/plugin/control/api"
)

// This file makes text for people: columns, numbers, and answers as rows.

// printable makes one line of text that comes from elsewhere, without what a terminal would obey.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case r == utf8.RuneError || !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s)
}

// table writes rows in columns. The widths are those of the rows so far, so that it suits a list that comes in pages.
type table struct {
	head   []string
	rows   []row
	widths []int
	shown  bool // the head
}

type row struct {
	cells []string
	below []string // lines under it
}

func (t *table) add(below []string, cells ...string) {
	for i, cell := range cells {
		cells[i] = printable(cell)
	}
	t.rows = append(t.rows, row{cells, below})
}

// writeTo writes the rows that were added since the last time.
func (t *table) writeTo(w io.Writer) {
	rows := t.rows
	if t.rows = nil; !t.shown {
		t.shown = true
		t.widths = make([]int, len(t.head))
		rows = slices.Insert(rows, 0, row{cells: t.head})
	}
	for _, r := range rows {
		for i, cell := range r.cells {
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cell))
		}
	}
	var line strings.Builder
	for _, r := range rows {
		line.Reset()
		for i, cell := range r.cells {
			fmt.Fprintf(&line, "%-*s  ", t.widths[i], cell)
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
		for _, b := range r.below {
			fmt.Fprintf(w, "    %s\n", printable(b))
		}
	}
}

// answerTable has the columns of lookup and list.
func answerTable() *table {
	return &table{head: []string{"BLOCK", "NAME", "TYPE", "BITS", "RCODE", "KIND", "SEGMENT", "ACCESSES", "TTL", "LEFT", "STORED", "SOURCE", "BYTES"}}
}

// addAnswer makes a row of an answer, with its records below.
func (t *table) addAnswer(block int, a api.Answer) {
	var bits []string
	for _, b := range []struct {
		set  bool
		name string
	}{{a.DO, "do"}, {a.CD, "cd"}, {a.NoRD, "no_rd"}} {
		if b.set {
			bits = append(bits, b.name)
		}
	}
	if a.Subnet != "" {
		bits = append(bits, a.Subnet)
	}
	if bits == nil {
		bits = []string{"-"}
	}
	qtype := a.Type
	if a.Class != "" && a.Class != "IN" {
		qtype = a.Class + "/" + a.Type
	}
	segment := a.Segment
	if a.Hot {
		segment += ",hot"
	}
	left := strconv.FormatInt(a.Left, 10)
	if a.Stale {
		left += ",stale"
	}
	t.add(a.Records, strconv.Itoa(block), a.Name, qtype, strings.Join(bits, ","), a.Rcode, a.Kind, segment, strconv.FormatUint(uint64(a.Hits), 10),
		strconv.FormatUint(uint64(a.TTL), 10), left, moment(a.Stored), cmp.Or(a.Source, "-"), strconv.Itoa(a.Bytes))
}

// moment is a time, to the second, in UTC.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// number groups digits by commas.
func number[N int | int64 | uint64](n N) string {
	s := fmt.Sprint(n)
	sign := ""
	if strings.HasPrefix(s, "-") {
		sign, s = "-", s[1:]
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return sign + s
}

// size is a number of bytes, in the unit that fits.
func size(n int64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB"}
	if n < 1<<10 {
		return number(n) + " bytes"
	}
	f := float64(n) / (1 << 10)
	for len(units) > 1 && f >= 1<<10 {
		f, units = f/(1<<10), units[1:]
	}
	return fmt.Sprintf("%.1f %s", f, units[0])
}

// share is a part of a whole, in percent.
func share(part, whole float64) string {
	if whole <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", 100*part/whole)
}

// total is the sum of counts by name.
func total[N int64 | uint64](counts map[string]N) (n N) {
	for _, c := range counts {
		n += c
	}
	return n
}

// byName lists counts, the largest first.
func byName[N int64 | uint64](counts map[string]N) string {
	names := slices.Sorted(maps.Keys(counts))
	slices.SortStableFunc(names, func(a, b string) int {
		switch {
		case counts[a] > counts[b]:
			return -1
		case counts[a] < counts[b]:
			return 1
		}
		return 0
	})
	for i, name := range names {
		names[i] = name + " " + number(counts[name])
	}
	return strings.Join(names, ", ")
}

// wrap breaks paragraphs into lines of at most width columns, where their words allow it.
func wrap(text string, width int) string {
	var b strings.Builder
	for i, para := range strings.Split(text, "\n\n") {
		if i > 0 {
			b.WriteString("\n\n")
		}
		column := 0
		for _, word := range strings.Fields(para) {
			switch n := utf8.RuneCountInString(word); {
			case column == 0:
				column = n
			case column+1+n > width:
				b.WriteByte('\n')
				column = n
			default:
				b.WriteByte(' ')
				column += 1 + n
			}
			b.WriteString(word)
		}
	}
	return b.String()
}
