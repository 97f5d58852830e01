//go:build !unix

package redis

// Pause skips the test: processes cannot be stopped here.
func (s *Server) Pause() { s.t.Skip("a process cannot be stopped here") }

// Resume ends Pause.
func (*Server) Resume() {}
