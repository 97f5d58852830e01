package test

import "syscall"

func init() { diesWithUs = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
