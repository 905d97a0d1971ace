# make ablation [EXPERIMENT=quick]   the whole experiment: table and figures
# make figures [EXPERIMENT=quick]    only the figures, from scores that are there
# make test, make lint               what CI runs
# make test-slow                     tests that load the bundled teacher or take minutes
# make evidence                      docs/evidence.md, from the tests of every method (minutes)
# make bench [ROWS=FILE.jsonl]       timings side by side with public trainers, results/bench and docs/performance.md
# make clean                         removes .venv and caches; never results

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
EXPERIMENT ?=
ROWS ?=
FILE = $(if $(EXPERIMENT),config/experiments/$(EXPERIMENT).yaml,config/config.yaml)
CONFIG = $(if $(EXPERIMENT),--config experiment=$(FILE))
BIN := $(CURDIR)/.venv/bin
READY := .venv/.installed
EVIDENCE := $(addprefix tests/,methods test_seqkd.py test_student_text_schedules.py test_every_arm.py) $(addprefix \
  tests/distill/test_,approaches.py onpolicy.py onpolicy_loss.py resume.py)
BENCH := .venv/.installed-bench
export PATH := $(BIN):$(PATH)

.PHONY: help ablation figures test test-slow evidence bench lint clean

help:
	@sed -n 's/^# make/make/p' Makefile

# PyPI's torch for Linux needs its CUDA libraries, which the lock leaves out because other builds have none.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/python -m pip install --constraint requirements.lock torch
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Without their dependencies: what the benchmarks use of them needs nothing beyond the lock.
$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps trl==1.16.0 liger-kernel==0.8.5
	touch $@

ablation: $(READY)
	entkd unlock
	snakemake --cores all $(CONFIG)

figures: $(READY)
	entkd unlock
	snakemake --cores 1 $(CONFIG) -- figures

# Two workers of one thread each beat one of two threads, and more would not fit into a laptop's memory.
test: export OMP_NUM_THREADS := 1
test: $(READY)
	python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)
	python -m pytest -m slow

evidence: export OMP_NUM_THREADS := 1
evidence: $(READY)
	python -m pytest --evidence docs/evidence.md $(EVIDENCE)

# One thing at a time: whatever runs beside it is measured too.
bench: $(BENCH)
	python -m benchmarks.step --precision bf16 fp32 $(if $(ROWS),--rows $(ROWS))
	python -m benchmarks.profile $(if $(ROWS),--rows $(ROWS))
	python -m benchmarks.head
	python -m benchmarks.scaling
	python -m benchmarks.generate
	python -m benchmarks.startup
	python -m benchmarks.arms
	python -m benchmarks.pages

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
