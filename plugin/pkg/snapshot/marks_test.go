package snapshot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func names(t *testing.T, path string) string {
	t.Helper()
	all, err := Marks(path)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range all {
		names = append(names, m.Name)
	}
	return strings.Join(names, " ")
}

func TestMarksAreThereUntilASnapshotIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	if got := names(t, path); got != "" {
		t.Fatalf("marks %q", got)
	}
	add := func(name string) func() {
		done, err := AddMark(path, Mark{Name: name, Kinds: 7, At: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	add("a.")()
	pending := add("b.")
	written := Settled(path) // the snapshot is begun while b. is being flushed
	pending()
	add("c.")()
	if got := names(t, path); got != "a. b. c." {
		t.Fatalf("marks %q", got)
	}
	if err := written(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, path); got != "b. c." {
		t.Errorf("marks %q, want b. and c.", got)
	}
	if err := Settled(path)(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, path); got != "" {
		t.Errorf("marks %q", got)
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}

func TestMarksAreBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	begun := time.Now()
	full := strings.Repeat(`{"name":"a.","kinds":1,"at":"2026-01-01T00:00:00Z"}`+"\n", mostMarks)
	if err := os.WriteFile(path+marksSuffix, []byte(full), 0o600); err != nil {
		t.Fatal(err)
	}
	done, err := AddMark(path, Mark{Name: "b.", Kinds: 1, At: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	done()
	all, err := Marks(path)
	if err != nil || len(all) != 2 || all[0].Name != "" || all[0].Kinds != allKinds || all[0].At.Before(begun) {
		t.Errorf("%d marks, the first one %+v, %v", len(all), all[0], err)
	}
}

// Where nothing is known of what has been flushed, all has.
func TestMarksThatCannotBeRead(t *testing.T) {
	for name, spoil := range map[string]func(string) error{
		"garbage":        func(path string) error { return os.WriteFile(path, []byte("garbage\n"), 0o600) },
		"unknown member": func(path string) error { return os.WriteFile(path, []byte(`{"kinds":7,"since":1}`), 0o600) },
		"too long":       func(path string) error { return os.WriteFile(path, make([]byte, mostMarksBytes+1), 0o600) },
		"folder":         func(path string) error { return os.Mkdir(path, 0o700) },
		"symbolic link":  func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "cache")
			if err := spoil(path + marksSuffix); err != nil {
				t.Fatal(err)
			}
			all, err := Marks(path)
			if err == nil || !strings.Contains(err.Error(), path+marksSuffix) || len(all) != 1 || all[0].Name != "" || all[0].At.IsZero() {
				t.Errorf("%+v, %v", all, err)
			}
		})
	}
}

// A mark that stands for all is there as long as any flush is under way, and two flushes of one moment have a mark each.
func TestMarksOfFlushesUnderWay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	at := time.Now()
	add := func(name string) func() {
		done, err := AddMark(path, Mark{Name: name, Kinds: 7, At: at})
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	first, second := add("a."), add("b.")
	first()
	if err := Settled(path)(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, path); got != "b." {
		t.Errorf("marks %q, want b.", got)
	}
	full := strings.Repeat(`{"name":"c.","kinds":1,"at":"2026-01-01T00:00:00Z"}`+"\n", mostMarks)
	if err := os.WriteFile(path+marksSuffix, []byte(full), 0o600); err != nil {
		t.Fatal(err)
	}
	add("d.")() // takes the place of all
	if err := Settled(path)(); err != nil {
		t.Fatal(err)
	}
	if all, err := Marks(path); err != nil || len(all) != 1 || all[0].Kinds != allKinds {
		t.Errorf("%+v, %v", all, err)
	}
	second()
	if err := Settled(path)(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, path); got != "" {
		t.Errorf("marks %q", got)
	}
}
