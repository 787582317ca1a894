# make demo: see everything once.  make test: every test.  make check: what a commit must pass.
PYTHON ?= python3
BIN := .venv/bin
# A file of tests a core; one thread each, since workers that share cores wait for each other's threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test check lock clean

help:
	@echo "make install   create .venv with the locked dependencies"
	@echo "make demo      train, serve, swap and A/B-test adapters on the example data (FRESH=1 trains again)"
	@echo "make check     formatter, linter, types, import rules, fast tests"
	@echo "make test      every test"

install: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock
	@echo "Installing the locked dependencies into .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Hotswap needs Python 3.11 or newer, this is " + sys.version'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/hotswap demo $(if $(FRESH),--fresh)

test: install
	$(PYTEST)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not e2e"

# The versions that this environment holds become the lock; a CPU build's local label would tie it to one machine.
lock: install
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > requirements.lock

clean:
	rm -rf .venv .cache build dist *.egg-info
