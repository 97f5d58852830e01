package kubernetes

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// This file makes the images, as archives that containerd imports. Nothing is pulled.

const (
	ownImage = "localhost/coredns-optcache:latest"

	// The user's, in deploy/README.md.
	documentedName  = "registry.example.org/dns/coredns-optcache"
	documentedImage = documentedName + ":1.0"

	toolsImage = "docker.io/library/busybox:1.37"
)

func (n *node) makeImages() error {
	// buildah keeps nothing elsewhere.
	if err := n.write("storage.conf", "[storage]\ndriver = \"vfs\"\ngraphroot = \"%[1]s/buildah\"\nrunroot = \"%[1]s/buildah-run\"\n", n.dir); err != nil {
		return err
	}
	os.Setenv("CONTAINERS_STORAGE_CONF", n.in("storage.conf"))
	stock, err := kubeadmImage(n.bin)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(n.in("images"), 0o755); err != nil {
		return err
	}
	// As the user does it, but that there is no registry.
	commands, err := documented("make image", "buildah push "+documentedImage, "buildah push -q "+documentedImage+" docker-archive:"+n.in("images/documented.tar")+":"+documentedImage)
	if err != nil {
		return err
	}
	if err := run("sh", "-ec", "cd "+root+"\n"+commands); err != nil {
		return err
	}
	if err := run("buildah", "tag", documentedImage, ownImage); err != nil {
		return err
	}
	// What kubeadm deploys has the same CoreDNS, whose `cache` is CoreDNS's own.
	if err := run("buildah", "tag", ownImage, stock); err != nil {
		return err
	}
	return errors.Join(n.pauseImage(), n.toolsImage(), n.save(ownImage, "own"), n.save(stock, "stock"))
}

// kubeadmImage is the name of CoreDNS's image in kubeadm's Deployment.
func kubeadmImage(bin string) (string, error) {
	version, err := kubernetesVersion(bin)
	if err != nil {
		return "", err
	}
	out, err := exec.Command(filepath.Join(bin, "kubeadm"), "config", "images", "list", "--kubernetes-version", version).Output()
	for _, name := range strings.Fields(string(out)) {
		if strings.Contains(name, "/coredns:") {
			return name, nil
		}
	}
	return "", fmt.Errorf("kubeadm names no image of CoreDNS: %w", err)
}

// kubernetesVersion is that of the binaries, as v1.2.3.
func kubernetesVersion(bin string) (string, error) {
	out, err := exec.Command(filepath.Join(bin, "kubeadm"), "version", "-o", "short").Output()
	return strings.TrimSpace(string(out)), err
}

func (n *node) save(image, name string) error {
	return run("buildah", "push", "-q", image, "docker-archive:"+n.in("images", name+".tar")+":"+image)
}

func (n *node) pauseImage() error {
	if err := n.write("build/pause/Dockerfile", "FROM scratch\nCOPY pause /pause\nUSER 65535:65535\nENTRYPOINT [\"/pause\"]\n"); err != nil {
		return err
	}
	dir := n.in("build/pause")
	return errors.Join(
		run("cp", filepath.Join(n.bin, "pause"), dir),
		run("buildah", "build", "-q", "--tag", "localhost/pause:1", dir),
		n.save("localhost/pause:1", "pause"))
}

// toolsImage has a shell, and lookups with three resolvers.
func (n *node) toolsImage() error {
	if err := errors.Join(
		n.write("build/tools/Dockerfile", "FROM scratch\nCOPY root/ /\nENV PATH=/bin\nCMD [\"/bin/sh\"]\n"),
		n.write("build/tools/root/etc/passwd", "root:x:0:0::/:/bin/sh\n"),
		n.write("build/tools/root/etc/nsswitch.conf", "hosts: files dns\n"),
		n.write("build/tools/root/tmp/.keep", "")); err != nil {
		return err
	}
	dir := n.in("build/tools")
	if err := os.MkdirAll(filepath.Join(dir, "root/bin"), 0o755); err != nil {
		return err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(dir, "root/bin", name) }
	if err := errors.Join(
		run("cp", busybox, in("busybox")),
		run("cp", filepath.Join(n.bin, "probe"), in("lookup-go")),
		run("musl-gcc", "-static", "-O2", "-o", in("lookup-musl"), "testdata/lookup.c"),
		run("gcc", "-O2", "-o", in("lookup-glibc"), "testdata/lookup.c")); err != nil {
		return err
	}
	applets, err := exec.Command(in("busybox"), "--list").Output()
	if err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if err := os.Symlink("busybox", in(a)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	// glibc, where the loader looks for it.
	libraries, err := exec.Command("ldd", in("lookup-glibc")).Output()
	if err != nil {
		return err
	}
	copies := make(map[string]bool)
	for _, word := range strings.Fields(string(libraries)) {
		if filepath.IsAbs(word) {
			copies[word] = true
			for _, name := range []string{"libresolv.so.2", "libnss_dns.so.2", "libnss_files.so.2"} {
				if beside := filepath.Join(filepath.Dir(word), name); strings.HasPrefix(filepath.Base(word), "libc.") {
					copies[beside] = true
				}
			}
		}
	}
	for from := range copies {
		to := filepath.Join(dir, "root", from)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := run("cp", "-L", from, to); err != nil {
			return err
		}
	}
	return errors.Join(run("buildah", "build", "-q", "--tag", toolsImage, dir), n.save(toolsImage, "tools"))
}
