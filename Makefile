# Sugar over the plain commands of README.md.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt

.PHONY: quickstart check test coverage test-loggers test-ray test-slurm test-cuda faults lint docs bench clean
CLUSTER ?= 1
CUDA ?= 1
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/.run: setup.cfg .ci/constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(BIN)/.test: setup.cfg .ci/constraints.txt | $(BIN)/python
	$(PIP) -e ".[test]"
	$(PIP) --no-deps torch-fidelity
	@touch $@

$(BIN)/.lint: setup.cfg .ci/constraints.txt | $(BIN)/python
	$(PIP) -e ".[test,lint]"
	$(PIP) --no-deps torch-fidelity
	@touch $@

$(BIN)/.docs: setup.cfg .ci/constraints.txt | $(BIN)/python
	$(PIP) -e ".[docs]"
	@touch $@

data/digits/train-0000.tar: data/digits.py lightning_tdisent/data/digits.py
	$(BIN)/python data/digits.py

# train, compose, sample, evaluate and report on real digit scans; 3:52 minutes when last measured on 2 cores (2026-12-01)
quickstart: $(BIN)/.run
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	$(BIN)/python -m lightning_tdisent quickstart

# before each commit: lint, types, and the tests that are neither slow nor start processes
check: lint
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	$(BIN)/python -m pytest -n auto -m "not slow and not cli and not faults"

test: $(BIN)/.test
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	$(BIN)/python -m pytest -n auto -m "not slow and not faults"
	$(BIN)/python -m pytest -n auto -m "slow or faults"

# the share of the package's lines that the tests below run in their own processes; a third of them reached 68 % (2026-12-01)
coverage: $(BIN)/.test
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	$(BIN)/python -m pytest -n auto -m "not slow and not faults" --cov=lightning_tdisent --cov-report=term --cov-fail-under=68

# real clusters on this machine, 5 minutes each; CLUSTER=required fails where one cannot start, instead of skipping
test-ray: $(BIN)/.test
	$(PIP) -e ".[ray]"
	CLUSTER=$(CLUSTER) $(BIN)/python -m pytest tests/fleet/test_ray.py

# W&B offline and MLflow, which are not installed otherwise
test-loggers: $(BIN)/.test
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	$(PIP) wandb mlflow-skinny
	$(BIN)/python -m pytest tests/lit/test_loggers.py

# Debian's slurm-wlm and munge must be installed
test-slurm: $(BIN)/.test
	CLUSTER=$(CLUSTER) $(BIN)/python -m pytest tests/fleet/test_slurm.py

# what needs a GPU, and a torch built for it; CUDA=required fails where there is none, instead of skipping (pytest's 5)
test-cuda: $(BIN)/.test
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	CUDA=$(CUDA) $(BIN)/python -m pytest tests/cuda || [ $$? = 5 ]

# every fault with all its trials, on fresh processes; more than an hour on 2 cores
faults: $(BIN)/.test
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	FAULTS=full $(BIN)/python -m pytest tests/faults -s

lint: $(BIN)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_tdisent
	$(BIN)/lint-imports

# the site, without a network; a warning is an error. Open docs/_build/index.html
docs: $(BIN)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

bench: $(BIN)/.run
	@$(MAKE) --no-print-directory data/digits/train-0000.tar
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf .venv build docs/_build docs/_api docs/_copied *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
