# Two commands do everything: `make chat` and `make test`. Nothing is installed outside $(VENV).
PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install

MAKEFLAGS += --no-print-directory
.PHONY: help chat test lint format clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

chat: $(VENV)/.installed ## talk with MODEL (default smollm2); also reads messages from a pipe
	@$(BIN)/fewfire chat $(MODEL)

test: $(VENV)/.installed-dev ## everything that CI checks: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

lint: $(VENV)/.installed-dev ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tools left behind (not the user's model cache)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second run instant. Messages go to stderr and stdin stays untouched, so that a pipe through
# `make chat` carries a message in and only the answer out.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' </dev/null || \
	  { echo "fewfire needs Python 3.10 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making a virtual environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV) </dev/null >&2
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	@echo "installing fewfire (once; a minute or two)" >&2
	@$(PIP) -e . </dev/null >&2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.python pyproject.toml
	@echo "installing fewfire with its test tools (once; some minutes)" >&2
	@$(PIP) -e '.[dev,peers]' </dev/null >&2
	@touch $@ $(VENV)/.installed
