package test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// This file makes a release for one platform, twice, and installs its Debian package. It takes minutes: make test-release.

const (
	releaseVersion   = "0.0.1-test"
	documentsVersion = "1.2.3" // in docs/install.md

	// A registry of images, for one that docs/install.md copies an image to.
	registry = "github.com/google/go-containerregistry/cmd/registry@v0.20.6"
)

// Two builds of the same files give the same bytes, wherever they are. The Debian package of one installs, serves, upgrades, and
// goes.
func TestRelease(t *testing.T) {
	if os.Getenv("OPTCACHE_RELEASE") == "" {
		t.Skip("OPTCACHE_RELEASE is not set")
	}
	dir := shortDir(t)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "another folder", "folder")
	copyFiles(t, a)
	copyFiles(t, b)
	key := filepath.Join(dir, "key.pem")
	openssl(t, "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", key)
	openssl(t, "ec", "-in", key, "-pubout", "-out", key+".pub")
	t.Setenv("SIGNING_KEY", key)
	first := release(t, a)
	t.Run("same", func(t *testing.T) {
		// Another user has another way with files, and another Go.
		settings := filepath.Join(dir, "settings")
		if err := os.WriteFile(settings, []byte("GOFLAGS=-tags=mine\nGOAMD64=v3\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "chmod", "-R", "go-rwx", b).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(b), "go.work"), []byte("go 1.26.0\nuse ./folder\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		second := release(t, b, "GOENV="+settings, "LC_ALL=C.UTF-8", "TZ=Asia/Kathmandu")
		if a, b := readFile(t, filepath.Join(first, "SHA256SUMS")), readFile(t, filepath.Join(second, "SHA256SUMS")); a != b || strings.Count(a, "\n") < 6 {
			t.Errorf("two releases:\n%s\n%s", a, b)
		}
	})
	t.Run("sums", func(t *testing.T) {
		// As docs/install.md has it.
		const command = "sha256sum -c --ignore-missing SHA256SUMS"
		if !strings.Contains(readFile(t, filepath.Join(root, "docs", "install.md")), "\n    "+command+"\n") {
			t.Errorf("docs/install.md does not say %s", command)
		}
		check := exec.CommandContext(t.Context(), "sh", "-c", command+" --strict")
		check.Dir = first
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		// As cosign has it: the signature in base64.
		signature, err := base64.StdEncoding.DecodeString(readFile(t, filepath.Join(first, "SHA256SUMS.sig")))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "signature"), signature, 0o600); err != nil {
			t.Fatal(err)
		}
		openssl(t, "dgst", "-sha256", "-verify", key+".pub", "-signature", filepath.Join(dir, "signature"), filepath.Join(first, "SHA256SUMS"))
	})
	t.Run("contents", func(t *testing.T) {
		testContents(t, first)
	})
	t.Run("chart", func(t *testing.T) {
		testChart(t, first)
	})
	t.Run("package", func(t *testing.T) {
		testPackage(t, first)
	})
	t.Run("image", func(t *testing.T) {
		testImage(t, first)
	})
	t.Run("container", func(t *testing.T) {
		testContainer(t, first)
	})
	// What docs/install.md says about building.
	t.Run("source", func(t *testing.T) {
		for _, command := range commands(t, "From source") {
			if strings.HasPrefix(command, "make release ") {
				continue // both folders' releases are made by it
			}
			build := exec.CommandContext(t.Context(), "sh", "-ec", command)
			build.Dir = a
			out, err := build.CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v\n%s", command, err, out)
			}
			if command == "bin/coredns -plugins" && !strings.Contains(string(out), "optcache") {
				t.Errorf("no plugin optcache:\n%s", out)
			}
		}
	})
}

