package kubernetes

import (
	"cmp"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// This file measures: `make kubernetes-figures`, on a machine that does nothing else. Both servers are the same binary with the same
// manifests; stock is CoreDNS's own `cache` in the place of optcache. They take turns, and a figure is the median of the rounds.

const (
	servicesVariable = "OPTCACHE_KUBERNETES_SERVICES" // how many Services there are when memory is measured
	rounds           = 3
	times            = 700 // that each resolver asks for all names in a round, which is some 40,000 queries
	idleTime         = 5 * time.Second
	ticks            = 100 // of the processor's time in /proc, in a second

	// The names of a pod's life: warmNames, asked for by Zipf's law.
	warmNames = 2000
	warmRate  = 400 // queries a second
	warmTime  = 30 * time.Second
	window    = 500 * time.Millisecond
)

var optcacheBlock = regexp.MustCompile(`optcache( \d+)? \{[^}]*\}`)

// figure is what is measured of a server.
type figure struct {
	ready     []float64 // s since its pod was made, of each round
	warm      float64   // s since it was ready
	ratio     float64   // of hits, later
	cpu       []float64 // ms for 1,000 queries, of each round, without what it takes when nobody asks
	idle      []float64 // ms in a second, when nobody asks
	queries   []float64 // of each round
	anonymous int       // MB of memory, without files
}

var servers = []string{"stock", "optcache"}

func TestFigures(t *testing.T) {
	services, err := strconv.Atoi(os.Getenv(servicesVariable))
	if err != nil {
		t.Skip("make kubernetes-figures")
	}
	needsNode(t)
	if err := cluster.startNode(); err != nil {
		t.Fatal(err)
	}
	addon(t)
	system(t, "scale", "deployment/coredns", "--replicas=1")
	figures := make(map[string]*figure)
	for _, name := range []string{"cluster-dns", "nodelocaldns"} {
		for round := range rounds {
			for _, server := range servers {
				key := name + ", " + server
				use(t, name, server)
				if round == 0 {
					figures[key] = new(figure)
				}
				figures[key].start(t, name, round == 0)
				figures[key].work(t, name)
				t.Logf("%s: %+v", key, *figures[key])
			}
		}
	}
	// kube-proxy has nothing to do with this, and would take the processor.
	end(cluster.proxy)
	createServices(t, services)
	for _, server := range servers {
		use(t, "cluster-dns", server)
		pod := podsOf(t, workloads["cluster-dns"])[0]
		eventually(t, "the server knows all services", 2*time.Minute, func() error {
			if got := ask(t, podIP(t, pod), fmt.Sprintf("s%d.default.svc.cluster.local A", services-1), "udp", false); !strings.Contains(got, "answer ") {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
		figures["cluster-dns, "+server].anonymous = anonymous(t, processOf(t, pod))
	}
	for _, name := range []string{"cluster-dns", "nodelocaldns"} {
		for _, server := range servers {
			f := figures[name+", "+server]
			text := fmt.Sprintf("%s, %s: ready %.1f s after its pod was made, warm %.1f s after that (later %.0f %% hits); %.1f ms of processor for 1,000 queries (%.0f in a round), %.1f ms in a second without any",
				name, server, median(f.ready), f.warm, 100*f.ratio, median(f.cpu), median(f.queries), median(f.idle))
			if f.anonymous > 0 {
				text += fmt.Sprintf("; %d MB with %d services", f.anonymous, services)
			}
			t.Log(text)
		}
	}
}

// What pods that ask cluster DNS themselves lose when its two pods are replaced: those of kubeadm's Deployment, and ours.
func TestRolloutFigures(t *testing.T) {
	if os.Getenv(servicesVariable) == "" {
		t.Skip("make kubernetes-figures")
	}
	needsNode(t)
	if err := cluster.startNode(); err != nil {
		t.Fatal(err)
	}
	addon(t)
	const workload, rollouts = "deployment/coredns", 5
	lost := make(map[string]lookups)
	for _, server := range servers {
		if server == "optcache" {
			kubectl(t, "apply", "--validate=strict", "-k", base("cluster-dns"))
		}
		system(t, "scale", workload, "--replicas=2")
		rolledOut(t, workload)
		l := startLoad(t, "tools", names...)
		for range rollouts {
			system(t, "rollout", "restart", workload)
			rolledOut(t, workload)
		}
		lost[server] = l.stop(math.MaxInt)
	}
	for _, server := range servers {
		n := lost[server]
		t.Logf("cluster-dns, %s: %d lookups in %d rollouts of two pods: %d failed, %d lost", server, n.all, rollouts, n.failed, n.lost)
	}
}

func median(all []float64) float64 { return slices.Sorted(slices.Values(all))[len(all)/2] }

// use has a workload run with one of the caches.
func use(t *testing.T, name, server string) {
	t.Helper()
	workload := workloads[name]
	kubectl(t, "apply", "--validate=strict", "-k", base(name))
	configMap := map[string]string{"cluster-dns": "coredns-optcache", "nodelocaldns": "node-local-dns-optcache"}[name]
	plugin := "optcache"
	if server == "stock" {
		plugin = "cache"
		cache := "cache 30"
		if name == "cluster-dns" {
			cache += " {\ndisable success cluster.local\ndisable denial cluster.local\n}"
		}
		old := system(t, "get", "configmap", configMap, "-o", "jsonpath={.data.Corefile}")
		patch, err := json.Marshal(map[string]any{"data": map[string]string{"Corefile": optcacheBlock.ReplaceAllString(old, cache)}})
		if err != nil {
			t.Fatal(err)
		}
		system(t, "patch", "configmap", configMap, "--type=merge", "-p", string(patch))
		if name == "nodelocaldns" { // ours are asked by the control interface, which stock does not have
			system(t, "patch", workload, "--type=json", "-p", stockProbes)
		}
	}
	system(t, "rollout", "restart", workload)
	rolledOut(t, workload)
	if text := scrape(t, metricsOf(t, name)); !strings.Contains(text, `coredns_plugin_enabled{name="`+plugin+`"`) {
		t.Fatalf("%s does not run with %s", name, server)
	}
}

const stockProbes = `[
{"op": "remove", "path": "/spec/template/spec/containers/0/startupProbe"},
{"op": "remove", "path": "/spec/template/spec/containers/0/livenessProbe"},
{"op": "replace", "path": "/spec/template/spec/containers/0/readinessProbe",
  "value": {"httpGet": {"host": "` + localDNS + `", "path": "/ready", "port": 8181}, "periodSeconds": 2}}]`

// metricsOf is where a workload's only server has its metrics.
func metricsOf(t *testing.T, name string) string {
	t.Helper()
	if name == "nodelocaldns" {
		return "http://" + nodeIP + ":9253/metrics"
	}
	return "http://" + podIP(t, podsOf(t, workloads[name])[0]) + ":9153/metrics"
}

// start replaces a server's pod. If asked, clients ask for many names before and after that: what the upstream is asked for is what
// the server has not had. Where its hit ratio is nine tenths of what it is later, it is warm.
func (f *figure) start(t *testing.T, name string, warms bool) {
	t.Helper()
	workload := workloads[name]
	old := podsOf(t, workload)[0]
	addressOf := func(pod string) string {
		if name == "nodelocaldns" {
			return localDNS
		}
		return podIP(t, pod)
	}
	r := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(r, 1.1, 1, warmNames-1)
	if warms {
		askFor(t, addressOf(old), warmTime, zipf)
	}
	system(t, "delete", "pod", old, "--wait=false")
	var young string
	var made time.Time
	eventually(t, "a new pod is ready", 2*time.Minute, func() error {
		var pods struct{ Items []corePod }
		if err := json.Unmarshal(api(t, "GET", "/api/v1/namespaces/kube-system/pods?labelSelector=k8s-app%3D"+labels[strings.Split(workload, "/")[1]], ""), &pods); err != nil {
			t.Fatal(err)
		}
		for _, p := range pods.Items {
			if p.Metadata.Name == old {
				continue
			}
			if young == "" {
				young, made = p.Metadata.Name, time.Now()
			}
			if slices.ContainsFunc(p.Status.Conditions, func(c condition) bool { return c.Type == "Ready" && c.Status == "True" }) {
				return nil
			}
		}
		return errors.New("it is not")
	})
	f.ready = append(f.ready, time.Since(made).Seconds())
	defer rolledOut(t, workload)
	if !warms {
		return
	}
	ratios := askFor(t, addressOf(young), warmTime, zipf)
	later := ratios[2*len(ratios)/3:]
	for _, ratio := range later {
		f.ratio += ratio / float64(len(later))
	}
	warm := slices.IndexFunc(ratios, func(ratio float64) bool { return ratio >= 0.9*f.ratio })
	f.warm = (time.Duration(warm+1) * window).Seconds()
}

type condition struct{ Type, Status string }

type corePod struct {
	Metadata struct{ Name string }
	Status   struct{ Conditions []condition }
}

// askFor asks a server for names, and returns which part of the queries its upstream has not had, of each window.
func askFor(t *testing.T, ip string, long time.Duration, which *rand.Zipf) (ratios []float64) {
	t.Helper()
	const upstreamMetrics = "http://" + upstreamIP + ":9153/metrics"
	questions := make(chan string, warmRate)
	var asked, lost atomic.Int64
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			c := dns.Client{Timeout: time.Second}
			for q := range questions {
				if _, _, err := c.Exchange(new(dns.Msg).SetQuestion(q, dns.TypeA), net.JoinHostPort(ip, "53")); err != nil {
					lost.Add(1)
				}
				asked.Add(1)
			}
		})
	}
	before, sent := requests(t, upstreamMetrics), int64(0)
	next := time.Now()
	for end := next.Add(long); next.Before(end); {
		for range int(warmRate * window / time.Second) {
			questions <- fmt.Sprintf("z%d.any.example.org.", which.Uint64())
		}
		next = next.Add(window)
		time.Sleep(time.Until(next))
		now, n := requests(t, upstreamMetrics), asked.Load()
		if n > sent {
			ratios = append(ratios, 1-(now-before)/float64(n-sent))
		} else {
			ratios = append(ratios, 0)
		}
		before, sent = now, n
	}
	close(questions)
	all.Wait()
	if n := lost.Load(); n > asked.Load()/100 {
		t.Errorf("%d of %d queries have no answer", n, asked.Load())
	}
	return ratios
}

// work puts a server under the load of pods with ndots:5: as many queries each time.
func (f *figure) work(t *testing.T, name string) {
	t.Helper()
	from, metrics := "tools", metricsOf(t, name)
	if name == "nodelocaldns" {
		from = "tools-local"
	}
	process := processOf(t, podsOf(t, workloads[name])[0])
	names := []string{"web", "web.default", "kubernetes.default", "www.example.org"}
	ask := func(times int) {
		loadOf(t, from, append([]string{"-times", strconv.Itoa(times)}, names...)...).stop(0)
	}
	ask(20)
	cpu := processor(t, process)
	time.Sleep(idleTime)
	idle := (processor(t, process) - cpu).Seconds() / idleTime.Seconds()
	queries, begin := requests(t, metrics), time.Now()
	cpu = processor(t, process)
	ask(times)
	busy := (processor(t, process) - cpu).Seconds() - idle*time.Since(begin).Seconds()
	queries = requests(t, metrics) - queries
	f.idle, f.queries, f.cpu = append(f.idle, 1000*idle), append(f.queries, queries), append(f.cpu, busy*1e6/queries)
}

// stat returns the fields of /proc/PID/stat from the third one, the state.
func stat(t *testing.T, pid int) []string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
}

