package chain

import (
	"context"
	"net"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/dnstap"
	"github.com/coredns/coredns/plugin/loadbalance"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"
)

// This file reads fields that CoreDNS does not export. No other file does. Each field has a test, which fails with a version of
// CoreDNS that has changed it. If a field does not exist, ok is false, and the caller does without it.

// Configs returns the configs of a Corefile, one for each key of each server block.
func Configs(corefile caddy.Context) (all []*dnsserver.Config, ok bool) {
	return unexported[[]*dnsserver.Config](corefile, "configs")
}

// ContextOf returns the context of a Corefile's instance.
func ContextOf(i *caddy.Instance) (c caddy.Context, ok bool) {
	return unexported[caddy.Context](i, "context")
}

// Servers returns the servers of a Corefile's instance that speak DNS over one of CoreDNS's transports.
func Servers(i *caddy.Instance) (all []*dnsserver.Server) {
	listeners := i.Servers()
	for n := range listeners {
		of, ok := unexported[caddy.Server](&listeners[n], "server")
		if !ok {
			continue
		}
		if s, ok := of.(*dnsserver.Server); ok {
			all = append(all, s)
		} else if s, ok := unexported[*dnsserver.Server](of, "Server"); ok { // the others have that one in them
			all = append(all, s)
		}
	}
	return all
}

// Zones returns the configs of a server by zone. A zone with several configs has views. The map belongs to the server, and must
// not be changed.
func Zones(s *dnsserver.Server) (zones map[string][]*dnsserver.Config, ok bool) {
	return unexported[map[string][]*dnsserver.Config](s, "zones")
}

// Listeners returns the two servers of package dns by which a server listens: for TCP and for UDP.
func Listeners(s *dnsserver.Server) (both [2]*dns.Server, ok bool) {
	return unexported[[2]*dns.Server](s, "server")
}

// AcceptFunc returns a function that accepts the same messages as the server's own MsgAcceptFunc. It is nil, which means the
// default of package dns, unless a plugin such as dynupdate has allowed further opcodes. A message with such an opcode must
// have one question, and may have any records.
func AcceptFunc(s *dnsserver.Server) (accept dns.MsgAcceptFunc, ok bool) {
	opcodes, ok := unexported[map[int]struct{}](s, "allowedOpcodes")
	if !ok || len(opcodes) == 0 {
		return nil, ok
	}
	return func(h dns.Header) dns.MsgAcceptAction {
		action := dns.DefaultMsgAcceptFunc(h)
		if _, ok := opcodes[int(h.Bits>>11)&0xf]; !ok || action != dns.MsgRejectNotImplemented {
			return action
		}
		if h.Qdcount != 1 {
			return dns.MsgReject
		}
		return dns.MsgAccept
	}, true
}

// unexported returns the field of the struct that of points to. ok is false if there is no field of that name and type. The type
// may have another name, if it is made of the same.
func unexported[T any](of any, name string) (field T, ok bool) {
	f := reflect.Indirect(reflect.ValueOf(of)).FieldByName(name)
	if !f.IsValid() || !alike(f.Type(), reflect.TypeFor[T]()) || !f.CanAddr() {
		return field, false
	}
	return *(*T)(f.Addr().UnsafePointer()), true
}

// alike reports whether values of two types are the same in memory: structs have the same fields in the same order.
func alike(a, b reflect.Type) bool {
	if a == b {
		return true
	}
	if a.Kind() != b.Kind() {
		return false
	}
	switch a.Kind() {
	case reflect.Struct:
		if a.NumField() != b.NumField() {
			return false
		}
		for i := range a.NumField() {
			if x, y := a.Field(i), b.Field(i); x.Name != y.Name || !alike(x.Type, y.Type) {
				return false
			}
		}
		return true
	case reflect.Slice:
		return alike(a.Elem(), b.Elem())
	case reflect.Map:
		return alike(a.Key(), b.Key()) && alike(a.Elem(), b.Elem())
	case reflect.Bool, reflect.String, reflect.Int, reflect.Uint16:
		return true
	}
	return false
}

// typeName returns the name of the type that v points to.
func typeName(v any) string {
	t := reflect.TypeOf(v)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.Name()
}

// shufflesOnly reports whether a loadbalance does round_robin and nothing else. The plugin does not tell its policy, but the
// function in its field shuffle has a name.
func shufflesOnly(h loadbalance.LoadBalance) bool {
	f := reflect.ValueOf(h).FieldByName("shuffle")
	if !f.IsValid() || f.Kind() != reflect.Func || f.IsNil() {
		return false
	}
	return strings.HasSuffix(runtime.FuncForPC(f.Pointer()).Name(), "/loadbalance.randomShuffle")
}

// localPrefix reports whether the plugin local answers names that begin with localhost. It is true if the field does not exist:
// such names then go the slow path, which is always right.
func localPrefix(h plugin.Handler) bool {
	v := reflect.Indirect(reflect.ValueOf(h))
	if v.Kind() != reflect.Struct {
		return true
	}
	f := v.FieldByName("disableLocalhostPrefix")
	return !f.IsValid() || f.Kind() != reflect.Bool || !f.Bool()
}

