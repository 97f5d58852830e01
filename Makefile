# `make run` and `make test` are the two that matter; `make help` lists the others.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null)
IMAGE   ?= coredns-optcache

# What this project wrote, without the binary that has all of CoreDNS.
OWN_PKGS = . ./plugin/... ./cmd/coredns/internal/... ./cmd/optcachectl/...

# A release of 2026 that knows Go 1.26; run from the module cache, never a dependency.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Makes the plugin's man page. CoreDNS makes its own from READMEs in the same form, with a program that is fetched as a
# binary; this one is run from the module cache.
MD2MAN = github.com/cpuguy83/go-md2man/v2@v2.0.7

# The man pages and the month in their headers. The month is that of the last change, not of the day when a page is made.
MAN      ?= man/coredns-optcache.7
MAN_CTL  ?= man/optcachectl.1
MAN_DATE = November 2026

BENCH     ?= .
BENCHTIME ?= 1s
FUZZTIME  ?= 30s
STEPS     ?= 1000000
SEED      ?= 0
SOAK      ?= 10m
ROLLOUTS  ?= 20
TESTFLAGS ?=

.DEFAULT_GOAL := build

# The version comes from git above, so the go command need not ask git itself (it refuses in a
# directory of another owner).
.PHONY: build
build: ## bin/coredns: CoreDNS with optcache; bin/optcachectl, its tool; and bin/nodelocal-setup, for the image
	CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)' -o bin/coredns ./cmd/coredns
	CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/optcachectl ./cmd/optcachectl
	CGO_ENABLED=0 GOOS=linux $(GO) build -C cmd/nodelocal-setup -buildvcs=false -trimpath -ldflags '-s -w' -o ../../bin/nodelocal-setup .

.PHONY: run
run: build ## build, and serve ./Corefile on 127.0.0.1:1053, metrics on 127.0.0.1:9153
	bin/coredns -conf Corefile

.PHONY: test
test: ## all tests; TESTFLAGS=-v shows those that are skipped
	$(GO) test $(TESTFLAGS) ./...

# What is the project's own, for a platform of 32 bits. Its binaries run on amd64.
.PHONY: test-386
test-386: ## the tests of optcache's own packages as a 32-bit program (on amd64)
	GOARCH=386 CGO_ENABLED=0 $(GO) test $(TESTFLAGS) $(OWN_PKGS)

.PHONY: cross
cross: PLATFORMS = linux/386 linux/arm64 linux/arm windows/amd64 darwin/arm64 freebsd/amd64
cross: ## build optcache's own packages, tests included, for PLATFORMS
	@set -e; for platform in $(PLATFORMS); do \
		echo "== $$platform"; \
		GOOS=$${platform%/*} GOARCH=$${platform#*/} CGO_ENABLED=0 $(GO) vet $(OWN_PKGS); \
	done

# The peers of bench/hitratio are a module of their own, so that what they need is not the plugin's.
.PHONY: test-bench
test-bench: ## vet and test bench/hitratio's peers
	$(GO) vet -C bench/hitratio/peers ./...
	$(GO) test -C bench/hitratio/peers ./...

# The page's tests drive a browser, and are a module of their own, too.
.PHONY: test-page
test-page: ## test the control interface's web page; needs chromium: apt-get install chromium
	$(GO) vet -C test/page ./...
	$(GO) test -C test/page -count 1 $(TESTFLAGS) ./...

.PHONY: pictures
pictures: ## docs/page-*.png, as the page's tests see it
	OPTCACHE_PICTURES=$(CURDIR)/docs $(GO) test -C test/page -count 1 -run '^TestPictures$$' -v ./...

# Kubernetes and etcd are a module of their own, too: their binaries take minutes to build, and seconds when Go's cache has them.
# The API server and the kubelet compare the versions that they are told here.
KUBERNETES = $(shell $(GO) list -C test/kubernetes -m -f '{{.Version}}' k8s.io/kubernetes)
KUBERNETES_MINOR = $(word 2,$(subst ., ,$(KUBERNETES)))
KUBERNETES_VERSION = k8s.io/component-base/version
KUBERNETES_FLAGS = -X $(KUBERNETES_VERSION).gitVersion=$(KUBERNETES) -X $(KUBERNETES_VERSION).gitMajor=1 \
	-X $(KUBERNETES_VERSION).gitMinor=$(KUBERNETES_MINOR) -X $(KUBERNETES_VERSION).gitTreeState=clean

