package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// apiServer is a Kubernetes API server that has namespaces, each with a Service web, and nothing that changes.
func apiServer(t testing.TB, namespaces int) string {
	t.Helper()
	type object = map[string]any
	lists := map[string]object{
		"/api/v1/namespaces":                       {"kind": "NamespaceList", "apiVersion": "v1"},
		"/api/v1/services":                         {"kind": "ServiceList", "apiVersion": "v1"},
		"/apis/discovery.k8s.io/v1/endpointslices": {"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1"},
	}
	var spaces, services []object
	for i := range namespaces {
		name := fmt.Sprintf("ns%d", i)
		spaces = append(spaces, object{"metadata": object{"name": name, "resourceVersion": "1"}})
		services = append(services, object{
			"metadata": object{"name": "web", "namespace": name, "resourceVersion": "1"},
			"spec": object{"clusterIP": fmt.Sprintf("10.96.0.%d", i+1), "clusterIPs": []string{fmt.Sprintf("10.96.0.%d", i+1)}, "type": "ClusterIP",
				"ports": []object{{"name": "http", "port": 80, "protocol": "TCP"}}},
		})
	}
	lists["/api/v1/namespaces"]["items"], lists["/api/v1/services"]["items"] = spaces, services
	lists["/apis/discovery.k8s.io/v1/endpointslices"]["items"] = []object{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		list := lists[r.URL.Path]
		switch {
		case list == nil:
			http.NotFound(w, r)
		case r.URL.Query().Get("sendInitialEvents") == "true": // then the client lists
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnprocessableEntity)
			json.NewEncoder(w).Encode(object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": http.StatusUnprocessableEntity})
		case r.URL.Query().Get("watch") != "":
			w.Header().Set("Content-Type", "application/json")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			list["metadata"] = object{"resourceVersion": "1"}
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(list)
		}
	}))
	t.Cleanup(s.CloseClientConnections)
	return s.URL
}

