# `make demo` and `make test` are all a newcomer needs: each sets up .venv by itself the first time.
# Variables: PYTHON=python3.12 (which Python makes .venv), V=1 (show what pip does), ARGS="-k gate -x" (for pytest).

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-ray sweep bench bench-run bench-gpu bench-placement chaos check fix clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip install $(if $(V),,-qq) --constraint constraints.txt
DEMO   := demo-out
MODEL  ?= fashion-dit
LABELS := t-shirt trouser pullover dress coat sandal shirt sneaker bag

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## ten garments with and without SpeCa, side by side, into demo-out/
	$(BIN)/speca generate fashion-dit $(LABELS:%=--label %) --label "ankle boot" \
		--n 10 --steps 50 --compare --out $(DEMO)
	@echo; echo "Look at:"; ls -1 $(DEMO)/grid.png $(DEMO)/timeline.png $(DEMO)/report.json

test: $(STAMP)  ## the test suite (ARGS="-m 'not slow'" for the quick part)
	$(BIN)/python -m pytest -q $(ARGS)

test-ray: $(STAMP)  ## the tests that start Ray on this machine (it is installed first; five minutes)
	@$(PIP) --editable '.[cluster]'
	$(BIN)/python -m pytest -q -m ray tests/cluster $(ARGS)

sweep: $(STAMP)  ## try every transformer class of diffusers and write docs/models.md (about a minute)
	PYTHONPATH=src:tests $(BIN)/python -W ignore -m sweep

bench: $(STAMP)  ## write docs/benchmarks.md, its pages and plots from the raw results in docs/results/bench/
	$(BIN)/python recipes/benchmarks.py

bench-run: $(STAMP)  ## measure anew: the full suite on MODEL=fashion-dit (up to two hours), then `make bench`
	$(BIN)/speca bench $(MODEL) --suite full --out bench-out/$(MODEL)
	@mkdir -p docs/results/bench && cp bench-out/$(MODEL)/results.jsonl docs/results/bench/$(MODEL).jsonl

bench-gpu: $(STAMP)  ## full-size models with random weights on one GPU, in nine minutes
	$(BIN)/python recipes/bench_gpu.py

bench-placement: $(STAMP)  ## time the search for full steps beside the exchange search (some ten minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python recipes/bench_placement.py

chaos: $(STAMP)  ## thousands of clients that leave and send what is wrong, kills and leaks, against a server (ten minutes)
	PYTHONPATH=src:tests $(BIN)/python -W ignore -m serve.chaos $(ARGS)

check: $(STAMP)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(STAMP)  ## let ruff put format and imports right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches, builds and demo-out (not .venv: delete that folder to install afresh)
	rm -rf build dist $(DEMO) .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than both files exactly when .venv holds what they ask for.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "This needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Python cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "[2/3] installing torch (a CPU build is a 190 MB download, one with CUDA several GB)"
	@$(PIP) torch
	@echo "[3/3] installing diffusers, the tools and speca itself (less than a minute)"
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps k-diffusion  # its samplers are tried in tests; what else it asks for would break diffusers
	@touch $@