// What cannot become a release is refused before anything is built, by a line that says why.
func TestReleaseRefuses(t *testing.T) {
	t.Parallel()
	needs(t, "git", "openssl")
	key := filepath.Join(t.TempDir(), "key.pem")
	for _, test := range []struct{ version, key, want string }{
		{"1.2", "", "VERSION=1.2 is no version: 1.2.3, or 1.2.3-rc.1"},
		{"v1.2.3", "", "VERSION=v1.2.3 is no version"},
		{"1.2.3; true", "", "VERSION=1.2.3; true is no version"},
		{"9999.0.0", "", "CHANGELOG.md has no section [9999.0.0]"},
		{"9999.0.0-rc.1", key, "SIGNING_KEY=" + key + " is no private key"},
	} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(root, "deploy", "release.sh"), test.version)
		cmd.Env = append(os.Environ(), "PLATFORMS=linux/amd64", "COMMIT=0123456789abcdef", "SOURCE_DATE_EPOCH=1700000000", "SIGNING_KEY="+test.key)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "release: "+test.want) {
			t.Errorf("%s: %v\n%s", test.version, err, out)
		}
		if _, err := os.Stat(filepath.Join(root, "bin", "release", test.version)); err == nil {
			t.Errorf("%s: there is a folder", test.version)
		}
	}
}

func openssl(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput(); err != nil {
		t.Fatalf("openssl %s: %v\n%s", args[0], err, out)
	}
}

