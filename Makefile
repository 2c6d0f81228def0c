# `make` lists the targets. Each of them installs what it needs first, into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(INSTALLED) ## Make .venv and install fastvlm into it; the other targets do this too
	@:

.PHONY: demo
demo: $(INSTALLED) ## See fastvlm at work on a small model that comes with it
	@$(BIN)/fastvlm demo

.PHONY: serve
serve: $(INSTALLED) ## Serve the example model with OpenAI's API, and a page to try it on
	@$(BIN)/fastvlm serve

# A process for each core, with one thread: models this small gain nothing from a second one. A file's
# tests stay together, for the models that they share, and files keep their order, the longest first.
.PHONY: test
test: $(INSTALLED) ## Run the fast tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: test-slow
test-slow: $(INSTALLED) ## Run the slow tests
	@$(BIN)/python -m pytest -m slow

# Where torchao is installed, transformers loads it, and it complains of the CUDA that isn't there.
.PHONY: test-torchao
test-torchao: $(INSTALLED) ## Run the tests of int8 weights, for which torchao is put aside
	@test -d $(VENV)/aside/torchao || $(PIP) install --no-deps --target $(VENV)/aside torchao==0.18.0
	@PYTHONPATH=$(VENV)/aside $(BIN)/python -m pytest -k torchao tests/language/test_placement.py tests/language/test_quantised.py

# They drive the Chromium that is installed; axe-core and the JavaScript client come by npm.
.PHONY: test-page
test-page: $(INSTALLED) ## Run the tests of the server's page in Chromium, and of the JavaScript client
	@test -d $(VENV)/aside/playwright || $(PIP) install --target $(VENV)/aside/playwright playwright==1.65.2
	@PYTHONPATH=$(VENV)/aside/playwright $(BIN)/python -m pytest -m slow tests/serving

.PHONY: package
package: $(INSTALLED) ## Build the wheels, check them, and use fastvlm's alone in a clean environment
	@.ci/package

.PHONY: docs
docs: $(INSTALLED) ## Build the documentation into site/
	@$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.PHONY: check
check: $(INSTALLED) ## Check format, style and types
	@$(BIN)/ruff format --check --quiet || { echo "Some files are not formatted: run make format."; exit 1; }
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy --no-error-summary

.PHONY: format
format: $(INSTALLED) ## Format the code, and mend the style where that is safe
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format --quiet

.PHONY: benchmark
benchmark: $(INSTALLED) ## Measure every decoding strategy in one run
	@$(BIN)/fastvlm benchmark

# torch goes first and by its exact version. Left to the resolver, "torch>=2.6" is the newest
# release, and on Linux its usual build brings several GB of CUDA packages along; the exact version
# also matches the CPU build of that release (2.13.0+cpu) wherever pip is set up to find one, and
# prefers it. The second command then finds torch installed and leaves it alone.
$(INSTALLED): pyproject.toml packages/example-model/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastvlm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1). Try make PYTHON=python3.11."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing fastvlm into $(VENV); the first time takes a few minutes."
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@$(PIP) install --constraint constraints.txt --editable '.[dev]' --editable packages/example-model
	@touch $@
