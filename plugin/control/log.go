package control

import (
	"sync/atomic"
	"time"

	clog "github.com/coredns/coredns/plugin/pkg/log"
)

var log = clog.NewWithPlugin("optcache")

// Clients can bring these lines about as often as they like. So there is one of each kind in ten seconds at the most.
var (
	refusals = &limitedLog{every: 10 * time.Second}
	faults   = &limitedLog{every: 10 * time.Second} // of files
)

type limitedLog struct {
	every time.Duration
	next  atomic.Int64 // ns since 1970
}

func (l *limitedLog) may() bool {
	now, next := time.Now().UnixNano(), l.next.Load()
	return now >= next && l.next.CompareAndSwap(next, now+int64(l.every))
}

func (l *limitedLog) Warningf(format string, args ...any) {
	if l.may() {
		log.Warningf(format, args...)
	}
}

func (l *limitedLog) Errorf(format string, args ...any) {
	if l.may() {
		log.Errorf(format, args...)
	}
}
