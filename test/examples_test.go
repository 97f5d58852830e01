package test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// This file starts every Corefile that the repository shows to somebody.

// Only where it listens and whom it asks is changed: all of it becomes loopback, with ports that
// the kernel chooses.
func TestExamplesAnswer(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob(filepath.Join(root, "examples", "Corefile.*"))
	if err != nil || len(paths) < 5 {
		t.Fatalf("examples: %v, %v", paths, err)
	}
	texts := map[string]string{}
	for _, path := range append(paths, filepath.Join(root, "Corefile")) {
		texts[filepath.Base(path)] = readFile(t, path)
	}
	for _, doc := range documents(t) {
		for i, text := range snippets(doc.text) {
			texts[fmt.Sprintf("%s, no. %d", doc.path, i+1)] = text
		}
	}
	for _, path := range []string{"README.md", "docs/migration.md"} {
		if texts[path+", no. 1"] == "" {
			t.Errorf("%s shows no Corefile", path)
		}
	}
	env := variables(readFile(t, filepath.Join(root, "examples", "heimdall.env")))

	for name, text := range texts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			c := local(t, text, u.addr)
			c.text = snapshotFile.ReplaceAllString(c.text, "${1}"+filepath.Join(t.TempDir(), "answers"))
			c.text = controlAt.ReplaceAllString(c.text, "${1}unix://"+filepath.Join(shortDir(t), "control.sock"))
			s := start(t, c.text, slices.Concat(env, []string{"OPTCACHE_UPSTREAMS=" + u.addr})...)
			if len(c.blocks) == 0 {
				t.Fatalf("no server block has optcache: %s", text)
			}
			for _, b := range c.blocks {
				seenFromMemory(t, s, c, b)
			}
		})
	}
}

