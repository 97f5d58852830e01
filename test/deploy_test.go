package test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy/caddyfile"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/optcache/optcache/plugin/control/api"
)

// This file reads deploy/ as those who use it would: the manifests strictly, with all that one says
// about another, and their Corefiles with a server.

const (
	// processBytes is what a container needs beside its caches: the mapped binary and Go's heap.
	processBytes = 80 << 20

	// snapshotTime is what is left of a pod's grace for writing snapshots, at the least.
	snapshotTime = 10 * time.Second

	mebibyte = 1 << 20
)

func TestManifestsHoldTogether(t *testing.T) {
	t.Parallel()
	bases := readBases(t)
	for _, b := range bases {
		t.Run(b.name, func(t *testing.T) {
			blocks := corefileBlocks(t, b.corefile(t))
			checkNames(t, b)
			checkServices(t, b, bases)
			checkVolumes(t, b)
			checkPorts(t, b, blocks)
			checkMemory(t, b, blocks)
			checkSnapshots(t, b, blocks)
			checkControl(t, b, blocks)
			checkRights(t, b)
			checkRollout(t, b)
		})
	}
}

// As TestExamplesAnswer, with the snapshots in a folder that is there. optcachectl flushes all blocks.
func TestManifestsAnswer(t *testing.T) {
	t.Parallel()
	for _, b := range readBases(t) {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			text := b.corefile(t)
			for _, m := range b.container().VolumeMounts {
				if !m.ReadOnly {
					text = strings.ReplaceAll(text, m.MountPath+"/", shortDir(t)+"/")
				}
			}
			args, _ := corefileBlocks(t, text)[0].line("control")
			u := newUpstream(t)
			c := local(t, text, u.addr)
			s := start(t, c.text, "KUBE_DNS_UPSTREAM_SERVICE_HOST="+u.addr)
			if want := len(corefileBlocks(t, text)); len(c.blocks) != want {
				t.Fatalf("%d of %d blocks have optcache", len(c.blocks), want)
			}
			for _, block := range c.blocks {
				seenFromMemory(t, s, c, block)
			}
			var flushed api.FlushReply
			out, errs, code := tool(t, args[0], "flush", "--all", "--yes", "-o", "json")
			if err := json.Unmarshal([]byte(out), &flushed); code != 0 || err != nil || flushed.Flushed < int64(len(c.blocks)) {
				t.Errorf("optcachectl: exit %d, %v: %s%s", code, err, out, errs)
			}
		})
	}
}

// base is a folder with a kustomization, which has one workload.
type base struct {
	name     string
	images   []string // that the kustomization lets the user replace
	objects  []runtime.Object
	pod      corev1.PodTemplateSpec
	selector *metav1.LabelSelector
}

// kustomization is as much of one as the bases use.
type kustomization struct {
	metav1.TypeMeta `json:",inline"`
	Resources       []string `json:"resources"`
	Images          []struct {
		Name    string `json:"name"`
		NewName string `json:"newName"`
		NewTag  string `json:"newTag"`
	} `json:"images"`
}

// readBases decodes every manifest as the API server does with fieldValidation=Strict: unknown
// fields and keys that stand twice are errors.
func readBases(t *testing.T) (bases []base) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{appsv1.AddToScheme, corev1.AddToScheme, rbacv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()

	files, err := filepath.Glob(filepath.Join(root, "deploy", "kubernetes", "*", "kustomization.yaml"))
	files = slices.DeleteFunc(files, func(file string) bool { return filepath.Base(filepath.Dir(file)) == "shared" }) // a component, not a base
	if err != nil || len(files) != 2 {
		t.Fatalf("kustomizations: %v, %v", files, err)
	}
	for _, file := range files {
		dir := filepath.Dir(file)
		b := base{name: filepath.Base(dir)}
		for _, name := range readKustomization(t, file, &b) {
			docs := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(readFile(t, filepath.Join(dir, name)))))
			for {
				doc, err := docs.Read()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatalf("%s/%s: %v", b.name, name, err)
				}
				o, _, err := decoder.Decode(doc, nil, nil)
				if err != nil {
					t.Fatalf("%s/%s: %v", b.name, name, err)
				}
				switch o := o.(type) {
				case *appsv1.Deployment:
					b.pod, b.selector = o.Spec.Template, o.Spec.Selector
				case *appsv1.DaemonSet:
					b.pod, b.selector = o.Spec.Template, o.Spec.Selector
				}
				b.objects = append(b.objects, o)
			}
		}
		// A server, and on nodes what sets them up.
		if n := len(b.pod.Spec.Containers); n != 1 && !(n == 2 && b.pod.Spec.Containers[1].Command[0] == "nodelocal-setup") {
			t.Fatalf("%s: %d containers", b.name, n)
		}
		bases = append(bases, b)
	}
	return bases
}

