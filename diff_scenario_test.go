package optcache

import (
	"fmt"
	"slices"
	"strings"
	"time"

	_ "github.com/coredns/coredns/plugin/bufsize"
	_ "github.com/coredns/coredns/plugin/dns64"
	_ "github.com/coredns/coredns/plugin/header"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/metadata"
	_ "github.com/coredns/coredns/plugin/nsid"
	_ "github.com/coredns/coredns/plugin/rewrite"

	"github.com/miekg/dns"
)

// This file makes the scenarios of the differential test: server blocks with any of the options, and
// histories of a few names in them.

// pick returns one of the words.
func (g *traffic) pick(words ...string) string { return words[g.IntN(len(words))] }

// newDiffScenario returns the scenario of that number.
func newDiffScenario(seed, number uint64) *diffScenario {
	g := newTraffic(seed*0x9e3779b97f4a7c15 + number)
	sc := new(diffScenario)
	g.diffOptions(sc)
	g.diffPlugins(sc)
	sc.fast = g.one(2)

	var names []*diffName
	for range 1 + g.IntN(6) {
		n := &diffName{question: g.question(), denied: g.one(2)}
		if g.one(8) {
			n.question.Name = "x." + g.pick("sub.example.org.", "alias.test.")
		}
		if !slices.ContainsFunc(names, func(o *diffName) bool { return strings.EqualFold(o.question.Name, n.question.Name) }) {
			names = append(names, n)
		}
	}
	for range 20 + g.IntN(200) {
		n := names[g.IntN(len(names))]
		sc.steps = append(sc.steps, g.diffStep(n, sc.oneClass))
	}
	return sc
}

// diffName is a question that is asked again and again, and what is answered for the time being.
type diffName struct {
	question dns.Question
	denied   bool // if all its answers are of one class
	last     diffStep
	there    bool
}

// diffOptions draws the cache's options.
func (g *traffic) diffOptions(sc *diffScenario) {
	sc.head = g.pick("", "", "", "30", "5", "3600", "7200 .", "example.org", "60 example.org sub.example.org 10.0.0.0/24")
	maybe := func(in int, format string, args ...any) {
		if g.one(in) {
			sc.options = append(sc.options, fmt.Sprintf(format, args...))
		}
	}
	maybe(3, "success %d%s", 2000+g.IntN(8000), g.pick("", " 10", " 3600 0", " 60 1", " 30 20", " 7200 5"))
	maybe(3, "denial %d%s", 2000+g.IntN(8000), g.pick("", " 10", " 1800 0", " 60 1", " 30 20", " 7200 5"))
	maybe(3, "servfail %s", g.pick("0", "1s", "3s", "5s", "60s", "5m"))
	maybe(3, "prefetch %d%s", 1+g.IntN(4), g.pick("", " 10s", " 1m", " 1m 10%", " 1h 50%", " 5s 90%", " 30s 11%"))
	maybe(6, "keepttl")
	maybe(8, "disable %s%s", g.pick("success", "denial"), g.pick("", " sub.example.org", " example.org other.net"))
	if g.one(3) {
		return
	}
	line := "serve_stale" + g.pick("", " 10s", " 1m", " 30m", " 24h")
	if strings.Count(line, " ") == 1 {
		rest := g.pick("", " 0s", " 5s", " 30s", " 0s 0s", " 5s 10s", " 30s 5m", " 0s 1s")
		if g.one(2) {
			line += g.pick("", " immediate"+rest)
		} else {
			timeout := g.pick("", " 0s", " 100ms", " 1s", " 3s")
			line += " verify" + timeout
			if timeout != "" {
				line += rest
			}
			sc.oneClass = timeout == "" || timeout == " 0s"
		}
	}
	sc.options = append(sc.options, line)
	maybe(4, "serve_stale_policy prefer_positive")
}

