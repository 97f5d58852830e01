package test

import (
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/miekg/dns"
	"sigs.k8s.io/yaml"

	"github.com/optcache/optcache/test/redis"
)

// This file checks what the repository's documents say about themselves: links, series, options, the man page.

// document is a Markdown file of the repository.
type document struct {
	path string // from the root, with slashes
	text string
}

// documents returns all Markdown files, but for those in folders that are no part of the repository.
func documents(t testing.TB) (all []document) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "bin" || d.Name() == "testdata" || d.Name() == "node_modules") {
			return fs.SkipDir
		}
		if d.Type().IsRegular() && strings.HasSuffix(name, ".md") {
			rel, err := filepath.Rel(root, name)
			if err != nil {
				return err
			}
			all = append(all, document{filepath.ToSlash(rel), readFile(t, name)})
		}
		return nil
	})
	if err != nil || len(all) < 10 {
		t.Fatalf("documents: %d, %v", len(all), err)
	}
	return all
}

// prose returns a document's lines, with those empty that are in a fence, in front matter, or indented as code.
func prose(text string) []string {
	lines := strings.Split(text, "\n")
	fence := ""
	for i, line := range lines {
		mark := strings.TrimLeft(line, " ")
		switch {
		case fence == "" && i == 0 && line == "+++":
			fence = "+++"
		case fence == "" && (strings.HasPrefix(mark, "~~~") || strings.HasPrefix(mark, "```")):
			fence = mark[:3]
		case fence != "" && strings.HasPrefix(mark, fence):
			fence = ""
		case fence == "" && !(strings.HasPrefix(line, "    ") && (i == 0 || lines[i-1] == "")):
			continue
		}
		lines[i] = ""
	}
	return lines
}

var (
	codeSpan   = regexp.MustCompile("`[^`]*`")
	inlineLink = regexp.MustCompile(`\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)`)
	reference  = regexp.MustCompile(`(?m)^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$`)
	htmlLink   = regexp.MustCompile(`(?i)<(?:a|img)\s[^>]*(?:href|src)="([^"]*)"`)
	heading    = regexp.MustCompile(`^#{1,6} +(.*?)(?: +#+)? *$`)
	linkText   = regexp.MustCompile(`!?\[([^\]]*)\]\([^)]*\)`)
)

// links returns where the links of a document lead.
func links(text string) (targets []string) {
	text = codeSpan.ReplaceAllString(strings.Join(prose(text), "\n"), "")
	for _, form := range []*regexp.Regexp{inlineLink, reference, htmlLink} {
		for _, m := range form.FindAllStringSubmatch(text, -1) {
			targets = append(targets, m[1])
		}
	}
	return targets
}

// anchors returns the anchors that GitHub gives a document's headings.
func anchors(text string) []string {
	var all []string
	seen := map[string]int{}
	for _, line := range prose(text) {
		m := heading.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		slug := slugOf(m[1])
		n := seen[slug]
		if seen[slug]++; n > 0 {
			slug = fmt.Sprintf("%s-%d", slug, n)
		}
		all = append(all, slug)
	}
	return all
}

// slugOf makes the anchor of a heading by GitHub's rules: lower case, letters, digits, hyphens and underscores stay, a space
// becomes a hyphen, everything else goes.
func slugOf(heading string) string {
	heading = linkText.ReplaceAllString(heading, "$1")
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-', r == '_', unicode.IsLetter(r), unicode.IsNumber(r), unicode.IsMark(r):
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}

func TestSlugs(t *testing.T) {
	t.Parallel()
	const text = "# Is it *working*?\n\n## What `cache` is, and isn't\n\n~~~ sh\n# no heading\n~~~\n\n## A_b - c\n\n## [Text](x.md) 2 ##\n\n## Is it working\n\n## ÄÖ & Ü\n"
	want := []string{"is-it-working", "what-cache-is-and-isnt", "a_b---c", "text-2", "is-it-working-1", "äö--ü"}
	if got := anchors(text); !slices.Equal(got, want) {
		t.Errorf("anchors are %q, want %q", got, want)
	}
}

