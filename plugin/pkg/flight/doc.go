// Package flight lets one call serve many requests. The first request for a key starts a flight, becomes its leader, and
// makes the call. Requests for the same key that come before the flight completes are its waiters. They share its value. Each
// waiter waits for a limited time. The number of waiters is limited, for one flight and in all.
//
// A call may hang. Then one of the waiters becomes the second leader, and makes the call again. Later, another flight for the
// key replaces the first one. The number of leaders that hang is bounded, for one key and in all.
//
// The package does not know what a key, a value or a call is.
package flight
