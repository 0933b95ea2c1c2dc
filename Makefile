# `make` lists what there is. PYTHON picks the interpreter (3.11 or newer), VENV the folder of the environment.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f 2>/dev/null)
# Results on the CPU depend on the number of threads; tests pin it.
THREADS ?= 1
TEST_ENV := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) MPLBACKEND=Agg
DEMO_OUT ?= runs/demo

.PHONY: help setup demo test test-slow lint format bench build clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

setup: $(STAMP)  ## the environment, with everything and the package itself in it (again only when it changed)

# torch comes first and alone: the build of the extension needs it, and the constraint keeps pip at the tested version.
$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py) $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("Expected Python 3.11 or newer, but got %d.%d; pass PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[data,cli,report,text,test,dev]"
	@touch $@

demo: $(STAMP)  ## DynFed against float32 FedAvg on digits, 20 clients: a table and a figure in a minute or two
	$(BIN)/dynfed compare benchmarks/configs/digits-fedavg.yaml benchmarks/configs/digits-dynfed.yaml --out $(DEMO_OUT)

test: $(STAMP)  ## the fast tests
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: $(STAMP)  ## the tests that take longer, and those that need a GPU where there is one
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "slow or gpu"

lint: $(STAMP)  ## format, lint and types, checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into the one format
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the kernels against memcpy and torch
	$(BIN)/python benchmarks/kernels.py

build: $(STAMP)  ## the source archive and the wheel, in dist/
	rm -rf build dist
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
	@ls -l dist

clean:  ## remove what was built; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dynfed_lightning kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f dynfed_lightning/*.so $(STAMP)
