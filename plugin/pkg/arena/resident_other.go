//go:build !linux

package arena

// ResidentIsKnown reports whether the kernel says which pages it has given.
func ResidentIsKnown() bool { return false }

func residentIn(uintptr, uintptr) (int64, bool) { return 0, false }
