package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

func newFlush(g *globals) *cobra.Command {
	var (
		request           api.FlushRequest
		denials, failures bool
		yes               bool
		out               *form
		blocks            *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "flush [NAME [TYPE]]",
		Short: "remove answers, so that they do not come back",
		Long: "Remove the answers for a qname, of one type or of all; or what is at or below a name; or all denials, failures, or " +
			"expired answers; or everything. A name, a kind and --stale together mean what is all of that.\n\n" +
			"When the command ends, nothing brings back an answer to a question that was asked before: neither the hot tier, a " +
			"request or a refresh that was under way, a reload, nor a snapshot. The next question for the name asks the upstream.",
		Example: "  optcachectl flush www.example.org\n  optcachectl flush example.org MX\n  optcachectl flush example.org --subtree\n" +
			"  optcachectl flush --denials --failures\n  optcachectl flush --all --yes",
		Args: cobra.MaximumNArgs(2),
	}, func(ctx context.Context, c *client.Client, args []string) (err error) {
		if request.Name, request.Type, err = nameAndType(args); err != nil {
			return err
		}
		if denials {
			request.Kinds = append(request.Kinds, "denial")
		}
		if failures {
			request.Kinds = append(request.Kinds, "failure")
		}
		request.Blocks = *blocks
		narrow := request.Name != "" || request.Kinds != nil || request.Stale
		switch {
		case request.All && narrow:
			return wrongUsage("--all goes with nothing else")
		case request.Subtree && request.Name == "":
			return wrongUsage("--subtree needs a NAME")
		case !request.All && !narrow:
			return wrongUsage("flush needs a NAME, --denials, --failures, --stale or --all")
		}
		if request.All && !yes {
			of := "everything"
			if len(*blocks) > 0 {
				of = "all of block " + strings.Trim(fmt.Sprint(*blocks), "[]")
			}
			if err := g.ask(fmt.Sprintf("Flush %s at %s? [y/N] ", of, c.Address)); err != nil {
				return err
			}
		}
		var reply api.FlushReply
		body, err := c.Post(ctx, "/v1/flush", request, &reply)
		if err != nil {
			return err
		}
		if out.is == "json" {
			return g.printJSON(body)
		}
		return g.print(func(w io.Writer) { fmt.Fprintf(w, "%s flushed\n", plural(reply.Flushed, "answer")) })
	})
	f := cmd.Flags()
	f.BoolVar(&request.Subtree, "subtree", false, "NAME, and all that is below it")
	f.BoolVar(&denials, "denials", false, "only NXDOMAIN and NODATA")
	f.BoolVar(&failures, "failures", false, "only failures, such as SERVFAIL")
	f.BoolVar(&request.Stale, "stale", false, "only what has expired")
	f.BoolVar(&request.All, "all", false, "everything, after a question")
	f.BoolVarP(&yes, "yes", "y", false, "with --all: do not ask")
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// ask returns an error unless the user says yes at a terminal.
func (g *globals) ask(question string) error {
	if !g.typed || !g.shown {
		return wrongUsage("--all needs --yes where no terminal is to ask at")
	}
	io.WriteString(g.stderr, question)
	line, err := bufio.NewReader(io.LimitReader(g.stdin, 1<<10)).ReadString('\n')
	if err != nil && line == "" {
		io.WriteString(g.stderr, "\n") // ^D leaves the cursor behind the question
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return &exitError{exitFailed, errors.New("nothing is flushed")}
}

func plural(n int64, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return number(n) + " " + noun
}