// readKustomization returns the manifests that it lists, which are all that are there.
func readKustomization(t *testing.T, file string, b *base) []string {
	t.Helper()
	var k kustomization
	if err := yaml.UnmarshalStrict([]byte(readFile(t, file)), &k); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if k.APIVersion != "kustomize.config.k8s.io/v1beta1" || k.Kind != "Kustomization" {
		t.Errorf("%s: %v", file, k.TypeMeta)
	}
	for _, image := range k.Images {
		b.images = append(b.images, image.Name)
	}
	entries, err := os.ReadDir(filepath.Dir(file))
	if err != nil {
		t.Fatal(err)
	}
	var there []string
	for _, entry := range entries {
		if entry.Name() != filepath.Base(file) {
			there = append(there, entry.Name())
		}
	}
	if slices.Sort(k.Resources); !slices.Equal(k.Resources, there) {
		t.Errorf("%s lists %v, and beside it are %v", file, k.Resources, there)
	}
	return k.Resources
}

// find returns the base's object of that type and name, or nil.
func find[T metav1.Object](b base, name string) (found T) {
	for _, o := range b.objects {
		if o, ok := o.(T); ok && o.GetName() == name {
			found = o
		}
	}
	return found
}

func (b base) container() corev1.Container { return b.pod.Spec.Containers[0] }

// mount returns what is mounted where a path lies in the server's container, and the volume.
func (b base) mount(file string) (corev1.VolumeMount, corev1.Volume, bool) {
	return mount(b, b.container(), file)
}

func mount(b base, c corev1.Container, file string) (corev1.VolumeMount, corev1.Volume, bool) {
	for _, m := range c.VolumeMounts {
		if strings.HasPrefix(file, m.MountPath+"/") {
			for _, v := range b.pod.Spec.Volumes {
				if v.Name == m.Name {
					return m, v, true
				}
			}
		}
	}
	return corev1.VolumeMount{}, corev1.Volume{}, false
}

// corefile returns what the container will find at the path after -conf.
func (b base) corefile(t *testing.T) string {
	t.Helper()
	args := b.container().Args
	if len(args) != 2 || args[0] != "-conf" {
		t.Fatalf("args: %v", args)
	}
	c, file := b.container(), args[1]
	m, v, ok := mount(b, c, file)
	if ok && v.EmptyDir != nil { // nodelocal-setup makes it
		setup := b.pod.Spec.InitContainers[0]
		for _, same := range b.pod.Spec.Containers[1:] {
			if made, base := flagOf(same, "-corefile"), flagOf(same, "-basecorefile"); made != file || base != flagOf(setup, "-basecorefile") {
				t.Errorf("%s makes %s of %s", same.Name, made, base)
			}
		}
		if made := flagOf(setup, "-corefile"); made != file {
			t.Errorf("%s makes %s", setup.Name, made)
		}
		if _, same, _ := mount(b, setup, file); same.Name != v.Name {
			t.Errorf("%s makes it elsewhere", setup.Name)
		}
		c, file = setup, flagOf(setup, "-basecorefile")
		m, v, ok = mount(b, c, file)
	}
	if !ok || v.ConfigMap == nil {
		t.Fatalf("%s is in no ConfigMap", file)
	}
	config := find[*corev1.ConfigMap](b, v.ConfigMap.Name)
	if config == nil {
		t.Fatalf("no ConfigMap %s", v.ConfigMap.Name)
	}
	for _, item := range v.ConfigMap.Items {
		if path.Join(m.MountPath, item.Path) == file && config.Data[item.Key] != "" {
			return places.Replace(config.Data[item.Key])
		}
	}
	t.Fatalf("no key of %s is at %s", config.Name, file)
	return ""
}

