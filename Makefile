SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 20s
# Daemons are not in a user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/larder
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/larder ./cmd/larder

.PHONY: demo
demo: build ## A pull storm on loopback: a registry and 8 nodes, then a table (DEMO_FLAGS=--stay)
	bin/larder demo $(DEMO_FLAGS)

.PHONY: check
check: lint unit ## gofmt, vet, linters, import directions and unit tests

.PHONY: unit
unit: ## Unit and integration tests at full size
	$(GO) test $$($(GO) list ./... | grep -v /test/cluster)
	$(GO) test ./test/cluster # alone: it counts what an outage in the middle of a storm costs

# Both modules that hold code of ours; test/tools has none.
.PHONY: lint
lint: ## gofmt, vet and golangci-lint
	@out=$$(git ls-files '*.go' | xargs gofmt -l); [ -z "$$out" ] || { echo "gofmt: $$out"; exit 1; }
	$(GO) vet ./... && cd test/e2e && $(GO) vet ./...
	@tools=$$(test/tools/install.sh lint); config=$$PWD/.golangci.yml; \
	for module in . test/e2e; do (cd $$module && $$tools/golangci-lint run -c $$config ./...); done

.PHONY: test
test: export LARDER_E2E_RACE := 1
test: deps lint unit race e2e page-test ## Everything: installs what it needs (as root), then all tests

.PHONY: race
race: ## The same under the race detector, which multiplies time and memory: smaller storms
	$(GO) test -race -short ./...

.PHONY: e2e
e2e: ## Real containerd, podman, skopeo and registries (root)
	@LARDER_TOOLS_BIN=$$(test/tools/install.sh runtimes); export LARDER_TOOLS_BIN; \
	cd test/e2e && $(GO) test -count=1 -timeout 20m ./...

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
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$(dirname $$file); \
		done; \
	done

.PHONY: bench
bench: build ## One node beside nginx and docker-registry: throughput, requests, cold pulls, memory
	$(GO) run ./test/bench -larder bin/larder $(BENCH_FLAGS)

.PHONY: sim
sim: ## Storms of up to 1,000 simulated nodes, and 500 real members in one process (an hour)
	LARDER_SIM=1 $(GO) test ./peer -run 'TestStormOfThousand|FiveHundred' -v -timeout 90m

.PHONY: bench-storm
bench-storm: build ## Pull storms on shaped links in network namespaces (root)
	@tools=$$(test/tools/install.sh runtimes); $(GO) build -o bin/storm ./test/storm; \
	bin/storm -larder bin/larder -registry $$tools/registry $(STORM_FLAGS)
