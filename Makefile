# `make quickstart` sets everything up and trains the embedded model; `make test` sets everything up and tests.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test bubblewrap check test-learning test-slow lab-page docs clean

quickstart: .venv/.installed
	$(BIN)/hf-rlhf train quickstart

test: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not learning and not slow"

# The sandbox of `unit_tests`; where it is missing its tests skip, and in CI (CI=true) they fail.
bubblewrap:
	command -v bwrap || { apt-get update && apt-get install --yes --no-install-recommends bubblewrap; }

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test-learning: .venv/.installed-dev
	$(BIN)/pytest -m learning

# With bitsandbytes, for bases of 4 and 8 bits: importing it takes every process 2 s, so `make test` does without.
test-slow: .venv/.installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,quant]"
	$(BIN)/pytest -n 2 --dist loadfile -m slow
	$(BIN)/pytest tests/integration/test_lora_quantised.py tests/integration/test_reward_models_memory.py

# The lab's page of every combination, which `make docs` puts into the site: some minutes.
lab-page: build/lab/lab.md
build/lab/lab.md: .venv/.installed-dev $(wildcard hf_rlhf/lab/*.py plugins/*/*.py recipes/*.yaml)
	mkdir -p build/lab
	$(BIN)/hf-rlhf lab --all --picture build/lab/lab.svg > build/lab/unfinished
	mv build/lab/unfinished $@

# A site of the README, docs/ and the examples' READMEs in build/site; a link that leads nowhere ends it.
docs: build/lab/lab.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
