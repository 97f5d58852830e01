package regular

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	for most, want := range map[int64]string{5: "", 6: "", 4: path + " has more than 4 bytes"} {
		b, err := Read(path, most)
		if (err == nil) != (want == "") || err == nil && string(b) != "12345" || err != nil && err.Error() != want {
			t.Errorf("%d bytes: %q, %v", most, b, err)
		}
	}
	for path, want := range map[string]string{dir: "is no regular file", filepath.Join(dir, "none"): "no such file"} {
		_, err := Read(path, 5)
		if err == nil || !strings.Contains(err.Error(), want) && want != "no such file" || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
		if got := Check("", path); got == nil || got.Error() == "" {
			t.Errorf("%s: Check says %v", path, got)
		}
	}
	if err := Check("", path); err != nil {
		t.Error(err)
	}
}
