# make setup            the virtual environment, with the exact versions of constraints.txt
# make train ARGS=...   treegrpo train ARGS; without ARGS, the miniature job
# make check            format, lint, types, tests of the algorithm and the configuration
# make test             format, lint, types, all tests, on WORKERS processes
# make test-oldest      all tests with the oldest libraries that are supported, constraints-oldest.txt
# make bench ARGS=...   every benchmark; ARGS=--quick for a minute each
#
# PYTHON=python3.12 does it with this interpreter, in an environment of its own.

ifdef PYTHON
VENV := .venv-$(notdir $(PYTHON))
else
VENV := .venv
PYTHON := $(shell for python in python3.11 python3.12 python3.13; do \
	$$python --version >/dev/null 2>&1 && echo $$python && break; done)
endif
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

# The stamp carries a checksum of what decides the environment's contents: file times are no guide,
# a checkout changes them.
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))

# Processes of the tests; each computes on one core.
WORKERS ?= 2
QUICK_TESTS := $(addprefix tests/test_,$(addsuffix .py,plan transition advantage objective \
	policy_gradient config methods))

.PHONY: setup train lint check test pytest test-oldest bench

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[dev]' -c $(CONSTRAINTS)
	rm -f $(VENV)/.setup-*
	touch $@

train: $(STAMP)
	$(BIN)/treegrpo train $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/pytest -q $(QUICK_TESTS)

test: lint pytest

pytest: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

test-oldest:
	$(MAKE) pytest PYTHON=$(PYTHON) VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

bench: $(STAMP)
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark $(ARGS) || exit 1; done
