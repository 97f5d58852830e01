package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

// loadTimeout is how long load waits, without --timeout, for what becomes of a dump that is sent: a million answers as text take a
// minute on a machine that has much else to do.
const loadTimeout = 15 * time.Minute

// refusalMeanings say why an answer of a dump is not taken in, by the server's words.
var refusalMeanings = map[string]string{
	"malformed": "it is no response that is ever kept",
	"zone":      "its name is in no zone of the block",
	"future":    "it came later than now, by the clock",
	"expired":   "it has expired since",
	"subnet":    "they are for the clients of one subnet, and ecs is not scoped",
	"room":      "there is no room, or an answer that is as new is held already",
}

func newLoad(g *globals) *cobra.Command {
	var (
		text   bool
		blocks *blockIDs
		out    *form
	)
	var cmd *cobra.Command
	cmd = g.command(cobra.Command{
		Use:   "load [FILE]",
		Short: "take a dump in",
		Long: "Take in what dump has written, from FILE or, without one, from stdin. Say how many answers are held now, and how many are not, " +
			"by reason. What the block holds already stays, unless the dump has something newer.\n\n" +
			"The server reads the dump to its end first: if it is cut off or damaged, nothing is changed. What was flushed after the dump was " +
			"made comes back. A file of cache_file_path is a dump, too.",
		Example: "  optcachectl load cache.zst\n  optcachectl -s OLD dump | optcachectl -s NEW load",
		Args:    cobra.MaximumNArgs(1),
	}, func(ctx context.Context, c *client.Client, args []string) error {
		in, length, err := g.openDump(args)
		if err != nil {
			return err
		}
		defer in.Close()
		if !cmd.Flags().Changed("timeout") {
			c.Timeout = loadTimeout
		}
		p := g.startProgress(true)
		defer p.end()
		body := bufio.NewReader(in)
		form := api.SnapshotForm
		if first, _ := body.Peek(1); text || string(first) == ";" { // no snapshot begins so
			form = api.ZoneForm
		}
		query := url.Values{}
		blocks.addTo(query)
		var reply api.LoadReply
		answer, err := c.Send(ctx, "/v1/load", query, form, io.TeeReader(body, &counter{say: p.bytes}), length, &reply)
		p.end()
		if err != nil {
			return err
		}
		if out.is == "json" {
			return g.printJSON(answer)
		}
		return g.print(func(w io.Writer) {
			fmt.Fprintf(w, "%s loaded\n", plural(int64(reply.Loaded), "answer"))
			for _, why := range slices.Sorted(maps.Keys(reply.Refused)) {
				meaning := refusalMeanings[why]
				if meaning != "" {
					meaning = ": " + meaning
				}
				fmt.Fprintf(w, "%s not loaded, %s%s\n", plural(int64(reply.Refused[why]), "answer"), printable(why), meaning)
			}
		})
	})
	cmd.ValidArgsFunction = completeFile
	cmd.Flags().BoolVar(&text, "text", false, "it is text; without this, its first letter says so")
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// openDump opens FILE or stdin. It returns its length in bytes, or -1 if that is not known.
func (g *globals) openDump(args []string) (in io.ReadCloser, length int64, err error) {
	if len(args) == 0 || args[0] == "-" {
		if g.typed {
			return nil, 0, wrongUsage("no dump is typed at a terminal: give a FILE")
		}
		return io.NopCloser(g.stdin), -1, nil
	}
	f, err := os.Open(args[0])
	if err != nil {
		return nil, 0, &exitError{exitUsage, err}
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, 0, &exitError{exitUsage, err}
	case info.IsDir():
		return nil, 0, wrongUsage("%s is a folder", args[0])
	case info.Size() > api.MaxLoad:
		return nil, 0, wrongUsage("%s has %s, and %s are allowed", args[0], size(info.Size()), size(api.MaxLoad))
	case !info.Mode().IsRegular():
		return f, -1, nil
	}
	return f, info.Size(), nil
}
