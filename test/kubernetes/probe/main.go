// Command probe looks names up with Go's resolver: probe NAME... It prints a line "NAME: ADDRESS..." for each, with the addresses
// sorted, or "NAME: failed: REASON".
//
// probe -until-eof NAME... asks again and again until its standard input ends. It prints a line for each lookup that fails or takes
// over a second, and at the end a summary, "N lookups, N failed, N over 1 s, N lost". probe -times N NAME... does that N times. A # at
// the begin of a name is replaced by another address each time, as in the names of pods.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// The testdata's lookup.c does the same with getaddrinfo.
const (
	pause = 2 * time.Millisecond    // between lookups
	long  = 1 * time.Second         // more than any lookup should take
	lost  = 4900 * time.Millisecond // what it takes at least when a packet was lost: the resolver waits before it asks again
)

func main() {
	untilEOF := flag.Bool("until-eof", false, "ask again and again until standard input ends")
	times := flag.Int("times", 0, "ask that many times")
	flag.Parse()
	many := *untilEOF || *times > 0
	var ended atomic.Bool
	if *untilEOF {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			ended.Store(true)
		}()
	}
	fresh := time.Now().UnixMilli() / 4 // no run of minutes ago has had the same names
	var lookups, failed, overLong, countLost int
	for {
		for _, name := range flag.Args() {
			if rest, is := strings.CutPrefix(name, "#"); is {
				fresh++
				name = fmt.Sprintf("10-%d-%d-%d%s", fresh>>16&255, fresh>>8&255, fresh&255, rest)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			begin := time.Now()
			addresses, err := net.DefaultResolver.LookupHost(ctx, name)
			took := time.Since(begin)
			cancel()
			lookups++
			result := strings.Join(slices.Compact(slices.Sorted(slices.Values(addresses))), " ")
			if err != nil {
				failed++
				result = "failed: " + err.Error()
			}
			if took > long {
				overLong++
			}
			if took > lost {
				countLost++
			}
			if !many {
				fmt.Printf("%s: %s\n", name, result)
			} else if err != nil || took > long {
				fmt.Printf("%s %s: %s (%d ms)\n", begin.UTC().Format("15:04:05.000"), name, result, took.Milliseconds())
			}
		}
		if !many {
			return
		}
		*times--
		if *times == 0 || *untilEOF && ended.Load() {
			fmt.Printf("%d lookups, %d failed, %d over 1 s, %d lost\n", lookups, failed, overLong, countLost)
			return
		}
		time.Sleep(pause)
	}
}
