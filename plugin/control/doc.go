// Package control is the control interface of optcache: HTTP and JSON, by which those who run a server look into its
// cache and flush it. openapi.json describes it.
//
// The plugin hands in its blocks (see Block), and says where to listen (see Listen). A listener outlives reloads: the
// next generation of the Corefile takes it over before the previous one lets go of it.
//
// Nothing here may cost the server's clients anything. So everything is bounded: connections, requests at once, sizes
// of requests and answers, and times.
package control