func (g *traffic) diffPlugins(sc *diffScenario) {
	for _, line := range []string{
		"metadata", "log", "prometheus", "loadbalance", "nsid the-server", "bufsize 1000",
		"dns64 {\n\tprefix 64:ff9b::/96\n}",
		"rewrite name suffix .alias.test .example.org answer auto", "rewrite ttl regex (.*) 7-9",
		"header {\n\tresponse set aa\n\tresponse clear ra\n}", "header {\n\tquery clear rd\n}",
	} {
		if sc.oneClass && strings.HasPrefix(line, "rewrite name") {
			continue // what is behind it decides on the class
		}
		if g.one(6) && !(strings.HasPrefix(line, "header") && len(sc.plugins) > 0 && strings.HasPrefix(sc.plugins[len(sc.plugins)-1], "header")) {
			sc.plugins = append(sc.plugins, line)
		}
	}
	if raceEnabled || g.one(2) {
		sc.extra = append(sc.extra, "max_memory 2MB")
	}
	sc.extra = append(sc.extra, g.pick("hot_cache_percentage 0", "hot_cache_percentage 50", "hot_cache_percentage auto", "hot_cache_percentage 10"),
		g.pick("hot_cache_promotion_threshold 1", "hot_cache_promotion_threshold 2", "hot_cache_promotion_threshold 3"),
		g.pick("cache_line_optimization true", "cache_line_optimization false"))
}

// Times are whole milliseconds: optcache does not tell requests for an entry apart any finer.
var diffJumps = []time.Duration{0, 0, 0, 0, 1e6, 400e6, 999e6, 1e9, 1e9, 1001e6, 2e9, 3e9, 5e9, 7e9, 10e9, 20e9, 30e9, 60e9, 300e9, 1000e9, 4000e9, 90000e9}

// diffStep draws a query for a name, and what the upstream says to it from now on.
func (g *traffic) diffStep(n *diffName, oneClass bool) diffStep {
	if !n.there || g.one(5) {
		n.there, n.last = true, g.diffUpstream(n, oneClass)
	}
	s := n.last
	s.jump = diffJumps[g.IntN(len(diffJumps))]
	s.query = g.request(n.question)
	s.client = plainClients[g.IntN(len(plainClients))]
	if g.one(150) {
		s.query.Opcode = g.IntN(6)
	}
	if g.one(6) {
		// The same client again, so that bits are the same and the entry is found.
		s.query.Extra, s.query.CheckingDisabled = nil, false
	}
	return s
}

// diffUpstream draws what an upstream does.
func (g *traffic) diffUpstream(n *diffName, oneClass bool) (s diffStep) {
	for {
		s = diffStep{response: g.response(n.question)}
		if g.one(3) { // times that the jumps go over
			ttl := uint32(g.IntN(12))
			for _, section := range [][]dns.RR{s.response.Answer, s.response.Ns, s.response.Extra} {
				for _, rr := range section {
					if rr.Header().Rrtype != dns.TypeOPT {
						rr.Header().Ttl = ttl
					}
				}
			}
		}
		switch s.verbatim = g.one(20); {
		case s.verbatim:
			q := &s.response.Question
			switch g.IntN(6) {
			case 0:
				*q = nil
			case 1:
				*q = append(*q, (*q)[0])
			case 2:
				(*q)[0].Name = "other.example.org."
			case 3:
				(*q)[0].Qtype++
			case 4:
				(*q)[0].Qclass++
			case 5:
				(*q)[0].Name = g.respelled((*q)[0].Name)
			}
		case g.one(10):
			s.response = nil
		}
		if g.one(4) {
			s.takes = []time.Duration{51e6, 120e6, 905e6, 1103e6, 2507e6, 6011e6}[g.IntN(6)] // no timeout of a verification
		}
		if g.one(10) {
			s.wildcard = g.pick("*.example.org.", "*.sub.example.org.")
		}
		if !oneClass || denies(s.response) == n.denied {
			return s
		}
	}
}

// allowed reports whether the scenario keeps to what optcache has in common with cache; one that has been
// made shorter may not.
func (sc *diffScenario) allowed() bool {
	denied := make(map[string]bool)
	for _, s := range sc.steps {
		name := strings.ToLower(s.query.Question[0].Name)
		if was, ok := denied[name]; sc.oneClass && ok && was != denies(s.response) {
			return false
		}
		denied[name] = denies(s.response)
	}
	return true
}

// denies reports whether a response is kept with the denials, if at all.
func denies(m *dns.Msg) bool {
	return m == nil || classOf(classify(m, time.Date(2000, 1, 2, 0, 0, 0, 0, time.UTC))) == denial
}
