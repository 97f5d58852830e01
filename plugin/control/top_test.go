package control

import (
	"slices"
	"strings"
	"testing"

	"github.com/optcache/optcache/plugin/control/api"
)

func TestTop(t *testing.T) {
	t.Parallel()
	hits := Top{Total: 10, OneIn: 1, Items: []TopItem{{Name: "a.", Type: "A", Count: 7}, {Name: "b.", Type: "A", Count: 2, Error: 1}}}
	one := &fakeBlock{top: map[string]Top{"hits": hits, "misses": {}, "clients": {Items: []TopItem{{Client: "192.0.2.0/24", Count: 3}}}}}
	two := &fakeBlock{top: map[string]Top{"hits": hits}}
	for target, want := range map[string]string{
		"/v1/top": "hits 0:2 1:2", "/v1/top?by=hits&limit=1&block=1": "hits 1:1", "/v1/top?by=misses": "misses 0:0", "/v1/top?by=clients": "clients 0:1",
	} {
		w := request{target: target}.do(t, one, two)
		a := decoded[api.TopReply](t, w.Body.Bytes())
		got := a.By
		for _, b := range a.Blocks {
			got += " " + string(rune('0'+b.ID)) + ":" + string(rune('0'+len(b.Items)))
		}
		if w.Code != 200 || got != want || strings.Contains(w.Body.String(), "null") {
			t.Errorf("%s: %s, %s", target, got, w.Body)
		}
	}
	for target, detail := range map[string]string{"/v1/top?by=clients": "top_clients", "/v1/top?by=misses&block=1": "misses are not counted"} {
		w := request{target: target}.do(t, two, two)
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 409, detail)
	}
	for target, detail := range map[string]string{"/v1/top?by=names": "by", "/v1/top?by=": "by", "/v1/top?limit=0": "limit", "/v1/top?limit=1001": "1000", "/v1/top?zone=a": `"zone"`} {
		w := request{target: target}.do(t, one)
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 400, detail)
	}
	if w := (request{target: "/v1/top"}).do(t); w.Code != 200 || !strings.Contains(w.Body.String(), `"blocks":[]`) {
		t.Errorf("without blocks: %s", w.Body)
	}
}

// A sorted list is the first answers of all blocks together.
func TestSortedListOfBlocks(t *testing.T) {
	t.Parallel()
	var asked []Filter
	block := func(lefts ...int64) Block {
		return &listBlock{list: func(f Filter) (p Page, err error) {
			asked = append(asked, f)
			for _, left := range lefts {
				p.Answers = append(p.Answers, Answer{Name: "x.", Left: left, Hits: uint32(left), Bytes: int(left)})
			}
			return p, nil
		}}
	}
	lefts := func(target string) (all []int64) {
		t.Helper()
		w := request{target: target}.do(t, block(5, 1, 9), block(2, 8), block())
		a := decoded[listAnswer](t, w.Body.Bytes())
		if w.Code != 200 || a.Next != "" {
			t.Fatalf("%s: %d %s", target, w.Code, w.Body)
		}
		for _, l := range a.Answers {
			all = append(all, l.Left)
		}
		return all
	}
	if got := lefts("/v1/list?sort=ttl&limit=3&hot=true"); !slices.Equal(got, []int64{1, 2, 5}) {
		t.Error(got)
	}
	if f := asked[0]; f.Limit != 3 || f.Sort != "ttl" || !f.Hot || len(asked) != 3 {
		t.Errorf("%+v", asked)
	}
	if got := lefts("/v1/list?sort=accesses"); !slices.Equal(got, []int64{9, 8, 5, 2, 1}) {
		t.Error(got)
	}
	if got := lefts("/v1/list?sort=bytes&limit=1&block=1"); !slices.Equal(got, []int64{8}) {
		t.Error(got)
	}
	for target, detail := range map[string]string{
		"/v1/list?sort=colour": "sort", "/v1/list?sort=": "sort", "/v1/list?sort=ttl&after=x": "after", "/v1/list?sort=ttl&records=true&limit=1001": "limit", "/v1/list?hot=1": "hot",
	} {
		w := request{target: target}.do(t, block())
		wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 400, detail)
	}
}

func TestLookupHasWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	b := &fakeBlock{underWay: []UnderWay{{Type: "A", Reason: "miss", Waiting: 2}}}
	w := request{target: "/v1/lookup?name=a"}.do(t, b, &fakeBlock{})
	a := decoded[lookupAnswer](t, w.Body.Bytes())
	if len(a.Blocks) != 2 || len(a.Blocks[0].UnderWay) != 1 || a.Blocks[0].UnderWay[0].Waiting != 2 || a.Blocks[1].UnderWay == nil {
		t.Errorf("%s", w.Body)
	}
}
