package kubernetes

import (
	"encoding/json"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// This file asks servers beside each other: stock's cache and ours, each as kubeadm has it and with answers of the cluster kept, too.

// server is one of them.
type server struct {
	name  string
	ip    string
	keeps bool // answers of the cluster
}

// keepsAll is a Corefile without the lines that keep answers of the cluster out of the cache.
func keepsAll(corefile string) string {
	return regexp.MustCompile(`\n *disable (success|denial) cluster\.local`).ReplaceAllString(corefile, "")
}

const besidePod = `{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "%[1]s", "namespace": "kube-system", "labels": {"app": "beside"}},
  "data": {"Corefile": %[2]s}}
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: kube-system, labels: {app: beside}}
spec:
  serviceAccountName: coredns
  dnsPolicy: Default
  terminationGracePeriodSeconds: 0
  containers:
  - name: coredns
    image: %[3]s
    imagePullPolicy: IfNotPresent
    args: ["-conf", "/etc/coredns/Corefile"]
    readinessProbe: {httpGet: {path: /ready, port: 8181}, periodSeconds: 1}
    volumeMounts:
    - {name: config-volume, mountPath: /etc/coredns}
    - {name: cache, mountPath: /var/cache/optcache}
    - {name: run, mountPath: /run}
  volumes:
  - {name: config-volume, configMap: {name: %[1]s}}
  - {name: cache, emptyDir: {}}
  - {name: run, emptyDir: {}}
`

// besideEachOther starts servers beside cluster DNS, and compares them.
func besideEachOther(t *testing.T) {
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	defer system(t, "delete", "pods,configmaps", "-l", "app=beside")
	servers := []server{{name: "stock"}, {name: "cluster DNS"}, {"stock, keeps all", "", true}, {"optcache, keeps all", "", true}, {"optcache, keeps all, no fast path", "", true}}
	for i, of := range []struct {
		pod, image, configMap string
		change                func(corefile string) string
	}{
		{"stock", stock, "coredns", func(c string) string { return c }},
		{},
		{"stock-all", stock, "coredns", keepsAll},
		{"optcache-all", ownImage, "coredns-optcache", keepsAll},
		{"optcache-off", ownImage, "coredns-optcache", func(c string) string {
			return strings.Replace(keepsAll(c), "optcache 30 {", "optcache 30 {\nfastpath off", 1)
		}},
	} {
		if of.pod == "" {
			of.pod = podsOf(t, "deployment/coredns")[0]
		} else {
			before := system(t, "get", "configmap", of.configMap, "-o", "jsonpath={.data.Corefile}")
			after := of.change(before)
			if servers[i].keeps && (after == before || strings.Contains(after, "disable ")) {
				t.Fatalf("%s keeps no answers of the cluster:\n%s", of.pod, after)
			}
			corefile, err := json.Marshal(after)
			if err != nil {
				t.Fatal(err)
			}
			apply(t, fmt.Sprintf(besidePod, of.pod, corefile, of.image))
		}
		system(t, "wait", "--for=condition=Ready", "pod/"+of.pod, "--timeout=600s")
		servers[i].ip = podIP(t, of.pod)
	}
	for i, want := range map[int]bool{3: true, 4: false} {
		metrics := scrape(t, "http://"+servers[i].ip+":9153/metrics")
		if has := strings.Contains(metrics, "coredns_optcache_fastpath_workers"); has != want {
			t.Errorf("%s has a fast path: %v", servers[i].name, has)
		}
	}
	sameAnswers(t, servers[0], servers[1])
	sameAnswers(t, servers[2], servers[3:]...)
	changesShow(t, append(servers, server{"NodeLocal DNSCache", localDNS, true}))
}

var ttlOfRecord = regexp.MustCompile(`\t\d+\tIN\t`)

// sameAnswers compares what others answer with what stock does: all but the TTLs of what the upstream has said or a cache has
// kept, and letters: owner names that are the qname have the client's in ours, and the first client's in stock's. NS is not asked
// for: stock is behind no service here.
func sameAnswers(t *testing.T, stock server, others ...server) {
	web := kubectl(t, "get", "pod", "web", "-o", "jsonpath={.status.podIP}")
	questions := []string{
		"web.default.svc.cluster.local A", "web.default.svc.cluster.local AAAA", "web.default.svc.cluster.local ANY",
		"_http._tcp.web.default.svc.cluster.local SRV", "7.7.96.10.in-addr.arpa PTR", "kubernetes.default.svc.cluster.local A",
		"db.default.svc.cluster.local A", "db.default.svc.cluster.local AAAA", "db-0.db.default.svc.cluster.local A", "db-2.db.default.svc.cluster.local A",
		"_pg._tcp.db.default.svc.cluster.local SRV", "1.9.244.10.in-addr.arpa PTR",
		"ext.default.svc.cluster.local A", "ext.default.svc.cluster.local AAAA", "ext.default.svc.cluster.local CNAME", "exti.default.svc.cluster.local A",
		"nosuch.default.svc.cluster.local A", "nosuch.default.svc.cluster.local AAAA", "nosuch.nosuch.svc.cluster.local A", "default.svc.cluster.local A",
		"cluster.local SOA", "dns-version.cluster.local TXT", strings.ReplaceAll(web, ".", "-") + ".default.pod.cluster.local A",
		"www.example.org A", "www.example.org AAAA", "www.example.org MX", "WWW.Example.ORG A", "nosuch.example.org A", "example.org NS", "example.org SOA",
		"web A", "web.default A", "1.2.0.192.in-addr.arpa PTR",
	}
	plain := func(reply string) string {
		if stock.keeps {
			reply = ttlOfRecord.ReplaceAllString(reply, "\t0\tIN\t")
		}
		return strings.ToLower(reply)
	}
	positive := 0
	for _, q := range questions {
		for _, transport := range []string{"udp", "tcp"} {
			for _, edns := range []bool{false, true} {
				for range 2 { // the second is a hit
					want := ask(t, stock.ip, q, transport, edns)
					for _, other := range others {
						if got := ask(t, other.ip, q, transport, edns); plain(got) != plain(want) {
							t.Errorf("%s by %s, EDNS %v: %s:\n%s\n%s:\n%s", q, transport, edns, stock.name, want, other.name, got)
						}
					}
					if strings.Contains(want, "NOERROR") && strings.Contains(want, "answer ") {
						positive++
					}
				}
			}
		}
	}
	if positive < 100 {
		t.Errorf("%d answers have records", positive)
	}
	for _, other := range others {
		if got := ask(t, other.ip, "WWW.Example.ORG A", "udp", false); !strings.Contains(got, "WWW.Example.ORG.") {
			t.Errorf("the client's letters: %s", got)
		}
	}
}

// ask returns a reply as text that can be compared. Where the upstream has said some of it, there are no TTLs: the rest of the
// reply has no longer ones.
func ask(t *testing.T, ip, question, transport string, edns bool) string {
	t.Helper()
	r := exchange(t, ip, question, transport, edns)
	lines := []string{fmt.Sprintf("%s aa %v tc %v ra %v ad %v cd %v", dns.RcodeToString[r.Rcode], r.Authoritative, r.Truncated, r.RecursionAvailable, r.AuthenticatedData, r.CheckingDisabled)}
	sections := [][]dns.RR{r.Answer, r.Ns, r.Extra}
	upstream := slices.ContainsFunc(slices.Concat(sections...), func(rr dns.RR) bool {
		return rr.Header().Rrtype != dns.TypeOPT && !strings.HasSuffix(rr.Header().Name, "cluster.local.")
	})
	for i, section := range sections {
		var records []string
		for _, rr := range section {
			if soa, ok := rr.(*dns.SOA); ok && strings.HasSuffix(soa.Hdr.Name, "cluster.local.") {
				soa.Serial = 0 // a time
			}
			if upstream && rr.Header().Rrtype != dns.TypeOPT {
				rr.Header().Ttl = 0
			}
			records = append(records, []string{"answer ", "authority ", "additional "}[i]+rr.String())
		}
		slices.Sort(records)
		lines = append(lines, records...)
	}
	return strings.Join(lines, "\n")
}

// exchange asks a server: NAME TYPE, by UDP or TCP.
func exchange(t *testing.T, ip, question, transport string, edns bool) *dns.Msg {
	t.Helper()
	name, qtype, _ := strings.Cut(question, " ")
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.StringToType[qtype])
	if edns {
		m.SetEdns0(1232, true)
	}
	c := dns.Client{Net: transport, Timeout: 5 * time.Second}
	r, _, err := c.Exchange(m, net.JoinHostPort(ip, "53"))
	if err != nil {
		t.Fatalf("%s at %s: %v", question, ip, err)
	}
	return r
}

