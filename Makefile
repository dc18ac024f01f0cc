SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers often set it; each of the many processes of a run would then compile all that it imports of this checkout.
export PYTHONDONTWRITEBYTECODE :=

# Files side by side, tests with Ray clusters after one another and first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --no-loadscope-reorder
FAST := -m "not slow and not browser and not gpu"

.PHONY: help demo test coverage test-slow test-cpus lint types hooks bench serve ui clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)-run ## the whole workflow on the built-in Fashion-MNIST model
	$(BIN)/python workflow.py fashion

test: $(STAMP)-test ## the fast tests
	$(PYTEST) $(FAST)

# A target of its own, since it costs the numeric tests half as much time again. Ray's processes are not traced.
coverage: $(STAMP)-test ## the fast tests, and how much of the code they run
	$(PYTEST) $(FAST) --cov --cov-report=term:skip-covered

test-slow: $(STAMP)-test ## the slow and the browser tests
	$(PYTEST) -m "slow or browser" || { code=$$?; [ $$code -eq 5 ] || exit $$code; }

test-cpus: $(STAMP)-test ## the numeric tests with the kernels of other CPUs
	$(BIN)/python -m tests.cpus

lint: $(STAMP)-dev ## ruff: rules and format; codespell; import-linter: which way imports go
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/pre-commit validate-config

types: $(STAMP)-dev ## mypy
	$(BIN)/mypy harmonica pipelines workflow.py

hooks: $(STAMP)-dev ## check what is committed and pushed, from now on (pre-commit)
	$(BIN)/pre-commit install

bench: $(STAMP)-test ## measure, and compare with the numbers to beat
	$(BIN)/python -m tests.benchmarks

.PHONY: docs
docs: $(STAMP)-docs ## the documentation, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml

# On top of what the commands need, since the pages on the APIs are made from the code.
$(STAMP)-docs: $(STAMP)-run
	$(BIN)/python -m pip install -q -c cluster/constraints.txt -e '.[docs]'
	@touch $@

serve: $(STAMP)-run ## the HTTP endpoint
	$(BIN)/python -m pipelines.serve

ui: $(STAMP)-run ## the MLflow UI over the local runs
	$(BIN)/python -m pipelines.ui

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .coverage
	find harmonica pipelines tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: name a newer one, as in: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

EXTRAS_run := all
EXTRAS_test := all,test
EXTRAS_dev := all,test,dev

# pip's some 600 lines are cut down to the packages large enough to wait for. It would compile one file after
# another, a third of the whole time: all cores do that afterwards. Files that do not compile are not meant to.
$(STAMP)-run $(STAMP)-test $(STAMP)-dev: $(STAMP)-%: pyproject.toml setup.py cluster/constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (the first time: some minutes, 2 to 6 GB with torch) ..."
	@$(BIN)/python -u -m pip install --progress-bar off --no-compile -c cluster/constraints.txt \
	  -e '.[$(EXTRAS_$*)]' | awk \
	  '/^ *(Downloading|Using cached) .*MB\)/ { sub(/.*\//, "", $$(NF-2)); print "  " $$(NF-2), $$(NF-1), $$NF; fflush() } \
	   /^Installing collected/ { print "  Installing", NF - 3, "packages"; fflush() }'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@ $(STAMP)-run $(if $(filter dev,$*),$(STAMP)-test)

