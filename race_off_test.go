//go:build !race

package optcache

const raceEnabled = false
