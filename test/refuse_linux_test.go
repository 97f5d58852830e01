package test

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file starts a server in a system that refuses a system call, as a container's seccomp profile, an old kernel, or a sandbox
// does. The test's own binary installs the filter, and then becomes the server.

// refuseVar has what is refused, as CALL[:OPTION]:ERRNO, and the server's binary behind a blank. With OPTION, CALL is
// setsockopt(2) at the level SOL_SOCKET. An ERRNO of 0 has the call succeed without doing anything.
const refuseVar = "OPTCACHE_TEST_REFUSE"

func init() {
	if of := os.Getenv(refuseVar); of != "" {
		fmt.Fprintln(os.Stderr, becomeRefused(of))
		os.Exit(1)
	}
}

// becomeRefused does not return, unless with an error.
func becomeRefused(of string) error {
	what, path, _ := strings.Cut(of, " ")
	var numbers []uint32
	for word := range strings.SplitSeq(what, ":") {
		n, err := strconv.ParseUint(word, 10, 32)
		if err != nil {
			return err
		}
		numbers = append(numbers, uint32(n))
	}
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	is := func(value uint32, otherwise int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: uint8(otherwise)}
	}
	ret := func(value uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value} }
	refusal := ret(0x00050000 | numbers[len(numbers)-1]) // SECCOMP_RET_ERRNO
	allow := ret(0x7fff0000)                             // SECCOMP_RET_ALLOW
	// In struct seccomp_data, the number of the call is at 0, and the arguments, of 8 bytes, are at 16. The lower half of an
	// argument comes first on a little-endian machine.
	half, one := uint32(0), uint16(1)
	if *(*byte)(unsafe.Pointer(&one)) == 0 {
		half = 4
	}
	program := []unix.SockFilter{load(0), is(numbers[0], 1), refusal, allow}
	if len(numbers) == 3 {
		program = []unix.SockFilter{load(0), is(numbers[0], 5), load(16 + 8 + half), is(unix.SOL_SOCKET, 3),
			load(16 + 16 + half), is(numbers[1], 1), refusal, allow}
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	runtime.LockOSThread() // the filter is the thread's, and execve keeps it
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&filter)), 0, 0); err != nil {
		return err
	}
	os.Unsetenv(refuseVar)
	return syscall.Exec(path, append([]string{path}, os.Args[1:]...), os.Environ())
}
