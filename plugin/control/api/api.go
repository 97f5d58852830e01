// Package api has what goes over the control interface: what a block of the Corefile says of itself, which answers a command
// means, and the messages of HTTP that carry both. It knows neither CoreDNS nor DNS, so that a program which asks needs no server.
package api

import "time"

// Status says how a block is. Sizes are in bytes, shares from 0 to 1.
type Status struct {
	Zones      []string `json:"zones"`
	View       string   `json:"view,omitempty"`
	Servers    []string `json:"servers"`    // such as dns://:53
	Generation int      `json:"generation"` // reloads since the start

	Entries     map[string]int64 `json:"entries"`     // by class: success, denial
	Capacity    map[string]int64 `json:"capacity"`    // likewise
	Segments    map[string]int64 `json:"segments"`    // the entries by segment: window, probationary, protected, heavy
	HotEntries  int64            `json:"hot_entries"` // copies in the hot tier
	Memory      int64            `json:"memory_bytes"`
	Parts       map[string]int64 `json:"memory_parts"` // success and denial: records by class; hot, index, and other, which is what is left
	MemoryLimit int64            `json:"memory_limit_bytes"`
	HotCapacity int64            `json:"hot_capacity"`
	WindowShare float64          `json:"window_share"` // of the entries
	Climber     Climber          `json:"climber"`

	Requests uint64            `json:"requests"`
	Hits     map[string]uint64 `json:"hits"` // by tier: hot, protected, probationary
	Misses   uint64            `json:"misses"`
	Stale    uint64            `json:"served_stale"`
	Prefetch uint64            `json:"prefetches"`
	Evicted  uint64            `json:"evictions"`
	Sent     map[string]uint64 `json:"sent"`    // hits by way: bytes, fastpath, or a message with its reason
	Waiting  int64             `json:"waiting"` // requests that wait for the upstream query of another one
	Flights  int64             `json:"flights"` // such queries under way, and refreshes
	Kept     int64             `json:"kept"`    // answers that the last reload has kept

	// MissTimes is how many misses the next plugin has answered or failed, by the seconds that it took at most: powers of two,
	// and +Inf. Each is counted once. Bounds without a miss are not there.
	MissTimes map[string]uint64 `json:"miss_times"`

	FastPath map[string]FastPathStatus `json:"fast_path"` // by server that has one
	Upstream UpstreamStatus            `json:"upstream"`
	Subnets  *SubnetStatus             `json:"subnets,omitempty"` // with ecs scoped
	Snapshot *SnapshotStatus           `json:"snapshot,omitempty"`
	Shared   *SharedStatus             `json:"shared,omitempty"`

	// Pools has the pool of a block that has its memory together with others, by name. Capacity, Segments, HotEntries, Parts,
	// MemoryLimit and HotCapacity are empty then, and Memory is what the records of the block have.
	Pools map[string]PoolStatus `json:"pools,omitempty"`
}

// PoolStatus says how the memory is that several blocks have together. Its members are as in Status.
type PoolStatus struct {
	Blocks      int              `json:"blocks"` // with answers of their own
	Same        bool             `json:"same"`   // the block has the same answers as others that say so
	Entries     map[string]int64 `json:"entries"`
	Capacity    map[string]int64 `json:"capacity"`
	Segments    map[string]int64 `json:"segments"`
	HotEntries  int64            `json:"hot_entries"`
	Memory      int64            `json:"memory_bytes"`
	Parts       map[string]int64 `json:"memory_parts"`
	MemoryLimit int64            `json:"memory_limit_bytes"`
	HotCapacity int64            `json:"hot_capacity"`
}

// UpstreamStatus says what the options have done that spare upstreams.
type UpstreamStatus struct {
	Synthesized uint64            `json:"synthesized"` // requests that nxdomain_cut has answered; they are neither hits nor misses
	Probes      uint64            `json:"probes"`      // names that nxdomain_cut probe has asked for
	KeptWarm    uint64            `json:"kept_warm"`   // questions that keep_warm has asked
	Jittered    uint64            `json:"jittered"`    // answers whose TTL jitter has shortened
	Limited     map[string]uint64 `json:"limited"`     // questions that upstream_limit has held back, by what became of them: deferred, stale, waited, refused
	Gone        int64             `json:"gone"`        // zones whose upstream is gone, by servfail
}

// SubnetStatus says how many answers there are for a client subnet.
type SubnetStatus struct {
	Answers int64             `json:"answers"` // some may have expired or gone since
	Names   int64             `json:"names"`   // that have them
	Most    int               `json:"most"`    // of a name
	Evicted map[string]uint64 `json:"evicted"` // to make room for others of their kind: of the same name (name), or of all (share)
}

// SharedStatus says how the second level is.
type SharedStatus struct {
	Servers string            `json:"servers"` // without user and password
	Group   string            `json:"group"`
	Away    bool              `json:"away"`              // nobody waits for it, because it is away or too slow
	Trouble string            `json:"trouble,omitempty"` // why
	P95     float64           `json:"p95"`               // seconds that all recent look-ups but one in twenty took
	Asked   map[string]uint64 `json:"asked"`             // by what became of it: hit, miss, late, failed, refused, skipped, waited
	Refused map[string]uint64 `json:"refused"`           // by reason; reasons that were not met are not there
	Writes  map[string]uint64 `json:"writes"`            // by what became of them: written, dropped, failed
	Flushes uint64            `json:"flushes"`           // of other replicas
	Warmed  uint64            `json:"warmed"`            // answers that were taken over at the start
}

