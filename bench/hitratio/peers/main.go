// Peers is what `go run ./bench/hitratio` runs: optcache's own engine and the caches it is compared
// with, driven by traces. See policies.go for how each is driven, limit.go for the one that knows
// the future, trace.go for the format of traces, chart.go for the chart.
//
// A trace that is not there is skipped with a message. Most caches hash with a random seed, and
// some gain or lose a point by it; of those the median of -runs runs is printed.
//
// This is a module of its own because the plugin's go.mod must not list the peers. Its tests are
// run by `go test -C bench/hitratio/peers ./...`. After a change of the plugin's go.mod,
// `go mod tidy` here.
package main

import (
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// defaultSizes are multiples of the 256 shards of CoreDNS's cache, which holds less otherwise.
const defaultSizes = "1024,9984,49664"

// minSize is the least that both optcache and CoreDNS's cache can be made to hold.
const minSize = 1024

func main() {
	switch err := run(os.Args[1:], os.Stdout, os.Stderr); {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "hitratio:", err)
		os.Exit(1)
	}
}

// errUsage is returned when the flag package has said already what is wrong.
var errUsage = errors.New("usage")

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("hitratio", flag.ContinueOnError)
	flags.SetOutput(stderr)
	sizeList := flags.String("sizes", defaultSizes, "sizes of the cache in answers, `N,…`")
	policyList := flags.String("policies", allNames(), "`names` of policies")
	runs := flags.Int("runs", 3, "`times` to run a policy that has chance in it; the median counts")
	restart := flags.Bool("restart", false, "restart optcache in the middle of each trace, and count what comes after")
	memory := flags.String("memory", "", "bound optcache by memory: `MB,…`, instead of sizes")
	cut := flags.Bool("cut", false, "also with nxdomain_cut probe, for traces of clusters: see cut.go")
	namespaces := flags.Uint("namespaces", defaultNamespaces, "with -cut: `number` of namespaces of the cluster")
	svg := flags.String("svg", "", "also draw a chart to `file`")
	flags.Usage = func() {
		fmt.Fprintln(stderr, "usage: hitratio [-sizes N,…] [-policies NAME,…] [-runs N] [-restart] [-memory MB,…] [-cut [-namespaces N]] [-svg FILE] TRACE.txt.gz…")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if flags.NArg() == 0 {
		flags.Usage()
		return errUsage
	}
	sizes, err := parseSizes("-sizes", *sizeList, minSize)
	if err != nil {
		return err
	}
	chosen, err := parsePolicies(*policyList)
	if err != nil {
		return err
	}

	if *runs < 1 {
		return fmt.Errorf("-runs: %d is less than 1", *runs)
	}
	if *restart {
		if *svg != "" {
			return errors.New("-restart draws no chart")
		}
		chosen = restarts
	}

	if *memory != "" {
		if *svg != "" || *restart {
			return errors.New("-memory draws no chart and restarts nothing")
		}
		if sizes, err = parseSizes("-memory", *memory, 1); err != nil {
			return err
		}
		chosen = bounds
	}

	if *cut {
		if *svg != "" || *restart || *memory != "" {
			return errors.New("-cut draws no chart, restarts nothing, and is not bound by memory")
		}
		chosen = cuts
	}

	out := csv.NewWriter(stdout)
	out.Write([]string{"trace", "size", "policy", "hit_ratio"})
	var all []result
	for _, path := range flags.Args() {
		t, err := readTrace(path)
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintf(stderr, "hitratio: skipped: %v\n", err)
			continue
		}
		if err != nil {
			return err
		}
		if *restart {
			t.first = len(t.requests) / 2
		}
		if *cut && markLists(t, uint32(max(*namespaces, 1))) == 0 {
			return fmt.Errorf("%s: %w", path, errNoLists)
		}
		results, err := measure(t, sizes, chosen, *runs)
		if err != nil {
			return err
		}
		for _, r := range results {
			out.Write(r.record())
		}
		if out.Flush(); out.Error() != nil {
			return out.Error()
		}
		all = append(all, results...)
	}
	out.Flush()
	if err := out.Error(); err != nil || *svg == "" {
		return err
	}
	if len(all) == 0 {
		fmt.Fprintln(stderr, "hitratio: no chart: there was no trace")
		return nil
	}
	return writeChart(*svg, all)
}

// result is one line of the output.
type result struct {
	trace  string
	size   int
	policy string
	ratio  float64 // per cent
}

func (r result) record() []string {
	return []string{r.trace, strconv.Itoa(r.size), r.policy, strconv.FormatFloat(r.ratio, 'f', 2, 64)}
}

// measure runs a trace through every policy at every size, as many at a time as there are
// processors. Results come by size and then by policy.
func measure(t *trace, sizes []int, chosen []policy, runs int) ([]result, error) {
	var (
		results []result
		hits    [][]int // of each run, by result
		errs    []error
		mu      sync.Mutex // guards errs
		wg      sync.WaitGroup
		free    = make(chan struct{}, runtime.GOMAXPROCS(0))
	)
	for _, size := range sizes {
		for _, p := range chosen {
			n := 1
			if p.random {
				n = runs
			}
			of := make([]int, n)
			results = append(results, result{trace: t.name, size: size, policy: p.name})
			hits = append(hits, of)
			for i := range of {
				free <- struct{}{}
				wg.Go(func() {
					defer func() { <-free }()
					var err error
					if of[i], err = p.hits(t, size); err != nil {
						mu.Lock()
						errs = append(errs, fmt.Errorf("%s at %d: %w", p.name, size, err))
						mu.Unlock()
					}
				})
			}
		}
	}
	wg.Wait()
	for i := range results {
		results[i].ratio = 100 * median(hits[i]) / float64(len(t.requests)-t.first)
	}
	return results, errors.Join(errs...)
}

// median sorts the values.
func median(values []int) float64 {
	slices.Sort(values)
	middle := len(values) / 2
	if len(values)%2 == 1 {
		return float64(values[middle])
	}
	return float64(values[middle-1]+values[middle]) / 2
}

func allNames() string {
	var names []string
	for _, p := range policies {
		names = append(names, p.name)
	}
	return strings.Join(names, ",")
}

// parseSizes reads the value of a flag: numbers that are at least least.
func parseSizes(name, list string, least int64) ([]int, error) {
	var sizes []int
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%s: bad size %q", name, s)
		}
		if n < least {
			return nil, fmt.Errorf("%s: %d is less than %d, which some policies hold at the least", name, n, least)
		}
		if !slices.Contains(sizes, int(n)) {
			sizes = append(sizes, int(n))
		}
	}
	return sizes, nil
}

func parsePolicies(list string) ([]policy, error) {
	var chosen []policy
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		i := slices.IndexFunc(policies, func(p policy) bool { return p.name == name })
		if i < 0 {
			return nil, fmt.Errorf("-policies: unknown policy %q; known are %s", name, allNames())
		}
		if !slices.ContainsFunc(chosen, func(p policy) bool { return p.name == name }) {
			chosen = append(chosen, policies[i])
		}
	}
	return chosen, nil
}