const stubDomain = "stub.example"

// places are what nodelocal-setup puts into a Corefile, with one stub domain.
var places = strings.NewReplacer("__PILLAR__LOCAL__DNS__", "169.254.20.10", "__PILLAR__UPSTREAM__SERVERS__", "/etc/resolv.conf",
	"__PILLAR__STUB__DOMAIN__", stubDomain, "__PILLAR__STUB__SERVERS__", "192.0.2.1")

// flagOf returns a flag's value in a container's command, -name=value.
func flagOf(c corev1.Container, name string) string {
	for _, word := range c.Command {
		if value, found := strings.CutPrefix(word, name+"="); found {
			return value
		}
	}
	return ""
}

// checkNames follows the names of service accounts, roles, labels and images.
func checkNames(t *testing.T, b base) {
	t.Helper()
	for _, o := range b.objects {
		object, err := meta.Accessor(o)
		if err != nil {
			t.Fatal(err)
		}
		want := "kube-system"
		switch o := o.(type) {
		case *rbacv1.ClusterRole:
			want = ""
		case *rbacv1.ClusterRoleBinding:
			want = ""
			if o.RoleRef.Kind != "ClusterRole" || find[*rbacv1.ClusterRole](b, o.RoleRef.Name) == nil {
				t.Errorf("no role %v", o.RoleRef)
			}
			for _, s := range o.Subjects {
				if account := find[*corev1.ServiceAccount](b, s.Name); account == nil || s.Kind != "ServiceAccount" || s.Namespace != account.Namespace {
					t.Errorf("no subject %v", s)
				}
			}
		}
		if object.GetNamespace() != want {
			t.Errorf("%s is in namespace %q", object.GetName(), object.GetNamespace())
		}
	}
	if name := b.pod.Spec.ServiceAccountName; find[*corev1.ServiceAccount](b, name) == nil {
		t.Errorf("no ServiceAccount %q", name)
	}
	if selector, err := metav1.LabelSelectorAsSelector(b.selector); err != nil || !selector.Matches(labels.Set(b.pod.Labels)) {
		t.Errorf("%v does not select %v: %v", b.selector, b.pod.Labels, err)
	}
	var images []string
	for _, c := range slices.Concat(b.pod.Spec.Containers, b.pod.Spec.InitContainers) {
		if !slices.Contains(images, c.Image) {
			images = append(images, c.Image)
		}
	}
	if !slices.Equal(images, b.images) {
		t.Errorf("images %v, and the kustomization names %v", images, b.images)
	}
}

// checkServices wants pods behind every service, of this base or another one, that have its ports.
func checkServices(t *testing.T, b base, bases []base) {
	t.Helper()
	for _, o := range b.objects {
		s, ok := o.(*corev1.Service)
		if !ok {
			continue
		}
		var selected int
		for _, other := range bases {
			if !labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(other.pod.Labels)) {
				continue
			}
			selected++
			for _, p := range s.Spec.Ports {
				if !hasPort(other.ports(t), p.TargetPort.IntVal, p.Protocol) {
					t.Errorf("%s: nothing listens on %v", s.Name, p)
				}
			}
		}
		if selected != 1 {
			t.Errorf("%s selects %d workloads", s.Name, selected)
		}
	}
}

