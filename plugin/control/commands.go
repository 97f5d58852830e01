package control

import (
	_ "embed"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/page"
)

// Version is what /v1/status calls the version. It is set before the first Listen.
var Version = "unknown"

// ErrCursor is what a Block's List returns, or wraps, for a cursor that is none of its own.
var ErrCursor = errors.New("bad cursor")

// The bounds of a list.
const (
	defaultLimit = 1000
	listChunk    = 250             // answers that a block is asked for at once
	listBytes    = 4 << 20         // a page ends when it has that many
	listTime     = 2 * time.Second // or when it has taken that long
)

//go:embed openapi.json
var description []byte

// route is a path and what is done there. parse reads a request and returns the job that answers it.
type route struct {
	method, path string
	free         bool     // the job asks no block, and needs no slot
	long         bool     // the job may take long, and has a slot of its own kind
	media        []string // of the body, which is kept in a file, and is r.Body as a *spool; nil: JSON, in memory
	parse        func(r *http.Request, body []byte, blocks []Block) (func() (*answer, error), error)
}

var routes = []route{
	{method: http.MethodGet, path: "/v1/status", parse: status},
	{method: http.MethodGet, path: "/v1/history", parse: historyRoute},
	{method: http.MethodGet, path: "/v1/lookup", parse: lookup},
	{method: http.MethodGet, path: "/v1/list", parse: list},
	{method: http.MethodGet, path: "/v1/top", parse: top},
	{method: http.MethodPost, path: "/v1/flush", parse: flush},
	{method: http.MethodPost, path: "/v1/snapshot", parse: snapshot},
	{method: http.MethodGet, path: "/v1/events", free: true, parse: events},
	{method: http.MethodPost, path: "/v1/explain", long: true, parse: explain},
	{method: http.MethodPost, path: "/v1/warm", long: true, parse: warm},
	{method: http.MethodGet, path: "/v1/dump", long: true, parse: dump},
	{method: http.MethodPost, path: "/v1/load", long: true, media: []string{snapshotForm, zoneForm}, parse: load},
	{method: http.MethodGet, path: "/v1/openapi.json", free: true, parse: openapi},
	{method: http.MethodGet, path: "/healthz", free: true, parse: healthz},
}

// handler is a route as an entry of a mux, which only finds it.
type handler struct{ route }

func (handler) ServeHTTP(http.ResponseWriter, *http.Request) {}

func newMux() *http.ServeMux {
	mux := http.NewServeMux()
	for _, r := range routes {
		mux.Handle(r.method+" "+r.path, handler{r})
	}
	for path := range page.Files {
		pattern := path
		if path == "/" {
			pattern = "/{$}" // that path, and no other
		}
		mux.Handle(http.MethodGet+" "+pattern, handler{route{method: http.MethodGet, path: path, free: true, parse: pageFile}})
	}
	return mux
}

// route returns the route of a request. The mux answers a request without one, and redirects some: its answers are no
// problem+json, and are not used.
func (s *server) route(r *http.Request) (*route, error) {
	h, _ := s.routes.Handler(r)
	if h, ok := h.(handler); ok {
		return &h.route, nil
	}
	allow := ""
	if _, ok := page.Files[r.URL.Path]; ok {
		allow = http.MethodGet
	}
	for _, other := range routes {
		if other.path == r.URL.Path {
			allow = other.method
		}
	}
	if allow != "" {
		return nil, &problem{Status: http.StatusMethodNotAllowed, allow: allow, Detail: fmt.Sprintf("method: %s is for %s", r.URL.Path, allow)}
	}
	return nil, &problem{Status: http.StatusNotFound, Detail: fmt.Sprintf("path: there is no %q", r.URL.Path)}
}

// --- /v1/status

type statusAnswer struct {
	Version string        `json:"version"`
	Blocks  []blockStatus `json:"blocks"`
}

type blockStatus struct {
	ID     int          `json:"id"`
	Recent []api.Recent `json:"recent"`
	Status
}

