package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

// This file has the commands that show what comes most often, and how the sizes are found: top, hot, climb.

func newTop(g *globals) *cobra.Command {
	var (
		hits, misses, clients, watch bool
		limit                        int
		out                          *form
		blocks                       *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "top",
		Short: "show the names, or the clients, that come most often",
		Long: "Show the names whose answers have been served most often in the last 10 to 20 minutes, with --misses the names that were " +
			"missed most often, or with --clients the clients that have asked most often, as prefixes. Clients are counted only if top_clients " +
			"in the Corefile asks for it.\n\n" +
			"A count is never too low, but for what sampling does, and too high by ERROR at the most. Misses are counted each. Of hits and " +
			"clients, a busy server counts samples, so that a count has a standard deviation, which is shown.",
		Example: "  optcachectl top\n  optcachectl top --misses --watch\n  optcachectl top --clients -n 5",
		Args:    cobra.NoArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) error {
		by := "hits"
		switch {
		case misses && clients || hits && (misses || clients):
			return wrongUsage("only one of --hits, --misses and --clients can be shown")
		case misses:
			by = "misses"
		case clients:
			by = "clients"
		}
		if limit < 1 {
			return wrongUsage("--limit %d: below 1", limit)
		}
		query := url.Values{"by": {by}, "limit": {strconv.Itoa(limit)}}
		blocks.addTo(query)
		if watch {
			if out.is != "table" {
				return wrongUsage("--watch shows a table")
			}
			return g.watch(ctx, func() ([]string, error) {
				var reply api.TopReply
				_, err := c.Get(ctx, "/v1/top", query, &reply)
				return topLines(reply, g.now()), err
			})
		}
		var reply api.TopReply
		body, err := c.Get(ctx, "/v1/top", query, &reply)
		if err != nil {
			return err
		}
		if out.is == "json" {
			return g.printJSON(body)
		}
		return g.printLines(topLines(reply, g.now()))
	})
	f := cmd.Flags()
	f.BoolVar(&hits, "hits", false, "names that are served most often; this is the default")
	f.BoolVar(&misses, "misses", false, "names that miss most often")
	f.BoolVar(&clients, "clients", false, "clients that ask most often")
	f.IntVarP(&limit, "limit", "n", 20, "`N` of each block at the most")
	watchFlag(cmd, &watch)
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// printLines prints lines as they are.
func (g *globals) printLines(lines []string) error {
	return g.print(func(w io.Writer) {
		for _, line := range lines {
			fmt.Fprintln(w, line)
		}
	})
}

// topLines makes a table of each block.
func topLines(reply api.TopReply, now time.Time) (lines []string) {
	for i, b := range reply.Blocks {
		if i > 0 {
			lines = append(lines, "")
		}
		took := now.Sub(b.Since)
		line := fmt.Sprintf("Block %d: %s %s since %s; an error is %s at the most", b.ID, number(b.Total), reply.By, moment(b.Since), number(b.Bound))
		if b.OneIn > 1 {
			line += fmt.Sprintf("; up to 1 in %s was counted", number(b.OneIn))
		}
		if b.Skipped > 0 {
			line += fmt.Sprintf("; %s were not counted", number(b.Skipped))
		}
		lines = append(lines, line)
		t := &table{head: []string{"NAME", "TYPE", "COUNT", "ERROR", "SHARE", "PER SECOND"}}
		if reply.By == "clients" {
			t.head = []string{"CLIENT", "COUNT", "ERROR", "SHARE", "PER SECOND"}
		}
		for _, it := range b.Items {
			cells := []string{it.Name, it.Type}
			if reply.By == "clients" {
				cells = []string{it.Client}
			}
			rate := "-"
			if took > 0 {
				rate = fmt.Sprintf("%.1f", float64(it.Count)/took.Seconds())
			}
			t.add(nil, append(cells, deviating(it.Count, b.OneIn), number(it.Error), share(float64(it.Count), float64(b.Total)), rate)...)
		}
		var text strings.Builder
		t.writeTo(&text)
		lines = append(lines, strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n")...)
	}
	if len(reply.Blocks) == 0 {
		lines = append(lines, "no blocks")
	}
	return lines
}

// deviating is a count with its standard deviation, where one in so many was counted.
func deviating(count, oneIn uint64) string {
	if oneIn <= 1 {
		return number(count)
	}
	return fmt.Sprintf("%s ±%s", number(count), number(int64(math.Round(math.Sqrt(float64(count)*float64(oneIn))))))
}

func newHot(g *globals) *cobra.Command {
	l := listing{hot: true, sort: "accesses"}
	cmd := g.command(cobra.Command{
		Use:   "hot",
		Short: "show what is in the hot tier",
		Long: "Show the answers that have a copy in the hot tier, those with the most accesses first. The count of a copy stops at 7, and starts " +
			"anew when the tier is full and another answer wants its place.",
		Args: cobra.NoArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) error {
		if l.limit < 1 {
			return wrongUsage("--limit %d: below 1", l.limit)
		}
		return g.list(ctx, c, "", l)
	})
	cmd.Flags().IntVarP(&l.limit, "limit", "n", 50, "`N` answers at the most")
	l.blocks = blockFlag(cmd)
	l.out = formFlag(cmd, "table", "json")
	return cmd
}

func newClimb(g *globals) *cobra.Command {
	var (
		out    *form
		blocks *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "climb",
		Short: "show where the hill climber stands",
		Long: "Show how large the window is, by how much the next step changes it, and what the hit ratio of the last sample was. The climber " +
			"goes on as long as the hit ratio rises, and turns round when it falls. With hot_cache_percentage auto, it finds the size of the " +
			"hot tier, too.",
		Args: cobra.NoArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) error {
		query := url.Values{}
		blocks.addTo(query)
		var reply struct {
			Blocks []struct {
				ID      int         `json:"id"`
				Climber api.Climber `json:"climber"`
			} `json:"blocks"`
		}
		if _, err := c.Get(ctx, "/v1/status", query, &reply); err != nil {
			return err
		}
		if out.is == "json" {
			body, err := json.Marshal(reply.Blocks)
			if err != nil {
				return err
			}
			return g.printJSON(body)
		}
		t := &table{head: []string{"BLOCK", "SIZE OF", "SHARE", "NEXT STEP", "VALUE", "REQUESTS LEFT"}}
		for _, b := range reply.Blocks {
			add := func(of string, h api.Hill) {
				value := "-"
				if h.Value != nil {
					value = fmt.Sprintf("%.4f", *h.Value)
				}
				t.add(nil, strconv.Itoa(b.ID), of, share(h.Share, 1), fmt.Sprintf("%+.2f %%", 100*h.Step), value, fmt.Sprintf("%s of %s", number(b.Climber.Left), number(b.Climber.Sample)))
			}
			add("window", b.Climber.Window)
			if b.Climber.Hot != nil {
				add("hot tier", *b.Climber.Hot)
			}
		}
		return g.print(t.writeTo)
	})
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}
