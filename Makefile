# Every target makes and uses .venv; nothing needs to be installed by hand but Python 3.11 or newer (constraints.txt has nothing for 3.10).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-fast lint docs docs-serve constraints clean

quickstart: $(VENV)/.examples ## adapt a real vision transformer to real digits and print a table
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev ## the whole test suite, slow tests included
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-fast: $(VENV)/.dev ## the tests that take seconds
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

lint: $(VENV)/.dev ## style, types, and that imports point one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev ## build the documentation, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

constraints: $(VENV)/.dev ## pin the newest of everything, except what constraints.in holds back
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate --extra dev \
		--custom-compile-command "make constraints" --output-file constraints.txt pyproject.toml constraints.in

docs-serve: $(VENV)/.dev
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch goes first and by its exact version, so that nothing that depends on it brings a build with CUDA.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(shell grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable '.[examples]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/timm timm # aside: without torchvision it breaks what finds it
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/deepspeed deepspeed einops hjson msgpack py-cpuinfo # aside: slow to import
	touch $@
