// Command sbom writes what programs are made of, from what the go command wrote into them: a bill of materials in the form
// SPDX 2.3, and the licences of all modules that are linked.
//
//	sbom -name NAME -version VERSION -time UNIX -spdx FILE -licences FILE PROGRAM...
//
// It needs the modules in Go's module cache, where the build has put them. It fails where a module has no licence in its folder,
// or one that it does not know, so that no release has one that nobody has looked at.
package main

import (
	"bytes"
	"cmp"
	"debug/buildinfo"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	classifier "github.com/google/licenseclassifier/v2"
	"github.com/google/licenseclassifier/v2/assets"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
	"golang.org/x/mod/module"
)

// linked is a module in a program, or Go's standard library.
type linked struct {
	path, version string
	sum           string // as in go.sum, with "h1:"; empty for the standard library
	dir           string
	licences      []string // SPDX identifiers
	texts         []text
}

// text is a file with a licence or a notice.
type text struct {
	name    string
	content []byte
}

func main() {
	name := flag.String("name", "", "`NAME` of what is released")
	version := flag.String("version", "", "its `VERSION`")
	at := flag.Int64("time", 0, "`SECONDS` since 1970 that the document gives as its time")
	spdx := flag.String("spdx", "", "`FILE` for the bill of materials, in JSON")
	licences := flag.String("licences", "", "`FILE` for the texts of the licences")
	flag.Parse()
	if err := run(*name, *version, time.Unix(*at, 0).UTC(), *spdx, *licences, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func run(name, version string, at time.Time, spdx, licences string, programs []string) error {
	if name == "" || version == "" || spdx == "" || licences == "" || len(programs) == 0 {
		return fmt.Errorf("-name, -version, -spdx, -licences and a program are needed")
	}
	modules, err := read(programs)
	if err != nil {
		return err
	}
	c, err := assets.DefaultClassifier()
	if err != nil {
		return err
	}
	for _, m := range modules {
		if err := m.classify(c); err != nil {
			return err
		}
	}
	var doc bytes.Buffer
	if err := spdxjson.Write(document(name, version, at, modules), &doc, spdxjson.Indent("  ")); err != nil {
		return err
	}
	if err := os.WriteFile(spdx, doc.Bytes(), 0o644); err != nil {
		return err
	}
	return os.WriteFile(licences, []byte(report(name, modules)), 0o644)
}

// read returns the modules of all programs, each once, in the order of their paths.
func read(programs []string) ([]*linked, error) {
	cache, err := goEnv("GOMODCACHE")
	if err != nil {
		return nil, err
	}
	goroot, err := goEnv("GOROOT")
	if err != nil {
		return nil, err
	}
	all := map[string]*linked{}
	for _, program := range programs {
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", program, err)
		}
		all[""] = &linked{path: "std", version: strings.TrimPrefix(info.GoVersion, "go"), dir: goroot}
		for _, dep := range info.Deps {
			if dep.Replace != nil {
				dep = dep.Replace
			}
			m, err := fromModule(cache, dep)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", program, err)
			}
			if old := all[m.path]; old != nil && old.version != m.version {
				return nil, fmt.Errorf("%s has %s %s, another program has %s", program, m.path, m.version, old.version)
			}
			all[m.path] = m
		}
	}
	var modules []*linked
	for _, m := range all {
		modules = append(modules, m)
	}
	slices.SortFunc(modules, func(a, b *linked) int { return cmp.Compare(a.path, b.path) })
	return modules, nil
}

func goEnv(name string) (string, error) {
	out, err := exec.Command("go", "env", name).Output()
	return strings.TrimSpace(string(out)), err
}

