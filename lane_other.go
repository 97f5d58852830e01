//go:build !linux

package optcache

import (
	"errors"

	"github.com/coredns/coredns/core/dnsserver"
)

func lanesSupported() error { return errors.New("it needs Linux") }

func openLane(*dnsserver.Server, *fastBlock) error { return lanesSupported() }

func closeLanes(*Optcache) {}

func reopenLanes() {}

func raiseProcs() {}
