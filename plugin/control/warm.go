package control

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"sync"

	"github.com/optcache/optcache/plugin/control/api"
)

// warmers is how many questions of one request are asked at once.
const warmers = 32

// maxWords bounds what is said of one failure, in bytes.
const maxWords = 300

// warm asks for names. All are read before the first is asked.
func warm(r *http.Request, body []byte, blocks []Block) (func() (*answer, error), error) {
	if _, err := parameters(r, nil, nil); err != nil {
		return nil, err
	}
	var q api.WarmRequest
	if err := decode(body, &q, "questions", "check", "blocks"); err != nil {
		return nil, err
	}
	if len(q.Questions) == 0 || len(q.Questions) > api.MaxWarm {
		return nil, badRequest("questions", "there are %d, and 1 to %d are allowed", len(q.Questions), api.MaxWarm)
	}
	all, err := chosenMember(blocks, q.Blocks)
	if err != nil {
		return nil, err
	}
	var bad []api.WarmFailure
	asked := make([]Question, len(q.Questions))
	for i, w := range q.Questions {
		if asked[i], err = questionOf(w.Name, w.Type); err != nil {
			bad = append(bad, failureOf(i, 0, w, err.Error()))
		}
	}
	switch {
	case q.Check:
		return func() (*answer, error) {
			return jsonAnswer(warmAnswer(api.WarmReply{Failed: len(bad), Failures: bad})), nil
		}, nil
	case bad != nil:
		return nil, badRequest(fmt.Sprintf("questions[%d]", bad[0].At), "%s", bad[0].Why)
	}
	return func() (*answer, error) {
		a := warmAll(asked, q.Questions, all)
		result := fmt.Sprintf("%d were there, %d came, %d failed", a.There, a.Came, a.Failed)
		did(r, fmt.Sprintf("warm questions=%d%s", len(asked), blockWords(q.Blocks)), result, nil)
		return jsonAnswer(warmAnswer(a)), nil
	}, nil
}

// warmAnswer has no null in its JSON.
func warmAnswer(a api.WarmReply) api.WarmReply {
	if a.Failures == nil {
		a.Failures = []api.WarmFailure{}
	}
	return a
}

func failureOf(at, block int, q api.WarmQuestion, why string) api.WarmFailure {
	return api.WarmFailure{At: at, Block: block, Name: q.Name, Type: q.Type, Why: why[:min(len(why), maxWords)]}
}

// warmAll asks all questions at all blocks that have their names, a few at once.
func warmAll(asked []Question, given []api.WarmQuestion, blocks []numbered) (a api.WarmReply) {
	var (
		mu   sync.Mutex // guards a
		some sync.WaitGroup
		next = make(chan int)
	)
	for range min(warmers, len(asked)) {
		some.Go(func() {
			for i := range next {
				one := warmOne(i, asked[i], given[i], blocks)
				mu.Lock()
				a.There, a.Came, a.Failed = a.There+one.There, a.Came+one.Came, a.Failed+one.Failed
				a.Failures = append(a.Failures, one.Failures...)
				mu.Unlock()
			}
		})
	}
	for i := range asked {
		next <- i
	}
	close(next)
	some.Wait()
	slices.SortFunc(a.Failures, func(x, y api.WarmFailure) int { return cmp.Or(cmp.Compare(x.At, y.At), cmp.Compare(x.Block, y.Block)) })
	return a
}

// warmOne asks one question at each block. A block that the question does not come to is passed over, unless all are.
func warmOne(at int, q Question, given api.WarmQuestion, blocks []numbered) (a api.WarmReply) {
	var missed []api.WarmFailure
	for _, b := range blocks {
		e, err := b.Ask(q, false)
		switch held, why := heldAfter(e, err); {
		case held && e.Outcome == api.Miss, held && e.Outcome == api.Verified:
			a.Came++
		case held:
			a.There++
		case err == nil && e.Outcome == api.Elsewhere:
			missed = append(missed, failureOf(at, b.id, given, why))
		default:
			a.Failed++
			a.Failures = append(a.Failures, failureOf(at, b.id, given, why))
		}
	}
	if len(missed) == len(blocks) {
		a.Failed, a.Failures = 1, missed[:1]
	}
	return a
}

// heldAfter reports whether an answer or a denial is held after a question was asked, or else why not.
func heldAfter(e Explanation, err error) (held bool, why string) {
	switch {
	case err != nil:
		return false, err.Error()
	case e.Response == nil:
		switch e.Outcome {
		case api.Hit, api.Prefetch, api.Stale, api.Synthesized:
			if isFailure(e.Rcode) {
				return false, "a failure is held: " + e.Rcode
			}
			return true, ""
		}
		return false, cmp.Or(e.Why, "there was no response")
	case !e.Response.Kept:
		return false, "not kept: " + e.Response.Why
	case isFailure(e.Rcode):
		return false, e.Rcode + because(e.Why)
	}
	return true, ""
}

// isFailure reports whether responses of that rcode are kept as failures.
func isFailure(rcode string) bool {
	return slices.Contains([]string{"SERVFAIL", "NOTIMP", "REFUSED", "FORMERR"}, rcode)
}

func because(why string) string {
	if why == "" {
		return ""
	}
	return ": " + why
}
