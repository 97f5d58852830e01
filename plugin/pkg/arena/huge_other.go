//go:build !linux

package arena

// HugeBytes returns 0: only Linux says how much memory is on huge pages.
func HugeBytes(...*Memory) int64 { return 0 }
