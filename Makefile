# dimat: `make demo` and `make test` do everything on a fresh machine with Python 3.11+ and make.
# PIP_ARGS is handed to pip, e.g. make demo PIP_ARGS="--index-url https://mirror.example.org/simple"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
PYTEST_ARGS ?=
ZOO_ARGS ?=

PROTO := build/proto-venv

# tests start hundreds of processes, each of which would compile dimat anew where bytecode is not kept
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: help install setup demo test test-all test-times lint format index docs proto proto-check zoo bench bench-quick screenshots clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# two set-ups: running needs less than developing does
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[plots]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.run

install: $(VENV)/.run  ## Make the virtual environment with what running needs

setup: $(VENV)/.dev  ## Make the virtual environment with everything for development

demo: $(VENV)/.run  ## Set up, then run the main job on bundled data (about two minutes; offline)
	$(BIN)/dimat demo $(DEMO_ARGS)

test: $(VENV)/.dev  ## Set up, then run all tests but for what `test-all` adds
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.dev  ## Run all tests, with 5,000 more fault schedules and larger cases (many CPU-minutes)
	$(PYTEST) --all $(PYTEST_ARGS)

test-times: $(VENV)/.dev  ## Run the tests and list what each costs in CPU-seconds, its processes included
	$(PYTEST) -p tests.times $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## Check style, types and the import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev  ## Put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

index: $(VENV)/.dev  ## Write the index of the code in CONTRIBUTING.md anew
	$(BIN)/python -m tests.code_index

docs: $(VENV)/.dev  ## Build the pages of docs/ into build/site (offline); fails on a dead link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# generated with an old grpcio-tools, in an environment of its own: newer gencode refuses older protobuf runtimes
$(PROTO)/.done:
	$(PYTHON) -m venv $(PROTO)
	$(PROTO)/bin/python -m pip install --quiet $(PIP_ARGS) grpcio-tools==1.71.2 'setuptools<81'
	@touch $@

GENERATE = $(PROTO)/bin/python -m grpc_tools.protoc -Iproto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	proto/dimat/wire/v1/peer.proto

proto: $(PROTO)/.done  ## Generate dimat/wire/v1 from proto/ anew
	$(call GENERATE,.)

proto-check: $(PROTO)/.done  ## Fail if dimat/wire/v1 is not what proto/ gives
	@rm -rf build/proto && mkdir -p build/proto
	$(call GENERATE,build/proto)
	@for file in build/proto/dimat/wire/v1/*; do cmp "$$file" "dimat/wire/v1/$$(basename "$$file")" \
		|| { echo "$$file differs: run make proto, and commit what it writes"; exit 1; }; done

zoo: $(VENV)/.dev  ## Derive and check the symmetries of many architectures (about two minutes; ZOO_ARGS names some)
	$(BIN)/python -m tests.symmetry.wide $(ZOO_ARGS)

bench: $(VENV)/.dev  ## Run all benchmarks (about an hour; see benchmarks/README.md)
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench-quick: $(VENV)/.dev  ## Run all benchmarks in their quick form (under a minute each)
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file --quick || exit 1; done

screenshots: $(VENV)/.dev  ## Take pictures of the dashboard into docs/screenshots (needs Chromium; about a minute)
	$(BIN)/python -m tests.ui.dashboard.screenshots

clean:  ## Remove what was built and measured, runs too
	rm -rf $(VENV) build dist runs benchmarks/cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
