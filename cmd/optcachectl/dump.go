package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

func newDump(g *globals) *cobra.Command {
	var (
		text   bool
		blocks *blockIDs
	)
	cmd := g.command(cobra.Command{
		Use:   "dump [FILE]",
		Short: "write what a block holds to a file",
		Long: "Write what one block holds to FILE or, without one, to stdout. load takes it in again. A dump is a snapshot, as in the file of " +
			"cache_file_path, which a start of the server reads; or text: lines of a zone file, with a comment before each answer. The text " +
			"does not say how popular an answer is.\n\n" +
			"The server serves on meanwhile. A FILE is written beside, with the mode 0600, and takes its name when it is whole. If the dump is " +
			"cut off, the exit code is 1, there is no new FILE, and an old one stays.",
		Example: "  optcachectl dump cache.zst\n  optcachectl dump --text --block 1 | grep example.org",
		Args:    cobra.MaximumNArgs(1),
	}, func(ctx context.Context, c *client.Client, args []string) error {
		path := ""
		if len(args) > 0 && args[0] != "-" {
			if path = args[0]; path == "" {
				return wrongUsage("FILE is empty")
			}
		}
		width, _ := g.screen()
		if path == "" && !text && width > 0 {
			return wrongUsage("a snapshot is not for a terminal: give a FILE, or --text")
		}
		query := url.Values{}
		blocks.addTo(query)
		form := api.SnapshotForm
		if text {
			form = api.ZoneForm
		}
		write := func(ctx context.Context, to io.Writer) (int64, error) {
			p := g.startProgress(path != "" || width == 0)
			defer p.end()
			return c.Stream(ctx, "/v1/dump", query, form, io.MultiWriter(to, &counter{say: p.bytes}))
		}
		if path == "" {
			_, err := write(ctx, g.stdout)
			return err
		}
		// The file beside is removed when ^C ends the program, too.
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
		var n int64
		err := replaceFile(path, func(to io.Writer) (err error) {
			n, err = write(ctx, to)
			return err
		})
		if err != nil {
			return err
		}
		return g.print(func(w io.Writer) { fmt.Fprintf(w, "%s written to %s\n", size(n), printable(path)) })
	})
	cmd.ValidArgsFunction = completeFile
	cmd.Flags().BoolVar(&text, "text", false, "as text")
	blocks = blockFlag(cmd)
	return cmd
}

// completeFile has the shell offer files.
func completeFile(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// counter counts what is written to it.
type counter struct {
	n   int64
	say func(int64)
}

func (c *counter) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	c.say(c.n)
	return len(b), nil
}

// replaceFile has a file written beside path, which takes its place when it is whole. A path that cannot be replaced, such as a pipe
// or a device, is written itself.
func replaceFile(path string, write func(io.Writer) error) (err error) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0) // says so if it is a folder
		if err != nil {
			return &exitError{exitUsage, err}
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			e.Path = path // the name beside says nothing to the user
		}
		return &exitError{exitUsage, err}
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