func status(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	values, err := parameters(r, nil, []string{"block"})
	if err != nil {
		return nil, err
	}
	all, err := chosenParameters(blocks, values)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) { return jsonAnswer(statusOf(historyOf(r), all)), nil }, nil
}

func statusOf(past *history, blocks []numbered) statusAnswer {
	a := statusAnswer{Version: Version, Blocks: []blockStatus{}}
	for _, b := range blocks {
		st := filled(b.Status())
		a.Blocks = append(a.Blocks, blockStatus{b.id, past.recent(&st, time.Now()), st})
	}
	return a
}

// filled returns a status without null in its JSON.
func filled(s Status) Status {
	for _, list := range []*[]string{&s.Zones, &s.Servers} {
		if *list == nil {
			*list = []string{}
		}
	}
	for _, m := range []*map[string]int64{&s.Entries, &s.Capacity, &s.Segments, &s.Parts} {
		if *m == nil {
			*m = map[string]int64{}
		}
	}
	for _, m := range []*map[string]uint64{&s.Hits, &s.Sent, &s.MissTimes, &s.Upstream.Limited} {
		if *m == nil {
			*m = map[string]uint64{}
		}
	}
	if s.FastPath == nil {
		s.FastPath = map[string]FastPathStatus{}
	}
	return s
}

// --- /v1/lookup

type lookupAnswer struct {
	Blocks []blockAnswers `json:"blocks"`
}

type blockAnswers struct {
	ID       int        `json:"id"`
	Answers  []Answer   `json:"answers"`
	UnderWay []UnderWay `json:"under_way"`
}

func lookup(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	values, err := parameters(r, []string{"name", "type"}, []string{"block"})
	if err != nil {
		return nil, err
	}
	name, err := domainName(values.Get("name"))
	if err != nil {
		return nil, err
	}
	var qtype uint16
	if values.Has("type") {
		if qtype, err = recordType(values.Get("type")); err != nil {
			return nil, err
		}
	}
	all, err := chosenParameters(blocks, values)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		a := lookupAnswer{Blocks: []blockAnswers{}}
		for _, b := range all {
			found, err := b.Lookup(name, qtype)
			if err != nil {
				return nil, fmt.Errorf("block %d: %w", b.id, err)
			}
			if found == nil {
				found = []Answer{}
			}
			asked, err := b.UnderWay(name, qtype)
			if err != nil {
				return nil, fmt.Errorf("block %d: %w", b.id, err)
			}
			if asked == nil {
				asked = []UnderWay{}
			}
			a.Blocks = append(a.Blocks, blockAnswers{b.id, found, asked})
		}
		return jsonAnswer(a), nil
	}, nil
}

// --- /v1/list

type listAnswer struct {
	Answers []listedAnswer `json:"answers"`
	Next    string         `json:"next,omitempty"`
}

type listedAnswer struct {
	Block int `json:"block"`
	Answer
}