// FastPathStatus says what the fast path of a server has done. The blocks behind one server share it.
type FastPathStatus struct {
	Workers int64             `json:"workers"`
	Packets uint64            `json:"packets"`
	Hits    uint64            `json:"hits"`
	Dropped uint64            `json:"dropped"` // because too many waited for the server
	Batches map[string]uint64 `json:"batches"` // by how many packets they had at most: 1, 2, 4, ...
}

// Climber says where the hill climber stands, which finds the size of the window and, with hot_cache_percentage auto, that of the
// hot tier. It counts requests in portions of 1,024 from each of its callers.
type Climber struct {
	Sample int64 `json:"sample"`             // requests between two steps
	Left   int64 `json:"left"`               // until the next step
	Window Hill  `json:"window"`             // its value is the hit ratio
	Hot    *Hill `json:"hot_tier,omitempty"` // its value is the share of requests that it answers, less a price for its size; nil: its size is fixed
}

// Hill is a climb of one size. Shares are of the entries.
type Hill struct {
	Share float64  `json:"share"`
	Step  float64  `json:"step"`            // of the next step; below zero: it shrinks, unless the value falls
	Value *float64 `json:"value,omitempty"` // of the last sample; nil: there was none
}

// UnderWay is a question that the next plugin is asked now.
type UnderWay struct {
	Type     string  `json:"type"`
	Class    string  `json:"class"`
	DO       bool    `json:"do"`
	CD       bool    `json:"cd"`
	Reason   string  `json:"reason"`   // miss, prefetch, or stale
	Seconds  float64 `json:"seconds"`  // since it was asked
	Asking   int     `json:"asking"`   // requests that ask: 1, or 2 if it takes long
	Waiting  int     `json:"waiting"`  // requests that wait for the answer
	Detached bool    `json:"detached"` // a flush has come since: the answer is for those that wait already, and is not kept
}

// Top is what comes most often.
type Top struct {
	Since   time.Time `json:"since"`   // from when on it is counted
	Total   uint64    `json:"total"`   // requests
	Bound   uint64    `json:"bound"`   // no error is larger, and nothing that has come more often is missing
	OneIn   uint64    `json:"one_in"`  // of so many requests one was counted, at times, and counted as that many; 1: each was counted
	Skipped uint64    `json:"skipped"` // requests that were not counted, because another one was being counted
	Items   []TopItem `json:"items"`   // the most frequent first
}

// TopItem is a name or a client. It has come Count times at the most, and Error times less at the least.
type TopItem struct {
	Name   string `json:"name,omitempty"`
	Type   string `json:"type,omitempty"`
	Client string `json:"client,omitempty"` // a prefix, as in 192.0.2.0/24
	Count  uint64 `json:"count"`
	Error  uint64 `json:"error"`
}

// SnapshotStatus says how the block's file is.
type SnapshotStatus struct {
	Path     string    `json:"path"`
	Written  time.Time `json:"written,omitzero"`
	Entries  int64     `json:"entries"`
	Bytes    int64     `json:"bytes"`
	Writes   int64     `json:"writes"`   // of the file, since the last reload
	Failures int64     `json:"failures"` // likewise
}

// Answer is what is held under one key.
type Answer struct {
	Name  string `json:"name"` // the qname, in presentation form, lower case
	Type  string `json:"type"`
	Class string `json:"class"` // of the DNS: IN
	DO    bool   `json:"do"`
	CD    bool   `json:"cd"`
	NoRD  bool   `json:"no_rd,omitempty"` // a question without RD has brought it
	// The clients that it is for: their prefix, with a second length where the SCOPE is longer, or 0/0 for those that withhold theirs.
	Subnet string `json:"subnet,omitempty"`

	Rcode   string    `json:"rcode"`
	Kind    string    `json:"kind"`    // success, denial or failure
	Segment string    `json:"segment"` // window, probationary, protected or heavy
	Hot     bool      `json:"hot"`     // there is a copy in the hot tier
	Hits    uint32    `json:"accesses"`
	TTL     uint32    `json:"ttl"`      // with which it was kept, in seconds
	Left    int64     `json:"ttl_left"` // below zero: it has expired
	Stale   bool      `json:"stale"`    // it has expired, and may be served
	Stored  time.Time `json:"stored"`   // when it came
	Bytes   int       `json:"bytes"`    // of memory
	Source  string    `json:"source"`   // whence it came, as far as its age says: upstream, an earlier store (reload), or a snapshot

	Records []string `json:"records,omitempty"` // in the form of zone files, with the TTL left; not in lists, unless asked for
}

// Filter says which answers are meant. What is empty says nothing.
type Filter struct {
	Name    string   // a qname,
	Subtree bool     // or what is at or below it
	Type    uint16   // 0: all
	Kinds   []string // success, denial, failure; empty: all
	Stale   bool     // only what has expired

	// For lists.
	Hot     bool   // only what is in the hot tier, too
	Sort    string // ttl, age, accesses, bytes or name: the first Limit answers in that order, in any order, and no cursor; empty: none
	Limit   int    // answers in a page, 1 to MaxPage
	After   string // the cursor of the page before; empty: from the start
	Records bool   // with their records
}

// MaxPage is the most answers in a page.
const MaxPage = 10_000

// Page is a part of a list.
type Page struct {
	Answers []Answer `json:"answers"`
	Next    string   `json:"next,omitempty"` // the cursor of the next page; empty: there is none
}