// ports returns those that the container declares. On the host's network it declares none, as a second pod on the node could not
// have them; there they are those of the Corefile.
func (b base) ports(t *testing.T) []corev1.ContainerPort {
	t.Helper()
	declared := b.container().Ports
	if !b.pod.Spec.HostNetwork {
		return declared
	}
	if len(declared) > 0 {
		t.Errorf("on the host's network, %v keep a second pod from the node", declared)
	}
	metrics, err := strconv.ParseInt(b.pod.Annotations["prometheus.io/port"], 10, 32)
	if err != nil {
		t.Error(err)
	}
	return []corev1.ContainerPort{
		{ContainerPort: 53, Protocol: corev1.ProtocolUDP}, {ContainerPort: 53, Protocol: corev1.ProtocolTCP}, {Name: "metrics", ContainerPort: int32(metrics)},
	}
}

// hasPort tells whether a port is among others; without a protocol, it is TCP.
func hasPort(ports []corev1.ContainerPort, port int32, protocol corev1.Protocol) bool {
	tcp := func(p corev1.Protocol) bool { return p == "" || p == corev1.ProtocolTCP }
	return slices.ContainsFunc(ports, func(p corev1.ContainerPort) bool {
		return p.ContainerPort == port && (p.Protocol == protocol || tcp(p.Protocol) && tcp(protocol))
	})
}

// checkVolumes wants every mount to have its volume, and every volume to be mounted.
func checkVolumes(t *testing.T, b base) {
	t.Helper()
	used := map[string]bool{}
	for _, c := range slices.Concat(b.pod.Spec.InitContainers, b.pod.Spec.Containers) {
		at := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if at[m.MountPath] {
				t.Errorf("%s: two mounts at %s", c.Name, m.MountPath)
			}
			at[m.MountPath], used[m.Name] = true, true
		}
	}
	for _, v := range b.pod.Spec.Volumes {
		if !used[v.Name] {
			t.Errorf("nothing mounts %s", v.Name)
		}
		delete(used, v.Name)
	}
	if len(used) > 0 {
		t.Errorf("no volumes %v", used)
	}
}

// checkPorts compares where the Corefile listens with what the pod says about it.
func checkPorts(t *testing.T, b base, blocks []serverBlock) {
	t.Helper()
	c, declared := b.container(), b.ports(t)
	probes := map[string]*corev1.Probe{"health": c.LivenessProbe, "ready": c.ReadinessProbe}
	for _, block := range blocks {
		if _, port := splitKey(block.key); port != "53" || !hasPort(declared, 53, corev1.ProtocolUDP) || !hasPort(declared, 53, corev1.ProtocolTCP) {
			t.Errorf("%s: not the ports %v", block.key, declared)
		}
		for _, plugin := range []string{"health", "ready", "prometheus"} {
			args, found := block.line(plugin)
			if !found {
				continue
			}
			host, port := "", ports[plugin]
			if len(args) > 0 {
				var err error
				if host, port, err = net.SplitHostPort(args[0]); err != nil {
					t.Error(err)
				}
			}
			if plugin == "prometheus" {
				if !slices.ContainsFunc(declared, func(p corev1.ContainerPort) bool {
					return p.Name == "metrics" && fmt.Sprint(p.ContainerPort) == port
				}) {
					t.Errorf("%s: metrics on %s, ports are %v", block.key, port, declared)
				}
				continue
			}
			probe := probes[plugin]
			delete(probes, plugin)
			if b.pod.Spec.HostNetwork { // see checkRollout
				if url := fmt.Sprintf("http://%s:%s/%s", host, port, plugin); plugin == "ready" && flagOf(b.pod.Spec.InitContainers[0], "-ready") != url {
					t.Errorf("ready at %s, and nodelocal-setup asks at %s", url, flagOf(b.pod.Spec.InitContainers[0], "-ready"))
				}
				continue
			}
			if probe == nil || probe.HTTPGet == nil {
				t.Errorf("no probe for %s", plugin)
				continue
			}
			get := probe.HTTPGet
			number := get.Port.String()
			for _, p := range declared {
				if p.Name == number {
					number = fmt.Sprint(p.ContainerPort)
				}
			}
			if get.Path != "/"+plugin || get.Host != host || number != port {
				t.Errorf("%s on %s:%s, and the probe asks %v", plugin, host, port, get)
			}
		}
	}
	if len(probes) > 0 {
		t.Errorf("no block answers %v", probes)
	}
}

