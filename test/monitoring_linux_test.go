package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/child"
	"github.com/optcache/optcache/test/freeport"
	"github.com/optcache/optcache/test/redis"
)

// This file holds deploy/monitoring against a Prometheus that watches a server under load. papers_test.go holds it against
// the documents.

// mayBeEmpty are series whose queries need not return data, and why. All others must.
var mayBeEmpty = map[string]string{
	"coredns_optcache_memory_huge_bytes":      "the kernel may not say, or not in time, what is on huge pages",
	"coredns_optcache_pool_memory_huge_bytes": "the same",
}

// dashboard is as much of the dashboard as is checked.
type dashboard struct {
	SchemaVersion int
	Templating    struct {
		List []struct{ Name, Type, Definition string }
	}
	Panels []panel
}

type panel struct {
	ID                       int
	Type, Title, Description string
	Datasource               struct{ Type, UID string }
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []struct{ RefID, Expr, LegendFormat string }
}

func monitoringDashboard(t testing.TB) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(root, "deploy", "monitoring", "dashboard.json"))), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// The dashboard is one that Grafana 10 reads, and can be used: no panel lies on another, each says what it shows, and the
// data source and the variables can be chosen.
func TestDashboardHoldsTogether(t *testing.T) {
	t.Parallel()
	d := monitoringDashboard(t)
	if d.SchemaVersion < 38 || d.SchemaVersion > 41 {
		t.Errorf("schemaVersion is %d", d.SchemaVersion)
	}
	var names []string
	for _, v := range d.Templating.List {
		names = append(names, v.Name)
	}
	if want := []string{"datasource", "job", "server", "zones"}; !slices.Equal(names, want) {
		t.Errorf("variables are %q, want %q", names, want)
	}
	ids, titles := map[int]bool{}, map[string]bool{}
	taken := map[[2]int]string{}
	section := ""
	for _, p := range d.Panels {
		if p.Type == "row" {
			section = p.Title
		}
		name := section + "/" + p.Title
		if p.ID == 0 || ids[p.ID] || p.Title == "" || titles[name] {
			t.Errorf("%s: the id %d or the title is there twice, or missing", name, p.ID)
		}
		ids[p.ID], titles[name] = true, true
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("%s does not fit the grid: %+v", name, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if taken[[2]int{x, y}] != "" {
					t.Fatalf("%s lies on %s", name, taken[[2]int{x, y}])
				}
				taken[[2]int{x, y}] = name
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || len(p.Targets) == 0 || p.Datasource.Type != "prometheus" || p.Datasource.UID != "${datasource}" {
			t.Errorf("%s has no description, no query, or another data source", name)
		}
		for _, target := range p.Targets {
			selects := strings.Count(target.Expr, "{")
			if selects == 0 || strings.Count(target.Expr, `job=~"$job"`) != selects {
				t.Errorf("%s: not every series is of the jobs chosen: %s", name, target.Expr)
			}
			for _, of := range seriesIn(target.Expr) {
				if strings.HasPrefix(of, "coredns_optcache_") && !strings.Contains(target.Expr, `server=~"$server"`) ||
					strings.HasPrefix(of, "coredns_optcache_") && !strings.Contains(of, "fastpath") && !strings.Contains(target.Expr, `zones=~"$zones"`) {
					t.Errorf("%s: not only what is chosen: %s", name, target.Expr)
				}
			}
		}
	}
}

// Each alarm has a test in which it fires.
func TestRulesAreRight(t *testing.T) {
	t.Parallel()
	needs(t, "promtool")
	dir := filepath.Join(root, "deploy", "monitoring")
	for _, args := range [][]string{{"check", "rules", "rules.yml"}, {"test", "rules", "rules_test.yml"}} {
		cmd := exec.CommandContext(t.Context(), "promtool", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	tests := readFile(t, filepath.Join(dir, "rules_test.yml"))
	for _, r := range monitoringRules(t) {
		if r.Alert != "" && !regexp.MustCompile(`exp_samples: .*alertname="`+r.Alert+`"`).MatchString(tests) {
			t.Errorf("no test expects %s", r.Alert)
		}
	}
}

// Beside a healthy server under load, each query of each panel, each variable and each rule gives data, no alarm goes off, and
// no series is named that there is not.
func TestMonitoringOfAServerUnderLoad(t *testing.T) {
	t.Parallel()
	needs(t, "prometheus")
	u := newUpstream(t)
	s := startFast(t, fastBlock("dns", u.addr, "2\n\t\tserve_stale\n\t\tsuccess 9984 3600 1\n\t\tcache_file_path "+filepath.Join(t.TempDir(), "answers")+" 1s\n\t\tshared "+redis.Start(t).URL()+"\n\t\tshared_secret "+redis.Secret(t, "a secret of the tests"),
		"prometheus 127.0.0.1:${metrics}")+block("pooled", u.addr, "optcache {\n\t\tpool node\n\t}"))
	variedLoad(t, s)
	p := startPrometheus(t, s.addr("metrics"))
	native := startPrometheus(t, s.addr("metrics"), "--enable-feature=native-histograms")

	pending := map[string]string{} // where they stand, by expression
	named := map[string]string{}   // where they are named, by series
	add := func(where, expr string) {
		empty := false
		for _, name := range seriesIn(expr) {
			named[name] = where
			empty = empty || mayBeEmpty[name] != ""
		}
		if !empty {
			pending[expr] = where
		}
	}
	chosen := strings.NewReplacer("$job", ".*", "$server", ".*", "$zones", ".*", "$__rate_interval", "5s")
	d := monitoringDashboard(t)
	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			add("the panel "+panel.Title, chosen.Replace(target.Expr))
		}
	}
	values := regexp.MustCompile(`^label_values\((.+), (\w+)\)$`)
	for _, v := range d.Templating.List {
		if m := values.FindStringSubmatch(v.Definition); m != nil {
			add("the variable "+v.Name, fmt.Sprintf(`group by (%s) (%s) and group by (%[1]s) ({%[1]s!=""})`, m[2], chosen.Replace(m[1])))
		} else if v.Type == "query" {
			t.Errorf("the variable %s is from %q", v.Name, v.Definition)
		}
	}
	for _, r := range monitoringRules(t) {
		if r.Record != "" {
			expr := r.Record
			if way := r.Labels["way"]; way != "" {
				expr += fmt.Sprintf("{way=%q}", way)
			}
			pending[expr] = "the rule " + r.Record
		}
		add("the rule "+r.Record+r.Alert, "vector(0) or "+r.Expr) // may find nothing, but not fail
	}
	if len(pending) < 60 {
		t.Errorf("there are only %d queries", len(pending))
	}
	eventually(t, func() error {
		for expr, where := range pending {
			n, err := p.query(expr)
			if err != nil || n == 0 {
				return fmt.Errorf("%s: %s returns no data: %v", where, expr, err)
			}
			delete(pending, expr)
		}
		return nil
	})

	there := map[string]bool{}
	for _, line := range scrape(t, s.addr("metrics")) {
		name, _, _ := strings.Cut(line, " ")
		name, _, _ = strings.Cut(name, "{")
		there[name] = true
	}
	for name, where := range named {
		if !there[name] && mayBeEmpty[name] == "" {
			t.Errorf("%s names %s, which there is not", where, name)
		}
	}
	for name := range mayBeEmpty {
		if named[name] == "" {
			t.Errorf("%s may be empty, and is named nowhere", name)
		}
	}
	if n, err := p.query(`ALERTS{alertstate="firing"}`); n != 0 || err != nil {
		t.Errorf("beside a healthy server, %d alarms went off: %v", n, err)
	}
	// A Prometheus that asks for native histograms gets them.
	for _, name := range []string{"miss_duration_seconds", "stale_age_seconds", "answer_size_bytes"} {
		expr := "histogram_count(sum(rate(coredns_optcache_" + name + "[5s]))) > 0"
		eventually(t, func() error {
			if n, err := native.query(expr); n != 1 || err != nil {
				return fmt.Errorf("%s: %d series, %v", expr, n, err)
			}
			return nil
		})
	}
	// What the numbers say must be what the clients did: nine of ten queries are for names that were asked for before.
	for _, expr := range []string{"block:optcache_hit_ratio:rate5m > 0.6 < 1", "block_way:optcache_requests:rate5m{way='fastpath'} > 0"} {
		eventually(t, func() error {
			if n, err := p.query(expr); n != 1 || err != nil {
				return fmt.Errorf("%s: %d series, %v", expr, n, err)
			}
			return nil
		})
	}
}

// seriesIn returns the series of the process that an expression names.
func seriesIn(expr string) []string {
	names := map[string]bool{}
	for _, name := range regexp.MustCompile(`\b(?:coredns|process|go)_[a-z_]+\b`).FindAllString(expr, -1) {
		names[name] = true
	}
	return slices.Collect(maps.Keys(names))
}

// variedLoad asks until the test ends: mostly for hosts that are cached, and for new ones, names that do not exist, one that
// fails, and one that expires every second.
func variedLoad(t *testing.T, s *server) {
	t.Helper()
	var wg sync.WaitGroup
	done := make(chan struct{})
	t.Cleanup(func() {
		close(done)
		wg.Wait()
	})
	send, stream := overUDP(s.addr("dns")), overTCP(s.addr("dns"))
	wg.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		lost := 0 // queries in a row without a reply
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			name, by := hostName(i%5), send
			switch i % 10 {
			case 0:
				name = hostName(1000 + i)
			case 1:
				name = "nx.example.org."
			case 2:
				name = "fail.example.org."
			case 3:
				by = stream
			case 4:
				name = "short.example.org."
			}
			m := query(name, dns.TypeA)
			reply, _, err := by(m)
			if err == nil {
				err, lost = isReply(reply, m), 0
			} else if lost++; lost < 3 { // this test is not about losses, and a busy machine may stand still for seconds
				continue
			}
			if err != nil {
				t.Errorf("query %d: %v", i, err)
				return
			}
		}
	})
}

