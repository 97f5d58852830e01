package optcache

import (
	"reflect"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

// This file decides whether a hit may leave as bytes, past the WriteMsg of everything that
// stands in front of this plugin.

// neutral lists the plugins that a reply in bytes may pass, each with the reason. A plugin that
// is not listed may do anything to a message it sees, so nothing is kept from it.
var neutral = map[string]string{
	"metadata":   "collects before the chain runs, writes nothing",
	"geoip":      "provides metadata, writes nothing",
	"cancel":     "wraps the context only",
	"bufsize":    "changes the request's OPT, which the reply's size is taken from",
	"nsid":       "wraps the writer only for a request with that option, which goes as a message",
	"ready":      "is no part of the chain",
	"health":     "is no part of the chain",
	"prometheus": "its recorder is told rcode and length, as WriteMsg tells it",
	"errors":     "looks at the error only",
	"local":      "answers by itself or passes on",
	"any":        "answers by itself or passes on",
	"chaos":      "answers by itself or passes on",
	"acl":        "answers by itself or passes on",
}

// front is what stands in front of the plugin in its server block.
type front struct {
	changes  bool // something that may change a reply, or is not known
	recorder bool // the prometheus plugin's recorder
}

// inspect looks at the plugins of a server block, in the order in which they are called.
func inspect(handlers []plugin.Handler) (f front) {
	for _, h := range handlers {
		name := h.Name()
		if name == pluginName {
			break
		}
		if _, ok := neutral[name]; !ok {
			f.changes = true
		}
		f.recorder = f.recorder || name == "prometheus"
	}
	return f
}

// recorder returns the prometheus plugin's recorder behind the writers that the chain has put
// around it, or nil.
func recorder(w dns.ResponseWriter) *metrics.Recorder {
	for range 32 { // no chain is that long
		switch t := w.(type) {
		case *metrics.Recorder:
			return t
		case *request.ScrubWriter, nil:
			return nil
		}
		// The writer that plugin.NextOrFailure puts around each plugin's is not exported; the
		// writer inside, an embedded field, is.
		v := reflect.ValueOf(w)
		if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
			return nil
		}
		inner := v.Elem().FieldByName("ResponseWriter")
		if !inner.IsValid() || !inner.CanInterface() {
			return nil
		}
		var ok bool
		if w, ok = inner.Interface().(dns.ResponseWriter); !ok {
			return nil
		}
	}
	return nil
}