func fromModule(cache string, dep *debug.Module) (*linked, error) {
	path, err := module.EscapePath(dep.Path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dep.Path, err)
	}
	version, err := module.EscapeVersion(dep.Version)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", dep.Path, dep.Version, err)
	}
	return &linked{path: dep.Path, version: dep.Version, sum: dep.Sum, dir: filepath.Join(cache, path+"@"+version)}, nil
}

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|unlicense)([-._].*)?$`)

// classify reads the licences in the module's folder.
func (m *linked) classify(c *classifier.Classifier) error {
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		return fmt.Errorf("%s %s is not in the module cache: %w", m.path, m.version, err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !licenceFile.MatchString(e.Name()) || filepath.Ext(e.Name()) == ".go" {
			continue
		}
		content, err := os.ReadFile(filepath.Join(m.dir, e.Name()))
		if err != nil {
			return err
		}
		m.texts = append(m.texts, text{e.Name(), content})
		for _, match := range c.Match(content).Matches {
			if match.MatchType == "License" && !slices.Contains(m.licences, match.Name) {
				m.licences = append(m.licences, match.Name)
			}
		}
	}
	if len(m.licences) == 0 {
		return fmt.Errorf("%s %s: no licence that is known in %s", m.path, m.version, m.dir)
	}
	slices.Sort(m.licences)
	return nil
}

// document is in one order for one input, and has no time but at, so that two builds give the same bytes.
func document(name, version string, at time.Time, modules []*linked) *v2_3.Document {
	const root = "Package-root"
	doc := &v2_3.Document{
		SPDXVersion:       v2_3.Version,
		DataLicense:       v2_3.DataLicense,
		SPDXIdentifier:    "DOCUMENT",
		DocumentName:      name + "-" + version,
		DocumentNamespace: "https://github.com/optcache/optcache/releases/" + version + "/" + name,
		CreationInfo: &v2_3.CreationInfo{
			Created:  at.Format(time.RFC3339),
			Creators: []common.Creator{{CreatorType: "Tool", Creator: "optcache-sbom"}},
		},
		Packages: []*v2_3.Package{{
			PackageName: name, PackageSPDXIdentifier: root, PackageVersion: version,
			PackageDownloadLocation: "https://github.com/optcache/optcache", PrimaryPackagePurpose: "APPLICATION",
			PackageLicenseConcluded: "Apache-2.0", PackageLicenseDeclared: "Apache-2.0", PackageCopyrightText: "NOASSERTION",
		}},
		Relationships: []*v2_3.Relationship{relation("DOCUMENT", "DESCRIBES", root)},
	}
	for i, m := range modules {
		id := fmt.Sprintf("Package-%d", i+1)
		p := &v2_3.Package{
			PackageName: m.path, PackageSPDXIdentifier: common.ElementID(id), PackageVersion: m.version,
			PackageDownloadLocation: "NOASSERTION", PrimaryPackagePurpose: "LIBRARY",
			PackageLicenseConcluded: strings.Join(m.licences, " AND "), PackageLicenseDeclared: "NOASSERTION", PackageCopyrightText: "NOASSERTION",
			PackageExternalReferences: []*v2_3.PackageExternalReference{{
				Category: "PACKAGE-MANAGER", RefType: "purl", Locator: "pkg:golang/" + m.path + "@" + m.version,
			}},
		}
		if m.path == "std" {
			p.PackageDownloadLocation = "https://go.dev/dl/go" + m.version + ".src.tar.gz"
		}
		if m.sum != "" {
			// The sum of go.sum is one over the files, not of the archive, so it is no checksum of the package.
			p.PackageComment = "go.sum: " + m.sum
		}
		doc.Packages = append(doc.Packages, p)
		doc.Relationships = append(doc.Relationships, relation(root, "CONTAINS", id))
	}
	return doc
}

func relation(from, kind, to string) *v2_3.Relationship {
	return &v2_3.Relationship{
		RefA: common.MakeDocElementID("", from), Relationship: kind, RefB: common.MakeDocElementID("", to),
	}
}

// report has a line for each module, and then the texts.
func report(name string, modules []*linked) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s contains:\n\n", name)
	for _, m := range modules {
		fmt.Fprintf(&b, "%s %s: %s\n", m.path, m.version, strings.Join(m.licences, ", "))
	}
	for _, m := range modules {
		for _, t := range m.texts {
			fmt.Fprintf(&b, "\n%s\n%s %s, %s\n\n%s\n", strings.Repeat("=", 79), m.path, m.version, t.name, bytes.TrimSpace(t.content))
		}
	}
	return b.String()
}
