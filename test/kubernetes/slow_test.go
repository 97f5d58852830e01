package kubernetes

import (
	"errors"
	"fmt"
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
)

// This file tells why a lookup is slow or lost: the machine was busy with other things, or a reply found no way back.

// delays are how long threads that could run have waited for a processor, by the kernel's own count.
type delays struct {
	mu      sync.Mutex
	samples []sample // by time, since the node has started
}

// sample is what the threads waited between two moments.
type sample struct {
	begin, end time.Time
	late       time.Duration            // how much too late the goroutine that takes the samples woke up
	waited     map[string]time.Duration // by program: of the thread that waited longest
}

const sampleTime = 200 * time.Millisecond

// take takes samples until the node ends.
func (d *delays) take() {
	before := make(map[string]time.Duration)
	begin := time.Now()
	for {
		time.Sleep(sampleTime)
		end := time.Now()
		s := sample{begin, end, max(0, end.Sub(begin)-sampleTime), make(map[string]time.Duration)}
		begin = end
		now := make(map[string]time.Duration)
		names, _ := filepath.Glob("/proc/[0-9]*/comm")
		for _, file := range names {
			text, _ := os.ReadFile(file)
			program := strings.TrimSpace(string(text))
			if program != "coredns" && !slices.Contains(resolvers, program) {
				continue
			}
			threads, _ := filepath.Glob(filepath.Join(filepath.Dir(file), "task/*/schedstat"))
			for _, thread := range threads {
				waited, err := runDelay(thread)
				if err != nil {
					continue // it has ended
				}
				now[thread] = waited
				if old, known := before[thread]; known {
					s.waited[program] = max(s.waited[program], waited-old)
				}
			}
		}
		before = now
		d.mu.Lock()
		d.samples = append(d.samples, s)
		d.mu.Unlock()
	}
}

// runDelay is how long a thread has waited for a processor since it began.
func runDelay(schedstat string) (time.Duration, error) {
	text, err := os.ReadFile(schedstat)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text)) // ns on a processor, ns in a run queue, time slices
	if len(fields) != 3 {
		return 0, fmt.Errorf("%s: %q", schedstat, text)
	}
	ns, err := strconv.ParseInt(fields[1], 10, 64)
	return time.Duration(ns), err
}

// during returns how long a program waited for a processor during a lookup, and how late the samples were then. Both are upper
// bounds: a sample that overlaps the lookup counts whole.
func (d *delays) during(l slow, program string) (waited, late time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.samples {
		if end := ofAnyDay(s.end); end.After(l.begin) && ofAnyDay(s.begin).Before(l.begin.Add(l.took)) {
			waited, late = waited+s.waited[program], late+s.late
		}
	}
	return waited, late
}

// ofAnyDay returns a time of day, as the resolvers print it, without the date.
func ofAnyDay(t time.Time) time.Time {
	u := t.UTC()
	return time.Date(0, 1, 1, u.Hour(), u.Minute(), u.Second(), u.Nanosecond(), time.UTC)
}

// why tells how long resolver and server waited for a processor during a slow lookup. starved means that no packet was lost, and that
// the lookup without these waits would not have been slow.
func (d *delays) why(l slow, resolver string) (text string, starved bool) {
	client, late := d.during(l, resolver)
	server, _ := d.during(l, "coredns")
	return fmt.Sprintf("waited for a processor: the resolver for %d ms, a server for %d ms, who only sleeps for %d ms",
		client.Milliseconds(), server.Milliseconds(), late.Milliseconds()), l.took < lostByMuslAfter && l.took-client-server <= slowAfter
}

// When a pod of cluster DNS is not ready any more, kube-proxy makes the kernel forget which packets went to it by the service's
// address. A reply that comes after that, to a query of before, has the pod's own address, and the client does not know it. This
// counts such replies, behind everything that changes addresses. Only pods ask there: 10.244.0.1 is the node's.
const strayRules = `
table ip optcache-test {
    counter stray { }
    chain behind-nat {
        type filter hook postrouting priority 300
        ip saddr 10.244.0.0/24 ip daddr 10.244.0.2-10.244.0.254 udp sport 53 counter name stray
    }
}
`

// countStrays begins to count.
func (n *node) countStrays() error {
	return errors.Join(n.write("stray.nft", strayRules), run("nft", "-f", n.in("stray.nft")))
}

// strays is how many such replies there were.
func strays(t *testing.T) int {
	t.Helper()
	out, err := exec.Command("nft", "list", "counter", "ip", "optcache-test", "stray").CombinedOutput()
	m := regexp.MustCompile(`packets (\d+)`).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("%v\n%s", err, out)
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestDelays(t *testing.T) {
	at := func(s float64) time.Time {
		return time.Date(2026, 11, 30, 3, 0, 0, 0, time.UTC).Add(time.Duration(s * float64(time.Second)))
	}
	waited := func(resolver, server time.Duration) map[string]time.Duration {
		return map[string]time.Duration{"lookup-go": resolver * time.Millisecond, "coredns": server * time.Millisecond}
	}
	d := delays{samples: []sample{
		{at(0), at(1), 0, waited(900, 900)}, {at(1), at(2), 700 * time.Millisecond, waited(300, 100)}, {at(2), at(3), 0, waited(100, 200)},
	}}
	for _, c := range []struct {
		begin   float64
		took    time.Duration
		text    string
		starved bool
	}{
		{1.1, 1600, "the resolver for 400 ms, a server for 300 ms, who only sleeps for 700 ms", true},
		{1.1, 1800, "the resolver for 400 ms, a server for 300 ms, who only sleeps for 700 ms", false},
		{0.5, 2500, "the resolver for 1300 ms, a server for 1200 ms, who only sleeps for 700 ms", false}, // a packet was lost
		{3.5, 1100, "the resolver for 0 ms, a server for 0 ms, who only sleeps for 0 ms", false},
	} {
		l := slow{ofAnyDay(at(c.begin)), c.took * time.Millisecond}
		if text, starved := d.why(l, "lookup-go"); !strings.HasSuffix(text, c.text) || starved != c.starved {
			t.Errorf("%v for %v: %s, starved %v", c.begin, l.took, text, starved)
		}
	}
	if waited, err := runDelay("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/schedstat"); err != nil || waited < 0 {
		t.Errorf("%v, %v", waited, err)
	}
}
