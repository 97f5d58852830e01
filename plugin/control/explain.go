package control

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control/api"
)

// explain asks a question at each block whose zones have the name, one after the other.
func explain(r *http.Request, body []byte, blocks []Block) (func() (*answer, error), error) {
	if _, err := parameters(r, nil, nil); err != nil {
		return nil, err
	}
	var q api.ExplainRequest
	if err := decode(body, &q, "name", "type", "do", "cd", "no_rd", "client", "tcp", "blocks"); err != nil {
		return nil, err
	}
	asked, err := questionOf(q.Name, q.Type)
	if err != nil {
		return nil, err
	}
	if q.Client != "" {
		if _, err := netip.ParseAddr(q.Client); err != nil {
			return nil, badRequest("client", "%q is not an IP address", q.Client)
		}
	}
	asked.DO, asked.CD, asked.NoRD, asked.Client, asked.TCP = q.DO, q.CD, q.NoRD, q.Client, q.TCP
	all, err := chosenMember(blocks, q.Blocks)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		a := api.ExplainReply{Blocks: []api.BlockExplanation{}}
		var failed []error
		for _, b := range all {
			e, err := b.Ask(asked, true)
			if err != nil {
				failed = append(failed, fmt.Errorf("block %d: %w", b.id, err))
				continue
			}
			a.Blocks = append(a.Blocks, api.BlockExplanation{ID: b.id, Explanation: e})
		}
		did(r, fmt.Sprintf("explain name=%q type=%s%s", asked.Name, dns.Type(asked.Type), blockWords(q.Blocks)), outcomes(a.Blocks), failed)
		if failed != nil {
			return nil, errors.Join(failed...)
		}
		return jsonAnswer(a), nil
	}, nil
}

func outcomes(all []api.BlockExplanation) string {
	var words []string
	for _, e := range all {
		words = append(words, e.Outcome)
	}
	return strings.Join(words, ", ")
}

// questionOf reads a name and a type. An empty type is A. A type that is none of data cannot be asked for.
func questionOf(name, qtype string) (q Question, err error) {
	if q.Name, err = domainName(name); err != nil {
		return q, err
	}
	q.Type = dns.TypeA
	if qtype != "" {
		if q.Type, err = recordType(qtype); err != nil {
			return q, err
		}
	}
	switch q.Type {
	case dns.TypeOPT, dns.TypeAXFR, dns.TypeIXFR, dns.TypeTKEY, dns.TypeTSIG, dns.TypeMAILA, dns.TypeMAILB:
		return q, badRequest("type", "%q is not a type of data", qtype)
	}
	return q, nil
}
