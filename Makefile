SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 20s
SEEDS ?= 1 2 3
# The name of the image in the deploy files: the chart's default.
IMAGE ?= ghcr.io/larder-cache/larder:$(shell sed -n 's/^appVersion: *"\(.*\)"/\1/p' deploy/chart/Chart.yaml)
# Daemons are not in a user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/larder
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/larder ./cmd/larder

.PHONY: image
image: ## Build dist/larder-image.tar: amd64 and arm64, for ctr, podman or docker to load (IMAGE=name:tag)
	mkdir -p dist
	for arch in amd64 arm64; do CGO_ENABLED=0 GOOS=linux GOARCH=$$arch $(GO) build -trimpath -ldflags '$(LDFLAGS)' \
		-o dist/larder-linux-$$arch ./cmd/larder; done
	$(GO) run ./deploy/image -name $(IMAGE) -version $(VERSION) -out dist/larder-image.tar dist/larder-linux-amd64 dist/larder-linux-arm64

.PHONY: manifest
manifest: ## Write the plain manifests in deploy from the chart
	@PATH=$$(test/tools/install.sh deploy):$$PATH; for m in larder doctor cleanup; do \
		deploy/manifest.sh $$m > deploy/$$m.yaml.new; mv deploy/$$m.yaml.new deploy/$$m.yaml; done

.PHONY: demo
demo: build ## A pull storm on loopback: a registry and 8 nodes, then a table (DEMO_FLAGS=--stay)
	bin/larder demo $(DEMO_FLAGS)

.PHONY: check
check: lint unit ## gofmt, vet, linters, import directions and unit tests

.PHONY: unit
unit: ## Unit and integration tests at full size
	$(GO) test $$($(GO) list ./... | grep -v /test/cluster)
	$(GO) test -count=1 -timeout 30m ./test/cluster # alone: it counts what an outage in the middle of a storm costs

# The modules that hold code of ours; test/tools has the mains of two tools alone.
MODULES := . test/e2e test/deploy test/alerts

.PHONY: lint
lint: ## gofmt, vet and golangci-lint
	@out=$$(git ls-files '*.go' | xargs gofmt -l); [ -z "$$out" ] || { echo "gofmt: $$out"; exit 1; }
	@for module in $(MODULES); do (cd $$module && $(GO) vet ./...); done
	@tools=$$(test/tools/install.sh lint); config=$$PWD/.golangci.yml; \
	for module in $(MODULES); do (cd $$module && $$tools/golangci-lint run -c $$config ./...); done

.PHONY: test
test: export LARDER_E2E_RACE := 1
test: deps lint unit race deploy-test page-test e2e e2e-k8s ## Everything: installs what it needs (as root), then all tests

.PHONY: race
race: ## The same under the race detector, which multiplies time and memory: smaller storms
	GOTOOLCHAIN=go1.27.4 $(GO) test -race -short -timeout 30m ./peer # see bubble in peer/main_test.go
	$(GO) test -race -short -p 1 -timeout 30m $$($(GO) list ./... | grep -v /peer$$) # one after the other: tests with real time need both cores

.PHONY: e2e
e2e: ## Real containerd, podman, skopeo and registries (root)
	@LARDER_TOOLS_BIN=$$(test/tools/install.sh runtimes); export LARDER_TOOLS_BIN; \
	cd test/e2e && $(GO) test -count=1 -timeout 20m -skip '^TestKubernetes$$' ./...

.PHONY: e2e-k8s
e2e-k8s: image ## An installation from its first command to its last, on real Kubernetes (root)
	@LARDER_TOOLS_BIN=$$(for set in runtimes kubernetes deploy; do test/tools/install.sh $$set; done | paste -sd:); export LARDER_TOOLS_BIN; \
	cd test/e2e && $(GO) test -count=1 -timeout 15m -v -run '^TestKubernetes$$' .

.PHONY: deploy-test
deploy-test: ## The chart by Helm, every preset and switch; the alerts by Prometheus' engine
	@LARDER_TOOLS_BIN=$$(test/tools/install.sh deploy); export LARDER_TOOLS_BIN; \
	for module in test/deploy test/alerts; do (cd $$module && $(GO) test -count=1 ./...); done

.PHONY: page-test
page-test: build ## The page at admin.listen in headless Chromium, under load and idle (PAGE_FLAGS=-keep, -stay)
	@modules=$$(test/tools/install.sh page); $(GO) run ./test/page -larder bin/larder -modules $$modules $(PAGE_FLAGS)

.PHONY: deps
deps: ## Install what the tests run against (root, apt), or say what is missing
	@test/tools/deps.sh

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME (20s)
	@grep -rl --include='*_test.go' '^func Fuzz' . | while read -r file; do \
		for target in $$(grep -o '^func Fuzz[A-Za-z0-9_]*' $$file | cut -c6-); do \
			echo "$$target in $$(dirname $$file)"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$(dirname $$file) || exit 1; \
		done; \
	done

.PHONY: bench
bench: build ## One node beside nginx and docker-registry: throughput, requests, cold pulls, memory
	$(GO) run ./test/bench -larder bin/larder $(BENCH_FLAGS)

.PHONY: sim
sim: ## Storms of up to 1,000 simulated nodes, and 500 real members in one process (an hour)
	LARDER_SIM=1 $(GO) test ./peer -run 'TestStorm$$|FiveHundred' -v -timeout 90m

.PHONY: bad-days
bad-days: ## The bad days of test/cluster with other digests, so with other homes (SEEDS="1 2 3", five minutes each; root)
	for seed in $(SEEDS); do echo "seed $$seed"; LARDER_CLUSTER_SEED=$$seed $(GO) test -count=1 ./test/cluster; done

.PHONY: bench-storm
bench-storm: build ## Pull storms on shaped links in network namespaces (root)
	@tools=$$(test/tools/install.sh runtimes); $(GO) build -o bin/storm ./test/storm; \
	bin/storm -larder bin/larder -registry $$tools/registry $(STORM_FLAGS)
