# Every target that runs Python first brings .venv up to date (scripts/venv.py): minutes
# when it is missing or stale, a blink when it is not.

PYTHON ?= python3
BIN := .venv/bin

# Where bytecode is not written (containers set that), every rank, gateway and torchrun
# compiles the thousands of modules of torch and vLLM anew: half of its start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow gpu check format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

venv:  ## build .venv when it is missing or stale
	@$(PYTHON) scripts/venv.py

demo: venv  ## two ranks, real text, three layouts, one set of processes
	@$(BIN)/python -m examples.demo

test: venv  ## the default test run (minutes)
	$(BIN)/python -m pytest

test-slow: venv  ## the tests marked slow
	$(BIN)/python -m pytest -m slow

gpu:  ## what this machine's GPUs or NPUs allow (PYTHON=...: an environment with torch)
	@$(PYTHON) scripts/gpu.py

check: venv  ## format, lint, types, import rules, unit tests (seconds)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/unit

format: venv  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

clean:  ## remove caches and build outputs (not .venv: delete that by hand)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
