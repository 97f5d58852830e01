package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
)

// This file shows something again and again: status --watch, top --watch.

const (
	// watchInterval is between two looks.
	watchInterval = time.Second

	// Escape sequences of a terminal (ECMA-48).
	cursorHome  = "\x1b[H"
	eraseLine   = "\x1b[K" // from the cursor on
	eraseScreen = "\x1b[J" // likewise
)

func watchFlag(cmd *cobra.Command, watch *bool) {
	cmd.Flags().BoolVarP(watch, "watch", "w", false, "show it again every second, with what happened meanwhile, until ^C")
}

// watch shows what look returns until the context ends: in place on a terminal, and one after another elsewhere. The cursor stays
// visible and no mode of the terminal is changed, so that nothing has to be put right when ^C ends the program.
func (g *globals) watch(ctx context.Context, look func() ([]string, error)) error {
	ticks := g.every(watchInterval)
	for first := true; ; first = false {
		lines, err := look()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		width, height := g.screen()
		err = g.print(func(w io.Writer) {
			if height == 0 {
				if !first {
					fmt.Fprintln(w)
				}
				for _, line := range lines {
					fmt.Fprintln(w, line)
				}
				return
			}
			if first {
				fmt.Fprint(w, cursorHome, eraseScreen)
			}
			fmt.Fprint(w, cursorHome)
			// Behind the last column, erasing would take its character. Behind the last line, the screen would scroll.
			for _, line := range clip(lines, width-1, height-1) {
				fmt.Fprint(w, line, eraseLine, "\r\n")
			}
			fmt.Fprint(w, eraseScreen)
		})
		if err != nil {
			return err
		}
		select {
		case <-ticks:
		case <-ctx.Done():
			return nil
		}
	}
}
