# make quickstart   from nothing to a trained model; make test   the suite; make check   format, lint, types
# PYTHON            the Python (>= 3.10) that .venv is made with
# TORCH_PIP_ARGS    more arguments to pip for PyTorch alone, such as the index of a CPU-only build
PYTHON ?= python3
TORCH_PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test check clean

quickstart: $(VENV)/.runtime
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -ra

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Removes what these commands made: the environment, the runs, caches.
clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch comes first and without the constraints, since another index need not hold the same versions of what it needs;
# the second line brings those to the pinned ones.
$(VENV)/.runtime: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the pinned dependencies into $(VENV)"
	$(PIP) $(TORCH_PIP_ARGS) torch==2.13.0
	$(PIP) -c constraints.txt setuptools
	$(PIP) -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
