package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

const (
	// pageSize is how many answers are asked for at once: few enough to come soon, enough that a million takes 200 pages.
	pageSize = 5_000

	// pageSizeWithRecords is likewise, where an answer may have up to 64 KiB of records.
	pageSizeWithRecords = 500

	// sortedLimit is how much of a sorted list is shown without --limit.
	sortedLimit = 100
)

// listing is the flags of list.
type listing struct {
	subtree, stale, hot, records bool
	qtype, sort                  string
	kinds                        []string
	limit                        int
	out                          *form
	blocks                       *blockIDs
}

func newList(g *globals) *cobra.Command {
	var l listing
	cmd := g.command(cobra.Command{
		Use:   "list [NAME]",
		Short: "list what is held",
		Long: "List the answers that are held, all of them or those that the flags mean. The list comes in pages, and the server serves on " +
			"meanwhile. What comes or goes while it is made may be in it or not.\n\n" +
			"The form json is one object a line. The form zone is the records as in a zone file; denials and failures are comments there.",
		Example: "  optcachectl list example.org --subtree\n  optcachectl list --kind failure --limit 100\n  optcachectl list -o zone >cache.zone",
		Args:    cobra.MaximumNArgs(1),
	}, func(ctx context.Context, c *client.Client, args []string) error {
		name, _, err := nameAndType(args)
		if err != nil {
			return err
		}
		if l.subtree && name == "" {
			return wrongUsage("--subtree needs a NAME")
		}
		if l.limit < 0 {
			return wrongUsage("--limit %d: below zero", l.limit)
		}
		if l.sort != "" && l.limit == 0 {
			l.limit = sortedLimit
		}
		if l.sort != "" && l.limit > api.MaxPage {
			return wrongUsage("--limit %d: a sorted list has %d answers at the most", l.limit, api.MaxPage)
		}
		return g.list(ctx, c, name, l)
	})
	f := cmd.Flags()
	f.BoolVar(&l.subtree, "subtree", false, "NAME, and all that is below it")
	f.StringVarP(&l.qtype, "type", "t", "", "only this `TYPE`")
	f.StringSliceVar(&l.kinds, "kind", nil, "only this `KIND`: success, denial or failure; may be repeated")
	f.BoolVar(&l.stale, "stale", false, "only what has expired")
	f.BoolVar(&l.hot, "hot", false, "only what has a copy in the hot tier")
	f.StringVar(&l.sort, "sort", "", "the first 100, or --limit, in this `ORDER`: ttl (what expires next), age (the oldest), accesses, bytes (the largest), name")
	f.BoolVar(&l.records, "records", false, "with the records of each answer")
	f.IntVarP(&l.limit, "limit", "n", 0, "`N` answers at the most; 0: all")
	complete(cmd, "type", commonTypes...)
	complete(cmd, "sort", "ttl", "age", "accesses", "bytes", "name")
	complete(cmd, "kind", "success", "denial", "failure")
	l.blocks = blockFlag(cmd)
	l.out = formFlag(cmd, "table", "json", "zone")
	return cmd
}

// page is what one request of a list brings: how many answers, and where the list goes on.
type page struct {
	answers int
	next    string
}

// list gets page after page until there is none, or there are as many answers as are wanted.
func (g *globals) list(ctx context.Context, c *client.Client, name string, l listing) error {
	query := url.Values{}
	set := func(key, value string) {
		if value != "" {
			query.Set(key, value)
		}
	}
	yes := func(key string, is bool) {
		if is {
			query.Set(key, "true")
		}
	}
	set("name", name)
	set("type", strings.ToUpper(l.qtype))
	yes("subtree", l.subtree)
	yes("stale", l.stale)
	yes("hot", l.hot)
	set("sort", l.sort)
	yes("records", l.records || l.out.is == "zone")
	for _, kind := range l.kinds {
		query.Add("kind", kind)
	}
	l.blocks.addTo(query)

	size := pageSize
	if query.Has("records") {
		size = pageSizeWithRecords
	}
	if l.sort != "" {
		size = l.limit // a sorted list has one page
	}
	t := answerTable()
	shown := 0
	width, _ := g.screen()
	p := g.startProgress(width == 0)
	defer p.end()
	for left := l.limit; ; {
		if l.limit > 0 {
			size = min(size, left)
		}
		query.Set("limit", strconv.Itoa(size))
		var got page
		var err error
		switch l.out.is {
		case "zone":
			got, err = g.zonePage(ctx, c, query)
		case "json":
			got, err = g.jsonPage(ctx, c, query)
		default:
			got, err = g.tablePage(ctx, c, query, t)
		}
		if err != nil {
			return err
		}
		shown += got.answers
		left -= got.answers
		if got.next == "" || l.limit > 0 && left <= 0 {
			return nil
		}
		if got.next == query.Get("after") {
			return errors.New("the list does not go on: the server has sent the same cursor twice")
		}
		query.Set("after", got.next)
		p.say(func() string { return plural(int64(shown), "answer") })
	}
}

func (g *globals) tablePage(ctx context.Context, c *client.Client, query url.Values, t *table) (page, error) {
	var reply api.ListReply
	if _, err := c.Get(ctx, "/v1/list", query, &reply); err != nil {
		return page{}, err
	}
	for _, a := range reply.Answers {
		t.addAnswer(a.Block, a.Answer)
	}
	return page{len(reply.Answers), reply.Next}, g.print(t.writeTo)
}

// jsonPage writes what the server says of an answer as it is, with members that this version does not know.
func (g *globals) jsonPage(ctx context.Context, c *client.Client, query url.Values) (page, error) {
	var reply struct {
		Answers []json.RawMessage `json:"answers"`
		Next    string            `json:"next"`
	}
	if _, err := c.Get(ctx, "/v1/list", query, &reply); err != nil {
		return page{}, err
	}
	var lines bytes.Buffer
	for _, a := range reply.Answers {
		if err := json.Compact(&lines, a); err != nil {
			return page{}, err
		}
		lines.WriteByte('\n')
	}
	_, err := g.stdout.Write(lines.Bytes())
	return page{len(reply.Answers), reply.Next}, err
}

// zonePage writes the records of answers. An answer that is no plain success says what it is in a comment.
func (g *globals) zonePage(ctx context.Context, c *client.Client, query url.Values) (page, error) {
	var reply api.ListReply
	if _, err := c.Get(ctx, "/v1/list", query, &reply); err != nil {
		return page{}, err
	}
	return page{len(reply.Answers), reply.Next}, g.print(func(w io.Writer) {
		for _, a := range reply.Answers {
			if a.Kind != "success" || a.Rcode != "NOERROR" {
				fmt.Fprintf(w, "; %s\n", printable(fmt.Sprintf("%s %s %s: %s, %s", a.Name, a.Class, a.Type, a.Rcode, a.Kind)))
			}
			for _, record := range a.Records {
				fmt.Fprintln(w, printable(record))
			}
		}
	})
}
