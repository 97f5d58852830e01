package arena

import (
	"encoding/binary"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file asks Linux which pages are in memory.

// ResidentIsKnown reports whether the kernel says which pages it has given. It tries that out with one page, because some
// sandboxes say of all pages that they are in memory.
var ResidentIsKnown = sync.OnceValue(func() bool {
	page := os.Getpagesize()
	b, err := unix.Mmap(-1, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return false
	}
	defer unix.Munmap(b)
	at := uintptr(unsafe.Pointer(&b[0]))
	before, ok := residentIn(at, uintptr(page))
	b[0] = 1
	after, _ := residentIn(at, uintptr(page))
	return ok && before == 0 && after == int64(page)
})

// pagemap returns the open file /proc/self/pagemap, or nil where the process may not read it. The file has 8 bytes for each
// page (Linux, Documentation/admin-guide/mm/pagemap.rst).
var pagemap = sync.OnceValue(func() *os.File {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil
	}
	return f
})

const (
	pagemapEntry     = 8
	pagemapExclusive = 1 << 56 // the page is in memory, and mapped only here
)

// residentPages is the number of pages that one system call asks about.
const residentPages = 4096

// residentIn returns how many of the n bytes at an address are on pages that are in memory. It asks mincore(2), which looks
// at page tables and takes about a millisecond for a gigabyte.
//
// mincore also counts pages that were read and never written to. Such a page costs nothing: it is the page of zeros, which
// all processes share. So where some pages are in memory, residentIn asks the page map which of them are the process's own.
// ok is false where the kernel refuses.
func residentIn(at, n uintptr) (bytes int64, ok bool) {
	page := uintptr(os.Getpagesize())
	var there [residentPages]byte
	var entries []byte
	end := at + n
	for from := at &^ (page - 1); from < end; from += residentPages * page {
		pages := min(residentPages, (end-from+page-1)/page)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, from, pages*page, uintptr(unsafe.Pointer(&there[0]))); errno != 0 {
			return 0, false
		}
		asked, own := false, false
		for i, state := range there[:pages] {
			if state&1 == 0 {
				continue
			}
			if !asked {
				asked = true
				if entries == nil {
					entries = make([]byte, residentPages*pagemapEntry)
				}
				if f := pagemap(); f != nil {
					_, err := f.ReadAt(entries[:pages*pagemapEntry], int64(from/page*pagemapEntry))
					own = err == nil
				}
			}
			if own && binary.NativeEndian.Uint64(entries[i*pagemapEntry:])&pagemapExclusive == 0 {
				continue
			}
			first := from + uintptr(i)*page
			bytes += int64(min(first+page, end) - max(first, at)) // of the first and the last page, other data may have a part
		}
	}
	return bytes, true
}
