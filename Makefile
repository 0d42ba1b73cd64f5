# make demo   the main job, shown on real data: sets up .venv, then writes abyssal-demo/index.html
# make test   the tests that every change runs: every room, in minutes; PYTEST_ARGS="-k chain -x" narrows them
# make test-all   those and the slow ones: examples, benchmark scripts, experiments at test size (make test-slow alone)
# make gpu    on a machine with a CUDA device: the tests that need one, and a step's time and memory on it
# make lint, types, bench, docs, clean: as they are called
#
# Everything runs in .venv, which is made on first use and again only when pyproject.toml or constraints.txt
# change. Needs Python 3.11 or newer with venv (Debian: apt install python3 python3-venv make), nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?=
BENCH_ARGS ?=

# Two test processes on two cores: a torch that starts threads of its own beside them only slows both down.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg

PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all gpu lint types format bench docs clean
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-demo
	$(BIN)/abyssal demo

test: $(VENV)/.stamp-dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-dev
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test test-slow

gpu: $(VENV)/.stamp-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m cuda $(PYTEST_ARGS)
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

bench: $(VENV)/.stamp-bench
	$(BIN)/python benchmarks/memory.py $(BENCH_ARGS)

docs: $(VENV)/.stamp-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site abyssal-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "abyssal needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "No venv module: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

# One environment, to which each extra adds what it needs.
$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	@echo "Installing abyssal[$*] and what it needs into $(VENV) (once; PyTorch makes it minutes)"
	@$(PIP_INSTALL) -e ".[$*]"
	@touch $@
