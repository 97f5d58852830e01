package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/licenseclassifier/v2/assets"
	spdxjson "github.com/spdx/tools-golang/json"
)

// This program describes itself: the same bytes each time, that SPDX's own library reads.
func TestOfThisProgram(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var written [2][]byte
	for i := range written {
		spdx, licences := filepath.Join(t.TempDir(), "spdx"), filepath.Join(t.TempDir(), "licences")
		if err := run("name", "1.2.3", time.Unix(1700000000, 0).UTC(), spdx, licences, []string{program, program}); err != nil {
			t.Fatal(err)
		}
		a, err := os.ReadFile(spdx)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(licences)
		if err != nil {
			t.Fatal(err)
		}
		written[i] = append(a, b...)
		doc, err := spdxjson.Read(bytes.NewReader(a))
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		for _, p := range doc.Packages {
			found[p.PackageName] = p.PackageLicenseConcluded
		}
		if found["github.com/google/licenseclassifier/v2"] != "Apache-2.0" || found["std"] != "BSD-3-Clause" || len(doc.Relationships) != len(doc.Packages) {
			t.Errorf("packages %v, %d relationships", found, len(doc.Relationships))
		}
		if !strings.Contains(string(b), "\ngithub.com/google/licenseclassifier/v2 v2.0.0: Apache-2.0\n") || !strings.Contains(string(b), "Copyright 2009 The Go Authors") {
			t.Errorf("licences:\n%.2000s", b)
		}
	}
	if !bytes.Equal(written[0], written[1]) {
		t.Error("two runs wrote different files")
	}
}

// A module without a licence, or with one that nobody knows, is an error that names it.
func TestUnknownLicence(t *testing.T) {
	c, err := assets.DefaultClassifier()
	if err != nil {
		t.Fatal(err)
	}
	for _, files := range []map[string]string{
		{"main.go": "package main"},
		{"LICENSE": "You may not do anything with this."},
		{"licence.go": "package licence"},
	} {
		m := &linked{path: "example.org/m", version: "v1.0.0", dir: t.TempDir()}
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(m.dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.classify(c); err == nil || !strings.Contains(err.Error(), "example.org/m v1.0.0: no licence") {
			t.Errorf("%v: %v", files, err)
		}
	}
	if err := run("n", "1", time.Time{}, "a", "b", []string{"/dev/null"}); err == nil || !strings.Contains(err.Error(), "/dev/null") {
		t.Errorf("no program: %v", err)
	}
}