func list(r *http.Request, _ []byte, blocks []Block) (func() (*answer, error), error) {
	l := lister{text: wantsText(r)}
	values, err := parameters(r, []string{"name", "subtree", "type", "stale", "hot", "records", "sort", "limit", "after"}, []string{"block", "kind"})
	if err != nil {
		return nil, err
	}
	if values.Has("name") {
		if l.filter.Name, err = domainName(values.Get("name")); err != nil {
			return nil, err
		}
	}
	if l.filter.Subtree, err = flag(values, "subtree"); err != nil {
		return nil, err
	}
	if l.filter.Subtree && l.filter.Name == "" {
		return nil, badRequest("subtree", "it needs a name")
	}
	if values.Has("type") {
		if l.filter.Type, err = recordType(values.Get("type")); err != nil {
			return nil, err
		}
	}
	if l.filter.Kinds, err = checkKinds("kind", values["kind"]); err != nil {
		return nil, err
	}
	if l.filter.Stale, err = flag(values, "stale"); err != nil {
		return nil, err
	}
	if l.filter.Hot, err = flag(values, "hot"); err != nil {
		return nil, err
	}
	if l.filter.Records, err = flag(values, "records"); err != nil {
		return nil, err
	}
	if l.text && !values.Has("records") {
		l.filter.Records = true
	}
	l.limit = defaultLimit
	if values.Has("limit") {
		if l.limit, err = strconv.Atoi(values.Get("limit")); err != nil || l.limit < 1 || l.limit > MaxPage {
			return nil, badRequest("limit", "%q is no number from 1 to %d", values.Get("limit"), MaxPage)
		}
	}
	if l.blocks, err = chosenParameters(blocks, values); err != nil {
		return nil, err
	}
	if values.Has("sort") {
		l.filter.Sort = values.Get("sort")
		if err := checkSort(l.filter.Sort, l.filter.Records, l.limit, values.Has("after")); err != nil {
			return nil, err
		}
		return l.sorted, nil
	}
	if values.Has("after") {
		id, after, err := parseCursor(values.Get("after"))
		if err != nil {
			return nil, err
		}
		at := slices.IndexFunc(l.blocks, func(b numbered) bool { return b.id == id })
		if at < 0 {
			return nil, badRequest("after", "the cursor is of block %d, which is not asked for or not there", id)
		}
		l.blocks, l.filter.After = l.blocks[at:], after
	}
	return l.page, nil
}

// lister makes a page of what several blocks list.
type lister struct {
	filter Filter
	limit  int
	text   bool
	blocks []numbered

	found []listedAnswer
	bytes int
	until time.Time
}

// page asks the blocks one after the other, for a part of the page at a time. The page may have fewer answers than the
// limit, even none, and still a cursor: answers with records may be large, and a filter may fit few of millions.
func (l *lister) page() (*answer, error) {
	l.found = []listedAnswer{}
	l.until = time.Now().Add(listTime)
	next := ""
	for i, b := range l.blocks {
		after, err := l.ask(b)
		if err != nil {
			return nil, err
		}
		if after != "" {
			next = cursorOf(b.id, after)
			break
		}
		l.filter.After = ""
		if l.full() && i+1 < len(l.blocks) {
			next = cursorOf(l.blocks[i+1].id, "")
			break
		}
	}
	if l.text {
		return l.zoneFile(next), nil
	}
	return jsonAnswer(listAnswer{l.found, next}), nil
}

func (l *lister) full() bool {
	return len(l.found) >= l.limit || l.bytes >= listBytes || !time.Now().Before(l.until)
}

// ask adds what a block has, and returns the block's cursor if it has more than the page.
func (l *lister) ask(b numbered) (after string, err error) {
	for f := l.filter; ; {
		f.Limit = min(l.limit-len(l.found), listChunk)
		p, err := b.List(f)
		if errors.Is(err, ErrCursor) {
			return "", errBadCursor()
		}
		if err == nil && p.Next != "" && p.Next == f.After {
			err = errors.New("the list does not go on")
		}
		if err != nil {
			return "", fmt.Errorf("block %d: %w", b.id, err)
		}
		for _, a := range p.Answers {
			l.found = append(l.found, listedAnswer{b.id, a})
			l.bytes += sizeOf(&a)
		}
		if p.Next == "" || l.full() {
			return p.Next, nil
		}
		f.After = p.Next
	}
}

// sizeOf is about how many bytes an answer has in a list.
func sizeOf(a *Answer) int {
	size := 300 + len(a.Name)
	for _, r := range a.Records {
		size += len(r) + 4
	}
	return size
}

// zoneFile writes a page as lines of a zone file (RFC 4027). A comment before an answer's records says what it is.
func (l *lister) zoneFile(next string) *answer {
	var b strings.Builder
	for _, a := range l.found {
		fmt.Fprintf(&b, "; block %d %s %s %s %s %s do=%t cd=%t ttl_left=%d stale=%t\n",
			a.Block, oneLine(a.Name), a.Type, a.Rcode, a.Kind, a.Segment, a.DO, a.CD, a.Left, a.Stale)
		for _, record := range a.Records {
			b.WriteString(oneLine(record))
			b.WriteByte('\n')
		}
	}
	page := newAnswer(http.StatusOK, "text/dns; charset=us-ascii", []byte(b.String()))
	if next != "" {
		page.header.Set("Next-Cursor", next)
	}
	return page
}

