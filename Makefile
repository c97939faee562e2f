# Everything a developer does, by name. Each target does its own set-up: `make run` and `make test` work from a clone.
#
#   make PYTHON=/path/to/python3 ...   use this Python for .venv (default: see scripts/find-python)
#   make test PYTEST="-k retry -x"     pass options on to pytest

VENV ?= .venv
PYTEST ?=
# Of `make test`: most tests wait for other processes, so more than there are cores.
PROCESSES ?= 4
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --require-hashes --requirement
.DEFAULT_GOAL := help
.SUFFIXES:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: $(VENV)/.installed ## Start Postgres, Redis, scheduler, workers and Flower here (ARGS="--workers 4" for options)
	@$(BIN)/dflow standalone $(ARGS)

.PHONY: test
test: $(VENV)/.installed-dev ## Run all tests: unit, property, integration and faults
	$(BIN)/python -m pytest tests --numprocesses $(PROCESSES) --dist worksteal $(PYTEST)

.PHONY: unit
unit: $(VENV)/.installed-dev ## Run the tests that need nothing
	$(BIN)/python -m pytest tests/unit tests/property $(PYTEST)

.PHONY: integration
integration: $(VENV)/.installed-dev ## Run the tests with the real Postgres, Redis and processes
	$(BIN)/python -m pytest tests/integration $(PYTEST)

.PHONY: faults
faults: $(VENV)/.installed-dev ## Run the tests that kill processes and cut servers off
	$(BIN)/python -m pytest tests/faults $(PYTEST)

.PHONY: lint
lint: $(VENV)/.installed-dev ## Check style, format and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: types
types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

.PHONY: fmt
fmt: $(VENV)/.installed-dev ## Format the code and mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.installed ## Write the generated pages of docs/ anew
	$(BIN)/python scripts/generate_docs.py

.PHONY: picture
picture: $(VENV)/.installed ## Draw docs/images/standalone.svg anew, from a real run
	$(BIN)/python scripts/draw_standalone.py

.PHONY: bench
bench: $(VENV)/.installed ## Measure against raw Celery in the same run (ARGS="--rounds 5" for options)
	$(BIN)/python -m benchmarks.run $(ARGS)

.PHONY: wheel
wheel: $(VENV)/.installed-dev ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

.PHONY: lock
lock: ## Choose new versions for both lock files (needs uv)
	uv pip compile pyproject.toml $(LOCK_OPTIONS) --extra embedded --group build --output-file requirements.lock
	uv pip compile pyproject.toml $(LOCK_OPTIONS) --extra embedded --group dev --constraint requirements.lock \
		--output-file requirements-dev.lock
LOCK_OPTIONS := --universal --python-version 3.11 --generate-hashes --upgrade --no-emit-index-url --no-annotate \
	--custom-compile-command "make lock" --quiet

.PHONY: clean
clean: ## Remove what was built and cached, .venv too
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment, exactly as locked. Stamps tell what is in it.

$(BIN)/python:
	@python=$${PYTHON:-$(PYTHON)}; python=$${python:-$$(scripts/find-python)} && \
		echo "Creating $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing what requirements.lock says into $(VENV) ..."
	@$(INSTALL) requirements.lock
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "Installing what requirements-dev.lock says into $(VENV) ..."
	@$(INSTALL) requirements-dev.lock
	@touch $@
