# Two commands do everything on a fresh machine with Python 3.10 to 3.12; each creates .venv and installs first, once:
#
#     make run     run the main job: soflowctl run sweeps/digits.yaml
#     make test    run the tests
#
# `make help` lists the others.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# One thread for each process: networks of tests are small. Modules are compiled once for the hundreds of processes that tests start.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Tests run in so many processes, a file's tests in one of them, the longest files first: three keep two cores busy, for one often
# waits. The slow ones need the memory of two. `make test JOBS=0` runs them in one.
JOBS ?= 3
SHARED = -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: run test test-slow test-faults test-all bench lint format wheel clean help

run: .venv/.installed
	@echo "run: soflowctl run sweeps/digits.yaml"
	@$(BIN)/soflowctl run sweeps/digits.yaml

test: .venv/.installed
	@echo "test: everything but what is marked slow or faults"
	@$(PYTEST) $(SHARED) -m "not slow and not faults"

test-slow: JOBS = 2
test-slow: .venv/.installed
	@echo "test-slow: the longer checks"
	@$(PYTEST) $(SHARED) -m slow

test-faults: .venv/.installed
	@echo "test-faults: kills processes, nodes and servers"
	@$(PYTEST) -m faults

test-all: .venv/.installed
	@$(MAKE) lint test test-slow test-faults

bench: .venv/.installed
	@echo "bench: every benchmark in a small form, compared with the newest of benchmarks/results"
	@$(BIN)/python benchmarks/all.py

lint: .venv/.installed
	@echo "lint: ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel: .venv/.installed
	@$(BIN)/python -m build --wheel --outdir dist .

clean:
	@rm -rf .venv dist build

help:
	@echo "run  test  test-slow  test-faults  test-all (lint and every test)  bench  lint  format  wheel  clean"

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "install: no Python 3.10 to 3.12 found; install one or set PYTHON=/path/to/python" >&2; exit 2; }
	@echo "install: creating .venv and installing soflow with its pinned dependencies (a few minutes, about 7 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