// oneLine keeps what came from the network from making a line of its own.
func oneLine(s string) string { return strings.NewReplacer("\n", `\010`, "\r", `\013`).Replace(s) }

// wantsText reports whether text/dns is named in Accept, before JSON.
func wantsText(r *http.Request) bool {
	for _, accept := range r.Header.Values("Accept") {
		for _, one := range strings.Split(accept, ",") {
			switch t, params, err := mime.ParseMediaType(one); {
			case err != nil || params["q"] == "0":
			case t == "text/dns":
				return true
			case t == "application/json":
				return false
			}
		}
	}
	return false
}

// --- /v1/flush

type flushRequest struct {
	Name    *string  `json:"name,omitempty"`
	Subtree bool     `json:"subtree,omitempty"`
	Type    *string  `json:"type,omitempty"`
	Kinds   []string `json:"kinds,omitempty"`
	Stale   bool     `json:"stale,omitempty"`
	All     bool     `json:"all,omitempty"`
	Blocks  []int    `json:"blocks,omitempty"`
}

type flushAnswer struct {
	Flushed int `json:"flushed"`
}

func flush(r *http.Request, body []byte, blocks []Block) (func() (*answer, error), error) {
	if _, err := parameters(r, nil, nil); err != nil {
		return nil, err
	}
	var q flushRequest
	if err := decode(body, &q, "name", "subtree", "type", "kinds", "stale", "all", "blocks"); err != nil {
		return nil, err
	}
	f, err := q.filter()
	if err != nil {
		return nil, err
	}
	all, err := chosenMember(blocks, q.Blocks)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		gone := 0
		var failed []error
		for _, b := range all {
			n, err := b.Flush(f)
			if gone += n; err != nil {
				failed = append(failed, fmt.Errorf("block %d: %w", b.id, err))
			}
		}
		did(r, "flush "+flushWords(f)+blockWords(q.Blocks), fmt.Sprintf("%d answers", gone), failed)
		if failed != nil {
			return nil, fmt.Errorf("%w; %d answers are flushed", errors.Join(failed...), gone)
		}
		return jsonAnswer(flushAnswer{gone}), nil
	}, nil
}

// filter returns what is flushed. A request that says nothing is an error, and so is one that says all and some: neither
// may flush what its client did not mean.
func (q *flushRequest) filter() (f Filter, err error) {
	if q.Name != nil {
		if f.Name, err = domainName(*q.Name); err != nil {
			return f, err
		}
	}
	if q.Type != nil {
		if f.Type, err = recordType(*q.Type); err != nil {
			return f, err
		}
	}
	if f.Kinds, err = checkKinds("kinds", q.Kinds); err != nil {
		return f, err
	}
	f.Subtree, f.Stale = q.Subtree, q.Stale
	some := f.Name != "" || f.Kinds != nil || f.Stale
	switch {
	case q.Kinds != nil && f.Kinds == nil:
		return f, badRequest("kinds", "is empty")
	case f.Subtree && f.Name == "":
		return f, badRequest("subtree", "it needs a name")
	case !some && !q.All:
		return f, badRequest("body", "name, kinds, stale or all is needed")
	case some && q.All:
		return f, badRequest("all", "it cannot be with name, kinds or stale")
	}
	return f, nil
}

// flushWords describes what is flushed, for the log.
func flushWords(f Filter) string {
	var words []string
	if f.Name != "" {
		words = append(words, fmt.Sprintf("name=%q", f.Name))
	}
	if f.Subtree {
		words = append(words, "subtree")
	}
	if f.Type != 0 {
		words = append(words, "type="+dns.Type(f.Type).String())
	}
	if f.Kinds != nil {
		words = append(words, "kinds="+strings.Join(f.Kinds, ","))
	}
	if f.Stale {
		words = append(words, "stale")
	}
	if f.Name == "" && f.Kinds == nil && !f.Stale {
		words = append(words, "all")
	}
	return strings.Join(words, " ")
}

