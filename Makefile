# `make` alone lists the targets. Everything is installed into $(VENV), nothing outside of it.

PYTHON ?= python3
VENV ?= .venv
# Two workers: most of a test's time is tracing, which uses one core.
PYTEST_ARGS ?= -n 2 --dist loadscope

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
NEED_PYTHON := import sys; sys.version_info >= (3, 11) or sys.exit( \
  "Python 3.11 or newer is needed, this is %d.%d: try make PYTHON=python3.12 ..." % sys.version_info[:2])

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-full docs check clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'

quickstart: $(VENV)/.installed ## install, then train a teacher and distil it on digits, on a CPU
	$(BIN)/python -m dimo_jax.main --config=configs/digits.py --workdir=runs/digits

install: $(VENV)/.installed ## create the virtual environment (PYTHON=python3.12 VENV=.venv)
	@echo "Installed; next: . $(VENV)/bin/activate"

test: $(VENV)/.installed-dev ## run the test suite (PYTEST_ARGS="-k name")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: $(VENV)/.installed-dev ## run also the slow tests: full-size models, soaks, studies
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow or not slow" --timeout 0

docs: $(VENV)/.installed-docs ## build the documentation into site/; a broken link is an error
	$(BIN)/mkdocs build --strict

check: $(VENV)/.installed-dev docs ## lint, format and type checks, requirements up to date, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/requirements.py --check

clean: ## remove the virtual environment and caches (never runs/)
	rm -rf $(VENV) .ci/venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps exist only while the environment is whole: each recipe removes them first and makes
# them last, so an interrupted install starts again from an empty environment.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c '$(NEED_PYTHON)'
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@ $(VENV)/.installed-dev $(VENV)/.installed-docs
	@echo "Installing into $(VENV), about a minute and 1.2 GB ..."
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --config-settings editable_mode=compat -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@rm -f $@ $(VENV)/.installed
	@$(PIP) install -r requirements-dev.txt
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev requirements-docs.txt
	@rm -f $@ $(VENV)/.installed $(VENV)/.installed-dev
	@$(PIP) install -r requirements-docs.txt
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@
