package control

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"

	"github.com/optcache/optcache/plugin/control/api"
)

// This file has what comes most often, and lists in an order.

// ErrNotCounted is what a Block's Top returns, or wraps, for what it does not count.
var ErrNotCounted = errors.New("it is not counted")

// kindsOfTop are what Top takes.
var kindsOfTop = []string{"hits", "misses", "clients"}

const (
	defaultTop = 20
	mostTop    = 1000
)

// --- /v1/top

func top(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	values, err := parameters(r, []string{"by", "limit"}, []string{"block"})
	if err != nil {
		return nil, err
	}
	by := cmp.Or(values.Get("by"), kindsOfTop[0])
	if !slices.Contains(kindsOfTop, by) || values.Has("by") && values.Get("by") == "" {
		return nil, badRequest("by", "%q is neither hits, misses nor clients", values.Get("by"))
	}
	limit := defaultTop
	if values.Has("limit") {
		if limit, err = strconv.Atoi(values.Get("limit")); err != nil || limit < 1 || limit > mostTop {
			return nil, badRequest("limit", "%q is no number from 1 to %d", values.Get("limit"), mostTop)
		}
	}
	all, err := chosenParameters(blocks, values)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		a := api.TopReply{By: by, Blocks: []api.BlockTop{}}
		for _, b := range all {
			t, err := b.Top(by, limit)
			if errors.Is(err, ErrNotCounted) {
				if !values.Has("block") {
					continue
				}
				return nil, errNotCounted(by)
			}
			if err != nil {
				return nil, fmt.Errorf("block %d: %w", b.id, err)
			}
			if t.Items == nil {
				t.Items = []TopItem{}
			}
			a.Blocks = append(a.Blocks, api.BlockTop{ID: b.id, Top: t})
		}
		if len(a.Blocks) == 0 && len(all) > 0 {
			return nil, errNotCounted(by)
		}
		return jsonAnswer(a), nil
	}, nil
}

func errNotCounted(by string) error {
	detail := "by: " + by + " are not counted"
	if by == "clients" {
		detail += ": top_clients in the Corefile turns that on"
	}
	return &problem{Status: http.StatusConflict, Detail: detail}
}

// --- sorted lists

// orders are the orders of a list: what comes first is what an operator looks for.
var orders = map[string]func(a, b *Answer) int{
	"ttl":      func(a, b *Answer) int { return cmp.Compare(a.Left, b.Left) },   // what expires next, or has expired the longest ago
	"age":      func(a, b *Answer) int { return a.Stored.Compare(b.Stored) },    // the oldest
	"accesses": func(a, b *Answer) int { return cmp.Compare(b.Hits, a.Hits) },   // what is asked for most
	"bytes":    func(a, b *Answer) int { return cmp.Compare(b.Bytes, a.Bytes) }, // the largest
	"name":     func(a, b *Answer) int { return cmp.Compare(a.Name, b.Name) },
}

// mostSortedRecords is the largest limit of a sorted list with records. All of it is in memory at once.
const mostSortedRecords = 1000

// checkSort returns the order of a list, and what is wrong with it.
func checkSort(sort string, records bool, limit int, after bool) error {
	switch {
	case orders[sort] == nil:
		return badRequest("sort", "%q is neither ttl, age, accesses, bytes nor name", sort)
	case after:
		return badRequest("after", "a sorted list has no pages: limit is how much of its beginning is shown")
	case records && limit > mostSortedRecords:
		return badRequest("limit", "with records, a sorted list has %d answers at the most", mostSortedRecords)
	}
	return nil
}

// sorted makes a list of the first answers of all blocks in an order.
func (l *lister) sorted() (*answer, error) {
	l.found = []listedAnswer{}
	for _, b := range l.blocks {
		f := l.filter
		f.Limit = l.limit
		p, err := b.List(f)
		if err != nil {
			return nil, fmt.Errorf("block %d: %w", b.id, err)
		}
		for _, a := range p.Answers {
			l.found = append(l.found, listedAnswer{b.id, a})
		}
	}
	order := orders[l.filter.Sort]
	slices.SortStableFunc(l.found, func(a, b listedAnswer) int { return order(&a.Answer, &b.Answer) })
	l.found = l.found[:min(len(l.found), l.limit)]
	if l.text {
		return l.zoneFile(""), nil
	}
	return jsonAnswer(listAnswer{l.found, ""}), nil
}