// watcher is a running Prometheus.
type watcher struct{ addr string }

// startPrometheus runs Prometheus with the rules of deploy/monitoring until the test ends, and waits until it is ready.
// It scrapes for the first time five seconds later.
func startPrometheus(t *testing.T, target string, flags ...string) *watcher {
	t.Helper()
	dir := t.TempDir()
	conf := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf(`
global: {scrape_interval: 200ms, evaluation_interval: 200ms}
rule_files: [%q]
scrape_configs:
- job_name: dns
  static_configs: [{targets: [%q]}]
`, filepath.Join(root, "deploy", "monitoring", "rules.yml"), target)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for try := 1; ; try++ {
		p := &watcher{addr: freeport.Address(t, "127.0.0.1")}
		out, exited := new(output), make(chan struct{})
		cmd := exec.Command("prometheus", append(flags, "--config.file="+conf, "--web.listen-address="+p.addr, "--log.level=warn",
			"--storage.tsdb.path="+filepath.Join(dir, "data"+strconv.Itoa(try)))...)
		cmd.Dir = dir
		cmd.Stdout, cmd.Stderr = out, out
		if err := child.Start(cmd); err != nil {
			t.Fatal(err)
		}
		go func() {
			cmd.Wait()
			close(exited)
		}()
		t.Cleanup(func() {
			cmd.Process.Kill()
			<-exited
			if t.Failed() {
				t.Logf("output of prometheus:\n%s", out)
			}
		})
		for end := time.Now().Add(patience); time.Now().Before(end); {
			if res, err := http.Get("http://" + p.addr + "/-/ready"); err == nil {
				res.Body.Close()
				if res.StatusCode == http.StatusOK {
					return p
				}
			}
			select {
			case <-exited:
				end = time.Time{}
			case <-time.After(pollEvery):
			}
		}
		if !strings.Contains(out.String(), "address already in use") || try == startTries {
			t.Fatalf("prometheus does not start:\n%s", out)
		}
	}
}

// query returns how many series with a number an expression gives now.
func (p *watcher) query(expr string) (n int, err error) {
	client := http.Client{Timeout: askTimeout}
	res, err := client.Get("http://" + p.addr + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	var reply struct {
		Status, Error string
		Data          struct {
			ResultType string
			Result     []struct{ Value [2]any }
		}
	}
	if err := json.NewDecoder(res.Body).Decode(&reply); err != nil {
		return 0, fmt.Errorf("%s: %v", res.Status, err)
	}
	if reply.Status != "success" || reply.Data.ResultType != "vector" {
		return 0, errors.New(reply.Status + reply.Error + reply.Data.ResultType)
	}
	for _, r := range reply.Data.Result {
		text, _ := r.Value[1].(string)
		if v, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(v) {
			n++
		}
	}
	return n, nil
}