// `make run`, but for the ports: the name of the README's first lines, and what /metrics says.
func TestMakeRun(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	c := local(t, readFile(t, filepath.Join(root, "Corefile")), u.addr)
	s := start(t, c.text, "OPTCACHE_UPSTREAMS="+u.addr)
	send := overUDP(s.addr("p1053"))
	q := query("www.example.org.", dns.TypeA)
	first := ttl(t, ask(t, send, q))
	eventually(t, func() error {
		if now := ttl(t, ask(t, send, q)); now >= first {
			return fmt.Errorf("TTL was %d and is %d", first, now)
		}
		return nil
	})
	if n := sum(t, s.addr("p9153"), "coredns_optcache_misses_total"); n != 1 {
		t.Errorf("%v misses", n)
	}
	if n := sum(t, s.addr("p9153"), "coredns_optcache_hits_total", `type="success"`); n < 1 {
		t.Errorf("%v hits", n)
	}
	if u.count("www.example.org.", dns.TypeA) != 0 {
		t.Error("example.org is not answered by the embedded upstream")
	}
	// Everything else goes to the system's resolvers, once.
	for range 3 {
		ask(t, send, query("www.example.net.", dns.TypeA))
	}
	if n := u.count("www.example.net.", dns.TypeA); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// seenFromMemory asks a block for its name twice, and fails the test if the second answer is not
// from a cache.
func seenFromMemory(t *testing.T, s *server, c localCorefile, b localBlock) {
	t.Helper()
	hits := func() float64 {
		return sum(t, s.addr(c.metrics), "coredns_optcache_hits_total") + sum(t, s.addr(c.metrics), "coredns_cache_hits_total")
	}
	before := hits()
	for range 2 {
		m := ask(t, overUDP(s.addr(b.port)), query(b.name, dns.TypeA))
		if m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0 {
			t.Errorf("%s: %v", b.name, m)
		}
	}
	eventually(t, func() error { // a worker of the fast path answers first, and counts then
		if got := hits() - before; got != 1 {
			return fmt.Errorf("%s: two queries, %v hits", b.name, got)
		}
		return nil
	})
}

// localCorefile is a Corefile that was changed to stay on loopback.
type localCorefile struct {
	text    string
	blocks  []localBlock // those with optcache
	metrics string       // the port of /metrics
}

// localBlock is the port of a server block, and a name that it answers through optcache.
type localBlock struct{ port, name string }

var (
	// blockHead is the line that opens a server block: its keys.
	blockHead = regexp.MustCompile(`(?m)^([^\s#{}][^{}#\n]*)\{[ \t]*$`)
	// listens are the plugins with an address of their own, and where it is by default.
	listens = regexp.MustCompile(`(?m)^([ \t]*)(prometheus|health|ready|pprof)(?:[ \t]+([^\s{]+))?`)
	ports   = map[string]string{"prometheus": "9153", "health": "8080", "ready": "8181", "pprof": "6053"}
	binds   = regexp.MustCompile(`(?m)^[ \t]+bind[ \t].*\n`)
	// forwards are where a block asks, but for the variables that the binary sets.
	forwards = regexp.MustCompile(`(?m)^([ \t]*forward[ \t]+\S+)((?:[ \t]+[^\s{]+)+)`)
	ours     = regexp.MustCompile(`(?m)^[ \t]*optcache\b(.*)$`)
	// snapshotFile is where a block keeps its answers: in a folder that there need not be.
	snapshotFile = regexp.MustCompile(`(?m)^([ \t]*cache_file_path[ \t]+)\S+`)
	// controlAt is where the control interface is: in a folder that there need not be, or at a port.
	controlAt = regexp.MustCompile(`(?m)^([ \t]*control[ \t]+)\S+`)
	cluster   = regexp.MustCompile(`(?m)^([ \t]*kubernetes\b[^{\n]*)\{`)
)

// local changes a Corefile so that it stays on loopback: ports become ones that the kernel
// chooses (the same where they were the same), addresses 127.0.0.1, upstreams the one given, the
// API server of a cluster an empty one. Nothing else is touched, but a /metrics is added to the
// blocks with optcache that have none. A fragment without server block gets one.
func local(t testing.TB, text, upstream string) (c localCorefile) {
	t.Helper()
	if head := blockHead.FindStringIndex(text); head == nil || ours.FindStringIndex(text)[0] <= head[0] {
		fragment := "\t" + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n\t")
		if !forwards.MatchString(fragment) {
			fragment += "\n\tforward . 192.0.2.53"
		}
		text = ".:53 {\n" + fragment + "\n}\n"
	}
	heads := blockHead.FindAllStringSubmatchIndex(text, -1)
	served := map[string]bool{} // ports of the Corefile
	for _, h := range heads {
		for key := range strings.FieldsSeq(text[h[2]:h[3]]) {
			_, port := splitKey(key)
			served[port] = true
		}
	}

	var out strings.Builder
	for i, h := range heads {
		end := len(text)
		if i+1 < len(heads) {
			end = heads[i+1][0]
		}
		body := text[h[1]:end]
		var keys []string
		var firstPort, firstZone string
		for key := range strings.FieldsSeq(text[h[2]:h[3]]) {
			zone, port := splitKey(key)
			if i := strings.Index(key, "://"); i >= 0 {
				t.Fatalf("%s: this test knows plain DNS only", key)
			}
			if firstPort == "" {
				firstZone, firstPort = zone, port
			}
			keys = append(keys, zone+":"+loopbackPort(port))
		}

		body = binds.ReplaceAllString(body, "")
		body = listens.ReplaceAllStringFunc(body, func(line string) string {
			m := listens.FindStringSubmatch(line)
			port := ports[m[2]]
			if i := strings.LastIndexByte(m[3], ':'); i >= 0 {
				port = m[3][i+1:]
			}
			if m[2] == "prometheus" {
				c.metrics = "p" + port
			}
			return m[1] + m[2] + " 127.0.0.1:" + loopbackPort(port)
		})
		body = forwards.ReplaceAllStringFunc(body, func(line string) string {
			m := forwards.FindStringSubmatch(line)
			to := m[1]
			for addr := range strings.FieldsSeq(m[2]) {
				host, port, _ := strings.Cut(addr, ":")
				switch {
				case strings.HasPrefix(addr, "{$"):
					to += " " + addr
				case host == "127.0.0.1" && served[port]:
					to += " " + host + ":" + loopbackPort(port)
				case !strings.HasSuffix(to, " "+upstream): // forward asks nobody twice
					to += " " + upstream
				}
			}
			return to
		})
		if cluster.MatchString(body) {
			api := newEmptyCluster(t)
			body = cluster.ReplaceAllString(body, "${1}{\n endpoint "+api)
		}
		if m := ours.FindStringSubmatch(body); m != nil {
			c.blocks = append(c.blocks, localBlock{"p" + firstPort, nameFor(firstZone, m[1])})
			if !strings.Contains(body, "prometheus") {
				c.metrics = "p9153"
				body = "\nprometheus 127.0.0.1:" + loopbackPort("9153") + body
			}
		}
		out.WriteString(strings.Join(keys, " ") + " {\nbind 127.0.0.1" + body + "\n")
	}
	c.text = out.String()
	return c
}

func loopbackPort(port string) string { return "${p" + port + "}" }

// splitKey splits the key of a server block into zone and port.
func splitKey(key string) (zone, port string) {
	zone, port, found := strings.Cut(strings.TrimSuffix(key, ","), ":")
	if !found {
		port = "53"
	}
	return zone, port
}

// nameFor makes a name that a block for a zone answers through optcache, of which args are the
// words after it.
func nameFor(zone, args string) string {
	for word := range strings.FieldsSeq(args) {
		if word != "{" && strings.Trim(word, "0123456789") != "" {
			zone = word
			break
		}
	}
	if zone == "." {
		zone = "example.org"
	}
	return "www." + dns.Fqdn(zone)
}

// snippets returns what is fenced as a Corefile.
func snippets(markdown string) (found []string) {
	fenced := regexp.MustCompile("(?ms)^(?:~~~|```) *[Cc]orefile *\n(.*?)^(?:~~~|```) *$")
	for _, m := range fenced.FindAllStringSubmatch(markdown, -1) {
		if ours.MatchString(m[1]) {
			found = append(found, m[1])
		}
	}
	return found
}

// variables returns the lines of an environment file that set one.
func variables(file string) []string {
	return slices.DeleteFunc(strings.Split(file, "\n"), func(line string) bool {
		return strings.HasPrefix(line, "#") || !strings.Contains(line, "=")
	})
}

// newEmptyCluster serves as much of the API of Kubernetes as the kubernetes plugin asks a cluster
// for that has nothing in it, and returns its address.
func newEmptyCluster(t testing.TB) string {
	t.Helper()
	kinds := map[string]string{"services": "ServiceList", "namespaces": "NamespaceList", "pods": "PodList", "endpointslices": "EndpointSliceList"}
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		kind, group := kinds[filepath.Base(r.URL.Path)], "v1"
		if strings.HasPrefix(r.URL.Path, "/apis/") {
			group = strings.Join(strings.Split(r.URL.Path, "/")[2:4], "/")
		}
		switch {
		case kind == "":
			http.NotFound(w, r)
		case r.URL.Query().Has("sendInitialEvents"):
			// As an API server of before Kubernetes 1.27 says: list, then watch.
			w.WriteHeader(http.StatusUnprocessableEntity)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)
		case r.URL.Query().Has("watch"):
			w.WriteHeader(http.StatusOK)
			http.NewResponseController(w).Flush()
			<-r.Context().Done() // nothing ever happens
		default:
			fmt.Fprintf(w, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"1"},"items":[]}`, kind, group)
		}
	}))
	t.Cleanup(func() {
		api.CloseClientConnections()
		api.Close()
	})
	return api.URL
}
