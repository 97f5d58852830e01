package control

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/optcache/optcache/plugin/pkg/regular"
)

// racy is how much older than its reading a file must be, for an equal time stamp to mean that it has not changed. File
// systems count time in ticks: a file that is written twice within one tick has one time stamp.
const racy = 2 * time.Second

// watched is what is in files that are read again when they change. It is safe for concurrent use.
type watched[T any] struct {
	paths []string
	load  func(paths []string) (T, error)

	mu    sync.Mutex // guards what follows
	seen  []fs.FileInfo
	at    time.Time // of the last reading
	value T         // of the last reading without an error
	err   error     // of the last reading
}

// get returns the value of the files as they are now. If they cannot be read, it returns the value of before, too.
func (w *watched[T]) get() (T, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := make([]fs.FileInfo, len(w.paths))
	for i, path := range w.paths {
		now[i], _ = os.Stat(path) // a file that is not there is nil
	}
	if !w.current(now) {
		// The files are looked at before they are read. A change in between is seen the next time.
		w.seen, w.at = now, time.Now()
		value, err := w.load(w.paths)
		if w.err = err; err == nil {
			w.value = value
		}
	}
	return w.value, w.err
}

// current reports whether the files are those of the last reading.
func (w *watched[T]) current(now []fs.FileInfo) bool {
	if len(w.seen) != len(now) {
		return false
	}
	for i, f := range now {
		was := w.seen[i]
		if f == nil || was == nil || !os.SameFile(f, was) || f.Size() != was.Size() || f.Mode() != was.Mode() ||
			!f.ModTime().Equal(was.ModTime()) || w.at.Sub(f.ModTime()) < racy {
			return false
		}
	}
	return true
}

// maxTokenFile and maxPEMFile are how many bytes the file of a token, or of certificates or a key, may have.
const (
	maxTokenFile = 4096
	maxPEMFile   = 1 << 20
)

// loadToken returns the sum of the token in a file. Errors do not show what is in it.
func loadToken(paths []string) (sum [sha256.Size]byte, err error) {
	path := paths[0]
	f, info, err := regular.Open(path)
	if err != nil {
		return sum, fmt.Errorf("token: %w", err)
	}
	defer f.Close()
	if err := checkTokenMode(path, info.Mode().Perm()); err != nil {
		return sum, err
	}
	token, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return sum, fmt.Errorf("token: %w", err)
	}
	if len(token) > maxTokenFile {
		return sum, fmt.Errorf("token: %s has more than %d bytes", path, maxTokenFile)
	}
	token = bytes.TrimSuffix(bytes.TrimSuffix(token, []byte("\n")), []byte("\r"))
	if len(token) == 0 {
		return sum, fmt.Errorf("token: %s is empty", path)
	}
	for _, c := range token {
		switch {
		case c == '\n' || c == '\r':
			return sum, fmt.Errorf("token: %s has more than one line", path)
		case c <= ' ' || c > '~':
			return sum, fmt.Errorf("token: %s has a character that a header cannot have: a token is of printable ASCII, without spaces", path)
		}
	}
	return sha256.Sum256(token), nil
}

// checkTokenMode returns an error if others may read a token. Those of a mounted Secret may be read by all: what sees
// the volume is the container, and the kubelet makes them so.
func checkTokenMode(path string, mode fs.FileMode) error {
	if runtime.GOOS == "windows" {
		return nil // the mode says nothing there
	}
	forbidden := fs.FileMode(0o077)
	if isMountedSecret(path) {
		forbidden = 0o022
	}
	if mode&forbidden != 0 {
		return fmt.Errorf("token: %s has mode %#o, and others must not read it: make it 0600", path, mode)
	}
	return nil
}

// isMountedSecret reports whether a file is of a volume that the kubelet has made. There, each file is a link through a
// link named ..data, by which all of them change at once.
func isMountedSecret(path string) bool {
	to, err := os.Readlink(path)
	return err == nil && strings.HasPrefix(filepath.ToSlash(to), "..data/")
}

// loadCertificate returns the certificate of a pair of files.
func loadCertificate(paths []string) (*tls.Certificate, error) {
	var pem [2][]byte
	for i, path := range paths {
		var err error
		if pem[i], err = regular.Read(path, maxPEMFile); err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
	}
	c, err := tls.X509KeyPair(pem[0], pem[1])
	if err != nil {
		return nil, fmt.Errorf("tls: %s and %s: %w", paths[0], paths[1], err)
	}
	return &c, nil
}
