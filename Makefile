# Everything from a fresh checkout; `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
WORK_DIR ?= work_dirs/quickstart
DATA_DIR ?= data/quickstart
TEST_JOBS ?= 2
TEST_ARGS ?=
PY = $(VENV)/bin/python

export PYTHON

INSTALLED = $(VENV)/.mmvim-installed
BUILT = $(VENV)/.mmvim-built
SOURCES = $(wildcard setup.py) $(shell find csrc -type f ! -name '*.pyc' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-mambavision quickstart-det quickstart-seg quickstart-video \
	test test-slow test-reliability audit lint format docs cuda-compile cuda-compile-all wheel clean \
	distclean

help: ## list the targets
	@echo 'usage: make [PYTHON=python3.12] [VENV=.venv] TARGET'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: TORCH_SPEC and PIP_ARGS choose other PyTorch builds and indexes (see'
	@echo 'tools/setup_venv.sh), TEST_JOBS the processes of the tests, TEST_ARGS more pytest arguments.'

setup: $(BUILT) ## make .venv, install everything, compile the extension

$(INSTALLED): pyproject.toml tools/setup_venv.sh
	@sh tools/setup_venv.sh install $(VENV)
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	@sh tools/setup_venv.sh build $(VENV)
	@$(PY) -m mmvim
	@touch $@

quickstart: $(BUILT) ## train and test a small Vim on real handwritten digits
	@$(PY) tools/quickstart/run.py cls --work-dir $(WORK_DIR) --data-dir $(DATA_DIR)

quickstart-mambavision: $(BUILT) ## the same with a small MambaVision, distilled from its own average
	@$(PY) tools/quickstart/run.py cls --work-dir $(WORK_DIR)/mambavision --data-dir $(DATA_DIR) \
		--config configs/quickstart/mambavision_digits_cls.py

quickstart-det: $(BUILT) ## the same for detection: digits on photographs
	@$(PY) tools/quickstart/run.py det --work-dir $(WORK_DIR) --data-dir $(DATA_DIR)

quickstart-seg: $(BUILT) ## the same for semantic segmentation
	@$(PY) tools/quickstart/run.py seg --work-dir $(WORK_DIR) --data-dir $(DATA_DIR)

quickstart-video: $(BUILT) ## the same for video: which digit, and which way it moves
	@$(PY) tools/quickstart/run.py video --work-dir $(WORK_DIR) --data-dir $(DATA_DIR)

test: $(BUILT) ## the tests (minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m 'not slow' -n $(TEST_JOBS) $(TEST_ARGS)

test-slow: $(BUILT) ## the tests that train (longer)
	$(PY) -m pytest -v -m slow $(TEST_ARGS)

test-reliability: $(BUILT) ## inject faults, at length; ends with a line of counts
	OMP_NUM_THREADS=1 $(PY) -m pytest -v -m slow -n $(TEST_JOBS) --dist worksteal tests/reliability \
		$(TEST_ARGS)

audit: $(BUILT) ## do installed packages fit together, and are vulnerabilities of them known?
	-$(PY) -m pip check
	@$(PY) -m pip install -q --upgrade pip-audit
	$(PY) -m pip_audit --progress-spinner off

lint: $(BUILT) ## check style and formatting of Python and C++
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
		xargs -r $(VENV)/bin/clang-format --dry-run --Werror

format: $(BUILT) ## put Python and C++ into the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
		xargs -r $(VENV)/bin/clang-format -i

docs: $(BUILT) ## build the documentation; warnings are errors
	@$(PY) -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
		{ EXTRAS=docs sh tools/setup_venv.sh install $(VENV) && \
		sh tools/setup_venv.sh build $(VENV); }
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'documentation: docs/_build/html/index.html'

cuda-compile: $(BUILT) ## compile the CUDA sources for sm_90 (no GPU needed; skipped without nvcc)
	$(PY) csrc/build.py --check-cuda 9.0 --objects build/cuda-objects

cuda-compile-all: $(BUILT) ## the same for every common architecture (an hour and more)
	$(PY) csrc/build.py --check-cuda all --objects build/cuda-objects

wheel: $(INSTALLED) ## a wheel with kernels for other machines, in dist (see tools/build_wheel.sh)
	@PYTHON=$(PY) bash tools/build_wheel.sh

clean: ## remove what was built, but not .venv, data and results
	rm -rf build docs/_build .pytest_cache .ruff_cache .hypothesis
	find mmvim tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv and what the quickstarts made
	rm -rf $(VENV) $(DATA_DIR) $(WORK_DIR) *.egg-info
