// Package keep keeps answers warm: it has a list of questions, and says when each is to be asked again, before its answer
// expires. It knows neither the cache nor CoreDNS.
package keep

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// Most is the most questions of a list.
const Most = 10_000

// Question is a question of class IN.
type Question struct {
	Name string // in presentation form, lower case, with the dot at its end
	Type uint16
}

// Questions reads NAME [TYPE...], the words of a line. The default types are A and AAAA. An error names the word.
func Questions(words []string) (all []Question, err error) {
	name := strings.ToLower(dns.Fqdn(words[0]))
	if _, ok := dns.IsDomainName(name); !ok || words[0] == "" {
		return nil, fmt.Errorf("%q is not a domain name", words[0])
	}
	if len(words) == 1 {
		return []Question{{name, dns.TypeA}, {name, dns.TypeAAAA}}, nil
	}
	for _, word := range words[1:] {
		t, ok := dns.StringToType[strings.ToUpper(word)]
		switch {
		case !ok, t == dns.TypeANY, t == dns.TypeAXFR, t == dns.TypeIXFR, t == dns.TypeOPT, t == dns.TypeTSIG, t == dns.TypeNone:
			return nil, fmt.Errorf("%q is not a type that can be kept", word)
		}
		all = append(all, Question{name, t})
	}
	return all, nil
}

// maxLine is the longest line of a file, in bytes.
const maxLine = 64 << 10

// Read reads a list of questions, each line NAME [TYPE...]. A hash sign begins a comment. Lines that say the same twice count once.
// The error names the line, in a file of that name, and the word.
func Read(r io.Reader, file string) (all []Question, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	seen := make(map[Question]bool)
	n := 0
	for lines.Scan() {
		n++
		text, _, _ := strings.Cut(lines.Text(), "#")
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		more, err := Questions(words)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, n, err)
		}
		for _, q := range more {
			if !seen[q] {
				seen[q] = true
				all = append(all, q)
			}
		}
		if len(all) > Most {
			return nil, fmt.Errorf("%s:%d: there are more than %d questions", file, n, Most)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s:%d: %w", file, n+1, err)
	}
	return all, nil
}

// without returns the questions of all that are not in known.
func without(all, known []Question) []Question {
	in := make(map[Question]bool, len(known))
	for _, q := range known {
		in[q] = true
	}
	return slices.DeleteFunc(slices.Clone(all), func(q Question) bool { return in[q] })
}