// copyFiles copies the files of the repository to a folder.
func copyFiles(t *testing.T, dir string) {
	t.Helper()
	list := exec.CommandContext(t.Context(), "git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	files, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var there []byte
	for name := range bytes.SplitSeq(bytes.TrimSuffix(files, []byte{0}), []byte{0}) {
		if _, err := os.Lstat(filepath.Join(root, string(name))); err == nil {
			there = append(append(there, name...), 0)
		}
	}
	tar := exec.CommandContext(t.Context(), "sh", "-c", `tar -C "$0" --null -T - -cf - | tar -C "$1" -xf -`, root, dir)
	tar.Stdin = bytes.NewReader(there)
	if out, err := tar.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// release makes a release in a copy of the repository, and returns its folder.
func release(t *testing.T, dir string, env ...string) string {
	t.Helper()
	started := time.Now()
	all := commands(t, "From source")
	last := strings.ReplaceAll(all[len(all)-1], documentsVersion, releaseVersion)
	build := exec.CommandContext(t.Context(), "sh", "-c", "umask 077; "+last+` "$@"`, "", "PLATFORMS=linux/amd64", "COMMIT=0123456789abcdef")
	build.Dir = dir
	build.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000"), env...)
	out, err := build.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", last, err, out)
	}
	t.Logf("make release for one platform took %v\n%s", time.Since(started).Round(time.Second), out[max(bytes.LastIndex(out, []byte("\ntotal ")), 0):])
	return filepath.Join(dir, "bin", "release", releaseVersion)
}

// testContents wants a static binary that says its version, CoreDNS's and the commit; and a bill of materials that names CoreDNS and
// Go, with their licences.
func testContents(t *testing.T, release string) {
	unpack(t, release)
	folder := filepath.Join(release, "coredns-optcache_"+releaseVersion+"_linux_amd64")
	out, err := exec.CommandContext(t.Context(), filepath.Join(folder, "coredns"), "-version").CombinedOutput()
	if err != nil || !regexp.MustCompile(`^CoreDNS-\d+\.\d+\.\d+\nlinux/amd64, go[^,]+, optcache 0\.0\.1-test, 0123456789abcdef\n$`).Match(out) {
		t.Errorf("%v: %q", err, out)
	}
	spdx := readFile(t, filepath.Join(release, "coredns-optcache_"+releaseVersion+".spdx.json"))
	for _, want := range []string{`"spdxVersion": "SPDX-2.3"`, `"pkg:golang/github.com/coredns/coredns@v`, `"pkg:golang/std@1.`, `"created": "2023-11-14T22:13:20Z"`} {
		if !strings.Contains(spdx, want) {
			t.Errorf("the bill of materials has no %s", want)
		}
	}
	licences := readFile(t, filepath.Join(folder, "licences.txt"))
	for _, want := range []string{"\ngithub.com/miekg/dns v", "\nstd 1.", "Copyright (c) 2009 The Go Authors"} {
		if !strings.Contains(licences, want) {
			t.Errorf("the licences have no %q", want)
		}
	}
}

// testChart wants the chart's archive to have no links, and the release's version.
func testChart(t *testing.T, release string) {
	dir := t.TempDir()
	out, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "-xzf", filepath.Join(release, "coredns-optcache-"+releaseVersion+".tgz")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	chart := filepath.Join(dir, "coredns-optcache")
	for _, file := range []string{"clusterDNS/deployment.yaml", "nodeLocalDNS/daemonset.yaml", "rules.yml"} {
		if info, err := os.Lstat(filepath.Join(chart, "files", file)); err != nil || !info.Mode().IsRegular() {
			t.Errorf("%s: %v", file, err)
		}
	}
	if text := readFile(t, filepath.Join(chart, "Chart.yaml")); !strings.Contains(text, "\nversion: "+releaseVersion+"\nappVersion: \""+releaseVersion+"\"\n") {
		t.Errorf("%s", text)
	}
}

// unpack unpacks a release's archive beside it.
func unpack(t *testing.T, release string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "tar", "-C", release, "-xzf", filepath.Join(release, "coredns-optcache_"+releaseVersion+"_linux_amd64.tar.gz")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// testPackage has deploy/debian/test.sh install the package, and one of a later version that has another Corefile.
func testPackage(t *testing.T, release string) {
	needs(t, "dpkg", "dig", "ip", "unshare", "setpriv")
	if os.Getuid() != 0 {
		t.Skip("only root can install packages")
	}
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = root
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		t.Logf("%s\n%s", name, out)
	}
	unpack(t, release)
	stage := filepath.Join(release, "coredns-optcache_"+releaseVersion+"_linux_amd64")
	corefile, err := os.OpenFile(filepath.Join(stage, "systemd", "Corefile"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := corefile.WriteString("# of b\n"); err != nil {
		t.Fatal(err)
	}
	corefile.Close()
	run("cp", filepath.Join(release, "coredns-optcache_0.0.1~test_amd64.deb"), filepath.Join(dir, "a.deb"))
	run("cp", filepath.Join(dir, "a.deb"), filepath.Join(dir, "coredns-optcache_"+documentsVersion+"_amd64.deb"))
	run("cp", filepath.Join(stage, "coredns"), dir)
	if err := os.WriteFile(filepath.Join(dir, "commands"), []byte(strings.Join(commands(t, "A Debian host"), "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run("deploy/debian/package.sh", "0.0.2-test", "amd64", stage, dir)
	run("mv", filepath.Join(dir, "coredns-optcache_0.0.2~test_amd64.deb"), filepath.Join(dir, "b.deb"))
	// The version before has its own programs, unit, Corefile and scripts, in the folders of today.
	source := versionBefore(t)
	buildBefore(t, source, stage)
	for _, file := range []string{"Corefile", "coredns-optcache.service"} {
		run("cp", filepath.Join(source, "deploy", "debian", file), filepath.Join(stage, "systemd"))
	}
	run(filepath.Join(source, "deploy", "debian", "package.sh"), "0.0.0-before", "amd64", stage, dir)
	run("mv", filepath.Join(dir, "coredns-optcache_0.0.0~before_amd64.deb"), filepath.Join(dir, "before.deb"))

	socket := filepath.Join(dir, "notify")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	if err := os.Chmod(socket, 0o777); err != nil {
		t.Fatal(err)
	}
	go func() {
		for buf := make([]byte, 512); ; {
			n, err := notify.Read(buf)
			if err != nil {
				return
			}
			if string(buf[:n]) == "READY=1" {
				os.WriteFile(filepath.Join(dir, "ready"), nil, 0o600)
			}
		}
	}()
	run(filepath.Join(root, "deploy/debian/test.sh"), dir)
}

// testContainer has deploy/container-test.sh follow docs/install.md, with its Corefile.
func testContainer(t *testing.T, release string) {
	needs(t, "podman", "skopeo", "dig", "curl", "ip", "unshare")
	if os.Getuid() != 0 {
		t.Skip("only root can have namespaces with a network")
	}
	dir := shortDir(t)
	_, corefile, found := strings.Cut(strings.Join(installSection(t, "A container"), "\n"), "\n~~~ corefile\n")
	corefile, _, closed := strings.Cut(corefile, "~~~\n")
	if !found || !closed {
		t.Fatal("docs/install.md has no Corefile for the container")
	}
	follow := strings.ReplaceAll(strings.Join(commands(t, "A container"), "\n")+"\n", documentsVersion, releaseVersion)
	for name, text := range map[string]string{"Corefile": corefile, "commands": follow, "version": releaseVersion} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	unpack(t, release)
	archive := "coredns-optcache_" + releaseVersion
	for _, command := range [][]string{
		{"cp", filepath.Join(release, archive+".oci.tar"), filepath.Join(release, archive+"_linux_amd64", "coredns"), dir},
		{"env", "GOBIN=" + dir, "go", "install", registry},
		{filepath.Join(root, "deploy", "container-test.sh"), dir},
	} {
		out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		t.Logf("%s\n%s", command, out)
	}
}

// testImage reads the index of images, and runs the server of this machine's as its user.
func testImage(t *testing.T, release string) {
	dir := t.TempDir()
	unpack := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "tar", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	unpack("-C", dir, "-xf", filepath.Join(release, "coredns-optcache_"+releaseVersion+".oci.tar"))
	type descriptor struct {
		Digest      string            `json:"digest"`
		Platform    map[string]string `json:"platform"`
		Annotations map[string]string `json:"annotations"`
	}
	blob := func(digest string) string { return filepath.Join(dir, "blobs", strings.Replace(digest, ":", "/", 1)) }
	read := func(file string, to any) {
		t.Helper()
		if err := json.Unmarshal([]byte(readFile(t, file)), to); err != nil {
			t.Fatal(err)
		}
	}
	var index struct{ Manifests []descriptor }
	read(filepath.Join(dir, "index.json"), &index)
	if name := index.Manifests[0].Annotations["org.opencontainers.image.ref.name"]; name != "coredns-optcache:"+releaseVersion {
		t.Errorf("the image's name is %q", name)
	}
	var images struct{ Manifests []descriptor }
	read(blob(index.Manifests[0].Digest), &images)
	if len(images.Manifests) != 1 || images.Manifests[0].Platform["architecture"] != "amd64" {
		t.Fatalf("images %+v", images)
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	read(blob(images.Manifests[0].Digest), &manifest)
	var config struct {
		Config struct {
			User        string
			Entrypoint  []string
			Labels      map[string]string
			Healthcheck any
		} `json:"config"`
	}
	read(blob(manifest.Config.Digest), &config)
	c := config.Config
	if c.User != imageUser(t) || len(c.Entrypoint) != 1 || c.Entrypoint[0] != "/coredns" || c.Healthcheck != nil {
		t.Errorf("config %+v", c)
	}
	for label, want := range map[string]string{"version": releaseVersion, "revision": "0123456789abcdef", "licenses": "Apache-2.0", "source": "https://github.com/optcache/optcache"} {
		if c.Labels["org.opencontainers.image."+label] != want {
			t.Errorf("label %s is %q", label, c.Labels["org.opencontainers.image."+label])
		}
	}

	image := filepath.Join(dir, "image")
	if err := os.Mkdir(image, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, layer := range manifest.Layers {
		unpack("-C", image, "--xattrs", "--xattrs-include=*", "-xzf", blob(layer.Digest))
	}
	var files []string
	var bytes int64
	err := filepath.WalkDir(image, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			info, err := d.Info()
			if err != nil {
				return err
			}
			bytes += info.Size()
			files = append(files, strings.TrimPrefix(path, image))
		}
		return err
	})
	if want := []string{"/coredns", "/etc/ssl/certs/ca-certificates.crt", "/usr/bin/nodelocal-setup", "/usr/bin/optcachectl"}; err != nil || !slices.Equal(files, want) {
		t.Errorf("%v: files %q", err, files)
	}
	t.Logf("the image has %d MB", bytes/1e6)
	if os.Getuid() != 0 {
		t.Skip("only root can enter the image")
	}
	for _, program := range [][]string{{"/coredns", "-version"}, {"/usr/bin/optcachectl", "--version"}} {
		cmd := exec.CommandContext(t.Context(), "chroot", append([]string{"--userspec=" + c.User, image}, program...)...)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), releaseVersion) {
			t.Errorf("%v: %v: %s", program, err, out)
		}
	}
}
