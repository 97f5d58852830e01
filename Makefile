# `make run` and `make test` are the two that matter; `make help` lists the others.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
IMAGE   ?= coredns-optcache

# The race detector goes through what this project wrote, not through all of CoreDNS.
RACE_PKGS = . ./plugin/... ./cmd/coredns/internal/...

# A release of 2026 that knows Go 1.26; run from the module cache, never a dependency.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

BENCH     ?= .
BENCHTIME ?= 1s
FUZZTIME  ?= 30s
STEPS     ?= 1000000
SEED      ?= 0
SOAK      ?= 10m

.DEFAULT_GOAL := build

# The version comes from git above, so the go command need not ask git itself (it refuses in a
# directory of another owner).
.PHONY: build
build: ## bin/coredns: CoreDNS with optcache
	CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/coredns ./cmd/coredns

.PHONY: run
run: build ## build, and serve ./Corefile on 127.0.0.1:1053, metrics on 127.0.0.1:9153
	bin/coredns -conf Corefile

.PHONY: test
test: ## all tests
	$(GO) test ./...

# The peers of bench/hitratio are a module of their own, so that what they need is not the plugin's.
.PHONY: test-bench
test-bench: ## vet and test bench/hitratio's peers
	$(GO) vet -C bench/hitratio/peers ./...
	$(GO) test -C bench/hitratio/peers ./...

.PHONY: race
race: ## the tests of optcache's own packages under the race detector (needs a C compiler)
	$(GO) test -race -timeout 40m $(RACE_PKGS)

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

.PHONY: soak
soak: ## a server between clients and faulty upstreams, for SOAK
	OPTCACHE_SOAK=$(SOAK) $(GO) test -count 1 -run '^TestSoak$$' -timeout 0 -v ./test

.PHONY: image
image: build ## a container image, IMAGE=name:tag; needs buildah: apt-get install buildah libcap2-bin
	deploy/image.sh $(IMAGE)

.PHONY: clean
clean: ## remove what build made
	rm -rf bin

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
