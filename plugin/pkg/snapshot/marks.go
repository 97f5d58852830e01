package snapshot

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// This file keeps marks beside a snapshot. A mark says what has been flushed from the cache since the snapshot was begun. The
// snapshotter leaves those answers out when it reads the snapshot. To write the snapshot anew may take seconds; a mark is on
// the disk at once.

// Mark says that answers have been flushed that had come by a time.
type Mark struct {
	Name    string    `json:"name,omitempty"` // in presentation form; empty: any
	Subtree bool      `json:"subtree,omitempty"`
	Type    uint16    `json:"type,omitempty"` // 0: any
	Kinds   uint8     `json:"kinds"`
	Expired bool      `json:"expired,omitempty"`
	At      time.Time `json:"at"`
}

const (
	// marksSuffix follows the snapshot's path in the name of the file with its marks.
	marksSuffix = ".flushed"

	// mostMarks is how many marks a file holds, and mostMarksBytes how long it may be. With more, one mark takes the place of
	// all, and says that everything has been flushed.
	mostMarks      = 1024
	allKinds       = ^uint8(0) // of the mark that takes the place of all
	mostMarksBytes = 1 << 20
)

// marks is the state of the marks of all files in the process.
var marks struct {
	mu      sync.Mutex // guards the files with marks, and pending
	pending map[string]map[time.Time]bool
}

// AddMark notes on the disk that something is being flushed. done is called when the flush is over: until then, no snapshot
// that is written makes the mark unnecessary. After an error, nothing has been noted.
func AddMark(path string, m Mark) (done func(), err error) {
	marks.mu.Lock()
	defer marks.mu.Unlock()
	m.At = m.At.UTC().Round(0)
	for marks.pending[path][m.At] { // marks are told apart by their times
		m.At = m.At.Add(1)
	}
	all, err := readMarks(path)
	if err != nil || len(all) >= mostMarks {
		all = []Mark{{Kinds: allKinds, At: m.At.Add(-1)}} // with a time of its own
	}
	if err := writeMarks(path, append(all, m)); err != nil {
		return nil, err
	}
	if marks.pending == nil {
		marks.pending = make(map[string]map[time.Time]bool)
	}
	if marks.pending[path] == nil {
		marks.pending[path] = make(map[time.Time]bool)
	}
	marks.pending[path][m.At] = true
	return func() {
		marks.mu.Lock()
		defer marks.mu.Unlock()
		delete(marks.pending[path], m.At)
	}, nil
}

// Marks returns the marks of a snapshot. Where their file cannot be read, the error says why, and the marks say that all has
// been flushed that had come before the file was written.
func Marks(path string) ([]Mark, error) {
	marks.mu.Lock()
	defer marks.mu.Unlock()
	return readMarks(path)
}

// Settled returns a function that removes the marks that a snapshot of the same path makes unnecessary: those of flushes that
// are over now, before the snapshot is begun. It is to be called when the snapshot is on the disk.
func Settled(path string) (remove func() error) {
	marks.mu.Lock()
	defer marks.mu.Unlock()
	over := make(map[time.Time]bool)
	all, broken := readMarks(path)
	for _, m := range all {
		over[m.At] = !marks.pending[path][m.At] && (m.Kinds != allKinds || len(marks.pending[path]) == 0)
	}
	return func() error {
		marks.mu.Lock()
		defer marks.mu.Unlock()
		if len(over) == 0 {
			return nil
		}
		var left []Mark
		all, err := readMarks(path)
		for _, m := range all {
			if !over[m.At] && err == nil {
				left = append(left, m)
			}
		}
		if err != nil && broken == nil { // it was sound then, and says something else now
			return err
		}
		return writeMarks(path, left)
	}
}

// readMarks is Marks for the holder of the lock.
func readMarks(path string) (all []Mark, err error) {
	name := path + marksSuffix
	info, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	at := time.Now()
	defer func() {
		if err != nil {
			all, err = []Mark{{Kinds: allKinds, At: at}}, fmt.Errorf("%s: %w", name, err)
		}
	}()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	at = info.ModTime()
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, mostMarksBytes+1))
	if err != nil {
		return nil, err
	}
	if len(content) > mostMarksBytes {
		return nil, fmt.Errorf("it is longer than %d bytes", mostMarksBytes)
	}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for n := 1; lines.Scan(); n++ {
		var m Mark
		d := json.NewDecoder(bytes.NewReader(lines.Bytes()))
		d.DisallowUnknownFields()
		if err := d.Decode(&m); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		all = append(all, m)
	}
	return all, lines.Err()
}

// writeMarks puts marks in the place of those that there are. The caller holds the lock.
func writeMarks(path string, all []Mark) (err error) {
	name := path + marksSuffix
	if len(all) == 0 {
		if err := os.Remove(name); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(name)+Temporary)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	e := json.NewEncoder(f)
	for _, m := range all {
		err = errors.Join(err, e.Encode(m))
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), name); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}
