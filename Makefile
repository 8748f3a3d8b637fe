# make setup            the virtual environment, with the exact versions of constraints.txt
# make train ARGS=...   treegrpo train ARGS; without ARGS, the miniature job
# make check            format, lint, types, tests of the algorithm and the configuration
# make test             format, lint, types, all tests, on WORKERS processes
# make bench ARGS=...   every benchmark; ARGS=--quick for a minute each

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# The stamp carries a checksum of what decides the environment's contents: file times are no guide,
# a checkout changes them.
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
TORCH := $(shell grep '^torch==' constraints.txt)

# Processes of the tests; each computes on one core.
WORKERS ?= 2
QUICK_TESTS := $(addprefix tests/test_,$(addsuffix .py,plan transition advantage objective \
	policy_gradient config methods))

.PHONY: setup train lint check test bench

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
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

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

bench: $(STAMP)
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark $(ARGS) || exit 1; done
