package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/client"
)

func newAlive(g *globals) *cobra.Command {
	return g.command(cobra.Command{
		Use:   "alive",
		Short: "tell by the exit code whether the server answers",
		Long: "Ask the control interface whether it answers. It does, too, while it is busy with other requests. This is for probes: it " +
			"prints nothing unless there is no answer.",
		Example: "  optcachectl alive --timeout 4s",
		Args:    cobra.NoArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) error { return c.Alive(ctx) })
}
