package optcache

import (
	"fmt"
	"slices"
	"strings"
	"time"

	_ "github.com/coredns/coredns/plugin/acl"
	_ "github.com/coredns/coredns/plugin/bufsize"
	_ "github.com/coredns/coredns/plugin/dns64"
	_ "github.com/coredns/coredns/plugin/header"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/metadata"
	_ "github.com/coredns/coredns/plugin/nsid"
	_ "github.com/coredns/coredns/plugin/rewrite"
	_ "github.com/coredns/coredns/plugin/tsig"
	_ "github.com/coredns/coredns/plugin/view"

	"github.com/coredns/coredns/plugin/pkg/response"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file makes the scenarios of the differential test: server blocks with any of the options, and
// histories of a few names in them.

const clearRD = "header {\n\tquery clear rd\n}"

// pick returns one of the words.
func (g *traffic) pick(words ...string) string { return words[g.IntN(len(words))] }

// newDiffScenario returns the scenario of that number.
func newDiffScenario(seed, number uint64) *diffScenario {
	g := newTraffic(seed*0x9e3779b97f4a7c15 + number)
	sc := new(diffScenario)
	g.diffOptions(sc)
	g.diffPlugins(sc)
	sc.fast = g.one(2)
	sc.norec = sc.norec || g.one(4)

	var names []*diffName
	for range 1 + g.IntN(6) {
		n := &diffName{question: g.question(), denied: g.one(2) && !sc.holdsDenials()}
		if g.one(8) {
			n.question.Name = "x." + g.pick("sub.example.org.", "alias.test.")
		}
		if !slices.ContainsFunc(names, func(o *diffName) bool { return strings.EqualFold(o.question.Name, n.question.Name) }) {
			names = append(names, n)
		}
	}
	for range 20 + g.IntN(200) {
		n := names[g.IntN(len(names))]
		sc.steps = append(sc.steps, g.diffStep(n, sc))
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
	sc.raised = strings.Contains(strings.Join(sc.options, "\n"), "success") && strings.HasSuffix(sc.options[0], " 30 20")
	before := len(sc.options)
	maybe(3, "prefetch %d%s", 1+g.IntN(4), g.pick("", " 10s", " 1m", " 1m 10%", " 1h 50%", " 5s 90%", " 30s 11%"))
	sc.oneClass = len(sc.options) > before
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
			sc.waits = timeout != ""
		}
	}
	sc.oneClass = true
	sc.options = append(sc.options, line)
	if !strings.Contains(strings.Join(sc.options, "\n"), "servfail") {
		maybe(2, "servfail 0")
	}
	maybe(4, "serve_stale_policy prefer_positive")
}