// What search paths cost upstream: pods of five namespaces, with ndots:5 and four search domains, ask for external names of twelve
// top-level domains. Behind the cache is the plugin kubernetes, in a server of its own. The resolvers are glibc's and musl's, in turn:
// both ask for A and AAAA of a name at once, and for the next name when there is neither. Where the test may make no host, it plays
// them.
//
// A new name costs two queries below each of the namespaces and of the other three domains, and two for itself. Once there are cuts,
// it costs the last two. With OPTCACHE_FIGURES, many names are asked for, and again for two TTLs: the queries are in the log.
func TestSearchPaths(t *testing.T) {
	t.Parallel()
	ttl := 3600 // longer than the test
	figures := os.Getenv("OPTCACHE_FIGURES") != ""
	if figures {
		ttl = 30
	}
	const namespaces = 5
	tlds := []string{"com", "net", "org", "io", "dev", "de", "co", "app", "cloud", "fr", "nl", "uk"}
	template := func(zone, rest string) string {
		return fmt.Sprintf("%s:${dns} {\n\tbind 127.0.0.1\n\tprometheus 127.0.0.1:${metrics}\n%s\n}\n", zone, rest)
	}
	back := template("cluster.local", fmt.Sprintf("\tkubernetes cluster.local {\n\t\tendpoint %s\n\t\tttl %d\n\t}", apiServer(t, namespaces), ttl)) +
		template("ec2.internal", "\ttemplate IN ANY {\n\t\trcode NXDOMAIN\n\t\tauthority \"ec2.internal. 60 IN SOA a. b. 1 2 3 4 60\"\n\t}") +
		template(".", "\ttemplate IN A {\n\t\tanswer \"{{ .Name }} 300 IN A 192.0.2.1\"\n\t}\n\ttemplate IN AAAA {\n\t\trcode NOERROR\n\t\tauthority \". 300 IN SOA a. b. 1 2 3 4 300\"\n\t}")
	resolve := newResolvers(t)
	if resolve == nil {
		t.Log("the resolvers are played")
		resolve = func(addr string, names []string, namespace int, musl bool) {
			for _, name := range names {
				lookUp(t, addr, name+".", namespace, musl)
			}
		}
	}
	for _, c := range []struct {
		name, option string
		queries      int // for a new name
	}{
		{"today", "", 2 * (namespaces + 3 + 1)},
		{"cut", "nxdomain_cut cluster.local ec2.internal", 2 * (namespaces + 3 + 1)}, // nobody asks for the names that it could stand at
		{"probe", "nxdomain_cut probe cluster.local ec2.internal", 2},
	} {
		upstream := start(t, back)
		eventually(t, func() error {
			if m, _, err := new(dns.Client).Exchange(query("web.ns4.svc.cluster.local.", dns.TypeA), upstream.addr("dns")); err != nil || len(m.Answer) != 1 {
				return fmt.Errorf("%v, %v", m, err)
			}
			return nil
		})
		s := start(t, block("dns", upstream.addr("dns"), "optcache {\n\t\t"+c.option+"\n\t}"))
		asked := func() float64 { return sum(t, upstream.addr("metrics"), "coredns_dns_requests_total") }
		asking := func(external []string) float64 { // returns the upstream queries
			before := asked()
			for space := range namespaces {
				resolve(s.addr("dns"), external, space, space%2 == 1)
			}
			for space := range namespaces { // a Service is found as ever
				if m := exchange(t, s.addr("dns"), fmt.Sprintf("web.ns%d.svc.cluster.local.", space), dns.TypeA); len(m.Answer) != 1 {
					t.Errorf("%s: %v", c.name, m)
				}
			}
			return asked() - before
		}
		site := 0
		names := func(n int) (external []string) { // that are new
			for range n {
				external = append(external, fmt.Sprintf("www.site%d.%s", site, tlds[site%len(tlds)]))
				site++
			}
			return external
		}
		if figures {
			external := names(200)
			first, begun, again := asking(external), time.Now(), 0.0
			for time.Since(begun) < 2*time.Duration(ttl)*time.Second {
				again += asking(external)
			}
			t.Logf("%s: %v upstream queries at first, then %.0f in each %d s", c.name, first, again/(time.Since(begun).Seconds()/float64(ttl)), ttl)
			continue
		}
		want := float64(len(tlds) * c.queries)
		eventually(t, func() error { // the Services are new once; probes have a rate; a query that is lost is sent again
			if got := asking(names(len(tlds))); got != want {
				return fmt.Errorf("%s: %d names cost %v queries, want %v", c.name, len(tlds), got, want)
			}
			return nil
		})
	}
}

// newResolvers returns a function that looks up external names as a pod of a namespace does, with glibc or musl, by a server at an
// address; nil where there are no such resolvers, or where there may be no host for them.
var newResolvers = func(*testing.T) func(addr string, names []string, namespace int, musl bool) { return nil }

// lookUp looks up an external name as a pod of a namespace does. With musl, a name that exists without an address ends the search.
func lookUp(t *testing.T, addr, name string, namespace int, musl bool) {
	t.Helper()
	for _, domain := range []string{fmt.Sprintf("ns%d.svc.cluster.local.", namespace), "svc.cluster.local.", "cluster.local.", "ec2.internal.", ""} {
		var both [2]*dns.Msg
		var wg sync.WaitGroup
		for i, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
			wg.Go(func() { both[i] = exchange(t, addr, name+domain, qtype) })
		}
		wg.Wait()
		for _, m := range both {
			if m != nil && (len(m.Answer) > 0 || musl && m.Rcode == dns.RcodeSuccess) {
				return
			}
		}
	}
	t.Errorf("%s is not found", name)
}

func exchange(t *testing.T, addr, name string, qtype uint16) *dns.Msg {
	t.Helper()
	var m *dns.Msg
	var err error
	for range 3 {
		if m, _, err = (&dns.Client{Timeout: 5 * time.Second}).Exchange(query(name, qtype), addr); err == nil {
			return m
		}
	}
	t.Errorf("%s: %v", name, err)
	return new(dns.Msg)
}
