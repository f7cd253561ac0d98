# make course            everything: environment, notebooks 00-06 at profile mini, figures
# make course PROFILE=smoke   the same, tiny, in minutes; touches no tracked file
# make test              environment, style, types, all tests
# make lab               JupyterLab on the notebooks
# make figures           redraws the figures, trains nothing
# make study             what takes hours: ablations, rivals, three training seeds -> results/
# make notebooks         rewrites notebooks/*.ipynb from the last course run at mini
# make clean             removes the run of PROFILE and the caches; keeps the environment
#
# Needs make, git and Python 3.11 or newer with venv; `make PYTHON=/path/to/python3.12 course`
# chooses one.

PROFILE ?= mini
EXTRAS := notebooks,test
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The version that the course is tested with comes first; a name that does not run is passed over.
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$p; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help env course test check lab figures study notebooks clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

env: $(STAMP)

$(PY):
	@test -n "$(PYTHON)" || { \
	  echo "error: no Python >= 3.11 with venv found: install one (Debian: apt install python3-venv)," \
	       "or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # cut off before
	@echo "==> installing into $(VENV): about 2 GB, some minutes the first time"
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

course: $(STAMP)
	@$(VENV)/bin/tomjerry course --profile $(PROFILE)

test: check
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile \
	  --cov --cov-report=term --cov-fail-under=85 --durations=15

check: $(STAMP)
	@echo "==> style and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lab: $(STAMP)
	@$(PY) -m jupyter lab --notebook-dir=. notebooks/00_start_here.ipynb

figures: $(STAMP)
	@$(VENV)/bin/tomjerry figures --profile $(PROFILE)

study: $(STAMP)
	@$(VENV)/bin/tomjerry study --profile $(PROFILE)

notebooks: $(STAMP)
	@$(VENV)/bin/tomjerry course --profile mini --sync

clean:
	rm -rf runs/$(PROFILE) .pytest_cache .mypy_cache .ruff_cache htmlcov .coverage .coverage.*
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