func TestLinksAreFound(t *testing.T) {
	t.Parallel()
	const text = "[a](x.md#y) and\n[two\nlines](z) `[no](code)` ![i](i.svg \"title\")\n\n    [no](indented)\n\n~~~\n[no](fenced)\n~~~\n\n[r]: https://example.org\n<img src=\"p.png\">\n"
	want := []string{"x.md#y", "z", "i.svg", "https://example.org", "p.png"}
	if got := links(text); !slices.Equal(got, want) {
		t.Errorf("links are %q, want %q", got, want)
	}
}

// ownPages is where files of the repository are on the network.
const ownPages = "https://github.com/optcache/optcache/blob/main/"

// Each link of each document leads to a file of the repository, and to a heading in it. Of other links only the form is
// checked.
func TestLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	for _, doc := range documents(t) {
		for _, link := range links(doc.text) {
			if err := checkLink(t, doc, link); err != nil {
				t.Errorf("%s: %s: %v", doc.path, link, err)
			}
		}
	}
}

func checkLink(t *testing.T, doc document, link string) error {
	u, err := url.Parse(link)
	if err != nil {
		return err
	}
	target := path.Join(path.Dir(doc.path), u.Path)
	switch own, isOwn := strings.CutPrefix(link, ownPages); {
	case isOwn:
		target, _, _ = strings.Cut(own, "#")
	case u.Scheme == "http" || u.Scheme == "https":
		if u.Host == "" || strings.ContainsAny(link, `<>"\^{|}`) {
			return fmt.Errorf("is no address")
		}
		return nil
	case u.Scheme != "" || strings.HasPrefix(u.Path, "/"):
		return fmt.Errorf("is neither relative nor an address on the network")
	case u.Path == "":
		target = doc.path
	}
	name := filepath.Join(root, filepath.FromSlash(target))
	if !filepath.IsLocal(filepath.FromSlash(target)) {
		return fmt.Errorf("leads out of the repository")
	}
	if _, err := os.Stat(name); err != nil {
		return err
	}
	if u.Fragment == "" {
		return nil
	}
	if all := anchors(readFile(t, name)); !slices.Contains(all, u.Fragment) {
		return fmt.Errorf("has no heading for #%s; there are %q", u.Fragment, all)
	}
	return nil
}

// proseWidth is where lines of prose are wrapped.
const proseWidth = 120

// Prose is wrapped alike. Tables, and lines that are one word, cannot be.
func TestProseIsWrapped(t *testing.T) {
	t.Parallel()
	for _, doc := range documents(t) {
		for i, line := range prose(doc.text) {
			words := strings.Fields(line)
			if n := utf8.RuneCountInString(line); n > proseWidth && len(words) > 2 && words[0][0] != '|' {
				t.Errorf("%s:%d has %d characters, and is wrapped at %d", doc.path, i+1, n, proseWidth)
			}
		}
	}
}

var (
	shownSeries = regexp.MustCompile("`(coredns_optcache_[a-z_]+)(?:\\{([a-z, ]*)\\})?`")
	namedSeries = regexp.MustCompile(`coredns_optcache_[a-z_]*[a-z]\b`)
	labelName   = regexp.MustCompile(`([a-z]+)="`)
)

