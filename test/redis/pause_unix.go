//go:build unix

package redis

import "syscall"

// Pause stops the server's process, which goes on after Resume.
func (s *Server) Pause() { s.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (s *Server) Resume() { s.cmd.Process.Signal(syscall.SIGCONT) }
