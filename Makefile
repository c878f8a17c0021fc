# make setup · demo · fmt · check · test · test-slow · test-long · matrix · bench · clean
# matrix: core tests with each version of transformers, installed under .matrix/ without constraints.txt.
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# PEFT's own tests, which `make test` runs as well; where there is no package index they are skipped, and say so.
PEFT_TESTS := $(VENV)/peft-tests/.fetched
# Threads of one test process; more only fight with the other processes.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo fmt check test test-slow test-long test-gpu matrix bench clean

setup: $(STAMP)

# Torch first and by itself: everything else would otherwise pull the build that it likes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/peft-moe demo

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) $(PEFT_TESTS)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

$(PEFT_TESTS): $(STAMP) tests/peft_contract/sdist.txt
	$(BIN)/python tests/peft_contract/fetch.py

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# Ten thousand examples of every property, a thousand kills while saving, a hundred while training: hours.
test-long: $(STAMP)
	HYPOTHESIS_PROFILE=long PEFT_MOE_KILLS=1000 PEFT_MOE_KILLED_RUNS=34 \
	$(BIN)/python -m pytest -n $(JOBS) tests/faults tests/experts/test_bad_inputs.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# A fresh install of each version of transformers that we promise, the newest one among them, and the core tests.
matrix:
	JOBS=$(JOBS) $(PYTHON) tests/matrix.py

# A benchmark of broken arithmetic says nothing: without these tests there are no figures.
bench: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) tests/ops tests/conformance/test_equalities.py
	$(BIN)/python -m benchmarks.suite

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
