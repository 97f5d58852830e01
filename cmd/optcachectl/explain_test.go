package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/optcache/optcache/plugin/control/api"
)

func TestExplain(t *testing.T) {
	t.Parallel()
	var asked api.ExplainRequest
	s := &server{Server: httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		json.NewDecoder(r.Body).Decode(&asked)
		reply(w, api.ExplainReply{Blocks: []api.BlockExplanation{{ID: 1, Explanation: api.Explanation{
			Name: "no.example.org.", Type: "MX", Client: "127.0.0.1", Server: "dns://:53", Outcome: "miss", Rcode: "NXDOMAIN", Milliseconds: 1.5,
			Response: &api.Response{Kind: "NXDOMAIN", Rule: "nxdomain_without_soa", Why: "NXDOMAIN without SOA"},
		}}}})
	}))}
	t.Cleanup(s.Close)
	s.ctl("explain", "no.example.org", "mx", "--do", "--no-rd", "--client", "192.0.2.1", "-b", "1").want(t, exitDone, `
Block 1: no.example.org. MX from 127.0.0.1
  outcome   miss
  reply     NXDOMAIN after 1.5 ms, by dns://:53
  not kept  NXDOMAIN: NXDOMAIN without SOA
`, "")
	if asked.Name != "no.example.org" || asked.Type != "MX" || !asked.DO || !asked.NoRD || asked.Client != "192.0.2.1" || len(asked.Blocks) != 1 {
		t.Errorf("%+v", asked)
	}
}
