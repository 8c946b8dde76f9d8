# make train: set up the environment, train a net and test it. make test: run all tests.
# make demo: write the interactive page and open it in a browser.
# make notebooks: execute the notebooks. make bench: benchmark a layer on this machine.
# CONTRIBUTING.md describes test-pythons, hostile and mutants.

# the first suitable Python on PATH, unless PYTHON is set
FITS := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c '$(FITS)' 2>/dev/null && echo $$name && break; done)
VENV ?= .venv
BIN := $(VENV)/bin

NOTEBOOKS := $(wildcard notebooks/*.py)

.PHONY: train demo test test-pythons hostile mutants notebooks docs bench lint format release clean

train: $(VENV)/.ready
	$(BIN)/graphcaps train

# one thread for each of the processes that share the tests
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder --durations 10

test-pythons: $(VENV)/.ready
	$(BIN)/python tests/pythons.py $(PYTHONS)

hostile: $(VENV)/.ready
	GRAPHCAPS_HOSTILE=1 $(BIN)/pytest --durations 10 tests/hostile

mutants: $(VENV)/.ready
	@if [ -f tests/mutants.py ]; then $(BIN)/python tests/mutants.py; \
	else echo "tests/mutants.py is not written yet"; fi

notebooks: $(VENV)/.ready
	$(BIN)/jupytext --to notebook --execute $(NOTEBOOKS)

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

demo: $(VENV)/.ready
	$(BIN)/graphcaps demo
	@$(BIN)/python -c 'import pathlib, sys, webbrowser; \
		sys.exit(not webbrowser.open(pathlib.Path("demo.html").absolute().as_uri()))' \
		|| echo "No browser here: open $(CURDIR)/demo.html in one"

bench: $(VENV)/.ready
	$(BIN)/python scripts/bench_routing.py --short

lint: $(VENV)/.ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

release: $(VENV)/.ready
	$(BIN)/pip install --constraint constraints.txt build twine
	$(BIN)/python scripts/release.py $(VERSION)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(FITS)' || { echo "graphcaps needs Python 3.11 or newer, with venv;" \
		"$(if $(PYTHON),$(PYTHON) is not one,none is on PATH): make PYTHON=/path/to/one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[train,dev,docs]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m graphcaps.install_dgl
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