// checkMemory wants the limits to have room for what the Corefile may take, and the grace for its
// lameduck.
func checkMemory(t *testing.T, b base, blocks []serverBlock) {
	t.Helper()
	var bytes int64
	var lameduck time.Duration
	for _, block := range blocks {
		args, _ := block.line("max_memory")
		bytes += size(t, args)
		if args, found := block.line("lameduck"); found {
			d, err := time.ParseDuration(args[0])
			if err != nil {
				t.Error(err)
			}
			lameduck = max(lameduck, d)
		}
	}
	// A reload has the caches of before and after for a moment, and a snapshot takes the place of
	// one that is still there.
	c := b.container()
	if limit := c.Resources.Limits.Memory().Value(); limit < 2*bytes+processBytes {
		t.Errorf("limit of %d MB, caches of %d MB", limit/mebibyte, bytes/mebibyte)
	}
	if request := c.Resources.Requests.Memory().Value(); request < bytes || request > c.Resources.Limits.Memory().Value() {
		t.Errorf("request of %d MB, caches of %d MB", request/mebibyte, bytes/mebibyte)
	}
	for _, block := range blocks {
		args, _ := block.line("cache_file_path")
		if _, v, _ := b.mount(args[0]); v.EmptyDir != nil && v.EmptyDir.SizeLimit.Value() < 2*bytes {
			t.Errorf("%s of %v, caches of %d MB", v.Name, v.EmptyDir.SizeLimit, bytes/mebibyte)
		}
	}
	if grace := b.pod.Spec.TerminationGracePeriodSeconds; grace == nil || time.Duration(*grace)*time.Second < lameduck+snapshotTime {
		t.Errorf("lameduck of %v, and the grace is too short", lameduck)
	}
}

// size reads optcache's binary units.
func size(t *testing.T, args []string) int64 {
	t.Helper()
	if len(args) != 1 {
		t.Fatalf("max_memory %v", args)
	}
	q, err := resource.ParseQuantity(strings.Replace(args[0], "B", "i", 1))
	if err != nil {
		t.Fatalf("max_memory %s: %v", args[0], err)
	}
	return q.Value()
}

// checkSnapshots wants each block to have a file of its own in a folder that outlives the container
// and that the user may write to.
func checkSnapshots(t *testing.T, b base, blocks []serverBlock) {
	t.Helper()
	owner := map[string]string{}
	for _, block := range blocks {
		args, found := block.line("cache_file_path")
		if !found {
			t.Errorf("%s has no snapshot", block.key)
			continue
		}
		file := args[0]
		if owner[file] != "" {
			t.Errorf("%s and %s write to %s", owner[file], block.key, file)
		}
		owner[file] = block.key
		if path.Base(file) == stubDomain {
			t.Errorf("%s: a stub domain may be named as another block's snapshot", file)
		}
		m, v, ok := b.mount(file)
		if !ok || m.ReadOnly || path.Dir(file) != m.MountPath || v.EmptyDir == nil && v.HostPath == nil {
			t.Errorf("%s: nothing to write to is mounted at %s", block.key, path.Dir(file))
		}
		// The kubelet makes an emptyDir for everybody, and a folder of the node for root.
		if v.HostPath != nil && !b.givesAway(t, m) {
			t.Errorf("%s stays root's", m.MountPath)
		}
	}
}

