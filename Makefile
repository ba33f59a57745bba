# make demo           install and watch three islands learn while one of them is killed
# make test           install and run all tests
# make check          lint, types, layers
# make bench          speed and memory against bare loops (results in benchmarks/results)
# make bench-quality  loss against data parallel training (up to 75 minutes, resumable)
# make bench-robust   what attackers do to a run under each rule, and gossip (an hour of a core, resumable)
# make bench-lab      what emulated links do and cost, and runs on them (root; 30 minutes, resumable)
# make storm          ten minutes of random faults on eight islands, beside two without (results as above)
# make simulate       a hundred thousand simulated runs with faults (about 25 minutes, resumable)
# make soak           half an hour on busy cores, resumable: nobody may be blamed who did nothing wrong
# make docs           the documentation as a site, in build/docs
# make clean          remove caches; make distclean removes .venv as well; runs/ is never touched
#
# PYTHON=python3.12 picks the interpreter (3.11 or newer), PIP_ARGS="..." goes to pip install (for example the index
# of another torch build), ARGS="..." goes to the command of the target (make test ARGS="-k ledger -x").

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile pip compiles all of torch and ray at once; an import compiles what it needs.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt $(PIP_ARGS)
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev

export RAY_USAGE_STATS_ENABLED := 0
# Images set it to stay small; without compiled modules each process of a run would compile all of torch and Ray again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check bench bench-quality bench-robust bench-lab storm simulate soak docs clean distclean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(RUN_STAMP)
	$(BIN)/atoll demo $(ARGS)

# Two at a time, in the order of their folders: those that wait for processes first, and many short ones to fill up at
# the end. Then those that last as long as what they watch (a storm of a minute, a cut of 20 s), each beside one other.
# At last those that measure times of real processes or of links: they have the machine alone.
PYTEST := $(BIN)/python -m pytest
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: $(DEV_STAMP)
ifeq ($(ARGS),)
	$(PYTEST) $(TWO) -m "not alone and not paired and not lab" tests
	$(PYTEST) $(TWO) -m paired tests/lab tests/ray
	$(PYTEST) -m "(alone or lab) and not paired" tests/ray tests/lab
else
	$(PYTEST) $(ARGS)
endif

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/unit/test_layers.py
	$(BIN)/python -m tests.lab.would_run

bench: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-quality: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.quality $(ARGS)

bench-robust: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.gossip_sync
	$(BIN)/python -m benchmarks.rule_time
	$(BIN)/python -m benchmarks.robust $(ARGS)

bench-lab: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.lab $(ARGS)

storm: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.storm $(ARGS)

simulate: $(DEV_STAMP)
	$(BIN)/atoll simulate --seeds 100000 --keep runs/simulate.jsonl $(ARGS)

soak: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.soak $(ARGS)

docs: $(DEV_STAMP)
	$(BIN)/python -m orchestrator.plan_pages docs/choosing.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The stamps are as new as the last install: a second call installs nothing until a requirement changes.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Atoll needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "\n  try:   make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing into $(VENV) (this once; torch is large) ..."
	$(INSTALL) -e '.[fast]'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing what the tests need ..."
	$(INSTALL) -e '.[dev]'
	@touch $@
