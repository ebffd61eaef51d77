# dindpool's recipes. `make` alone lists them. CI runs the very same ones.
#
# ARGS=…   further arguments: of `dindpool up` (make up), of the side-by-side benches (make bench), of `docker build`
#          (make image)
# IMAGE=dindpool:0.1.0, BINARY=target/release/dindpool, RUST_IMAGE=…, PUSH=1   make image: scripts/image tells them
# ONCE=1   make up: stop after the demonstration
# FUZZ_SECONDS=60, FUZZ_TARGETS=…   make fuzz: how long for each target, and which ones
# CI=true  make test: a skipped test is a failed run, and what is built is kept outside the clone

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dindpool
PARTS := $(or $(DINDPOOL_PARTS),$(CACHE)/parts)
DENY_VERSION := 0.20.2
DENY := $(CACHE)/tools/bin/cargo-deny
FUZZ_VERSION := 0.13.2
FUZZ := $(CACHE)/tools/bin/cargo-fuzz
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
# Coverage instrumentation is an unstable flag of the stable compiler.
FUZZ_RUN := RUSTC_BOOTSTRAP=1 nice -n 5 $(FUZZ)

# A CI system makes a new clone for each run: there, what is built outlives the clone.
ifeq ($(CI),true)
export CARGO_TARGET_DIR ?= $(CACHE)/target
export CARGO_INCREMENTAL ?= 0
endif

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: up
up: ## install what is missing, start a pool here, build and run through it (ARGS=…, ONCE=1)
	@scripts/up $(ARGS)

.PHONY: test
test: ## everything: format, lints, docs, licences, unit tests, real daemons and clients (root)
	@scripts/test

.PHONY: soak
soak: ## hours: 100,000 simulated seeds, the failure suite 20 times, 10 minutes of random work and faults (root)
	@scripts/soak

.PHONY: bench
bench: ## engine and relay benches, and the relay beside other proxies (minutes)
	nice -n 5 cargo bench
	@if [ -x benches/run ]; then benches/run $(ARGS); fi

.PHONY: build
build: ## the release binary
	cargo build --release --locked

.PHONY: fmt
fmt: ## format the source
	cargo fmt --all

.PHONY: fmt-check
fmt-check: ## fail where the source is not formatted
	cargo fmt --all --check

.PHONY: lint
lint: ## clippy on every target, and shellcheck if it is there; a warning is a fault
	cargo clippy --locked --all-targets -- -D warnings
	@if command -v shellcheck >/dev/null; then shellcheck scripts/up scripts/test scripts/soak scripts/manifests scripts/image deploy/rootfs .ci/run tests/parts/install \
		tests/cluster/cluster tests/cluster/images deploy/prestop.sh; \
	else echo "shellcheck is not installed: scripts were not checked (apt-get install shellcheck)"; fi

.PHONY: doc
doc: ## the library's documentation; a broken link is a fault
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

.PHONY: image
image: ## dindpool's image, from source or around BINARY=FILE (IMAGE=…, PUSH=1, RUST_IMAGE=…)
	@IMAGE='$(IMAGE)' BINARY='$(BINARY)' PUSH='$(PUSH)' RUST_IMAGE='$(RUST_IMAGE)' scripts/image $(ARGS)

.PHONY: manifests
manifests: ## deploy/kubernetes/ from the chart in helm/
	scripts/manifests

.PHONY: deny
deny: $(DENY) ## licences, bans and sources of all dependencies (deny.toml)
	$(DENY) --locked check --hide-inclusion-graph licenses bans sources

# Minutes, once for each user: beside other work, so with the least priority.
$(DENY):
	nice -n 15 cargo install --locked --root $(CACHE)/tools cargo-deny@$(DENY_VERSION)

# What a run finds stays outside the clone, beside the corpus; what breaks a rule is in fuzz/artifacts. No sanitizer:
# what is fuzzed is safe Rust.
.PHONY: fuzz
fuzz: $(FUZZ) ## any bytes against the rules of src/fuzzing/, a minute for each target (FUZZ_SECONDS=…)
	for target in $(FUZZ_TARGETS); do \
		mkdir -p $(CACHE)/fuzz/$$target; \
		$(FUZZ_RUN) run -s none $$target $(CACHE)/fuzz/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=10 -print_final_stats=1; \
	done

.PHONY: fuzz-corpus
fuzz-corpus: $(FUZZ) ## what the runs of make fuzz have found into the corpus: whatever reaches more code
	for target in $(FUZZ_TARGETS); do \
		$(FUZZ_RUN) run -s none $$target fuzz/corpus/$$target $(CACHE)/fuzz/$$target -- \
			-merge=1 -use_counters=0 -max_len=4096; \
	done

$(FUZZ):
	nice -n 15 cargo install --locked --root $(CACHE)/tools cargo-fuzz@$(FUZZ_VERSION)

.PHONY: parts
parts: ## the real daemons and clients that the tests run against
	tests/parts/install

.PHONY: clean-parts
clean-parts: ## remove them again
	@test -d "$(PARTS)/lock" || { echo "no parts in $(PARTS)"; exit 0; }; echo rm -rf "$(PARTS)"; rm -rf "$(PARTS)"
