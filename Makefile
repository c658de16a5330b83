# make demo   calibrate, serve, ask, measure, stop (PORT=8000)
# make serve  calibrate, serve, stay up until Ctrl-C (PORT=8000)
# make types  check the types
# make test   lint and tests
# make tradeoff  redraw the figure of the README
# make bench-calibration  what the README says of calibration's speed and memory (25 minutes, idle machine)
# make soak   kill, replace and fuzz what serves the example, under load (25 minutes; installs schemathesis in .venv-soak)
# make check-deploy CRDS=FOLDER  deploy/kubernetes against the operator's custom resource definitions in FOLDER
# make lock   rewrite the lock from pyproject.toml
# Each makes .venv first if it is missing.

PYTHON ?= python3.11
PORT ?= 8000
TORCH_FROM ?= --torch-backend cpu # where uv looks for the CPU build of torch when it writes the lock
LOCK := requirements/cpu.lock
TORCH := $(shell grep '^torch==' $(LOCK))
BIN := .venv/bin
SCHEMATHESIS := 4.32.5

.PHONY: demo serve types test tradeoff bench-calibration soak check-deploy lock clean

demo: .venv/.ready
	$(BIN)/python -m examples.demo --port $(PORT)

serve: .venv/.ready
	$(BIN)/python -m examples.demo --port $(PORT) --keep-serving

types: .venv/.ready
	$(BIN)/ty check

test: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

tradeoff: .venv/.ready
	$(BIN)/python -m benchmarks.tradeoff

bench-calibration: .venv/.ready
	$(BIN)/python -m benchmarks.calibration

soak: .venv/.ready .venv-soak/.ready-$(SCHEMATHESIS)
	$(BIN)/python -m tests.soak.survival
	$(BIN)/python -m tests.soak.fuzz --schemathesis .venv-soak/bin/st

check-deploy: .venv/.ready
	$(BIN)/python -m deploy.check $(CRDS)

.venv-soak/.ready-%:
	$(PYTHON) -m venv .venv-soak
	.venv-soak/bin/pip install -q schemathesis==$*
	touch $@

# Torch comes first: from wherever pip is told to look if that has the CPU build, else from PyTorch's own CPU index, which
# uv knows by name. The lock is whole, so nothing pulls in a requirement that it leaves out (cpu.exclude).
.venv/.ready: $(LOCK) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-deps '$(TORCH)' || { $(BIN)/pip install -q uv && \
	  $(BIN)/uv pip install -q --python $(BIN)/python --no-deps --torch-backend cpu '$(TORCH)'; }
	$(BIN)/pip install -q --no-deps -r $(LOCK)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

lock:
	uv pip compile -q pyproject.toml --extra cpu --extra dev --python-version 3.11 --no-annotate --no-header \
	  --excludes requirements/cpu.exclude $(TORCH_FROM) -o $(LOCK)

clean:
	rm -rf .venv .venv-soak build
