# make train: from a fresh clone to a trained and tested net. make test: all the tests.
# make notebooks: runs each and writes its .ipynb. make bench: the layer's cost on this machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

NOTEBOOKS := $(wildcard notebooks/*.py)

.PHONY: train test notebooks bench lint format clean

train: $(VENV)/.ready
	$(BIN)/graphcaps train

test: $(VENV)/.ready
	$(BIN)/pytest

notebooks: $(VENV)/.ready
	$(BIN)/jupytext --to notebook --execute $(NOTEBOOKS)

bench: $(VENV)/.ready
	$(BIN)/python scripts/bench_routing.py --short

lint: $(VENV)/.ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else "graphcaps needs Python 3.11 or 3.12, this is %d.%d: add PYTHON=python3.12 to make" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[train,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
