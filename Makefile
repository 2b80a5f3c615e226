# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help install demo test soak lint typecheck bench kernels arm site wheel clean sanitize fuzz

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED) ## .venv with cocoop-fast (editable) and the development tools

demo: $(INSTALLED) ## 238 icons, half of them never seen: zero-shot CLIP, CoOp, CoCoOp, CoCoOp kept near CLIP; a table and a report
	$(BIN)/cocoop-fast run base2new --datasets icons --shots 2 --seeds 1 --dense-time --output-dir output/demo \
		--methods zeroshot coop cocoop cocoop+cosine-consistency
	$(BIN)/cocoop-fast report output/demo --images 100

test: $(INSTALLED) ## all tests
	$(BIN)/python -m pytest tests/ -n auto --maxprocesses 8 --dist worksteal

soak: $(INSTALLED) ## the long tests: 10,000 steps, a hundred kills, all architectures
	$(BIN)/python -m pytest tests/ -m soak

lint: $(INSTALLED) ## style: ruff check and ruff format; import-linter: who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(INSTALLED) ## types: mypy
	$(BIN)/mypy

sanitize: $(INSTALLED) ## tests of the C++ operations under the address and undefined-behaviour sanitizers
	PYTHON=$(BIN)/python tools/sanitize_ops.sh

fuzz: $(INSTALLED) ## random calls of them under the same, ten minutes, while threads change the inputs
	PYTHON=$(BIN)/python tools/sanitize_ops.sh -s -m soak tests/ops/test_fuzz.py

arm: ## the CPU kernels for ARM: cross-compiled, and checked under user-mode emulation
	$(PYTHON) tools/check_kernels.py --arm

bench: $(INSTALLED) ## benchmarks, a short set; all of them with `make bench FULL=--full`
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(FULL)

kernels: $(INSTALLED) ## docs/kernels.md: every GPU kernel compiled for every target (needs nvcc)
	$(BIN)/python tools/make_kernels_page.py

site: $(INSTALLED) ## these pages with the API's docstrings, in build/site
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[docs]'
	$(BIN)/mkdocs build --quiet

wheel: $(INSTALLED) ## source distribution and wheel in dist/
	rm -rf build dist
	$(BIN)/python -m build

clean: ## remove .venv and everything built
	rm -rf $(VENV) .editable build dist *.egg-info cocoop_fast/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again whenever what it is built from changes. The stamp comes last, so an install that failed is repeated.
$(INSTALLED): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "cocoop_fast needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Choose one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "$(PYTHON) cannot create virtual environments: install python3-venv (Debian, Ubuntu) or choose another: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -c 'from cocoop_fast.ops.extensions import CPP; print(CPP.describe())'
	@touch $@
