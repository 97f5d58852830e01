package control

import (
	"io"

	"github.com/optcache/optcache/plugin/control/api"
)

// Rewinder is a reader that can begin anew.
type Rewinder interface {
	io.Reader
	Rewind()
}

// Block is one optcache block of the Corefile that runs. Its methods are safe for concurrent use.
type Block interface {
	// Status returns what there is to say of the block now.
	Status() Status

	// Lookup returns every answer that is held for a qname, of one type or, with qtype 0, of all types. name is a domain name
	// in presentation form.
	Lookup(name string, qtype uint16) ([]Answer, error)

	// List returns a page of what is held. It holds no lock for longer than a few records take.
	List(Filter) (Page, error)

	// UnderWay returns what the next plugin is asked now for a qname, as Lookup does for what is held.
	UnderWay(name string, qtype uint16) ([]UnderWay, error)

	// Top returns the n names or clients that have come most often lately: by hits, by misses, or clients. It returns ErrNotCounted
	// if the block does not count that.
	Top(by string, n int) (Top, error)

	// Flush removes what a filter says, and returns how many answers went. When it returns, no answer that came of a question
	// asked before it was called is there or comes back: not by a request or a refresh under way, not from a store that a
	// reload moves, not from a snapshot.
	Flush(Filter) (int, error)

	// Ask asks a question through the chain of the block's server, as a client would, and says what has become of it. It takes a
	// few seconds at the most. whole says that the way of the hits and what is held are wanted, too; then a question that was a
	// miss may be asked twice. The error says why the question could not be asked, or had no reply.
	Ask(q Question, whole bool) (Explanation, error)

	// Dump writes what is held to w, as a snapshot or as text, and returns how many answers. It holds no lock while it writes.
	Dump(w io.Writer, text bool) (int, error)

	// Load takes in what Dump has written, by the same rules as the answers of a file of cache_file_path. It reads all of it first:
	// if the error is, or wraps, ErrBadDump, nothing is changed.
	Load(from Rewinder, text bool) (Loaded, error)

	// Snapshot writes the file of cache_file_path now, and returns when it is written. It fails where the block has none.
	Snapshot() error
}

// What goes over the interface is a package that does without CoreDNS.
type (
	Status         = api.Status
	FastPathStatus = api.FastPathStatus
	UpstreamStatus = api.UpstreamStatus
	SubnetStatus   = api.SubnetStatus
	SnapshotStatus = api.SnapshotStatus
	PoolStatus     = api.PoolStatus
	SharedStatus   = api.SharedStatus
	Answer         = api.Answer
	Filter         = api.Filter
	Page           = api.Page
	Climber        = api.Climber
	Hill           = api.Hill
	UnderWay       = api.UnderWay
	Top            = api.Top
	TopItem        = api.TopItem
	Question       = api.Question
	Explanation    = api.Explanation
	Response       = api.Response
	Way            = api.Way
	Loaded         = api.LoadReply
)

// MaxPage is the most answers in a page.
const MaxPage = api.MaxPage