func (g *traffic) diffPlugins(sc *diffScenario) {
	for _, line := range []string{
		"metadata", g.pick("log", "log . {\n\tclass error\n}", "log . {\n\tclass denial error\n}"), "prometheus", "dnstap", "dnstap full", "loadbalance", "nsid the-server", "bufsize 1000",
		"dns64 {\n\tprefix 64:ff9b::/96\n}",
		"rewrite name suffix .alias.test .example.org answer auto",
		g.pick("rewrite ttl regex (.*) 7-9", "rewrite ttl substring sub 7-9", "rewrite ttl suffix test 7-9", "rewrite type AAAA A", "rewrite rcode exact x.alias.test NXDOMAIN NOERROR"),
		"acl " + g.pick("{\n\tblock type TXT net 192.0.2.0/24\n}", "example.org {\n\tfilter net 2001:db8::/32\n\tdrop type MX\n}", "{\n\tallow net 192.0.2.7/32\n\tblock\n}"),
		"tsig " + g.pick("", "example.org ") + "{\n\tsecret key.example.org. c2VjcmV0\n\trequire " + g.pick("none", "MX TXT", "all") + "\n}",
		"view some {\n\texpr " + g.pick("name() endsWith 'example.org.'", "type() in ['A', 'AAAA'] || do()", "incidr(client_ip(), '192.0.2.0/24')", "proto() == 'udp' && port() != '53'", "bufsize() < 4096") + "\n}",
		"header {\n\tresponse set aa\n\tresponse clear ra\n}", clearRD,
	} {
		if (sc.oneClass || sc.raised) && (strings.HasPrefix(line, "rewrite name") || strings.HasPrefix(line, "dns64")) {
			continue // the question behind it decides on what the response is
		}
		if g.one(6) && !(strings.HasPrefix(line, "header") && len(sc.plugins) > 0 && strings.HasPrefix(sc.plugins[len(sc.plugins)-1], "header")) {
			sc.plugins = append(sc.plugins, line)
			sc.norec = sc.norec || line == clearRD
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
func (g *traffic) diffStep(n *diffName, sc *diffScenario) diffStep {
	if !n.there || g.one(5) {
		n.there, n.last = true, g.diffUpstream(n, sc)
	}
	s := n.last
	s.jump = diffJumps[g.IntN(len(diffJumps))]
	s.query = g.request(n.question)
	s.query.RecursionDesired = (s.query.RecursionDesired || sc.asks()) && !sc.norec
	s.client = plainClients[g.IntN(len(plainClients))]
	if g.one(150) {
		s.query.Opcode = g.IntN(6)
	}
	if opt := s.query.IsEdns0(); opt != nil && !sc.allows(&s) {
		s.query.Extra = nil
	}
	if g.one(6) {
		// The same client again, so that bits are the same and the entry is found.
		s.query.Extra, s.query.CheckingDisabled = nil, false
	}
	return s
}

// diffUpstream draws what an upstream does.
func (g *traffic) diffUpstream(n *diffName, sc *diffScenario) (s diffStep) {
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
			s.takes = []time.Duration{51e6, 120e6, 905e6, 1103e6, 2507e6, 3911e6}[g.IntN(6)] // no timeout of a verification
		}
		if g.one(10) {
			s.wildcard = g.pick("*.example.org.", "*.sub.example.org.")
		}
		class := !sc.oneClass || !failing(s.response) && denies(s.response) == n.denied || failing(s.response) && !n.denied
		if class && sc.allows(&s) && (!sc.norec || decides(s.response)) {
			return s
		}
	}
}

// allowed reports whether the scenario keeps to what optcache has in common with cache; one that has been
// made shorter may not.
func (sc *diffScenario) allowed() bool {
	denied := make(map[string]bool)
	for _, s := range sc.steps {
		if !sc.allows(&s) {
			return false
		}
		name := strings.ToLower(s.query.Question[0].Name)
		if sc.norec && (s.query.RecursionDesired || !decides(s.response)) || !sc.norec && slices.Contains(sc.plugins, clearRD) {
			return false
		}
		if failing(s.response) {
			continue
		}
		if was, ok := denied[name]; sc.oneClass && ok && was != denies(s.response) {
			return false
		}
		denied[name] = denies(s.response)
	}
	return true
}

// allows reports whether an upstream may do what that step says.
func (sc *diffScenario) allows(s *diffStep) bool {
	m := s.response
	if m == nil {
		return !sc.oneClass || sc.mayFail()
	}
	at := time.Date(2000, 1, 2, 0, 0, 0, 0, time.UTC)
	kind := admit.Classify(m, at)
	const year = 365 * 24 * 3600 // longer than a scenario
	if s.query != nil && s.query.IsEdns0() != nil && s.query.IsEdns0().Do() && admit.SignedFor(m, at) < year {
		return false
	}
	switch {
	case sc.holdsDenials() && !failing(m) && !admit.Answers(m, kind):
		return false
	case kind == response.NameError && len(m.Answer) > 0:
		return false
	case kind == response.Delegation || kind == admit.Incomplete:
		stock, _ := response.Typify(m, at)
		return (!sc.oneClass || kind == admit.Incomplete && !sc.servesStale()) && !sc.raised && (kind == admit.Incomplete || kind == stock || len(m.Ns)+len(m.Extra) == 0)
	case sc.oneClass && !sc.servesStale() && (m.Truncated || kind == response.OtherError || !admit.Keepable(m, kind)):
		return true // what is not kept changes nothing
	case failing(m) && sc.oneClass:
		return sc.mayFail() && m.Rcode == dns.RcodeServerFailure
	case sc.oneClass:
		return !m.Truncated && kind != response.OtherError && admit.Keepable(m, kind) && (!sc.servesStale() || admit.SmallestTTL(m, kind, time.Hour) > 0)
	}
	return true
}

// asks reports whether a plugin asks questions of its own, for which nobody looks what RD=0 would get.
func (sc *diffScenario) asks() bool {
	return slices.ContainsFunc(sc.plugins, func(line string) bool { return strings.HasPrefix(line, "dns64") })
}

// servesStale reports whether the scenario's block has serve_stale.
func (sc *diffScenario) servesStale() bool {
	return strings.Contains(strings.Join(sc.options, "\n"), "serve_stale")
}

// prefetches reports whether the scenario's block has prefetch.
func (sc *diffScenario) prefetches() bool {
	return strings.Contains(strings.Join(sc.options, "\n"), "prefetch")
}

// holdsDenials reports whether cache takes a denial, or its like, for no news of a stale one.
func (sc *diffScenario) holdsDenials() bool {
	return slices.Contains(sc.options, "serve_stale_policy prefer_positive")
}

// mayFail reports whether names that have answers may fail, too. With serve_stale, cache serves failures stale.
func (sc *diffScenario) mayFail() bool {
	return !sc.prefetches() && (!sc.servesStale() || slices.Contains(sc.options, "servfail 0"))
}

// failing reports whether a response is none, or a failure.
func failing(m *dns.Msg) bool {
	return m == nil || m.Rcode == dns.RcodeServerFailure || m.Rcode == dns.RcodeNotImplemented
}

// decides reports whether a response is kept under whatever RD it has come, or under none.
func decides(m *dns.Msg) bool {
	if m == nil {
		return false // kept as SERVFAIL
	}
	kind := admit.Classify(m, time.Date(2000, 1, 2, 0, 0, 0, 0, time.UTC))
	return admit.Conclusive(m, kind) || !admit.Keepable(m, kind)
}

// denies reports whether a response is kept with the denials, if at all.
func denies(m *dns.Msg) bool {
	return m == nil || admit.ClassOf(admit.Classify(m, time.Date(2000, 1, 2, 0, 0, 0, 0, time.UTC))) == record.Denial
}
