# Every target sets up what it needs in .venv first. Python 3.11 or later, make and git are all that must be there.
PYTHON      ?= python3
# cpu, or gpu for Linux with an NVIDIA GPU and CUDA 13.
FLAVOUR     ?= cpu
# Another index for torch, for example https://download.pytorch.org/whl/cpu for the build without CUDA.
TORCH_INDEX ?=
CONFIG      ?= configs/movielens.yaml
# More arguments for serve and quickstart, for example ARGS="--set serve.port=8001".
ARGS        ?=

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMP  := $(VENV)/.installed-$(FLAVOUR)
# Side by side: tests/conftest.py says which tests one process runs one after the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TORCH   = $(shell grep '^torch==' requirements/$(FLAVOUR).txt)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart serve test test-fast lint docs

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON, FLAVOUR=cpu|gpu, TORCH_INDEX, CONFIG, ARGS (see the top of the Makefile)."

setup: $(STAMP)  ## Install everything into .venv

quickstart: $(STAMP)  ## MovieLens in, recommendations out over HTTP, on this machine
	@$(BIN)/python -m jobs.quickstart $(ARGS)

serve: $(STAMP)  ## Serve the published generation of CONFIG on 127.0.0.1 until Ctrl-C
	@$(BIN)/python -m jobs.serve --config $(CONFIG) $(ARGS)

test: $(STAMP)  ## Run all tests (tests that need a GPU or the MovieLens mirror say why they do not run)
	@$(PYTEST) -n 2

test-fast: $(STAMP)  ## Run the tests that take no Ray, no sockets and little time
	@$(PYTEST) -n 2 -m "not (sockets or slow)" tests/property tests/unit

lint: $(STAMP)  ## Check style, types and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: requirements/docs.txt  ## Build the pages as a site in site/
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check --no-input install -qq -r requirements/docs.txt
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs --quiet build --strict
	@echo "site/index.html is the first page"

# A killed installation may leave half a package that pip takes for a whole one, so it starts afresh: the
# mark stays until the end. Another flavour's environment is replaced too, since both bring a `faiss`.
$(STAMP): requirements/$(FLAVOUR).txt pyproject.toml
	@set -e; \
	others=$$(ls $(VENV)/.installed-* 2>/dev/null | grep -v -- '-$(FLAVOUR)$$' || true); \
	if [ -e $(VENV)/.installing ] || [ -n "$$others" ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
			{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }; \
		echo "Making $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi; \
	touch $(VENV)/.installing
	@echo "Installing requirements/$(FLAVOUR).txt (a few minutes the first time)"
	@$(PIP) install -qq --upgrade pip
	@$(PIP) install -qq $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) install -qq -r requirements/$(FLAVOUR).txt
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installing; touch $@
