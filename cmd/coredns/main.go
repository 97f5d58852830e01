package main

import (
	_ "github.com/coredns/coredns/core/plugin"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/caddy"
	_ "github.com/miekg/dns"
	_ "github.com/optcache/optcache"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "golang.org/x/sys/unix"
)

func main() { coremain.Run() }
