//go:build linux

// Command nodelocal-setup gives a node what NodeLocal DNSCache needs there: an interface with the cache's addresses, rules that keep
// its packets out of connection tracking and so out of kube-proxy's hands, folders, and the Corefile with what the ConfigMap kube-dns
// says. It does in a pod what node-cache does by itself. Flags that node-cache has, too, mean the same.
//
// With -once it ends when all is there, as an init container. Without, it looks again and again, mends what is missing, and takes
// away what it has made when it is told to end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// config is what the flags say.
type config struct {
	addresses    []netip.Addr // of the cache, each once
	iface        string       // the interface, and the table of rules
	setInterface bool
	setRules     bool
	skipTeardown bool
	interval     time.Duration // between two looks
	once         bool
	ready        string // URL; empty: always
	lock         string // file; empty: this is the only one on the node

	folders  []string
	uid, gid int
	sweep    string

	base, corefile string // files; empty: none
	kubeDNS        string // folder
	upstreamVar    string // variable of the environment
}

// longestName is how many bytes the name of an interface may have.
const longestName = syscall.IFNAMSIZ - 1

// parse reads the flags. What is wrong is named in the error.
func parse(args []string, usage io.Writer) (c config, err error) {
	f := flag.NewFlagSet("nodelocal-setup", flag.ContinueOnError)
	f.SetOutput(usage)
	localIP := f.String("localip", "", "the cache's `addresses`, separated by commas: one of the node's own, and that of the service kube-dns, if its pods are to ask the cache")
	f.StringVar(&c.iface, "interfacename", "nodelocaldns", "the interface's `name`, and that of the table of rules")
	f.BoolVar(&c.setInterface, "setupinterface", true, "make the interface, with the addresses")
	f.BoolVar(&c.setRules, "setupiptables", true, "make the rules: no connection tracking for the cache's packets, and no firewall of iptables that drops them")
	f.BoolVar(&c.skipTeardown, "skipteardown", false, "leave interface and rules at the end")
	f.DurationVar(&c.interval, "syncinterval", 5*time.Second, "the `time` between two looks whether all is there")
	f.StringVar(&c.base, "basecorefile", "", "the `file` that -corefile is made of")
	f.StringVar(&c.corefile, "corefile", "", "the `file` for CoreDNS: -basecorefile, with what -kubednscm and -upstreamsvc say")
	f.StringVar(&c.kubeDNS, "kubednscm", "/etc/kube-dns", "the `folder` with the keys of the ConfigMap kube-dns; there may be none")
	service := f.String("upstreamsvc", "kube-dns-upstream", "the `service` whose address stands for "+placeCluster+" in -basecorefile")
	f.BoolVar(&c.once, "once", false, "end when all is there")
	f.StringVar(&c.ready, "ready", "", "a `URL` that answers 200 while the cache serves; at other times there are no rules that keep packets from kube-proxy")
	f.StringVar(&c.lock, "lock", "", "a `file` of the node by which those that run at the same time know of each other: the last one takes away what is there")
	folders := f.String("folders", "", "`folders` to make for -owner, separated by commas")
	owner := f.String("owner", "65532:65532", "the user and group, by `number`, who own -folders")
	f.StringVar(&c.sweep, "sweep", "", "a `folder` whose empty folders are removed when they are ten minutes old")
	if err := f.Parse(args); err != nil {
		return c, err
	}
	wrong := func(name, format string, args ...any) {
		err = errors.Join(err, fmt.Errorf("-%s %q: %s", name, f.Lookup(name).Value, fmt.Sprintf(format, args...)))
	}
	if f.NArg() > 0 {
		err = errors.Join(err, fmt.Errorf("%q: flags only", f.Arg(0)))
	}
	addresses, seen := list(*localIP), make(map[netip.Addr]bool)
	if len(addresses) == 0 && (c.setInterface || c.setRules) {
		err = errors.Join(err, errors.New("-localip is missing"))
	}
	for _, text := range addresses {
		a, parseErr := netip.ParseAddr(text)
		switch {
		case parseErr != nil:
			wrong("localip", "%q is no IP address", text)
		case a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
			wrong("localip", "%s cannot be an address of the interface", a)
		case !seen[a]:
			seen[a] = true
			c.addresses = append(c.addresses, a)
		}
	}
	if c.iface == "" || len(c.iface) > longestName || c.iface == "." || c.iface == ".." || strings.ContainsAny(c.iface, "/: \t\n\"%") {
		wrong("interfacename", "an interface has a name of 1 to %d characters, without spaces, quotes, slashes, colons and percent signs", longestName)
	}
	if c.interval < 100*time.Millisecond {
		wrong("syncinterval", "at least 100ms")
	}
	if (c.base == "") != (c.corefile == "") {
		err = errors.Join(err, errors.New("-basecorefile and -corefile go together"))
	}
	if u, parseErr := url.Parse(c.ready); c.ready != "" && (parseErr != nil || u.Scheme != "http" || u.Host == "") {
		wrong("ready", "a URL like http://169.254.20.10:8181/ready")
	}
	uid, gid, found := strings.Cut(*owner, ":")
	var uidErr, gidErr error
	c.uid, uidErr = strconv.Atoi(uid)
	c.gid, gidErr = strconv.Atoi(gid)
	if !found || uidErr != nil || gidErr != nil || min(c.uid, c.gid) < 0 {
		wrong("owner", "a user and a group by number, like 65532:65532")
	}
	if c.folders = list(*folders); len(c.folders) > 0 {
		for _, dir := range c.folders {
			if !filepath.IsAbs(dir) {
				wrong("folders", "%q is not absolute", dir)
			}
		}
	}
	c.upstreamVar = strings.ToUpper(strings.ReplaceAll(*service, "-", "_")) + "_SERVICE_HOST" // as the kubelet names it
	return c, err
}

// list returns what stands between commas.
func list(text string) (all []string) {
	for word := range strings.SplitSeq(text, ",") {
		if word = strings.TrimSpace(word); word != "" {
			all = append(all, word)
		}
	}
	return all
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("nodelocal-setup: ")
	c, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		log.Print(err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, c); err != nil {
		log.Fatal(err)
	}
}
