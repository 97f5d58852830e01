package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// zipkinSpan is as much of a span in Zipkin's format as is checked.
type zipkinSpan struct {
	ID, ParentID, TraceID, Name string
	Tags                        map[string]string
}

// CoreDNS's plugin trace sends the span of what optcache did, with its facts.
func TestTraceHasTheSpanOfTheCache(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex // guards spans
	var spans []zipkinSpan
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var sent []zipkinSpan
		if err := json.NewDecoder(r.Body).Decode(&sent); err != nil {
			t.Errorf("what was sent is no list of spans: %v", err)
		}
		mu.Lock()
		spans = append(spans, sent...)
		mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
	}))
	t.Cleanup(collector.Close)
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "trace zipkin "+collector.URL+"/api/v2/spans {\nzipkin_max_batch_size 1\n}", "optcache"))
	for range 2 {
		ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
	}
	eventually(t, func() error {
		mu.Lock()
		defer mu.Unlock()
		var said []string
		for _, span := range spans {
			i := slices.IndexFunc(spans, func(p zipkinSpan) bool { return p.ID == span.ParentID && p.TraceID == span.TraceID })
			if span.Name == "optcache" && i >= 0 {
				said = append(said, fmt.Sprintf("%s %s %s in %s", span.Tags["optcache/status"], span.Tags["optcache/tier"], span.Tags["optcache/ttl"], spans[i].Name))
			}
			if span.Name == "forward" && i >= 0 {
				said = append(said, "forward in "+spans[i].Name)
			}
		}
		slices.Sort(said)
		for i, like := range []string{"forward in optcache", "hit probationary (300|29[0-9]) in errors", "miss   in errors"} {
			if i >= len(said) || !regexp.MustCompile("^"+like+"$").MatchString(said[i]) {
				return fmt.Errorf("spans say %q", said)
			}
		}
		return nil
	})
}
