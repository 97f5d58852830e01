package api

// This file has the messages of version 1 of the interface, as JSON.

// InstanceHeader names the process that asks, if that is a server. A server gives itself no dump.
const InstanceHeader = "Optcache-Instance"

// MaxRequest is the most bytes of the body of a request, but for a dump.
const MaxRequest = 64 << 10

// StatusReply answers GET /v1/status.
type StatusReply struct {
	Version string        `json:"version"`
	Blocks  []BlockStatus `json:"blocks"`
}

// BlockStatus is the status of one block. ID is what other requests call the block.
type BlockStatus struct {
	ID     int      `json:"id"`
	Recent []Recent `json:"recent"` // over 1, 5 and 60 minutes
	Status
}

// Recent is what a block has done in the last minutes.
type Recent struct {
	Minutes  int      `json:"minutes"`
	Seconds  float64  `json:"seconds"` // of the time that is meant: fewer than Minutes have where the listener is younger
	Requests uint64   `json:"requests"`
	QPS      float64  `json:"qps"`                 // requests a second
	HitRatio *float64 `json:"hit_ratio,omitempty"` // from 0 to 1; nil: there were no requests
}

// HistoryReply answers GET /v1/history.
type HistoryReply struct {
	Blocks []BlockHistory `json:"blocks"`
}

// BlockHistory is the history of one block.
type BlockHistory struct {
	ID int `json:"id"`
	History
}

// History is what the status of a block was at some times, the oldest first. Each series has a number for each time. Its name
// is that of a number in Status, with dots, such as hits.hot. A number that the status did not have then is 0.
type History struct {
	At     []float64            `json:"at"` // in seconds since 1970
	Series map[string][]float64 `json:"series"`
}

// LookupReply answers GET /v1/lookup.
type LookupReply struct {
	Blocks []BlockAnswers `json:"blocks"`
}

// BlockAnswers is what one block holds for a name.
type BlockAnswers struct {
	ID       int        `json:"id"`
	Answers  []Answer   `json:"answers"`
	UnderWay []UnderWay `json:"under_way"`
}

// TopReply answers GET /v1/top.
type TopReply struct {
	By     string     `json:"by"`     // hits, misses or clients
	Blocks []BlockTop `json:"blocks"` // those that count it
}

// BlockTop is what comes most often to one block.
type BlockTop struct {
	ID int `json:"id"`
	Top
}

// ListReply answers GET /v1/list.
type ListReply struct {
	Answers []ListedAnswer `json:"answers"`
	Next    string         `json:"next,omitempty"` // the cursor of the next page; empty: there is none
}

// ListedAnswer is an answer in a list that goes through several blocks.
type ListedAnswer struct {
	Block int `json:"block"`
	Answer
}

// FlushRequest is the body of POST /v1/flush. At least one of Name, Kinds, Stale and All is given.
type FlushRequest struct {
	Name    string   `json:"name,omitempty"`
	Subtree bool     `json:"subtree,omitempty"`
	Type    string   `json:"type,omitempty"`
	Kinds   []string `json:"kinds,omitempty"`
	Stale   bool     `json:"stale,omitempty"`
	All     bool     `json:"all,omitempty"`
	Blocks  []int    `json:"blocks,omitempty"` // empty: all
}

// FlushReply answers POST /v1/flush.
type FlushReply struct {
	Flushed int64 `json:"flushed"` // answers
}

// SnapshotRequest is the body of POST /v1/snapshot.
type SnapshotRequest struct {
	Blocks []int `json:"blocks,omitempty"` // empty: all
}

// SnapshotReply answers POST /v1/snapshot.
type SnapshotReply struct {
	Written []int `json:"written"` // blocks
}

// Problem is the body of an error (RFC 9457).
type Problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"` // one sentence that names the word that is wrong
}
