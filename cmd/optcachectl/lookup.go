package main

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

func newLookup(g *globals) *cobra.Command {
	var (
		out    *form
		blocks *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "lookup NAME [TYPE]",
		Short: "show every answer that is held for a name",
		Long: "Show every answer that is held for a qname, of one type or of all. There is one for each type and each combination of " +
			"the bits DO and CD in the question. Below an answer are its records, with the TTL that is left. Behind the answers is what the " +
			"upstream is asked for the name now. The command itself asks no upstream.\n\n" +
			"The exit code is 4 where there is none.",
		Example: "  optcachectl lookup www.example.org\n  optcachectl lookup example.org MX -o json",
		Args:    cobra.RangeArgs(1, 2),
	}, func(ctx context.Context, c *client.Client, args []string) error {
		name, qtype, err := nameAndType(args)
		if err != nil {
			return err
		}
		query := url.Values{"name": {name}}
		if qtype != "" {
			query.Set("type", qtype)
		}
		blocks.addTo(query)
		var reply api.LookupReply
		body, err := c.Get(ctx, "/v1/lookup", query, &reply)
		if err != nil {
			return err
		}
		t, found := answerTable(), false
		var asked []string
		for _, b := range reply.Blocks {
			for _, a := range b.Answers {
				t.addAnswer(b.ID, a)
				found = true
			}
			for _, u := range b.UnderWay {
				asked = append(asked, underWay(b.ID, u))
			}
		}
		if out.is == "json" {
			err = g.printJSON(body)
		} else if found || asked != nil {
			err = g.print(func(w io.Writer) {
				if found {
					t.writeTo(w)
				}
				for _, line := range asked {
					fmt.Fprintln(w, printable(line))
				}
			})
		}
		if err == nil && !found {
			err = &exitError{exitNotFound, fmt.Errorf("nothing is held for %s", strings.Join(args, " "))}
		}
		return err
	})
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// underWay describes a question that the next plugin is asked now.
func underWay(block int, u api.UnderWay) string {
	var bits string
	if u.DO {
		bits += " do"
	}
	if u.CD {
		bits += " cd"
	}
	line := fmt.Sprintf("block %d asks for %s%s, for %.1f s: %s", block, u.Type, bits, u.Seconds, u.Reason)
	if u.Waiting > 0 {
		line += fmt.Sprintf(", %s wait", number(int64(u.Waiting)))
	}
	if u.Detached {
		line += ", flushed meanwhile"
	}
	return line
}
