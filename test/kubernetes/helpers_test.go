package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// command is kubectl.
func (n *node) command(args ...string) *exec.Cmd {
	return exec.Command(filepath.Join(n.bin, "kubectl"), args...)
}

// kubectl runs kubectl, and returns what it prints, warnings included.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := cluster.command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// system is kubectl in the namespace of the manifests.
func system(t *testing.T, args ...string) string {
	t.Helper()
	return kubectl(t, append([]string{"-n", "kube-system"}, args...)...)
}

// apply applies a manifest that is given as text.
func apply(t *testing.T, manifest string) {
	t.Helper()
	c := cluster.command("apply", "--validate=strict", "-f", "-")
	c.Stdin = strings.NewReader(manifest)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, manifest)
	}
}

// base is a kustomization of deploy/.
func base(name string) string { return filepath.Join(root, "deploy/kubernetes", name) }

// workloads are the bases and what they have.
var workloads = map[string]string{"cluster-dns": "deployment/coredns", "nodelocaldns": "daemonset/node-local-dns"}

// rolledOut waits until a workload's pods are as it says, and no old ones are left.
func rolledOut(t *testing.T, workload string) {
	t.Helper()
	name := strings.Split(workload, "/")[1]
	eventually(t, workload+" is rolled out", 5*time.Minute, func() error {
		if status := system(t, "rollout", "status", workload, "--watch=false"); !strings.Contains(status, "successfully rolled out") {
			return errors.New(status)
		}
		pods := strings.Fields(system(t, "get", "pods", "-l", "k8s-app="+labels[name], "-o", "jsonpath={range .items[*]}{.metadata.name}={.metadata.deletionTimestamp}{\"\\n\"}{end}"))
		for _, p := range pods {
			if !strings.HasSuffix(p, "=") {
				return fmt.Errorf("%s ends", p)
			}
		}
		return nil
	})
}

var labels = map[string]string{"coredns": "kube-dns", "node-local-dns": "node-local-dns"}

// podsOf returns the names of a workload's pods that do not end.
func podsOf(t *testing.T, workload string) []string {
	t.Helper()
	return strings.Fields(system(t, "get", "pods", "-l", "k8s-app="+labels[strings.Split(workload, "/")[1]], "-o", "jsonpath={.items[*].metadata.name}"))
}

// eventually fails the test when something does not come within the limit.
func eventually(t *testing.T, what string, limit time.Duration, try func() error) {
	t.Helper()
	if err := within(what, limit, try); err != nil {
		t.Fatal(err)
	}
}

// resolvers are the programs of the tools image, which all print the same.
var resolvers = []string{"lookup-go", "lookup-glibc", "lookup-musl"}

// load are lookups without a pause, by all three resolvers in a pod.
type load struct {
	t        *testing.T
	begin    time.Time
	strays   int // before it
	commands []*exec.Cmd
	stdins   []io.Closer
	outputs  []*bytes.Buffer
}

// startLoad begins to ask for names.
func startLoad(t *testing.T, pod string, names ...string) *load {
	t.Helper()
	return loadOf(t, pod, append([]string{"-until-eof"}, names...)...)
}

// loadOf has the resolvers begin with options and names.
func loadOf(t *testing.T, pod string, args ...string) *load {
	t.Helper()
	l := &load{t: t, begin: time.Now(), strays: strays(t)}
	for _, r := range resolvers {
		c := cluster.command(append([]string{"exec", "-i", pod, "--", r}, args...)...)
		stdin, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out := new(bytes.Buffer)
		c.Stdout, c.Stderr = out, out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		l.commands, l.stdins, l.outputs = append(l.commands, c), append(l.stdins, stdin), append(l.outputs, out)
	}
	return l
}

var summary = regexp.MustCompile(`(?m)^(\d+) lookups, (\d+) failed, (\d+) over 1 s, (\d+) lost$`)

// lookups are the sums of a load. Lost are those that took as long as a resolver waits for a reply before it asks again. Starved
// are those over 1 s that had to wait for a processor. Strays are replies whose client did not know them.
type lookups struct{ all, failed, long, starved, lost, strays int }

// forgets are the moments when kube-proxy has made the kernel forget what it tracks of pods that are gone, or not ready any more.
func forgets(since time.Time) (lines []string) {
	log, _ := os.ReadFile(cluster.in("log", "kube-proxy"))
	for line := range strings.Lines(string(log)) {
		if m := forgotten.FindStringSubmatch(line); m != nil && m[1] >= since.Format("15:04:05") {
			lines = append(lines, m[1]+" kube-proxy has had "+m[2]+" entries forgotten")
		}
	}
	return lines
}

var forgotten = regexp.MustCompile(`^I\d{4} (\S+) .*"Finished reconciling conntrack entries".* entriesDeleted=([1-9]\d*)`)

// slow is a lookup over a second, as the resolvers print it.
type slow struct {
	begin time.Time // of an unknown day
	took  time.Duration
}

func (s slow) overlaps(other slow) bool {
	return s.begin.Before(other.begin.Add(other.took)) && other.begin.Before(s.begin.Add(s.took))
}

