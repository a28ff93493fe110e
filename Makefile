# Every target starts from a bare clone: it makes .venv and installs the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check format bench table results clean check-latest

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## fit and test both demo tasks, then the table with controls
	$(BIN)/python -m corrsteer_pl fit --config demo.yaml
	$(BIN)/python -m corrsteer_pl test --ckpt_path checkpoints/demo/last.ckpt
	$(BIN)/python -m corrsteer_pl fit --config demo_refusal.yaml
	$(BIN)/python -m corrsteer_pl test --ckpt_path checkpoints/demo_refusal/last.ckpt
	$(BIN)/python -m corrsteer_pl.demo.results

test: $(READY)  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)  ## formatting, lint, types, doctests and the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not network and not gpu"
	$(BIN)/python -m benchmarks --quick > /dev/null

check-latest:  ## the quick tests with the newest versions of all dependencies but torch
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-latest/bin/pip install --quiet --upgrade --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not network and not gpu"

format: $(READY)  ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## measure speed against plain ways, on an idle machine, and write benchmarks/results.json
	$(BIN)/python -m benchmarks

table: $(READY)  ## write the table of results into the README
	$(BIN)/python -m corrsteer_pl.demo.results --readme README.md

results: $(READY) smollm2  ## the recorded run on a real model, which takes hours, and its table in the README
	$(BIN)/python -m corrsteer_pl.results --config results/smollm2.yaml --readme README.md

clean:  ## remove the environment and caches
	rm -rf $(VENV) .venv-latest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
