# vpMoE. `make quickstart` trains a nano vpMoE from nothing; `make test` runs the suite. Both do their own set-up.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Files side by side, in the order of the command: the longest, which start processes of their own, come first.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup quickstart rl-nano distil-nano nano-moe think-nano ladder-nano docs docs-serve test test-unit check format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with exact versions (torch first)

$(STAMP): requirements/lock.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed ($(PYTHON) not found); name yours: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "==> virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> torch 2.13.0 (first, by exact version: others would pull in another build)"
	@$(BIN)/pip install -qq torch==2.13.0
	@echo "==> the rest, exact versions from requirements/lock.txt (about a minute)"
	@$(BIN)/pip install -qq -r requirements/lock.txt
	@$(BIN)/pip install -qq --no-deps --editable .
	@touch $@

quickstart: setup  ## data, training, evaluation and a report of a nano vpMoE, on two CPU cores
	@$(BIN)/vpmoe quickstart

rl-nano: setup  ## a nano vpMoE short of mastery, then rewards (GRPO) and preferences (DPO) from its weights
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/vpmoe rl-nano

distil-nano: setup  ## a teacher, and students of it: texts alone, its top K stored and live, and their own words
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/vpmoe distil-nano

nano-moe: setup  ## a story model from nothing: tokenizer, pretraining, SFT, DPO, evaluation and a report
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/vpmoe nano-moe

think-nano: setup  ## experts of three kinds on five domains, alone and behind one router, and a report
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/vpmoe think-nano

ladder-nano: setup  ## all six rungs and the three stages of distillation, from a tiny Qwen3 that it trains first
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/vpmoe ladder configs/nano/ladder.toml

test: setup  ## the whole suite
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/crash tests/golden tests/distributed tests/app tests/gpu_shape tests/parity tests/commands tests/unit

test-unit: setup  ## the quick part of it
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit -m "not slow"

check: setup  ## lint, types, layering
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/python -m pytest -q tests/unit/test_layering.py

format: setup  ## rewrite in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Without the theme's notice of what its authors build next. Not --quiet: what is not told is not counted as an error.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: setup  ## the site of docs/ and of both packages: site/index.html; a link that leads nowhere is an error
	@$(BIN)/mkdocs build --strict

docs-serve: setup  ## the same at http://127.0.0.1:8000, built anew as pages change
	@$(BIN)/mkdocs serve

bench: setup  ## every benchmark in scripts/bench but regress.py, which wants a commit to compare with
	@for bench in $$(grep -l __main__ scripts/bench/*.py | grep -v /regress.py); do echo "==> $$bench"; $(BIN)/python $$bench || exit 1; done

clean:  ## remove caches; runs, data, models, reports and profiles are yours
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
