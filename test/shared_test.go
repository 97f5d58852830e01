package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/yaml"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/freeport"
	"github.com/optcache/optcache/test/redis"
)

// This file has the second level as those have it who run servers.

// The start in five minutes of docs/shared.md, word for word but for the ports, the upstream, the program and the time to wait.
func TestStartInFiveMinutes(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"redis-server", "openssl", "dig", "curl"} {
		needs(t, tool)
	}
	_, text, _ := strings.Cut(readFile(t, filepath.Join(root, "docs", "shared.md")), "\n## A start in five minutes\n")
	_, script, _ := strings.Cut(text, "\n~~~ sh\n")
	script, _, found := strings.Cut(script, "\n~~~\n")
	if !found || strings.Count(script, "\n") < 15 {
		t.Fatalf("there is no script: %q", script)
	}
	u := newUpstream(t)
	words := []string{"bin/coredns", bin, "forward . 9.9.9.9", "forward . " + u.addr, "www.example.org", "host-1.example.org",
		"shared_secret shared.secret", "shared_secret shared.secret\n        shared_timeout 1s"} // the machine may be busy
	ports := make(map[string]string)
	for _, port := range []string{"6379", "1053", "1054", "9153", "9154"} {
		ports[port] = fmt.Sprint(freeport.Port(t))
		words = append(words, port, ports[port])
	}
	words = append(words, "sleep 1", fmt.Sprintf(`timeout 60 bash -c 'for port in %s %s
do until curl -s 127.0.0.1:$port/metrics | grep -q "^coredns_optcache_shared_away.* 0$"; do sleep 0.1; done; done'`, ports["9153"], ports["9154"]))
	script = strings.NewReplacer(words...).Replace(script)
	dir := t.TempDir()
	c := exec.Command("bash", "-c", "trap 'kill $(jobs -p); redis-cli -p "+ports["6379"]+" shutdown nosave' EXIT\n"+script)
	c.Dir = dir
	c.Env = append(os.Environ(), "LC_ALL=C")
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "} 1") {
		log, _ := os.ReadFile(filepath.Join(dir, "b.log"))
		t.Fatalf("%v\n%s\n%s", err, out, log)
	}
	if n := strings.Count(string(out), hostName(1)); n != 2 || u.count(hostName(1), dns.TypeA) != 1 {
		t.Errorf("%d answers, and the upstream was asked %d times:\n%s", n, u.count(hostName(1), dns.TypeA), out)
	}
}

// A server of the second level whose name the very server answers that looks for it.
func TestSecondLevelByANameOfItsOwn(t *testing.T) {
	t.Parallel()
	valkey := redis.Start(t)
	u := newUpstream(t)
	port := freeport.Port(t)
	s := start(t, fmt.Sprintf(`.:%d {
	bind 127.0.0.1
	prometheus 127.0.0.1:${metrics}
	hosts {
		127.0.0.1 valkey.example
		fallthrough
	}
	optcache {
		shared valkey://valkey.example:%d
		shared_resolver 127.0.0.1:%d
		shared_secret %s
	}
	forward . %s
}`, port, valkey.Port, port, redis.Secret(t, "a secret of the tests"), u.addr))
	eventually(t, func() error {
		if sum(t, s.addr("metrics"), "coredns_optcache_shared_away") != 0 {
			return fmt.Errorf("it is away")
		}
		return nil
	})
}

// The component's manifests are what an API server takes, and what its first lines say is right.
func TestSharedComponent(t *testing.T) {
	t.Parallel()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{appsv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	dir := filepath.Join(root, "deploy", "kubernetes", "shared")
	var k struct {
		APIVersion string   `json:"apiVersion"`
		Kind       string   `json:"kind"`
		Resources  []string `json:"resources"`
		Patches    []struct {
			Path   string `json:"path"`
			Target struct {
				Kind string `json:"kind"`
				Name string `json:"name"`
			} `json:"target"`
		} `json:"patches"`
	}
	text := readFile(t, filepath.Join(dir, "kustomization.yaml"))
	if err := yaml.UnmarshalStrict([]byte(text), &k); err != nil || k.Kind != "Component" || len(k.Patches) != 1 {
		t.Fatalf("%v: %+v", err, k)
	}
	kinds := make(map[string]any)
	for _, name := range append(k.Resources, k.Patches[0].Path) {
		o, kind, err := decoder.Decode([]byte(readFile(t, filepath.Join(dir, name))), nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		kinds[kind.Kind] = o
	}
	set, secret := kinds["StatefulSet"].(*appsv1.StatefulSet), kinds["Secret"].(*corev1.Secret)
	service, policy, patch := kinds["Service"].(*corev1.Service), kinds["NetworkPolicy"].(*networkingv1.NetworkPolicy), kinds["Deployment"].(*appsv1.Deployment)
	for what, labels := range map[string]map[string]string{"service": service.Spec.Selector, "policy": policy.Spec.PodSelector.MatchLabels, "set": set.Spec.Selector.MatchLabels} {
		for label, value := range labels {
			if set.Spec.Template.Labels[label] != value {
				t.Errorf("%s selects %s=%s", what, label, value)
			}
		}
	}
	mount := patch.Spec.Template.Spec.Containers[0].VolumeMounts[0].MountPath
	for _, want := range []string{mount + "/secret", service.Name + ".kube-system.svc.cluster.local", "{$VALKEY_PASSWORD}"} {
		if !strings.Contains(text, want) || !strings.Contains(readFile(t, filepath.Join(root, "docs", "shared.md")), want) {
			t.Errorf("the lines for the Corefile do not have %s", want)
		}
	}
	if len(secret.StringData) != 2 || secret.StringData["secret"] != "" {
		t.Error("there is a secret that all have")
	}
	// The user's rights are enough: a real server is told of them, and used.
	args := set.Spec.Template.Spec.Containers[0].Args[0]
	_, rights, _ := strings.Cut(args, "user optcache on >$VALKEY_PASSWORD ")
	rights, _, _ = strings.Cut(rights, "\"")
	valkey := redis.Start(t)
	valkey.Do(append([]string{"acl", "setuser", "optcache", "on", ">hush"}, strings.Fields(rights)...)...)
	valkey.Do("acl", "setuser", "default", "off")
	u := newUpstream(t)
	s := start(t, fmt.Sprintf(`.:${dns} {
	bind 127.0.0.1
	prometheus 127.0.0.1:${metrics}
	optcache {
		shared valkey://optcache:hush@%s
		shared_secret %s
	}
	forward . %s
}`, valkey.Addr(), redis.Secret(t, "a secret of the tests"), u.addr))
	eventually(t, func() error {
		if sum(t, s.addr("metrics"), "coredns_optcache_shared_away") != 0 {
			return fmt.Errorf("it is away")
		}
		return nil
	})
	askHosts(t, s, 50)
	eventually(t, func() error {
		if n := sum(t, s.addr("metrics"), "coredns_optcache_shared_writes_total", `outcome="written"`); n != 50 {
			return fmt.Errorf("%v answers are written", n)
		}
		return nil
	})
	eventually(t, func() error { // the hottest are told
		if valkey.Do("--user", "optcache", "--pass", "hush", "--no-auth-warning", "zcard", "optcache:{group}hot") != "50" {
			return fmt.Errorf("the hottest are not told")
		}
		return nil
	})
	if log := s.out.String(); strings.Contains(log, "NOPERM") || strings.Contains(log, "hush") {
		t.Errorf("the log: %s", log)
	}
}