func number(t *testing.T, text string) float64 {
	t.Helper()
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// processor is the time of the processor that a process has taken.
func processor(t *testing.T, pid int) time.Duration {
	t.Helper()
	fields := stat(t, pid)
	return time.Duration((number(t, fields[11]) + number(t, fields[12])) / ticks * float64(time.Second))
}

// anonymous is a process's memory in MB, without what it maps of files.
func anonymous(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, "RssAnon:"); found {
			return int(number(t, strings.Fields(value)[0])) / 1024
		}
	}
	t.Fatal("no RssAnon")
	return 0
}

func scrape(t *testing.T, url string) string {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// requests is how many a server has answered.
func requests(t *testing.T, url string) (sum float64) {
	t.Helper()
	for line := range strings.Lines(scrape(t, url)) {
		if strings.HasPrefix(line, "coredns_dns_requests_total{") {
			sum += number(t, strings.TrimSpace(line[strings.LastIndexByte(line, ' ')+1:]))
		}
	}
	return sum
}

var apiClient = http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}

// ofAPI asks the API server.
func ofAPI(method, path, body string) ([]byte, error) {
	r, err := http.NewRequest(method, "https://"+nodeIP+":6443"+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Authorization", "Bearer "+adminToken)
	r.Header.Set("Content-Type", "application/json")
	reply, err := apiClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer reply.Body.Close()
	text, err := io.ReadAll(reply.Body)
	if err == nil && reply.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", reply.Status, text)
	}
	return text, err
}

func api(t *testing.T, method, path, body string) []byte {
	t.Helper()
	text, err := ofAPI(method, path, body)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// createServices makes services by the API, a few at a time: kubectl takes its time between two.
func createServices(t *testing.T, n int) {
	t.Helper()
	numbers, failed := make(chan int), make(chan error)
	const workers = 8
	for range workers {
		go func() {
			var first error
			for i := range numbers {
				_, err := ofAPI("POST", "/api/v1/namespaces/default/services",
					fmt.Sprintf(`{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s%d"}, "spec": {"ports": [{"name": "http", "port": 80}]}}`, i))
				first = cmp.Or(first, err)
			}
			failed <- first
		}()
	}
	for i := range n {
		numbers <- i
	}
	close(numbers)
	for range workers {
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	}
}