const (
	movedService = `{apiVersion: v1, kind: Service, metadata: {name: moved, namespace: default}, spec: {clusterIP: None, ports: [{name: pg, port: 5432}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: moved-1, namespace: default, labels: {kubernetes.io/service-name: moved}},
  addressType: IPv4, ports: [{name: pg, port: 5432, protocol: TCP}], endpoints: [{addresses: [%s], conditions: {ready: true}}]}
`
	fixedService = `{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: default}, spec: {clusterIP: %s, ports: [{name: http, port: 80}]}}
`
	oldAddress, newAddress, goneAddress, madeAddress = "10.244.9.4", "10.244.9.5", "10.96.7.21", "10.96.7.20"
)

// changesShow makes a service, moves one, and deletes one. A server that keeps no answers of the cluster shows it at once, and the
// others when the TTL has run out that they have last said.
func changesShow(t *testing.T, servers []server) {
	changes := []struct{ name, before, after string }{
		{"made", "", madeAddress}, {"moved", oldAddress, newAddress}, {"gone", goneAddress, ""},
	}
	defer kubectl(t, "delete", "services/made", "services/moved", "services/gone", "endpointslices/moved-1", "--ignore-not-found")
	apply(t, fmt.Sprintf(movedService, oldAddress)+"---\n"+fmt.Sprintf(fixedService, "gone", goneAddress))
	// said returns the addresses of a reply, and when its TTL runs out.
	said := func(s server, name string) (addresses string, end time.Time) {
		t.Helper()
		r := exchange(t, s.ip, name+".default.svc.cluster.local A", "udp", false)
		if r.Rcode != dns.RcodeSuccess && r.Rcode != dns.RcodeNameError {
			t.Fatalf("%s says %s of %s", s.name, dns.RcodeToString[r.Rcode], name)
		}
		var all []string
		end = time.Now().Add(time.Hour)
		for _, rr := range slices.Concat(r.Answer, r.Ns) {
			if a, is := rr.(*dns.A); is {
				all = append(all, a.A.String())
			}
			if e := time.Now().Add(time.Duration(rr.Header().Ttl) * time.Second); e.Before(end) {
				end = e
			}
		}
		return strings.Join(all, " "), end
	}
	type which struct{ server, name string }
	ends := make(map[which]time.Time)
	for _, s := range servers {
		for _, c := range changes {
			eventually(t, s.name+" knows how it is before", 40*time.Second, func() error {
				if got, _ := said(s, c.name); got != c.before {
					return fmt.Errorf("%s: %q", c.name, got)
				}
				return nil
			})
		}
	}
	// When what they say now ends, before the change and not after a wait.
	for _, s := range servers {
		for _, c := range changes {
			_, ends[which{s.name, c.name}] = said(s, c.name)
		}
	}

	apply(t, fmt.Sprintf(movedService, newAddress)+"---\n"+fmt.Sprintf(fixedService, "made", madeAddress))
	kubectl(t, "delete", "service", "gone")
	changed := time.Now()
	const late = 10 * time.Second // of this test, and of the news, on a busy machine
	shown := make(map[which]time.Duration)
	eventually(t, "all servers show the changes", time.Minute, func() error {
		for _, s := range servers {
			for _, c := range changes {
				w := which{s.name, c.name}
				if _, done := shown[w]; done {
					continue
				}
				last := changed
				if s.keeps && ends[w].After(changed) {
					last = ends[w]
				}
				got, end := said(s, c.name)
				switch {
				case got == c.after:
					shown[w] = time.Since(changed)
				case got != c.before:
					t.Fatalf("%s says %q of %s", s.name, got, c.name)
				case time.Now().After(last.Add(late)):
					t.Fatalf("%s does not show %s, %v after it could", s.name, c.name, time.Since(last))
				case s.keeps && end.After(last.Add(late)):
					t.Fatalf("%s gives %s a TTL that ends %v after the one before", s.name, c.name, end.Sub(last))
				}
			}
		}
		if n := len(servers)*len(changes) - len(shown); n > 0 {
			return fmt.Errorf("%d to come", n)
		}
		return nil
	})
	for _, s := range servers {
		var times []string
		for _, c := range changes {
			times = append(times, fmt.Sprintf("%s after %.1f s", c.name, shown[which{s.name, c.name}].Seconds()))
		}
		t.Logf("%s shows %s", s.name, strings.Join(times, ", "))
	}
}
