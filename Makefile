# Every target makes and uses .venv; nothing needs to be installed by hand but Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: quickstart test test-fast test-newest test-lowest lint docs docs-serve constraints release-check clean

quickstart: $(VENV)/.examples ## adapt a real vision transformer to real digits and print a table
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev ## the whole test suite, slow tests included
	$(PYTEST) --durations=20

test-fast: $(VENV)/.dev ## the tests that take seconds
	$(PYTEST) -m "not slow"

test-newest: ## the whole suite on the newest releases of everything
	rm -f .venv-newest/.dev
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

test-lowest: ## the whole suite on the lower bounds of pyproject.toml
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(VENV)/.dev ## style, types, imports that point one way, dependencies, workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry . examples
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

docs: $(VENV)/.dev ## build the documentation, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.dev
	$(BIN)/mkdocs serve

constraints: $(VENV)/.dev ## pin the newest of everything, except what constraints.in holds back
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate --extra dev \
		--custom-compile-command "make constraints" --output-file constraints.txt pyproject.toml constraints.in

release-check: $(VENV)/.dev ## build sdist and wheel, check them, and try the wheel in an environment of its own
	rm -rf dist build .venv-release
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-release
	$(call install,$(CURDIR)/.venv-release/bin/python,dist/*.whl)
	cd / && $(CURDIR)/.venv-release/bin/python -I $(CURDIR)/tests/smoke.py

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

# $(call install,PYTHON,WHAT): uv takes a quarter of pip's time. It reads no settings of pip, so that the index is handed
# over; where it fails, pip does it. The index strategy is pip's as well.
pip-setting = $(or $(PIP_$(1)),$(shell $(BIN)/python -m pip config get global.$(2) 2>/dev/null))
define install
	UV_DEFAULT_INDEX="$(call pip-setting,INDEX_URL,index-url)" UV_INDEX="$(call pip-setting,EXTRA_INDEX_URL,extra-index-url)" \
	UV_FIND_LINKS="$(call pip-setting,FIND_LINKS,find-links)" UV_INDEX_STRATEGY=unsafe-best-match \
	$(BIN)/uv pip install --quiet --upgrade --python $(1) --constraint $(CONSTRAINTS) $(2) \
	|| $(1) -m pip install --disable-pip-version-check --upgrade --constraint $(CONSTRAINTS) $(2)
endef

# The torch of constraints.txt is exact, so that nothing that depends on it brings a build with CUDA where there is another.
$(VENV)/.uv: $(filter-out /dev/null,$(CONSTRAINTS))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	touch $@

$(VENV)/.examples: $(VENV)/.uv pyproject.toml
	$(call install,$(BIN)/python,--editable '.[examples]')
	touch $@

$(VENV)/.dev: $(VENV)/.uv pyproject.toml
	$(call install,$(BIN)/python,--editable '.[dev]')
	$(call install,$(BIN)/python,--no-deps --target $(VENV)/timm timm) # aside: without torchvision it breaks what finds it
	$(call install,$(BIN)/python,--no-deps --target $(VENV)/deepspeed deepspeed einops hjson msgpack py-cpuinfo) # aside: slow to import
	touch $@