// checkControl wants each block to be behind the socket where optcachectl looks for it, in a folder that the server can make
// for itself, or that the image has.
func checkControl(t *testing.T, b base, blocks []serverBlock) {
	t.Helper()
	const socket = "/run/optcache/control.sock"
	for _, block := range blocks {
		if args, _ := block.line("control"); !slices.Equal(args, []string{"unix://" + socket}) {
			t.Errorf("%s: control %q", block.key, args)
		}
	}
	m, v, ok := b.mount(socket)
	empty := m.MountPath == path.Dir(path.Dir(socket)) && v.EmptyDir != nil
	// On the node, each pod has its own, which it is given.
	own := m.MountPath == path.Dir(socket) && v.HostPath != nil && m.SubPathExpr == "$(POD_NAME)" && b.givesAway(t, m)
	if !ok || m.ReadOnly || !empty && !own {
		t.Errorf("at %s, there is neither an empty volume nor a folder of the pod's", path.Dir(path.Dir(socket)))
	}
	if docs := readFile(t, filepath.Join(root, "docs", "control.md")); !strings.Contains(docs, "it is `unix://"+socket+"`") {
		t.Errorf("optcachectl looks elsewhere than at %s", socket)
	}
	if dockerfile := readFile(t, filepath.Join(root, "deploy", "Dockerfile")); !strings.Contains(dockerfile, "\nCOPY --chown="+imageUser(t)+" run /run\n") {
		t.Error("the folder in the image is not its user's")
	}
}

// givesAway tells whether an init container makes the image's user the owner of a mount.
func (b base) givesAway(t *testing.T, m corev1.VolumeMount) bool {
	t.Helper()
	folder := path.Join(m.MountPath, strings.NewReplacer("(", "", ")", "").Replace(m.SubPathExpr))
	for _, c := range b.pod.Spec.InitContainers {
		for _, same := range c.VolumeMounts {
			folders := strings.NewReplacer("(", "", ")", "").Replace(flagOf(c, "-folders"))
			if same.Name == m.Name && same.MountPath == m.MountPath && slices.Contains(strings.Split(folders, ","), folder) {
				owner := flagOf(c, "-owner")
				return owner == imageUser(t) || owner == "" && imageUser(t) == "65532:65532" // as nodelocal-setup has it by itself
			}
		}
	}
	return false
}

// checkRights wants the container to have the image's user, the right to bind port 53 and no other.
func checkRights(t *testing.T, b base) {
	t.Helper()
	pod, c := b.pod.Spec.SecurityContext, b.container().SecurityContext
	if fmt.Sprintf("%d:%d", *pod.RunAsUser, *pod.RunAsGroup) != imageUser(t) || !*pod.RunAsNonRoot {
		t.Errorf("not the user of the image: %v", pod)
	}
	if !*c.ReadOnlyRootFilesystem || *c.AllowPrivilegeEscalation ||
		!slices.Equal(c.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
		!slices.Equal(c.Capabilities.Add, []corev1.Capability{"NET_BIND_SERVICE"}) {
		t.Errorf("too many rights, or too few: %v", c)
	}
	// What changes the node's network is root, and has no other right than what that takes.
	for _, other := range slices.Concat(b.pod.Spec.InitContainers, b.pod.Spec.Containers[1:]) {
		s, want := other.SecurityContext, []corev1.Capability{"NET_ADMIN"}
		switch {
		case other.Command[0] != "nodelocal-setup":
			want = nil
		case flagOf(other, "-folders") != "":
			want = append(want, "CHOWN")
		}
		if !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(s.Capabilities.Add, want) {
			t.Errorf("%s: too many rights, or too few: %v", other.Name, s)
		}
	}
}

// checkRollout wants a new pod to come before an old one goes. What serves on the node's network shares it meanwhile, so it needs
// probes that only this pod can answer, and one that hangs is not ready any more before it would count as available.
func checkRollout(t *testing.T, b base) {
	t.Helper()
	for _, o := range b.objects {
		switch o := o.(type) {
		case *appsv1.Deployment:
			if r := o.Spec.Strategy.RollingUpdate; r == nil || r.MaxUnavailable.String() != "0" || r.MaxSurge == nil || o.Spec.MinReadySeconds < 1 {
				t.Errorf("%s may have fewer pods than replicas: %v", o.Name, o.Spec.Strategy)
			}
		case *appsv1.DaemonSet:
			if r := o.Spec.UpdateStrategy.RollingUpdate; r == nil || r.MaxUnavailable.String() != "0" || r.MaxSurge == nil || o.Spec.MinReadySeconds < 1 {
				t.Errorf("%s leaves nodes without a pod: %v", o.Name, o.Spec.UpdateStrategy)
			}
			const late = 10 // seconds until the kubelet has noticed and the controller knows
			if p := b.container().ReadinessProbe; p.PeriodSeconds*p.FailureThreshold+p.TimeoutSeconds+late > o.Spec.MinReadySeconds {
				t.Errorf("available after %d s, before the probe %v has failed", o.Spec.MinReadySeconds, p)
			}
		}
	}
	if !b.pod.Spec.HostNetwork {
		return
	}
	checkSetup(t, b)
	c := b.container()
	for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
		if p == nil || p.Exec == nil || !slices.Equal(p.Exec.Command, []string{"optcachectl", "alive"}) {
			t.Errorf("a probe that does not tell this pod from another one on the node: %v", p)
		}
	}
}