var slowLine = regexp.MustCompile(`(?m)^(\S+) \S+: .*\((\d+) ms\)$`)

func slowLookups(text string) (all []slow) {
	for _, m := range slowLine.FindAllStringSubmatch(text, -1) {
		begin, err := time.Parse("15:04:05", m[1])
		ms, err2 := strconv.Atoi(m[2])
		if err == nil && err2 == nil {
			if took := time.Duration(ms) * time.Millisecond; took > slowAfter {
				all = append(all, slow{begin, took})
			}
		}
	}
	return all
}

// lostByMusl counts lookups that musl's resolver had to ask again for. It does so after 2.5 s, and a busy machine may stand still for
// as long. So it does not count where one of the others, which wait for 5 s, got a late reply at the same time, and lost none.
func lostByMusl(text string, others ...string) (n int) {
	for _, s := range slowLookups(text) {
		stood := false
		for _, other := range others {
			stood = stood || slices.ContainsFunc(slowLookups(other), func(o slow) bool { return o.took < lostAfter && s.overlaps(o) })
		}
		if s.took >= lostByMuslAfter && (!stood || s.took >= lostAfter) {
			n++
		}
	}
	return n
}

const slowAfter = time.Second

const lostAfter, lostByMuslAfter = 4900 * time.Millisecond, 2400 * time.Millisecond

// stop ends the load. It is an error if lookups have failed, or took so long that a packet must have been lost. Each resolver may
// lose one for each pod of cluster DNS that ended; see strayRules.
func (l *load) stop(ended int) (sum lookups) {
	l.t.Helper()
	for _, stdin := range l.stdins {
		stdin.Close()
	}
	waited := make([]error, len(l.commands))
	for i, c := range l.commands {
		waited[i] = c.Wait()
	}
	for i := range l.commands {
		err, text := waited[i], l.outputs[i].String()
		m := summary.FindStringSubmatch(text)
		if err != nil || m == nil {
			l.t.Fatalf("%s: %v\n%s", resolvers[i], err, text)
		}
		var n [4]int
		for k := range n {
			n[k], _ = strconv.Atoi(m[k+1])
		}
		if resolvers[i] == "lookup-musl" {
			n[3] = lostByMusl(text, l.outputs[0].String(), l.outputs[1].String())
		}
		sum.all, sum.failed, sum.long, sum.lost = sum.all+n[0], sum.failed+n[1], sum.long+n[2], sum.lost+n[3]
		if n[0] < 10 {
			l.t.Errorf("%s: %d lookups are no load", resolvers[i], n[0])
		}
		if n[1]+n[2] == 0 {
			continue
		}
		text = slowLine.ReplaceAllStringFunc(text, func(line string) string {
			for _, s := range slowLookups(line) {
				why, starved := cluster.delays.why(s, resolvers[i])
				line += "; " + why
				if starved {
					sum.starved++
				}
			}
			return line
		})
		lines := slices.Sorted(slices.Values(append(strings.Split(strings.TrimSpace(text), "\n"), forgets(l.begin)...)))
		l.t.Logf("%s: …\n%s", resolvers[i], strings.Join(lines[max(0, len(lines)-40):], "\n"))
		if max(n[1], n[3]) > ended {
			l.t.Errorf("%s: %d of %d lookups have failed, and %d were lost", resolvers[i], n[1], n[0], n[3])
		}
	}
	sum.strays = strays(l.t) - l.strays
	l.t.Logf("%d lookups, %d failed, %d over 1 s (%d for want of a processor), %d lost; %d replies that no client knew",
		sum.all, sum.failed, sum.long, sum.starved, sum.lost, sum.strays)
	return sum
}

func TestLostByMusl(t *testing.T) {
	for _, c := range []struct {
		musl, other string
		want        int
	}{
		{"23:45:52.155 a.: 192.0.2.1 (2920 ms)\n", "", 1},
		{"23:45:52.155 a.: 192.0.2.1 (2920 ms)\n", "23:45:52.155 b.: 192.0.2.1 2001:db8::1 (2960 ms)\n", 0},
		{"23:45:52.155 a.: 192.0.2.1 (2920 ms)\n", "23:45:53.248 b.: 192.0.2.1 (1839 ms)\n", 0},
		{"23:45:52.155 a.: 192.0.2.1 (2920 ms)\n", "23:45:58.248 b.: 192.0.2.1 (1839 ms)\n", 1}, // another time
		{"23:45:52.155 a.: 192.0.2.1 (2920 ms)\n", "23:45:52.155 b.: 192.0.2.1 (5010 ms)\n", 1}, // lost, too
		{"23:45:52.155 a.: 192.0.2.1 (5020 ms)\n", "23:45:52.155 b.: 192.0.2.1 (2010 ms)\n", 1},
		{"23:45:52.155 a.: failed: timeout (1920 ms)\n", "", 0},
	} {
		if got := lostByMusl(c.musl+"9 lookups, 0 failed, 1 over 1 s, 1 lost\n", c.other); got != c.want {
			t.Errorf("%s beside %s: %d lost, want %d", c.musl, c.other, got, c.want)
		}
	}
}