.PHONY: kubernetes
kubernetes: ## bin/kubernetes: the binaries of a cluster, for test-kubernetes
	CGO_ENABLED=0 $(GO) build -C test/kubernetes -trimpath -ldflags '-s -w $(KUBERNETES_FLAGS)' -o ../../bin/kubernetes/ tool ./probe ./pause
	CGO_ENABLED=0 $(GO) build -C test/helm -trimpath -ldflags '-s -w' -o ../../bin/kubernetes/ tool

.PHONY: test-kubernetes
test-kubernetes: build kubernetes ## deploy/kubernetes in a real cluster of one node (needs root; installs containerd and others)
	$(GO) vet -C test/kubernetes ./...
	$(GO) test -C test/kubernetes -count 1 -timeout 120m -v $(TESTFLAGS) .

.PHONY: rollouts
rollouts: ## test-kubernetes, with ROLLOUTS rollouts under load
	OPTCACHE_KUBERNETES_ROLLOUTS=$(ROLLOUTS) $(MAKE) test-kubernetes

.PHONY: kubernetes-figures
kubernetes-figures: SERVICES ?= 10000
kubernetes-figures: build kubernetes ## start, processor, memory and lost lookups in that cluster, beside stock
	@# Each has a cluster of its own.
	OPTCACHE_KUBERNETES_SERVICES=$(SERVICES) $(GO) test -C test/kubernetes -count 1 -timeout 120m -v -run '^TestFigures$$' .
	OPTCACHE_KUBERNETES_SERVICES=$(SERVICES) $(GO) test -C test/kubernetes -count 1 -timeout 120m -v -run '^TestRolloutFigures$$' .

# Helm is a module of its own, too.
.PHONY: test-helm
test-helm: ## the chart in deploy/helm, as Helm renders and lints it; the documented kustomization
	$(GO) vet -C test/helm ./...
	$(GO) test -C test/helm -count 1 $(TESTFLAGS) ./...

# What sets a node up is a module of its own, too: only the image needs netlink and nftables.
.PHONY: test-nodelocal
test-nodelocal: ## nodelocal-setup, in network namespaces; needs root, nft and iptables
	$(GO) vet -C cmd/nodelocal-setup ./...
	$(GO) test -C cmd/nodelocal-setup -count 1 $(TESTFLAGS) ./...

.PHONY: test-recipe
test-recipe: ## build CoreDNS's own tree as README.md says (minutes)
	OPTCACHE_RECIPE=1 $(GO) test -count 1 -run '^TestRecipe$$' -timeout 30m -v ./test

.PHONY: race
race: RACE = GOMEMLIMIT=2GiB $(GO) test -race -timeout 40m $(TESTFLAGS)
race: ## the tests of optcache's own packages under the race detector (needs a C compiler). Memory for answers is Go's heap there
	@# The detector keeps a record of each word and goroutine that it has seen, until the process ends. So the plugin's tests are
	@# run in parts. A part that fails does not keep the others from being run.
	failed=; $(RACE) $(filter-out .,$(OWN_PKGS)) || failed=1; \
	for tests in '^Test[AB]' '^TestC' '^Test[D-H]' '^Test[I-O]' '^Test[PQ]' '^TestR' '^TestS'; do \
		$(RACE) -run "$$tests" . || failed=1; \
	done; \
	$(RACE) -skip '^Test[A-S]' . || failed=1; test -z "$$failed"

.PHONY: lint
lint: fmt vet staticcheck ## fmt, vet and staticcheck

.PHONY: fmt
fmt: ## fail where gofmt would change something
	@unformatted=$$(gofmt -l .) && if [ -n "$$unformatted" ]; then gofmt -d .; echo "gofmt: $$unformatted"; exit 1; fi

.PHONY: vet
vet: ## go vet
	$(GO) vet ./...

.PHONY: staticcheck
staticcheck: ## staticcheck, at a pinned version
	$(GO) run $(STATICCHECK) ./...

.PHONY: bench
bench: ## benchmarks; BENCH=regexp BENCHTIME=duration CPU=1,2 COUNT=5
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -benchtime $(BENCHTIME) $(if $(CPU),-cpu $(CPU)) $(if $(COUNT),-count $(COUNT)) . ./plugin/...