// README describes the series that there are, with their labels, and no document names another one.
func TestDocumentsNameTheSeries(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the fast path's series are on Linux")
	}
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "prometheus 127.0.0.1:${metrics}",
		"optcache {\nfastpath 1\nserve_stale\nsuccess 9984 3600 1\ncache_file_path "+filepath.Join(t.TempDir(), "answers")+" 1s\n"+
			fmt.Sprintf("pool documents\nshared valkey://127.0.0.1:%d\nshared_secret ", redis.Start(t).Port)+redis.Secret(t, "a secret of the tests")+"\n}")+
		"example.net:0 {\n\tbind 127.0.0.1\n\toptcache {\n\t\twarm_from http://127.0.0.1:1\n\t}\n\twhoami\n}\n") // has no fast path

	there := map[string]string{} // labels by name
	ofHistogram := func(name string) string {
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, suffix)
		}
		return name
	}
	misses := 0
	eventually(t, func() error {
		ask(t, overUDP(s.addr("dns")), query("short.example.org.", dns.TypeA))
		misses++
		ask(t, overUDP(s.addr("dns")), query(hostName(misses), dns.TypeA)) // which the second level is asked for, once it is there
		for _, line := range scrape(t, s.addr("metrics")) {
			name, rest, ok := strings.Cut(line, "{")
			if !ok || !strings.HasPrefix(name, "coredns_optcache_") {
				continue
			}
			name = ofHistogram(name)
			var labels []string
			for _, m := range labelName.FindAllStringSubmatch(rest, -1) {
				if m[1] != "le" {
					labels = append(labels, m[1])
				}
			}
			there[name] = sorted(labels)
		}
		for _, late := range []string{"coredns_optcache_snapshot_age_seconds", "coredns_optcache_stale_age_seconds", "coredns_optcache_shared_duration_seconds"} {
			if there[late] == "" {
				return fmt.Errorf("there is no %s yet", late)
			}
		}
		return nil
	})

	described := map[string]string{}
	readme := readFile(t, filepath.Join(root, "README.md"))
	for _, m := range shownSeries.FindAllStringSubmatch(readme, -1) {
		if m[2] != "" {
			described[m[1]] = sorted(strings.Split(m[2], ", "))
		}
	}
	// The kernel may not say, or not in time, what is on huge pages.
	for _, of := range []string{"memory", "pool_memory"} {
		if huge := "coredns_optcache_" + of + "_huge_bytes"; there[huge] == "" {
			there[huge] = there["coredns_optcache_"+of+"_bytes"]
		}
	}
	for _, name := range slices.Sorted(maps.Keys(there)) {
		if described[name] != there[name] {
			t.Errorf("%s has the labels %q, and README.md describes %q", name, there[name], described[name])
		}
	}
	for _, doc := range documents(t) {
		for _, name := range namedSeries.FindAllString(doc.text, -1) {
			if there[ofHistogram(name)] == "" {
				t.Errorf("%s names %s, which there is not", doc.path, name)
			}
		}
	}
}

func sorted(labels []string) string {
	slices.Sort(labels)
	return strings.Join(labels, ", ")
}

// syntaxBlock is the long form of a plugin's syntax.
var syntaxBlock = regexp.MustCompile(`(?ms)^~~~ txt\noptcache \[TTL\] \[ZONES\.\.\.\] \{\n(.*?)^\}\n~~~`)

// README describes each option of its syntax, and the page for coredns.io has the same syntax.
func TestEveryOptionIsDescribed(t *testing.T) {
	t.Parallel()
	readme := readFile(t, filepath.Join(root, "README.md"))
	syntax := syntaxBlock.FindStringSubmatch(readme)
	if syntax == nil {
		t.Fatal("README.md has no syntax")
	}
	for line := range strings.Lines(syntax[1]) {
		words := strings.Fields(line)
		if len(words) > 0 && !regexp.MustCompile("\n *\\* (`[a-z_]+` and )?`"+words[0]+"`").MatchString(readme) {
			t.Errorf("README.md does not describe %s", words[0])
		}
	}
	page := syntaxBlock.FindStringSubmatch(readFile(t, filepath.Join(root, "docs", "coredns.io", "optcache.md")))
	if page == nil || page[1] != syntax[1] {
		t.Error("docs/coredns.io/optcache.md has another syntax than README.md")
	}
}

// monitoringRule is a rule for Prometheus: one that records, or an alarm.
type monitoringRule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

