# The two commands: `make demo` (images) and `make test`. Each sets itself up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
# Test files run side by side in this many processes; more than the cores is slower.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: install demo test test-slow lint verify clean

install: $(STAMP)

# --no-deps: stlpips-pytorch asks for torchvision and others, and only its weight file is read.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latentdiff needs Python 3.11 or newer; got " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 " + "install")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps stlpips-pytorch==0.0.2
	touch $@

demo: install
	$(BIN)/python training/demo.py --output $(DEMO)

test: install
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

verify: install
	$(BIN)/python benchmarks/verify.py

clean:
	rm -rf $(VENV) build dist *.egg-info
