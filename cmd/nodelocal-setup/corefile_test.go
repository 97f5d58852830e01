//go:build linux

package main

import (
	"bytes"
	"errors"
	"log"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const baseText = `# What everybody asks.
cluster.local:53 {
    bind __PILLAR__LOCAL__DNS__
    forward . __PILLAR__CLUSTER__DNS__ {
        force_tcp
    }
}
__PILLAR__STUB__DOMAIN__:53 {
    errors # {
    optcache 30 {
        cache_file_path /var/cache/optcache/__PILLAR__STUB__DOMAIN__
    }
    forward . __PILLAR__STUB__SERVERS__
}
.:53 {
    forward . __PILLAR__UPSTREAM__SERVERS__
}
`

// configMap writes keys of the ConfigMap kube-dns into a folder, as the kubelet does.
func configMap(t *testing.T, keys map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for key, text := range keys {
		if err := os.WriteFile(filepath.Join(dir, key), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// makeCorefile renders a base with what a ConfigMap says.
func makeCorefile(file, base, dir, upstream, variable string) (string, error) {
	addresses := []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fd00::20:10")}
	k, readErr := readKubeDNS(dir, addresses)
	text, err := template{file: file, text: base, addresses: addresses, upstream: upstream, variable: variable}.render(k)
	return text, errors.Join(readErr, err)
}

func TestStubDomainsAndUpstreamServersBecomeBlocks(t *testing.T) {
	got, err := makeCorefile("base", baseText, configMap(t, map[string]string{
		"upstreamNameservers": `["192.0.2.1", "192.0.2.2:5353", "fe80::1%eth0.7", "169.254.20.10:5353"]`,
		"stubDomains":         `{"Corp.Example.": ["192.0.2.3"], "b.example": ["2001:db8::1", "[2001:db8::2]:54"]}`,
	}), "10.96.9.9", "X")
	if err != nil {
		t.Fatal(err)
	}
	const want = `# What everybody asks.
cluster.local:53 {
    bind 169.254.20.10 fd00::20:10
    forward . 10.96.9.9 {
        force_tcp
    }
}
b.example:53 {
    errors # {
    optcache 30 {
        cache_file_path /var/cache/optcache/b.example
    }
    forward . 2001:db8::1 [2001:db8::2]:54
}
corp.example:53 {
    errors # {
    optcache 30 {
        cache_file_path /var/cache/optcache/corp.example
    }
    forward . 192.0.2.3
}
.:53 {
    forward . 192.0.2.1 192.0.2.2:5353 fe80::1%eth0.7 169.254.20.10:5353
}
`
	if got != want {
		t.Errorf("got:\n%s", got)
	}
}

func TestWithoutTheConfigMap(t *testing.T) {
	for name, dir := range map[string]string{"no folder": "/nonexistent", "no keys": t.TempDir(), "empty keys": configMap(t, map[string]string{"stubDomains": "\n", "upstreamNameservers": "[]"})} {
		got, err := makeCorefile("base", baseText, dir, "2001:db8::10", "X")
		if err != nil || strings.Contains(got, "__PILLAR__") || strings.Contains(got, "optcache") ||
			!strings.Contains(got, "forward . /etc/resolv.conf\n") || !strings.Contains(got, "forward . 2001:db8::10 {") {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
	// What is not used need not be there.
	if got, err := makeCorefile("base", ".:53 {\n  whoami\n}", "/nonexistent", "", "X"); err != nil || got != ".:53 {\n  whoami\n}" {
		t.Errorf("%v\n%s", err, got)
	}
}

// Each error says where it is. What is wrong in a ConfigMap is left out; without a base there is nothing.
func TestWrongConfigMapsAndBases(t *testing.T) {
	for _, test := range []struct {
		base, upstream string
		keys           map[string]string
		want           []string
	}{
		{keys: map[string]string{"stubDomains": `{"a": "b"}`}, want: []string{`/stubDomains: "a": `, "cannot unmarshal"}},
		{keys: map[string]string{"stubDomains": `["a.example"]`}, want: []string{"/stubDomains", "cannot unmarshal"}},
		{keys: map[string]string{"stubDomains": `{"a.example": ["192.0.2.1", 7]}`}, want: []string{`/stubDomains: "a.example": `, "cannot unmarshal"}},
		{keys: map[string]string{"stubDomains": `{"a`, "upstreamNameservers": `7`}, want: []string{"/stubDomains", "unexpected end", "/upstreamNameservers"}},
		{keys: map[string]string{"stubDomains": `{"a b": ["192.0.2.1"]}`}, want: []string{"/stubDomains", `"a b" is no domain`}},
		{keys: map[string]string{"stubDomains": `{"": ["192.0.2.1"]}`}, want: []string{`"" is no domain`}},
		{keys: map[string]string{"stubDomains": `{"a{": ["192.0.2.1"]}`}, want: []string{`"a{" is no domain`}},
		{keys: map[string]string{"stubDomains": `{"a.example": []}`}, want: []string{"/stubDomains", `"a.example" has no servers`}},
		{keys: map[string]string{"stubDomains": `{"a.example": ["ns.example"]}`}, want: []string{`/stubDomains: "a.example": "ns.example" is neither`}},
		{keys: map[string]string{"stubDomains": `{"a.example": ["192.0.2.1"], "A.example.": ["192.0.2.1"]}`}, want: []string{`"a.example" stands twice`}},
		{keys: map[string]string{"stubDomains": `{"Cluster.Local": ["192.0.2.1"]}`}, want: []string{`"cluster.local" in stubDomains`, "base has a block"}},
		{keys: map[string]string{"upstreamNameservers": `["192.0.2.1\n}"]`}, want: []string{"/upstreamNameservers", "is neither"}},
		{keys: map[string]string{"upstreamNameservers": `["fe80::1%eth0\n}\n.:54 {\n"]`}, want: []string{"/upstreamNameservers", "is neither"}},
		{keys: map[string]string{"stubDomains": `{"a.example": ["[fe80::1%a b]:53"]}`}, want: []string{"/stubDomains", "is neither"}},
		{keys: map[string]string{"upstreamNameservers": `["192.0.2.1:0"]`}, want: []string{"/upstreamNameservers", "is neither"}},
		{keys: map[string]string{"upstreamNameservers": `["192.0.2.1", "169.254.20.10"]`}, want: []string{`/upstreamNameservers: "169.254.20.10" is the cache itself`}},
		{keys: map[string]string{"stubDomains": `{"a.example": ["[fd00::20:10]:53"]}`}, want: []string{`/stubDomains: "a.example": "[fd00::20:10]:53" is the cache itself`}},
		{keys: map[string]string{"upstreamNameservers": `[` + strings.Repeat(`"192.0.2.1",`, 15) + `"192.0.2.1"]`}, want: []string{"16 servers, at most 15"}},
		{base: ".:53 {\n}\n", keys: map[string]string{"stubDomains": `{"a.example": ["192.0.2.1"]}`}, want: []string{"base has no block for " + placeDomain}},
		{base: ".:53 {\n}\n", keys: map[string]string{"upstreamNameservers": `["192.0.2.1"]`}, want: []string{"base has no " + placeUpstream}},
		{base: ".:53 {\n\n} }\n", want: []string{"base:3: a brace is closed"}},
		{base: ".:53 {\n", want: []string{"base: at the end, a brace is open"}},
		{upstream: "nowhere", want: []string{"base has " + placeCluster, `KUBE_DNS_UPSTREAM_SERVICE_HOST is "nowhere"`}},
	} {
		base, upstream := baseText, "192.0.2.9"
		if test.base != "" {
			base = test.base
		}
		if test.upstream != "" {
			upstream = test.upstream
		}
		got, err := makeCorefile("base", base, configMap(t, test.keys), upstream, "KUBE_DNS_UPSTREAM_SERVICE_HOST")
		for _, want := range test.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %v, want %q\n%s", test.keys, err, want, got)
			}
		}
		if without, _ := makeCorefile("base", base, "/nonexistent", upstream, "X"); got != without {
			t.Errorf("%v: got\n%s\nwant\n%s", test.keys, got, without)
		}
	}
}

// One wrong entry does not take the others with it, and each is told, in the same order each time.
func TestOnlyWhatIsWrongIsLeftOut(t *testing.T) {
	const base = "corp.example:53 {\n}\n__PILLAR__STUB__DOMAIN__:53 {\n    forward . __PILLAR__STUB__SERVERS__\n}\n.:53 {\n    forward . __PILLAR__UPSTREAM__SERVERS__\n}\n"
	const stubs = `{
		"a.example": ["192.0.2.1"],
		"b.example": ["ns.b.example"],
		"c.example": "192.0.2.3",
		"corp.example": ["192.0.2.4"],
		"d.example": ["192.0.2.5", "169.254.20.10"],
		"d..example": ["192.0.2.6"],
		"e.example": [],
		"f.example": ["192.0.2.7"], "F.example": ["192.0.2.8"], "f.example.": ["192.0.2.9"],
		"z.example": ["192.0.2.10", "192.0.2.11:54"]
	}`
	const someStubs = "a.example:53 {\n    forward . 192.0.2.1\n}\nz.example:53 {\n    forward . 192.0.2.10 192.0.2.11:54\n}\n"
	for _, test := range []struct {
		stubs, upstream         string
		wantStubs, wantUpstream string
		told                    []string
	}{
		{stubs, `["192.0.2.20"]`, someStubs, "192.0.2.20", []string{
			`/stubDomains: "b.example": "ns.b.example" is neither`, `/stubDomains: "c.example": json: `, `"corp.example" in stubDomains, for which`,
			`/stubDomains: "d.example": "169.254.20.10" is the cache itself`, `/stubDomains: "d..example" is no domain`,
			`/stubDomains: "e.example" has no servers`, `/stubDomains: "f.example" stands twice`,
		}},
		{`{"a.example`, `["192.0.2.20"]`, "", "192.0.2.20", []string{"/stubDomains: unexpected end"}},
		{`{"a.example": ["192.0.2.1"], "z.example": ["192.0.2.10", "192.0.2.11:54"]}`, `["192.0.2.20", "dns"]`, someStubs, "/etc/resolv.conf",
			[]string{`/upstreamNameservers: "dns" is neither`}},
		{stubs, `["169.254.20.10"]`, someStubs, "/etc/resolv.conf", []string{`/upstreamNameservers: "169.254.20.10" is the cache itself`, `"e.example"`}},
		{stubs, `192.0.2.20`, someStubs, "/etc/resolv.conf", []string{"/upstreamNameservers: invalid", `"e.example"`}},
	} {
		dir := configMap(t, map[string]string{"base": base, keyStubs: test.stubs, keyUpstream: test.upstream})
		corefile := filepath.Join(dir, "Corefile")
		s := &setup{config: config{base: filepath.Join(dir, "base"), corefile: corefile, kubeDNS: dir, addresses: []netip.Addr{netip.MustParseAddr("169.254.20.10")}}}
		var out bytes.Buffer
		log.SetOutput(&out)
		err := s.writeCorefile()
		log.SetOutput(os.Stderr)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(corefile)
		if want := "corp.example:53 {\n}\n" + test.wantStubs + ".:53 {\n    forward . " + test.wantUpstream + "\n}\n"; err != nil || string(got) != want {
			t.Errorf("%v, got\n%s\nwant\n%s", err, got, want)
		}
		for _, want := range test.told {
			if !strings.Contains(out.String(), want) {
				t.Errorf("no %q in\n%s", want, out.String())
			}
		}
		// The Corefile is there now, and stays.
		first := s.writeCorefile()
		for range 5 {
			if err := s.writeCorefile(); err == nil || err.Error() != first.Error() || !strings.Contains(err.Error(), "stays as it is") {
				t.Errorf("first %v, then %v", first, err)
			}
		}
	}
}

// A ConfigMap that cannot be read changes nothing in a Corefile that is there, and does not keep CoreDNS from starting.
func TestCorefileIsWritten(t *testing.T) {
	dir := configMap(t, map[string]string{"base": baseText, "stubDomains": `{"a.example": ["192.0.2.1"]}`})
	in := func(name string) string { return filepath.Join(dir, name) }
	t.Setenv("SOME_SERVICE_HOST", "10.96.9.9")
	c := config{base: in("base"), corefile: in("Corefile"), kubeDNS: dir, upstreamVar: "SOME_SERVICE_HOST"}
	s := &setup{config: c}
	read := func() string {
		t.Helper()
		text, err := os.ReadFile(in("Corefile"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(in(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.writeCorefile(); err != nil || !strings.Contains(read(), "a.example:53") {
		t.Fatal(err)
	}
	before, err := os.Stat(in("Corefile"))
	if err != nil || before.Mode().Perm() != 0o644 {
		t.Fatal(before.Mode(), err)
	}
	// The same again writes nothing.
	if err := s.writeCorefile(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(in("Corefile")); err != nil || !os.SameFile(before, after) {
		t.Error("the same Corefile has been written again")
	}
	write("stubDomains", `{"b.example": ["192.0.2.1"]}`)
	if err := s.writeCorefile(); err != nil || !strings.Contains(read(), "b.example:53") || strings.Contains(read(), "a.example:53") {
		t.Fatal(err, read())
	}
	write("stubDomains", `{`)
	if err := s.writeCorefile(); err == nil || !strings.Contains(err.Error(), in("Corefile")+" stays as it is") || !strings.Contains(read(), "b.example:53") {
		t.Error(err, read())
	}
	s.once = true
	if err := s.writeCorefile(); err != nil || !strings.Contains(read(), "b.example:53") {
		t.Error(err, read())
	}
	if err := os.Remove(in("Corefile")); err != nil {
		t.Fatal(err)
	}
	if err := s.writeCorefile(); err != nil || !strings.Contains(read(), "10.96.9.9") || strings.Contains(read(), "b.example") {
		t.Error(err, read())
	}
	if left, err := filepath.Glob(in(".Corefile*")); err != nil || len(left) > 0 {
		t.Error(left, err)
	}
	write("base", "{")
	os.Remove(in("Corefile"))
	if err := s.writeCorefile(); err == nil {
		t.Error("a base that cannot be read")
	}
}

func TestFlags(t *testing.T) {
	for args, want := range map[string]string{
		"":                                      "-localip is missing",
		"-localip 1.2.3":                        `-localip "1.2.3": "1.2.3" is no IP address`,
		"-localip ,":                            "-localip is missing",
		"-localip 127.0.0.1":                    "127.0.0.1 cannot be",
		"-localip fe80::1%eth0":                 "fe80::1%eth0 cannot be",
		"-localip ::":                           ":: cannot be",
		"-localip 224.0.0.1":                    "224.0.0.1 cannot be",
		"-localip 192.0.2.1 more":               `"more": flags only`,
		"-localip 192.0.2.1 -nosuch":            "-nosuch",
		"-localip 192.0.2.1 -interfacename a/b": `-interfacename "a/b"`,
		"-localip 192.0.2.1 -interfacename dns%d":            `-interfacename "dns%d"`, // the kernel would make dns0, dns1, dns2
		"-localip 192.0.2.1 -interfacename sixteen-letters-": `-interfacename "sixteen-letters-"`,
		"-localip 192.0.2.1 -syncinterval 1ms":               `-syncinterval "1ms": at least 100ms`,
		"-localip 192.0.2.1 -syncinterval soon":              "-syncinterval",
		"-localip 192.0.2.1 -ready /ready":                   `-ready "/ready"`,
		"-localip 192.0.2.1 -corefile /a":                    "-basecorefile and -corefile",
		"-localip 192.0.2.1 -owner root":                     `-owner "root"`,
		"-localip 192.0.2.1 -folders a":                      `-folders "a": "a" is not absolute`,
	} {
		_, err := parse(strings.Fields(args), new(bytes.Buffer))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", args, err)
		}
	}
	c, err := parse([]string{"-localip", "169.254.20.10, fd00::10,169.254.20.10", "-upstreamsvc", "my-svc", "-owner", "7:8", "-folders", "/a,/b"}, new(bytes.Buffer))
	if err != nil || len(c.addresses) != 2 || c.addresses[1].String() != "fd00::10" || c.upstreamVar != "MY_SVC_SERVICE_HOST" || c.uid != 7 || c.gid != 8 ||
		len(c.folders) != 2 || c.interval != 5*time.Second || !c.setInterface || !c.setRules || c.skipTeardown || c.iface != "nodelocaldns" {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := parse([]string{"-setupinterface=false", "-setupiptables=false"}, new(bytes.Buffer)); err != nil {
		t.Error(err)
	}
}

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := makeFolders([]string{in("a/b"), dir}, os.Getuid(), os.Getgid()); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(in("a/b")); err != nil || info.Mode().Perm() != 0o700 {
		t.Error(info.Mode(), err)
	}
	if err := os.MkdirAll(in("full/x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(in("empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	there := func() string {
		all, err := filepath.Glob(in("*"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(strings.Join(all, " "), dir+"/", "")
	}
	sweep(dir, time.Now())
	if got := there(); got != "a empty full" {
		t.Error(got)
	}
	sweep(dir, time.Now().Add(sweepAfter+time.Minute))
	if got := there(); got != "a full" {
		t.Error(got)
	}
	sweep(in("nosuch"), time.Now())
	sweep("", time.Now())
}

// A folder that an old pod of the same name has left is swept away, and there all the same.
func TestFoldersAreMadeAfterTheSweep(t *testing.T) {
	dir := t.TempDir()
	own := filepath.Join(dir, "own")
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-sweepAfter - time.Hour)
	if err := os.Chtimes(own, old, old); err != nil {
		t.Fatal(err)
	}
	c := config{once: true, folders: []string{own}, sweep: dir, uid: os.Getuid(), gid: os.Getgid()}
	if err := run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(own); err != nil {
		t.Error(err)
	}
}