// monitoringRules returns the rules of deploy/monitoring.
func monitoringRules(t testing.TB) (all []monitoringRule) {
	t.Helper()
	var file struct {
		Groups []struct {
			Name  string
			Rules []monitoringRule
		}
	}
	if err := yaml.UnmarshalStrict([]byte(readFile(t, filepath.Join(root, "deploy", "monitoring", "rules.yml"))), &file); err != nil {
		t.Fatalf("the rules: %v", err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// Each alarm of the rules for Prometheus has a section that says what it means, and leads there.
func TestAlarmsAreExplained(t *testing.T) {
	t.Parallel()
	const page = "docs/operations.md"
	doc := readFile(t, filepath.Join(root, filepath.FromSlash(page)))
	var explained []string
	for _, m := range regexp.MustCompile(`(?m)^### (Optcache\w+)$`).FindAllStringSubmatch(doc, -1) {
		explained = append(explained, m[1])
	}
	var alarms []string
	for _, r := range monitoringRules(t) {
		if r.Alert == "" {
			continue
		}
		alarms = append(alarms, r.Alert)
		if want := ownPages + page + "#" + slugOf(r.Alert); r.Annotations["runbook_url"] != want {
			t.Errorf("%s leads to %q, want %s", r.Alert, r.Annotations["runbook_url"], want)
		}
		for _, annotation := range []string{"summary", "description"} {
			if r.Annotations[annotation] == "" {
				t.Errorf("%s has no %s", r.Alert, annotation)
			}
		}
		if severity := r.Labels["severity"]; !slices.Contains([]string{"critical", "warning", "info"}, severity) {
			t.Errorf("%s has the severity %q", r.Alert, severity)
		}
	}
	if len(alarms) == 0 || !slices.Equal(alarms, explained) {
		t.Errorf("alarms are %q, and explained are %q", alarms, explained)
	}
}

// recordedName is a series that a rule records.
var recordedName = regexp.MustCompile(`\b[a-z_]+:optcache_\w+:\w+\b`)

// What documents and other rules name as recorded is recorded.
func TestRecordedNamesAreRecorded(t *testing.T) {
	t.Parallel()
	rules := monitoringRules(t)
	texts := documents(t)
	for _, r := range rules {
		texts = append(texts, document{r.Record + r.Alert, r.Expr})
	}
	for _, text := range texts {
		for _, name := range recordedName.FindAllString(text.text, -1) {
			if !slices.ContainsFunc(rules, func(r monitoringRule) bool { return r.Record == name }) {
				t.Errorf("%s names %s, which no rule records", text.path, name)
			}
		}
	}
}

// The table of ideas and places names files and folders that there are.
func TestArchitectureNamesPlaces(t *testing.T) {
	t.Parallel()
	_, table, ok := strings.Cut(readFile(t, filepath.Join(root, "docs", "architecture.md")), "\n## Idea and place\n")
	places := codeSpan.FindAllString(table, -1)
	if !ok || len(places) == 0 {
		t.Fatal("docs/architecture.md has no table of places")
	}
	for _, place := range places {
		if _, err := os.Stat(filepath.Join(root, filepath.FromSlash(strings.Trim(place, "`")))); err != nil {
			t.Error(err)
		}
	}
}

// Documents name the version of CoreDNS that go.mod has.
func TestDocumentsNameTheVersion(t *testing.T) {
	t.Parallel()
	m := regexp.MustCompile(`(?m)^\s*github\.com/coredns/coredns v(\S+)`).FindStringSubmatch(readFile(t, filepath.Join(root, "go.mod")))
	if m == nil {
		t.Fatal("go.mod does not name CoreDNS")
	}
	named := regexp.MustCompile(`CoreDNS\*? (?:version )?v?(\d+\.\d+\.\d+)`)
	for _, doc := range documents(t) {
		for _, version := range named.FindAllStringSubmatch(doc.text, -1) {
			if version[1] != m[1] {
				t.Errorf("%s is about CoreDNS %s, and go.mod has %s", doc.path, version[1], m[1])
			}
		}
	}
}

// The man pages that are here are those that `make man` makes of README.md and of the command's help.
func TestManPagesAreCurrent(t *testing.T) {
	t.Parallel()
	needs(t, "make", "awk")
	dir := t.TempDir()
	plugin, command := filepath.Join(dir, "page.7"), filepath.Join(dir, "page.1")
	cmd := exec.CommandContext(t.Context(), "make", "--no-print-directory", "man", "MAN="+plugin, "MAN_CTL="+command)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		if regexp.MustCompile(`dial tcp|no such host|module lookup disabled`).Match(out) {
			t.Skipf("the program that makes it is not here, and cannot be fetched:\n%s", out)
		}
		t.Fatalf("make man: %v\n%s", err, out)
	}
	for name, made := range map[string]string{"coredns-optcache.7": plugin, "optcachectl.1": command} {
		if readFile(t, made) != readFile(t, filepath.Join(root, "man", name)) {
			t.Errorf("man/%s is not what its source says: run `make man`", name)
		}
	}
}
