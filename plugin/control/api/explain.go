package api

// This file has what goes over the interface when operators have names asked.

// Question is a question that a block is asked through its server's chain of plugins, as by a client.
type Question struct {
	Name   string // a domain name in presentation form, fully qualified
	Type   uint16
	DO, CD bool
	NoRD   bool   // RD=0
	Client string // the client's IP address; empty: 127.0.0.1
	TCP    bool   // over TCP, and not over UDP
}

// What has become of a question.
const (
	Hit         = "hit"         // an answer was held
	Prefetch    = "prefetch"    // likewise, and the question has started a refresh of it
	Stale       = "stale"       // likewise, and it had expired
	Verified    = "verified"    // likewise, and the next plugin has answered in time
	Coalesced   = "coalesced"   // the answer to another request was shared
	Miss        = "miss"        // the next plugin was asked
	Shared      = "shared"      // the second level has answered
	Synthesized = "synthesized" // the answer is made of what is held for a name above
	Passed      = "passed"      // the block does not look for it, and the next plugin was asked
	Elsewhere   = "elsewhere"   // it has not come to the block
)

// Explanation says what has become of a question.
type Explanation struct {
	Name   string `json:"name"`
	Type   string `json:"type"`
	DO     bool   `json:"do"`
	CD     bool   `json:"cd"`
	NoRD   bool   `json:"no_rd,omitempty"`
	Client string `json:"client"`
	Server string `json:"server,omitempty"` // that was asked, such as dns://:53

	Outcome      string  `json:"outcome"`
	Why          string  `json:"why,omitempty"` // a clause
	Rcode        string  `json:"rcode,omitempty"`
	Milliseconds float64 `json:"milliseconds"` // until the reply

	Tier string `json:"tier,omitempty"` // where a hit was found: hot, protected, probationary
	Age  int64  `json:"age"`            // of a hit, in seconds
	TTL  uint32 `json:"ttl"`            // of a hit, as the client gets it, in seconds

	Response *Response `json:"response,omitempty"` // that has come, if one has
	Way      *Way      `json:"way,omitempty"`      // of the hits, if there is an answer now
	Held     *Answer   `json:"held,omitempty"`     // what is held now; for synthesized, what the answer is made of
}

// Response says what was decided on a response.
type Response struct {
	Kind  string `json:"kind"` // such as NOERROR, NODATA, NXDOMAIN, SERVERERROR, DELEGATION, INCOMPLETE
	Kept  bool   `json:"kept"`
	TTL   uint32 `json:"ttl"`             // for how long, in seconds
	Own   uint32 `json:"own_ttl"`         // that the response has by itself, in seconds
	Bound string `json:"bound,omitempty"` // what decides for how long: records, soa_minimum, default, min, max, servfail, signatures
	Rule  string `json:"rule,omitempty"`  // by which it is not kept, such as nxdomain_without_soa
	Why   string `json:"why"`             // a clause that says the bound or the rule
}

// Way says how hits are sent.
type Way struct {
	Way      string `json:"way"`                // bytes, fastpath, or a message with its reason
	Why      string `json:"why,omitempty"`      // a clause: what sends them as messages
	FastPath string `json:"fastpath,omitempty"` // why the fast path does not send them, where the block has one
}

// ExplainRequest is the body of POST /v1/explain.
type ExplainRequest struct {
	Name   string `json:"name"`
	Type   string `json:"type,omitempty"` // empty: A
	DO     bool   `json:"do,omitempty"`
	CD     bool   `json:"cd,omitempty"`
	NoRD   bool   `json:"no_rd,omitempty"`
	Client string `json:"client,omitempty"` // an IP address; empty: 127.0.0.1
	TCP    bool   `json:"tcp,omitempty"`
	Blocks []int  `json:"blocks,omitempty"` // empty: all whose zones have the name
}

// ExplainReply answers POST /v1/explain.
type ExplainReply struct {
	Blocks []BlockExplanation `json:"blocks"`
}

// BlockExplanation is what one block has to say.
type BlockExplanation struct {
	ID int `json:"id"`
	Explanation
}

// MaxWarm is the most questions in one request to warm.
const MaxWarm = 250

// WarmRequest is the body of POST /v1/warm.
type WarmRequest struct {
	Questions []WarmQuestion `json:"questions"`        // at most MaxWarm
	Check     bool           `json:"check,omitempty"`  // say which questions are none, and ask nothing
	Blocks    []int          `json:"blocks,omitempty"` // empty: all whose zones have the name
}

// WarmQuestion is a name to be asked for.
type WarmQuestion struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// WarmReply answers POST /v1/warm. Questions are counted once for each block that they are asked at.
type WarmReply struct {
	There    int           `json:"there"` // were held already
	Came     int           `json:"came"`  // have come, and are held now
	Failed   int           `json:"failed"`
	Failures []WarmFailure `json:"failures"` // of those that failed or, with check, of those that are no questions
}

// WarmFailure says why a name is not held.
type WarmFailure struct {
	At    int    `json:"at"` // of the question, from 0
	Block int    `json:"block"`
	Name  string `json:"name"`
	Type  string `json:"type"`
	Why   string `json:"why"`
}
