# Needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
SEEDS  ?= 1
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Tests and the laboratory read local files only.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# As many test processes as cores, of one thread each. A module's tests stay together: they share what is expensive.
export OMP_NUM_THREADS ?= 1
PARALLEL ?= -n auto --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-vllm test-oldest mutants bench docs notebooks lint format clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml .ci/constraints.txt
	@echo "== creating $(VENV) with the tested versions of .ci/constraints.txt"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hdpo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c .ci/constraints.txt -e '.[test,lint,docs,wandb]'
	@touch $@

install: $(READY) ## Create the virtual environment

ARMS := $(patsubst %,benchmarks/results/foreign/arms/%.yaml,grpo sft_on_cliffs hdpo initial_frozen)
demo: $(READY) ## Train four methods in the laboratory of configs/lab_foreign.yaml (SEEDS=3 for three seeds)
	@echo "== the same policy and prompts, four ways to deal with cliffs; what a run prints goes to runs/demo/*/fit.log"
	$(BIN)/python -m hdpo sweep --config configs/lab_foreign.yaml --arms $(ARMS) --seeds $(SEEDS) --jobs 2 --out runs/demo
	@echo "== next: $(BIN)/tensorboard --logdir runs/demo, make demo SEEDS=3 (is it noise?), and README.md for your policy and data"

test: $(READY) ## All tests but the slow ones
	@echo "== tests"
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not vllm"

test-slow: $(READY) ## The slow tests
	@echo "== slow tests"
	$(BIN)/python -m pytest -q $(PARALLEL) -m "slow and not vllm"

.venv-vllm/.ready: pyproject.toml .ci/constraints.txt .ci/constraints-vllm.txt .ci/install-vllm
	@echo "== creating .venv-vllm (vLLM's CPU build brings many packages)"
	bash .ci/install-vllm .venv-vllm
	@touch $@

test-vllm: .venv-vllm/.ready ## The vLLM engine's tests, in an environment of its own
	@echo "== vLLM tests"
	.venv-vllm/bin/python -m pytest -q -m vllm tests/generation

.venv-oldest/.ready: pyproject.toml
	@echo "== creating .venv-oldest with the oldest versions that pyproject.toml allows"
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e '.[test]'
	@touch $@

test-oldest: .venv-oldest/.ready ## The fast tests with the oldest versions that pyproject.toml allows
	@echo "== tests with the oldest versions"
	.venv-oldest/bin/python -m pytest -q -m "not slow and not vllm"

mutants: $(READY) ## Break the code on purpose, one change at a time, and see which breaks no test notices (hours)
	$(BIN)/python -m tests.mutations

.venv-trl/.ready: pyproject.toml .ci/constraints.txt benchmarks/constraints-trl.txt
	@echo "== creating .venv-trl: what the benchmarks compare with"
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --upgrade pip
	.venv-trl/bin/pip install --quiet -c .ci/constraints.txt -c benchmarks/constraints-trl.txt trl -e .
	@touch $@

BENCH := .venv-trl/bin/python benchmarks
bench: .venv-trl/.ready ## The CPU benchmarks, into runs/bench; leave the machine alone meanwhile
	@echo "== benchmarks (about 9 minutes on 2 cores)"
	$(BENCH)/update.py --json runs/bench/update.json
	$(BENCH)/rollouts.py --repeats 5 --json runs/bench/rollouts.json
	$(BENCH)/step.py --json runs/bench/step.json
	$(BENCH)/memory.py --width 128 --json runs/bench/memory.json
	$(BENCH)/verifier.py --json runs/bench/verifier.json

notebooks: $(READY) ## Write the outputs of the notebooks anew, as after new records
	$(BIN)/python -m tests.test_notebooks

docs: $(READY) ## The API page from the docstrings, into docs/api; fails where one is missing
	@echo "== docs"
	$(BIN)/python docs/build_api.py docs/api

lint: $(READY) ## Style, docstrings, annotations, types and the import contract
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and the runs
	rm -rf $(VENV) runs docs/api
