# Everything installs into a virtual environment of its own: .venv, or .venv-3.12 for make test PYTHON=python3.12
PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= $(if $(filter command,$(firstword $(origin PYTHON))),.venv-$(TAG),.venv)
BIN := $(VENV)/bin
# The CPU build of PyTorch; another index or version can be given on the command line.
TORCH ?= torch==2.13.0
# timm imports torchvision. Both come without their dependencies, which would bring another build of PyTorch; what else
# they need at import (numpy, pillow, pyyaml) is there already. The tests do without torchvision's compiled operators.
TIMM ?= timm==1.0.31 torchvision
JOBS ?= 2

.PHONY: demo test test-torch test-slow test-long test-beam lint bench-smoke install install-test clean

demo: install
	$(BIN)/histokd demo --workdir runs/demo

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[report]'
	touch $@

$(VENV)/.installed-test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-torch: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-deps $(TIMM)
	touch $@

test: install-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not torch and not bench and not slow and not long'

test-torch: $(VENV)/.installed-torch
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m torch

# Apache Beam limits protobuf and pyarrow, so that it gets an environment of its own.
$(VENV)-beam/bin/python:
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/python -m pip install --quiet --upgrade pip

$(VENV)-beam/.installed: setup.py | $(VENV)-beam/bin/python
	$(VENV)-beam/bin/python -m pip install --quiet -e '.[test,beam]'
	touch $@

test-beam: $(VENV)-beam/.installed
	$(VENV)-beam/bin/python -m pytest tests/data_pipelines/beam tests/embed/test_beam_embedding.py

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --line-length 120 .

bench-smoke: install-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'bench and not torch and not long'

# Further variants of checks whose main variant runs in `make test`, with optimised code.
test-slow: install-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		-m 'slow and not bench and not torch and not long'

# Minutes of compilation each; not part of continuous integration.
test-long: install-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'long and not torch'

clean:
	rm -rf .venv .venv-* .jax_cache build *.egg-info