# The go command fuzzes one target at a time.
.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME
	@set -e; \
	for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -r -n 1 dirname | sort -u); do \
		for target in $$(grep -h '^func Fuzz' $$dir/*_test.go | sed 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/'); do \
			echo "== $$dir $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$dir; \
		done; \
	done

.PHONY: difftest
difftest: ## optcache beside CoreDNS's cache for STEPS random steps; SEED=n repeats a run
	$(GO) test -count 1 -run '^TestDifferential$$' -timeout 0 -v . -args -diff.steps $(STEPS) -diff.seed $(SEED)

.PHONY: soak-shared
soak-shared: ANSWERS = 10000000
soak-shared: ## check ANSWERS of three replicas whose second level is killed, stopped, emptied and written to at random
	OPTCACHE_SHARED_SOAK=$(ANSWERS) $(GO) test -count 1 -run '^TestSharedSoak$$' -timeout 0 -v ./test

.PHONY: soak
soak: ## a server between clients and faulty upstreams, for SOAK
	OPTCACHE_SOAK=$(SOAK) $(GO) test -count 1 -run '^TestSoak$$' -timeout 0 -v ./test

.PHONY: idle-streams
idle-streams: ## what 10,000 idle connections cost, by TCP and TLS, with the fast path and without
	OPTCACHE_IDLE=10000 $(GO) test -count 1 -run '^TestIdleStreamsMemory$$' -timeout 0 -v ./test

.PHONY: cgroup
cgroup: ## 200 reloads and a flood in a control group of 200 MiB; needs root
	OPTCACHE_GROUP_RELOADS=200 $(GO) test -count 1 -run '^TestMaxMemoryAuto$$' -timeout 0 -v ./test

.PHONY: storm
storm: ## the fast path on and off by 2,000 reloads under traffic
	OPTCACHE_RELOADS=2000 $(GO) test -count 1 -run '^TestFastPathOnAndOff$$' -timeout 0 -v ./test

.PHONY: man
man: ## man/coredns-optcache.7, from README.md; and man/optcachectl.1, from the command's help
	awk -v date='$(MAN_DATE)' -f man/readme.awk README.md >$(MAN).md
	$(GO) run $(MD2MAN) -in $(MAN).md -out $(MAN)
	@rm $(MAN).md
	$(GO) run ./cmd/optcachectl man '$(MAN_DATE)' >$(MAN_CTL)

.PHONY: image
image: build ## a container image, IMAGE=name:tag; needs buildah: apt-get install buildah libcap2-bin
	deploy/image.sh $(IMAGE)

# COMMIT and SOURCE_DATE_EPOCH, its time, are git's. SIGNING_KEY is a file with a private key for an ECDSA signature.
.PHONY: release
release: PLATFORMS = linux/amd64 linux/arm64 linux/arm linux/riscv64 linux/386
release: ## bin/release/VERSION: archives, Debian packages, SBOM, licences, checksums; VERSION=1.2.3
	PLATFORMS='$(PLATFORMS)' COMMIT='$(COMMIT)' GO='$(GO)' deploy/release.sh '$(VERSION)'

# The version before is the last release. Until there is one, it is the first commit that could make one.
FROM ?= $(shell git -c 'safe.directory=*' describe --tags --abbrev=0 --match 'v[0-9]*' HEAD^ 2>/dev/null || git -c 'safe.directory=*' log --diff-filter=A --format=%H -- deploy/release.sh | tail -1)

.PHONY: sizes
sizes: build ## bytes of what the image has, and of stock CoreDNS of the same version
	CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w' -o bin/stock/coredns github.com/coredns/coredns
	@stat -c '%12s  %n' bin/coredns bin/optcachectl bin/nodelocal-setup bin/stock/coredns

.PHONY: test-release
test-release: ## two releases are the same; the Debian package installs, serves, upgrades from FROM, goes; the image runs (needs root; minutes)
	OPTCACHE_RELEASE=1 OPTCACHE_FROM=$(FROM) $(GO) test -count 1 -run '^TestRelease|^TestUpgrade' -timeout 60m -v $(TESTFLAGS) ./test

.PHONY: test-upgrade
test-upgrade: ## from FROM, the release before, to this version and back, with a snapshot
	OPTCACHE_FROM=$(FROM) $(GO) test -count 1 -run '^TestUpgrade' -timeout 30m -v $(TESTFLAGS) ./test

.PHONY: test-sbom
test-sbom: ## the program that writes a release's bill of materials
	$(GO) vet -C deploy/sbom ./...
	$(GO) test -C deploy/sbom -count 1 $(TESTFLAGS) ./...

# Finds what GitHub would refuse in .github/workflows.
ACTIONLINT = github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

.PHONY: workflows
workflows: ## check .github/workflows
	$(GO) run $(ACTIONLINT)

# Knows the vulnerabilities of vuln.go.dev, and which of them the code can reach.
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: vulnerabilities
vulnerabilities: ## known vulnerabilities that the code can reach
	$(GO) run $(GOVULNCHECK) ./...

.PHONY: clean
clean: ## remove what build made
	rm -rf bin

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
