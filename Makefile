# make setup            the virtual environment, with the exact versions of constraints.txt
# make train ARGS=...   treegrpo train ARGS; without ARGS, the miniature job
# make test             format, lint, types, tests
# make bench ARGS=...   every benchmark; ARGS=--quick for a minute each

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# The stamp carries a checksum of what decides the environment's contents: file times are no guide,
# a checkout changes them.
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: setup train test bench

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	rm -f $(VENV)/.setup-*
	touch $@

train: $(STAMP)
	$(BIN)/treegrpo train $(ARGS)

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(STAMP)
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark $(ARGS) || exit 1; done
