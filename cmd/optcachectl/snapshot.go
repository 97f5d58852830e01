package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

func newSnapshot(g *globals) *cobra.Command {
	var (
		out     *form
		blocks  *blockIDs
		sockets string
	)
	cmd := g.command(cobra.Command{
		Use:   "snapshot",
		Short: "write the snapshot files now",
		Long: "Write the file of cache_file_path of each block that has one. The command ends when the files are written.\n\n" +
			"With --sockets it asks each server whose socket fits a pattern. That is for a server that starts beside the one that it " +
			"takes the place of, and reads its files. So it is done, too, where no server listens, or where one fails: it says so.",
		Example: "  optcachectl snapshot\n  optcachectl snapshot --block 1\n  optcachectl snapshot --sockets '/run/optcache/*/control.sock'",
		Args:    cobra.NoArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) error {
		if sockets == "" {
			return g.snapshot(ctx, c, *blocks, out)
		}
		if len(*blocks) > 0 || g.address != "" {
			return wrongUsage("--sockets goes with neither --server nor --block: it asks all blocks of all servers")
		}
		return g.snapshots(ctx, c, sockets, out)
	})
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	cmd.Flags().StringVar(&sockets, "sockets", "", "ask each server whose unix socket fits `PATTERN`, an absolute path with * ? []")
	return cmd
}

// snapshot asks one server.
func (g *globals) snapshot(ctx context.Context, c *client.Client, blocks []int, out *form) error {
	var reply api.SnapshotReply
	body, err := c.Post(ctx, "/v1/snapshot", api.SnapshotRequest{Blocks: blocks}, &reply)
	if err != nil {
		return err
	}
	if out.is == "json" {
		return g.printJSON(body)
	}
	return g.print(func(w io.Writer) {
		for _, id := range reply.Written {
			fmt.Fprintf(w, "block %d: snapshot written\n", id)
		}
		if len(reply.Written) == 0 {
			fmt.Fprintln(w, "no block has a snapshot file")
		}
	})
}

// snapshots asks each server whose socket fits a pattern, as c would ask one. What a server says does not fail the command.
func (g *globals) snapshots(ctx context.Context, c *client.Client, pattern string, out *form) error {
	paths, err := filepath.Glob(pattern)
	if err != nil || !filepath.IsAbs(pattern) {
		return wrongUsage("--sockets %q: not a pattern of an absolute path", pattern)
	}
	listening := 0
	for _, path := range paths {
		if info, err := os.Lstat(path); err != nil || info.Mode()&fs.ModeSocket == 0 {
			continue
		}
		o := c.Options
		if o.Address, err = client.ParseAddress("unix://" + path); err != nil {
			return err
		}
		one, err := client.New(o)
		if err == nil {
			err = g.snapshot(ctx, one, nil, out)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, ok := errors.AsType[*client.ConnectError](err); !ok {
			listening++
		}
		if err != nil {
			fmt.Fprintf(g.stderr, "optcachectl: %s: %s\n", printable(path), printable(err.Error()))
		}
	}
	if listening == 0 {
		fmt.Fprintf(g.stderr, "optcachectl: no server listens at %s\n", printable(pattern))
	}
	return nil
}
