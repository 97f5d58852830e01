// Package test holds the end-to-end tests: the real binary of cmd/coredns with real sockets,
// real clients and a real upstream, all on loopback. What a single function does is tested beside
// it; here is what only shows when everything stands together.
package test