// checkSetup wants the init container and the one that keeps watch to do the same, and both to know when the cache is ready and which
// of two pods is the last one on the node.
func checkSetup(t *testing.T, b base) {
	t.Helper()
	setups := b.pod.Spec.InitContainers[:2]
	for _, name := range []string{"-localip", "-ready", "-lock", "-basecorefile", "-corefile"} {
		if a, b := flagOf(setups[0], name), flagOf(setups[1], name); a != b || a == "" {
			t.Errorf("%s is %q at the start, and %q then", name, a, b)
		}
	}
	if p := setups[1].RestartPolicy; p == nil || *p != corev1.ContainerRestartPolicyAlways {
		t.Error("the one that keeps watch is no sidecar, and does not outlive the cache")
	}
	for _, c := range setups {
		if _, v, ok := mount(b, c, flagOf(c, "-lock")); !ok || v.HostPath == nil {
			t.Errorf("%s: the lock is not the node's", c.Name)
		}
		if m, v, ok := mount(b, c, "/etc/kube-dns/stubDomains"); !ok || !m.ReadOnly || v.ConfigMap == nil || v.ConfigMap.Name != "kube-dns" || !*v.ConfigMap.Optional {
			t.Errorf("%s: the ConfigMap kube-dns is not there", c.Name)
		}
	}
}

// imageUser is the user of the Dockerfile, as UID:GID.
func imageUser(t *testing.T) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^USER (\d+:\d+)$`).FindStringSubmatch(readFile(t, filepath.Join(root, "deploy", "Dockerfile")))
	if m == nil {
		t.Fatal("no user by number in the Dockerfile")
	}
	return m[1]
}

// serverBlock is a server block: its key and its lines, as words.
type serverBlock struct {
	key   string
	lines [][]string
}

// line returns the words after the first one of the line that begins with it.
func (b serverBlock) line(first string) (args []string, found bool) {
	for _, words := range b.lines {
		if words[0] == first {
			return words[1:], true
		}
	}
	return nil, false
}

// corefileBlocks parses a Corefile as CoreDNS does.
func corefileBlocks(t *testing.T, text string) (blocks []serverBlock) {
	t.Helper()
	parsed, err := caddyfile.Parse("Corefile", strings.NewReader(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range parsed {
		if len(s.Keys) != 1 {
			t.Fatalf("keys %v", s.Keys)
		}
		b := serverBlock{key: s.Keys[0]}
		for _, tokens := range s.Tokens {
			last := 0
			for _, token := range tokens {
				switch {
				case token.Text == "{" || token.Text == "}":
				case token.Line == last:
					i := len(b.lines) - 1
					b.lines[i] = append(b.lines[i], token.Text)
				default:
					b.lines = append(b.lines, []string{token.Text})
				}
				last = token.Line
			}
		}
		blocks = append(blocks, b)
	}
	return blocks
}
