package admit

import (
	"fmt"
	"time"
)

// This file says in words why a response is kept for a time, or not kept.

// Rule is the reason why a response is not kept. Keeps is none.
type Rule uint8

const (
	Keeps Rule = iota

	// Of the response, see Judge.
	NoQuery          // it is one to an UPDATE, a NOTIFY, or a zone transfer
	BadSignature     // with DO, a signature has expired or is not valid yet
	OtherRcode       // its rcode is none of those that are kept
	DenialWithAnswer // it is NXDOMAIN, and its answer section is no chain of aliases to a name that does not exist
	IncompleteChain  // see Incomplete
	DenialWithoutSOA // it is NXDOMAIN without the SOA that has its TTL
	Truncated
	NoQuestion

	// Of the request that it came for, and of the options.
	NotTheQuestion // it is a response to another question
	OneSubnet      // it is for the clients of one subnet (RFC 7871)
	Inconclusive   // it came of a question with RD=0, and neither answers nor denies
	ZeroTTL        // it would be kept for no time
	Excepted       // the option disable excepts the name
	NotBetter      // the stale answer that there is is preferred to it

	// Of the store.
	TooLarge    // its record is larger than may be kept, or cannot be packed
	Overtaken   // a newer answer has come meanwhile
	NotAdmitted // there is no room for it, it is larger than its share of a shard, or it has been flushed meanwhile

	lastRule
)

var rules = [lastRule]struct{ word, says string }{
	Keeps:            {"", ""},
	NoQuery:          {"no_query", "a response to an UPDATE or a NOTIFY, or a zone transfer, is not kept"},
	BadSignature:     {"signature", "a signature has expired, or is not valid yet"},
	OtherRcode:       {"rcode", "its rcode is none of NOERROR, NXDOMAIN, SERVFAIL and NOTIMP"},
	DenialWithAnswer: {"nxdomain_with_answer", "NXDOMAIN with an answer section that does not lead to another name"},
	IncompleteChain:  {"incomplete", "the answer section does not answer the question, and there is no SOA"},
	DenialWithoutSOA: {"nxdomain_without_soa", "NXDOMAIN without SOA"},
	Truncated:        {"truncated", "it is truncated"},
	NoQuestion:       {"no_question", "it has no question"},
	NotTheQuestion:   {"other_question", "it is a response to another question"},
	OneSubnet:        {"subnet", "it is for the clients of one subnet"},
	Inconclusive:     {"no_rd", "the question had RD=0, and the response neither answers nor denies"},
	ZeroTTL:          {"ttl", "its TTL is 0"},
	Excepted:         {"disabled", "the option disable excepts the name"},
	NotBetter:        {"stale_preferred", "the stale answer is preferred to it"},
	TooLarge:         {"too_large", "it is too large"},
	Overtaken:        {"overtaken", "a newer answer has come meanwhile"},
	NotAdmitted:      {"no_room", "the store has no room for it, or it has been flushed meanwhile"},
}

// String returns a word for a rule, "" for Keeps.
func (r Rule) String() string { return rules[r].word }

// Says returns a clause for a rule.
func (r Rule) Says() string { return rules[r].says }

// Bound is what decides for how long a response is kept.
type Bound uint8

const (
	ByRecords    Bound = iota // the smallest TTL of its records
	ByMinimum                 // MINIMUM of its SOA
	ByDefault                 // the time for responses that have no TTL of their own
	ByMin                     // MINTTL of the class
	ByMax                     // TTL of the class
	ByServfail                // the option servfail
	BySignatures              // the end of a signature
	ByOwnMin                  // MIN of an option ttl
	ByOwnMax                  // MAX of an option ttl
	ByOption                  // the option denial_without_soa
	ByJitter                  // the option jitter
	bounds
)

// String returns a word for a bound.
func (b Bound) String() string {
	return [bounds]string{"records", "soa_minimum", "default", "min", "max", "servfail", "signatures", "ttl_min", "ttl_max", "denial_without_soa", "jitter"}[b]
}

// Lifetime says for how long a response is kept.
type Lifetime struct {
	TTL time.Duration
	Own time.Duration // the TTL that the response has by itself; 0 for a failure, which has none
	By  Bound
}

// Until cuts a lifetime to the seconds for which the signatures are valid.
func (l Lifetime) Until(signed int64) Lifetime {
	if most := time.Duration(min(signed, 1<<32)) * time.Second; most < l.TTL {
		l.TTL, l.By = most, BySignatures
	}
	return l
}

// Shortened returns a lifetime of which that part, 0 to below 1, is gone. A second is left at least.
func (l Lifetime) Shortened(part float64) Lifetime {
	if off := time.Duration(part * float64(l.TTL)).Truncate(time.Second); off > 0 && l.TTL-off >= time.Second {
		l.TTL, l.By = l.TTL-off, ByJitter
	}
	return l
}

// Says returns a clause. class is the word of the Corefile for the class: success or denial.
func (l Lifetime) Says(class string) string {
	own, ttl := l.Own/time.Second, l.TTL/time.Second
	switch l.By {
	case ByMinimum:
		return fmt.Sprintf("MINIMUM %d of the SOA", own)
	case ByDefault:
		return fmt.Sprintf("%d s, for it has no TTL of its own", own)
	case ByMin:
		return fmt.Sprintf("TTL %d of the response, raised to %d by the MINTTL of %s", own, ttl, class)
	case ByMax:
		return fmt.Sprintf("TTL %d of the response, cut to %d by the TTL of %s", own, ttl, class)
	case ByOwnMin:
		return fmt.Sprintf("TTL %d of the response, raised to %d by the option ttl", own, ttl)
	case ByOwnMax:
		return fmt.Sprintf("TTL %d of the response, cut to %d by the option ttl", own, ttl)
	case ByOption:
		return fmt.Sprintf("%d s of the option denial_without_soa", ttl)
	case ByJitter:
		return fmt.Sprintf("TTL %d of the response, shortened to %d by the option jitter", own, ttl)
	case ByServfail:
		return fmt.Sprintf("%d s of the option servfail", ttl)
	case BySignatures:
		return fmt.Sprintf("cut to %d s, when a signature expires", ttl)
	}
	return fmt.Sprintf("TTL %d of the response", own)
}
