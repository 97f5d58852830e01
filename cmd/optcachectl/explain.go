package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

func newExplain(g *globals) *cobra.Command {
	var (
		request api.ExplainRequest
		out     *form
		blocks  *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "explain NAME [TYPE]",
		Short: "ask a question, and show what becomes of it and why",
		Long: "Ask for a name through the server's chain of plugins, as a client does, and show what became of it: a hit and where, or a " +
			"miss; for how long the answer is kept and what decides that, or by which rule it is not kept; how its hits are sent. TYPE is A " +
			"if it is not given. The question may reach the upstream, and counts in the metrics. One that was a miss is asked twice.",
		Example: "  optcachectl explain www.example.org\n  optcachectl explain example.org MX --do",
		Args:    cobra.RangeArgs(1, 2),
	}, func(ctx context.Context, c *client.Client, args []string) (err error) {
		if request.Name, request.Type, err = nameAndType(args); err != nil {
			return err
		}
		request.Blocks = *blocks
		var reply api.ExplainReply
		body, err := c.Post(ctx, "/v1/explain", request, &reply)
		if err != nil {
			return err
		}
		if out.is == "json" {
			return g.printJSON(body)
		}
		return g.print(func(w io.Writer) {
			for _, e := range reply.Blocks {
				for _, line := range explainLines(e) {
					fmt.Fprintln(w, printable(line))
				}
			}
		})
	})
	f := cmd.Flags()
	f.BoolVar(&request.DO, "do", false, "with DO=1")
	f.BoolVar(&request.CD, "cd", false, "with CD=1")
	f.BoolVar(&request.NoRD, "no-rd", false, "with RD=0")
	f.BoolVar(&request.TCP, "tcp", false, "over TCP")
	f.StringVar(&request.Client, "client", "", "from this IP `ADDRESS` (default 127.0.0.1)")
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// explainLines says in lines what became of a question.
func explainLines(e api.BlockExplanation) (lines []string) {
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	because := func(why string) string {
		if why == "" {
			return ""
		}
		return ": " + why
	}
	add("Block %d: %s %s from %s", e.ID, e.Name, e.Type, e.Client)
	add("  outcome   %s%s", e.Outcome, because(e.Why))
	if e.Tier != "" {
		add("  found     in the tier %s, %d s old; the client gets TTL %d", e.Tier, e.Age, e.TTL)
	}
	if e.Rcode != "" {
		add("  reply     %s after %.1f ms, by %s", e.Rcode, e.Milliseconds, e.Server)
	}
	if r := e.Response; r != nil && r.Kept {
		add("  kept      as %s for %d s: %s", r.Kind, r.TTL, r.Why)
	} else if r != nil {
		add("  not kept  %s: %s", r.Kind, r.Why)
	}
	if w := e.Way; w != nil {
		add("  hits go   %s%s", w.Way, because(w.Why))
		if w.FastPath != "" {
			add("            not by the fast path: %s", w.FastPath)
		}
	}
	if h := e.Held; h != nil {
		add("  held      segment %s, %d s of %d s left", h.Segment, h.Left, h.TTL)
		for _, record := range h.Records {
			add("    %s", record)
		}
	}
	return lines
}