// --- /v1/snapshot

type snapshotRequest struct {
	Blocks []int `json:"blocks,omitempty"`
}

type snapshotAnswer struct {
	Written []int `json:"written"`
}

func snapshot(r *http.Request, body []byte, blocks []Block) (func() (*answer, error), error) {
	if _, err := parameters(r, nil, nil); err != nil {
		return nil, err
	}
	var q snapshotRequest
	if err := decode(body, &q, "blocks"); err != nil {
		return nil, err
	}
	all, err := chosenMember(blocks, q.Blocks)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		with := slices.DeleteFunc(slices.Clone(all), func(b numbered) bool { return b.Status().Snapshot == nil })
		if len(with) == 0 {
			return nil, &problem{Status: http.StatusConflict, Detail: "blocks: none has cache_file_path"}
		}
		if q.Blocks != nil && len(with) < len(all) {
			return nil, &problem{Status: http.StatusConflict, Detail: "blocks: not all of them have cache_file_path"}
		}
		a := snapshotAnswer{Written: []int{}}
		var failed []error
		for _, b := range with {
			if err := b.Snapshot(); err != nil {
				failed = append(failed, fmt.Errorf("block %d: %w", b.id, err))
				continue
			}
			a.Written = append(a.Written, b.id)
		}
		did(r, "snapshot"+blockWords(q.Blocks), fmt.Sprintf("blocks %v are written", a.Written), failed)
		if failed != nil {
			return nil, fmt.Errorf("%w; blocks %v are written", errors.Join(failed...), a.Written)
		}
		return jsonAnswer(a), nil
	}, nil
}

// --- /v1/openapi.json, /healthz and the page's files

func openapi(r *http.Request, _ []byte, _ []Block) (func() (*answer, error), error) {
	_, err := parameters(r, nil, nil)
	return func() (*answer, error) { return newAnswer(http.StatusOK, "application/json", description), nil }, err
}

func healthz(r *http.Request, _ []byte, _ []Block) (func() (*answer, error), error) {
	_, err := parameters(r, nil, nil)
	return func() (*answer, error) { return newAnswer(http.StatusNoContent, "", nil), nil }, err
}

// pageFile answers requests for the files of the page. They are the same for everybody, and have nothing of the cache.
func pageFile(r *http.Request, _ []byte, _ []Block) (func() (*answer, error), error) {
	_, err := parameters(r, nil, nil)
	return func() (*answer, error) {
		f := page.Files[r.URL.Path]
		a := newAnswer(http.StatusOK, f.Type, f.Body)
		a.header.Set("Content-Security-Policy", page.Policy)
		a.header.Set("Referrer-Policy", "no-referrer")
		a.header.Set("Cross-Origin-Opener-Policy", "same-origin")
		a.header.Set("Cross-Origin-Resource-Policy", "same-origin")
		return a, nil
	}, err
}

// chosenMember returns the blocks of a request's member "blocks". An empty list is neither all nor some.
func chosenMember(blocks []Block, ids []int) ([]numbered, error) {
	if ids != nil && len(ids) == 0 {
		return nil, badRequest("blocks", "is empty")
	}
	return chosen(blocks, "blocks", ids)
}

// did logs what a request has changed, and for whom.
func did(r *http.Request, what, result string, failed []error) {
	if failed != nil {
		log.Errorf("control: %s, by %s: %s; %v", what, peer(r), result, errors.Join(failed...))
		return
	}
	log.Infof("control: %s, by %s: %s", what, peer(r), result)
}

func blockWords(ids []int) string {
	if ids == nil {
		return ""
	}
	return fmt.Sprintf(" blocks=%v", ids)
}
