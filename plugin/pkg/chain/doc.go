// Package chain knows what stands around a cache in CoreDNS.
//
//   - Outer plugins stand in front of the cache in the chain. A hit may bypass some of them. The fast path emulates the
//     effects of others (outer.go), such as the metrics of the plugin prometheus (report.go).
//   - CoreDNS makes servers of server blocks (server.go).
//   - Some of this CoreDNS does not export (unexported.go).
//
// The package knows nothing of how a cache works.
package chain
