package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

func newStatus(g *globals) *cobra.Command {
	var (
		watch  bool
		out    *form
		blocks *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "status",
		Short: "show sizes, hits and misses of each block",
		Long: "Show what the optcache blocks of the Corefile hold, and what they have done since the server started. The number of a " +
			"block is what --block means in all commands.",
		Example: "  optcachectl status\n  optcachectl status --watch --block 0",
		Args:    cobra.NoArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) error {
		query := url.Values{}
		blocks.addTo(query)
		if watch {
			if out.is != "table" {
				return wrongUsage("--watch shows a table")
			}
			return g.watchStatus(ctx, c, query)
		}
		var reply api.StatusReply
		body, err := c.Get(ctx, "/v1/status", query, &reply)
		if err != nil {
			return err
		}
		if out.is == "json" {
			return g.printJSON(body)
		}
		return g.printLines(statusLines(reply, nil, 0))
	})
	watchFlag(cmd, &watch)
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// watchStatus shows the status until the context ends, with rates.
func (g *globals) watchStatus(ctx context.Context, c *client.Client, query url.Values) error {
	var (
		before   map[int]api.Status
		lastTime time.Time
	)
	return g.watch(ctx, func() ([]string, error) {
		var reply api.StatusReply
		if _, err := c.Get(ctx, "/v1/status", query, &reply); err != nil {
			return nil, err
		}
		now := g.now()
		lines := statusLines(reply, before, now.Sub(lastTime))
		before, lastTime = make(map[int]api.Status), now
		for _, b := range reply.Blocks {
			before[b.ID] = b.Status
		}
		return lines, nil
	})
}

// clip cuts lines to what a screen shows.
func clip(lines []string, width, height int) []string {
	lines = slices.Clone(lines[:min(len(lines), max(height, 1))])
	for i, line := range lines {
		if utf8.RuneCountInString(line) > width {
			lines[i] = string([]rune(line)[:max(width, 0)])
		}
	}
	return lines
}

// statusLines makes a table of each block. With the status of before, counts have their rate in the time since then.
func statusLines(reply api.StatusReply, before map[int]api.Status, elapsed time.Duration) (lines []string) {
	if reply.Version != "" {
		lines = append(lines, "optcache "+printable(reply.Version))
	}
	if len(reply.Blocks) == 0 {
		lines = append(lines, "no blocks")
	}
	for _, b := range reply.Blocks {
		old, known := before[b.ID]
		lines = append(lines, "", printable(blockTitle(b)))
		rows := statusRows(b, old, known && elapsed > 0, elapsed)
		labels, values := 0, 0
		for _, r := range rows {
			labels = max(labels, utf8.RuneCountInString(r[0]))
			if r[2] != "" {
				values = max(values, utf8.RuneCountInString(r[1]))
			}
		}
		for _, r := range rows {
			lines = append(lines, strings.TrimRight(fmt.Sprintf("  %-*s  %-*s  %s", labels, printable(r[0]), values, printable(r[1]), r[2]), " "))
		}
	}
	return lines
}

func blockTitle(b api.BlockStatus) string {
	title := fmt.Sprintf("Block %d: %s", b.ID, strings.Join(b.Zones, " "))
	if b.View != "" {
		title += ", view " + b.View
	}
	if len(b.Servers) > 0 {
		title += ", at " + strings.Join(b.Servers, " ")
	}
	return title
}

