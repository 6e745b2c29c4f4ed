# make run | test | docs | prove | lint | slow | gpu | clean. Everything runs inside $(VENV), made when it is missing or out of date.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PIP := $(BIN)/pip --disable-pip-version-check
# Where the CPU build of torch lies when pip's own indexes lack it. For a GPU: make TORCH_INDEX=https://pypi.org/simple TORCH=torch==2.13.0
TORCH := torch==2.13.0$(if $(filter Darwin,$(shell uname -s)),,+cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
METHODS ?= dmd2 swiftbrush sim sid-lsg uni-instruct

export HF_HUB_OFFLINE ?= 1

.PHONY: run test slow gpu docs prove lint clean venv
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/stillroom run

test: lint
	$(BIN)/python -m pytest

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# On a machine with a CUDA device, of at most eight minutes. What it finds goes into results/benchmarks/gpu.json.
gpu: $(STAMP)
	$(BIN)/python tools/gpu_check.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python tools/generate_docs.py --check

docs: $(STAMP)
	$(BIN)/python tools/generate_docs.py
	if test -x $(BIN)/zensical; then $(BIN)/zensical build --clean; \
	  else echo "The site is built where zensical is installed: $(PIP) install -c constraints.txt 'stillroom[docs]'"; fi

prove: $(STAMP)
	$(BIN)/stillroom prove $(METHODS)
	$(BIN)/python tools/generate_docs.py

venv: $(STAMP)

# torch comes first and alone: asked for by its exact build, it cannot be resolved to one that brings CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "from importlib.metadata import version as v; import sys; sys.exit(v('torch') not in '$(TORCH)'.split('=='))" 2>/dev/null \
	  || $(PIP) install -qq -c constraints.txt '$(TORCH)' 2>/dev/null \
	  || $(PIP) install -qq -c constraints.txt --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install -qq -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf site $(VENV) .venv-ci .pytest_cache .ruff_cache .hypothesis build dist
