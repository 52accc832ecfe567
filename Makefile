# `make` lists the targets. Needed: Python 3.11 or newer, make. Everything else goes into .venv, here.

# The first of these that runs and is new enough; choose another one with PYTHON=…
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif
endif

VENV ?= .venv
BENCH_VENV ?= .venv-bench
PYTEST_ARGS ?=
BENCH_ARGS ?=
PROFILE_ARGS ?=

CONSTRAINTS := .ci/constraints.txt
# A stamp stands for one installed extra; it is renewed when one of these changes.
INPUTS := pyproject.toml $(CONSTRAINTS)
# $(call install,<venv>,<what>)
install = echo 'Installing $(2) into $(1) (minutes, the first time)' && \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(2)

# Two processes: one for the tests that start Ray, one for the others (tests/conftest.py). Alone: PYTEST_ARGS="-n 0".
PYTEST = -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo examples test test-fast test-versions lint bench profile docs build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-examples ## train a small network on Ray and show its spectra
	@$(VENV)/bin/python examples/quickstart.py

examples: $(VENV)/.stamp-examples ## run every example
	@set -e; for f in examples/*.py; do echo "== $$f"; $(VENV)/bin/python "$$f"; done

test: $(VENV)/.stamp-test ## all tests; PYTEST_ARGS="-k moments" for some of them
	@$(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.stamp-test ## the tests that take no more than a few seconds
	@$(VENV)/bin/python $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-versions: ## the integration tests with other versions: RAY=2.51.0 TORCH=2.9.1
	@test -n "$(RAY)" -a -n "$(TORCH)" || { echo "Say which: make test-versions RAY=2.51.0 TORCH=2.9.1" >&2; exit 1; }
	@$(PYTHON) -m venv .venv-ray$(RAY)-torch$(TORCH)
	@echo 'Installing ray $(RAY) and torch $(TORCH) into .venv-ray$(RAY)-torch$(TORCH) (minutes)'
	@.venv-ray$(RAY)-torch$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	@.venv-ray$(RAY)-torch$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==$(TORCH) 'ray[train,tune]==$(RAY)' -e '.[test]'
	@.venv-ray$(RAY)-torch$(TORCH)/bin/python -m pytest tests/integration $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint ## ruff check, ruff format --check, mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

bench: $(BENCH_VENV)/.stamp-bench ## measure against delve 0.1.50, in .venv-bench; BENCH_ARGS="…"
	@$(BENCH_VENV)/bin/python -m tests.benchmarks.run $(BENCH_ARGS)

profile: $(BENCH_VENV)/.stamp-bench ## show where the time of the hooks goes; PROFILE_ARGS="…"
	@$(BENCH_VENV)/bin/python -m tests.benchmarks.profile $(PROFILE_ARGS)

docs: $(VENV)/.stamp-docs ## the API reference as HTML, into build/docs/
	@$(VENV)/bin/python docs/reference.py build/docs
	@echo "build/docs/index.html"

build: $(VENV)/.stamp-build ## wheel and sdist, into dist/
	@rm -rf dist
	@$(VENV)/bin/python -m build --no-isolation --outdir dist .

clean: ## remove what make made: environments, builds, caches
	@rm -rf $(VENV) $(BENCH_VENV) .venv-ray* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find delve_ray tests examples -type d -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and pinned, so that nothing else chooses its build.
%/.stamp-torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "delve_ray needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@$(PYTHON) -m venv $* || { \
		echo "Could not make a virtual environment; on Debian and Ubuntu, install python3-venv." >&2; exit 1; }
	@$(call install,$*,torch)
	@touch $@

%/.stamp-build: %/.stamp-torch $(INPUTS)
	@$(call install,$*,build hatchling)
	@touch $@

# The extra is the stamp's name.
$(foreach extra,examples test lint docs,$(VENV)/.stamp-$(extra)): $(VENV)/.stamp-%: $(VENV)/.stamp-torch $(INPUTS)
	@$(call install,$(VENV),-e ".[$*]")
	@touch $@

$(BENCH_VENV)/.stamp-bench: $(BENCH_VENV)/.stamp-torch $(INPUTS)
	@$(call install,$(BENCH_VENV),-e ".[bench]")
	@touch $@

.PRECIOUS: %/.stamp-torch