// statusRows are label, value and rate.
func statusRows(b api.BlockStatus, old api.Status, rates bool, elapsed time.Duration) (rows [][3]string) {
	s := b.Status
	add := func(label, value string) { rows = append(rows, [3]string{label, value}) }
	// A count that has fallen is of a server that started anew.
	rate := func(now, before uint64) string {
		if !rates || now < before {
			return ""
		}
		return number(int64(math.Round(float64(now-before)/elapsed.Seconds()))) + "/s"
	}
	count := func(label string, now, before uint64, more string) {
		rows = append(rows, [3]string{label, number(now) + more, rate(now, before)})
	}

	hits := total(s.Hits)
	count("requests", s.Requests, old.Requests, "")
	ratio := ""
	if s.Requests > 0 {
		ratio = " (" + share(float64(hits), float64(s.Requests)) + ")"
	}
	count("hits", hits, total(old.Hits), ratio)
	for _, r := range b.Recent {
		value := fmt.Sprintf("%s/s", number(int64(math.Round(r.QPS))))
		if r.HitRatio != nil {
			value += fmt.Sprintf(", hits %s", share(*r.HitRatio, 1))
		}
		add("  last "+lasting(r), value)
	}
	if hits > 0 {
		add("  by tier", byName(s.Hits))
	}
	if total(s.Sent) > 0 {
		add("  by way", byName(s.Sent))
	}
	count("misses", s.Misses, old.Misses, "")
	if total(s.MissTimes) > 0 {
		add("  answered", missTimes(s.MissTimes))
	}
	count("served stale", s.Stale, old.Stale, "")
	count("prefetches", s.Prefetch, old.Prefetch, "")
	count("evictions", s.Evicted, old.Evicted, "")
	u, before := s.Upstream, old.Upstream
	for _, c := range []struct {
		label       string
		now, before uint64
	}{
		{"synthesized", u.Synthesized, before.Synthesized}, {"probes", u.Probes, before.Probes},
		{"kept warm", u.KeptWarm, before.KeptWarm}, {"jittered", u.Jittered, before.Jittered},
	} {
		if c.now > 0 {
			count(c.label, c.now, c.before, "")
		}
	}
	if total(u.Limited) > 0 {
		add("held back", byName(u.Limited))
	}
	if u.Gone > 0 {
		add("upstreams", fmt.Sprintf("those of %s are gone", plural(u.Gone, "zone")))
	}
	if n := s.Subnets; n != nil {
		add("subnets", fmt.Sprintf("%s of %s, %s each at most", plural(n.Answers, "answer"), plural(n.Names, "name"), number(int64(n.Most))))
		if total(n.Evicted) > 0 {
			add("  evicted", byName(n.Evicted))
		}
	}
	add("waiting", number(s.Waiting))
	add("flights", number(s.Flights))

	classes := slices.Collect(maps.Keys(s.Entries))
	for class := range s.Capacity {
		if !slices.Contains(classes, class) {
			classes = append(classes, class)
		}
	}
	slices.SortFunc(classes, func(a, b string) int { return cmp.Compare(b, a) }) // success before denial
	for _, class := range classes {
		value := number(s.Entries[class])
		if capacity, bounded := s.Capacity[class]; bounded {
			value += " of " + number(capacity)
		}
		add(class, value+" entries")
	}
	if segments := byName(s.Segments); segments != "" {
		add("segments", segments)
	}
	memory := size(s.Memory)
	if s.MemoryLimit > 0 {
		memory += fmt.Sprintf(" of %s (%s)", size(s.MemoryLimit), share(float64(s.Memory), float64(s.MemoryLimit)))
	}
	add("memory", memory)
	if len(s.Pools) == 0 {
		add("hot tier", fmt.Sprintf("%s of %s entries", number(s.HotEntries), number(s.HotCapacity)))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Pools)) {
		p := s.Pools[name]
		with := fmt.Sprintf("%s, of %s", name, plural(int64(p.Blocks), "block"))
		if p.Same {
			with += ", with the same answers as others"
		}
		add("pool", with)
		add("  entries", fmt.Sprintf("%s of %s", number(total(p.Entries)), number(total(p.Capacity))))
		add("  segments", byName(p.Segments))
		add("  memory", fmt.Sprintf("%s of %s (%s)", size(p.Memory), size(p.MemoryLimit), share(float64(p.Memory), float64(p.MemoryLimit))))
		add("  hot tier", fmt.Sprintf("%s of %s entries", number(p.HotEntries), number(p.HotCapacity)))
	}
	add("window", share(s.WindowShare, 1)+" of the entries")
	add("generation", number(s.Generation))
	for _, at := range slices.Sorted(maps.Keys(s.FastPath)) {
		f := s.FastPath[at]
		add("fast path", at)
		add("  packets", fmt.Sprintf("%s, %s hits, %s dropped, by %s", number(f.Packets), number(f.Hits), number(f.Dropped), plural(f.Workers, "worker")))
		if total(f.Batches) > 0 {
			add("  batches", batches(f.Batches))
		}
	}
	if f := s.Shared; f != nil {
		add("shared", f.Servers+", group "+f.Group)
		if f.Away {
			add("  away", cmp.Or(f.Trouble, "not reached yet"))
		}
		var asked uint64
		for _, n := range f.Asked {
			asked += n
		}
		add("  asked", fmt.Sprintf("%s, %s hits, %s late, %s refused, 95 of 100 within %s", number(asked), number(f.Asked["hit"]), number(f.Asked["late"]), number(f.Asked["refused"]), time.Duration(f.P95*1e9).Round(10*time.Microsecond)))
		add("  written", fmt.Sprintf("%s, %s dropped, %s failed", number(f.Writes["written"]), number(f.Writes["dropped"]), number(f.Writes["failed"])))
	}
	if f := s.Snapshot; f != nil {
		add("snapshot", f.Path)
		if f.Written.IsZero() {
			add("  written", "never")
		} else {
			add("  written", fmt.Sprintf("%s, %s entries, %s", moment(f.Written), number(f.Entries), size(f.Bytes)))
		}
		if f.Failures > 0 {
			add("  failures", number(f.Failures))
		}
	}
	return rows
}

// bounds are the keys of a histogram by their numbers, in their order.
func bounds(counts map[string]uint64) (all []float64, of map[float64]uint64) {
	of = make(map[float64]uint64)
	for key, n := range counts {
		if bound, err := strconv.ParseFloat(key, 64); err == nil {
			all = append(all, bound)
			of[bound] = n
		}
	}
	slices.Sort(all)
	return all, of
}

// missTimes says within which time half of the misses were answered or have failed, and nearly all.
func missTimes(times map[string]uint64) string {
	all, of := bounds(times)
	within := func(share float64) string {
		sum := 0.0
		for _, bound := range all {
			if sum += float64(of[bound]); sum < share*float64(total(times)) {
				continue
			}
			switch {
			case bound < 1:
				return fmt.Sprintf("%.3g ms", 1000*bound)
			case !math.IsInf(bound, 1):
				return fmt.Sprintf("%.3g s", bound)
			}
		}
		return "longer"
	}
	return fmt.Sprintf("half within %s, 99 %% within %s", within(0.5), within(0.99))
}

// batches says how many batches of the fast path had how many packets at most.
func batches(counts map[string]uint64) string {
	all, of := bounds(counts)
	var words []string
	for _, most := range all {
		words = append(words, fmt.Sprintf("%g: %s", most, number(of[most])))
	}
	return "of up to " + strings.Join(words, ", ")
}

// lasting is for how long something was counted: a minute, say, or less where the server is younger.
func lasting(r api.Recent) string {
	whole := time.Duration(r.Minutes) * time.Minute
	if took := time.Duration(r.Seconds * float64(time.Second)); took < whole*9/10 {
		return took.Round(time.Second).String()
	}
	return fmt.Sprintf("%d min", r.Minutes)
}
