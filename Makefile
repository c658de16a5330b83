PY ?= python3.11
LOCK := requirements/cpu.lock
TORCH := $(shell grep '^torch==' $(LOCK))

# pip first, as the machine is configured; PyTorch's own CPU index, which uv knows by name, where that has no CPU build.
.venv/.ready: $(LOCK) pyproject.toml
	$(PY) -m venv .venv
	.venv/bin/pip install -q --no-deps '$(TORCH)' \
	  || (.venv/bin/pip install -q uv && .venv/bin/uv pip install --python .venv/bin/python --no-deps --torch-backend cpu '$(TORCH)')
	.venv/bin/pip install -q --no-deps -r $(LOCK)
	.venv/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

.PHONY: lock
lock: # rewrites the lock from pyproject.toml
	uv pip compile -q pyproject.toml --extra cpu --extra dev --python-version 3.11 --no-emit-find-links --no-emit-index-url --no-annotate --no-header -o $(LOCK)