// field is a field of the struct S. ok is false if there is no field of that name and type.
type field[S, T any] struct {
	offset uintptr
	ok     bool
}

func fieldOf[S, T any](name string) (f field[S, T]) {
	known, ok := reflect.TypeFor[S]().FieldByName(name)
	if ok && len(known.Index) == 1 && known.Type == reflect.TypeFor[T]() {
		f.offset, f.ok = known.Offset, true
	}
	return f
}

// of returns the field of s. It must exist.
func (f field[S, T]) of(s *S) T { return *(*T)(unsafe.Add(unsafe.Pointer(s), f.offset)) }

// What the writer of the plugin dnstap knows of a request.
var (
	tapQueryTime = fieldOf[dnstap.ResponseWriter, time.Time]("queryTime")
	tapQuery     = fieldOf[dnstap.ResponseWriter, *dns.Msg]("query")
	tapContext   = fieldOf[dnstap.ResponseWriter, context.Context]("ctx")
	canTap       = tapQueryTime.ok && tapQuery.ok && tapContext.ok
)

// tracker is the type of the writer that plugin.NextOrFailure puts around that of each plugin, and where in it this writer is.
// The type is nil if it is not a struct that embeds the writer.
var tracker = func() (known struct {
	writer reflect.Type
	offset uintptr
}) {
	next := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, _ *dns.Msg) (int, error) {
		t := reflect.TypeOf(w)
		if t == nil || t.Kind() != reflect.Pointer || t.Elem().Kind() != reflect.Struct {
			return 0, nil
		}
		f, ok := t.Elem().FieldByName("ResponseWriter")
		if ok && len(f.Index) == 1 && f.Type == reflect.TypeFor[dns.ResponseWriter]() {
			known.writer, known.offset = t, f.Offset
		}
		return 0, nil
	})
	plugin.NextOrFailure("", next, context.Background(), nil, nil)
	return known
}()

// inTracker returns the writer in a tracker. ok is false if w is none.
func inTracker(w dns.ResponseWriter) (inner dns.ResponseWriter, ok bool) {
	if t := reflect.TypeOf(w); t == nil || t != tracker.writer {
		return nil, false
	}
	return *(*dns.ResponseWriter)(unsafe.Add(reflect.ValueOf(w).UnsafePointer(), tracker.offset)), true
}

// Conn returns the connection by which CoreDNS's server has received a request. w is the request's writer, as the first plugin
// of the chain gets it. ok is false if there is none, as over UDP.
func Conn(w dns.ResponseWriter) (conn net.Conn, ok bool) {
	scrub, ok := w.(*request.ScrubWriter)
	if !ok {
		return nil, false
	}
	if v := reflect.ValueOf(scrub.ResponseWriter); v.Kind() != reflect.Pointer || v.Type().Elem().PkgPath() != reflect.TypeFor[dns.Msg]().PkgPath() {
		return nil, false
	}
	conn, ok = unexported[net.Conn](scrub.ResponseWriter, "tcp")
	return conn, ok && conn != nil
}

// SameCode reports whether two functions run the same code. Method values of different receivers do.
func SameCode[F any](f, g F) bool {
	return reflect.ValueOf(f).Pointer() == reflect.ValueOf(g).Pointer()
}

// ZonesOf returns the zones, in presentation format, that the plugins from first on answer for or ask others for, as far as
// their fields say. A zone may come twice, or be the root.
func ZonesOf(first plugin.Handler) (zones []string) {
	for h, left := first, 64; h != nil && left > 0; left-- { // more than a chain has
		v := reflect.Indirect(reflect.ValueOf(h))
		if v.Kind() != reflect.Struct {
			return zones
		}
		zones = append(zones, zoneFields(v, 3)...)
		next := v.FieldByName("Next")
		if !next.IsValid() || !next.CanInterface() {
			return zones
		}
		h, _ = next.Interface().(plugin.Handler)
	}
	return zones
}

// zoneFields returns what is in fields of v that plugins name so. Names under a lock may change: they are not read.
func zoneFields(v reflect.Value, depth int) (zones []string) {
	locked := false
	for i := range v.NumField() {
		t := v.Type().Field(i).Type
		locked = locked || t.PkgPath() == "sync"
	}
	for i := range v.NumField() {
		name, f := v.Type().Field(i).Name, v.Field(i)
		named := slices.Contains([]string{"zones", "zonenames", "origins", "from"}, strings.ToLower(name)) || name == "Names" && !locked
		switch {
		case named && f.Kind() == reflect.String:
			zones = append(zones, f.String())
		case named && f.Kind() == reflect.Slice && f.Type().Elem().Kind() == reflect.String:
			for k := range f.Len() {
				zones = append(zones, f.Index(k).String())
			}
		case v.Type().Field(i).Anonymous || named:
			if f = reflect.Indirect(f); f.Kind() == reflect.Struct && depth > 0 {
				zones = append(zones, zoneFields(f, depth-1)...)
			}
		}
	}
	return zones
}
