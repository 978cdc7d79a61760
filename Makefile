# `make help` lists what there is.
PYTHON ?= python3.11
PY := .venv/bin/python
SOURCES := $(wildcard csrc/*/*.*)
WORKERS ?= 2

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.venv/.packages: requirements-dev.txt requirements-peers.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	touch $@

.venv/.built: .venv/.packages pyproject.toml setup.py $(SOURCES)
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	touch $@

install: .venv/.built ## .venv with everything, the extension built (demo and test do this first)

demo: .venv/.built ## train a ViT on scikit-learn's digit scans, naive and fused, and compare (under 4 minutes)
	$(PY) -m vitkernels demo

lint: .venv/.packages ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: .venv/.built lint ## ruff, mypy and all tests (under 15 minutes on 2 cores)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

clean: ## remove .venv and every build product
	rm -rf .venv build vitkernels.egg-info vitkernels/*.so
