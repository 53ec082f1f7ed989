# Every target sets up what it needs: a virtual environment in .venv, once, and again when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt $(wildcard requirements/*.txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What comes from an index is held to the hashes of requirements/*.txt (`make lock`), all but torch: see there.
LOCKED := $(INSTALL) --require-hashes --no-deps --no-build-isolation
OURS := $(INSTALL) --no-deps --no-build-isolation -e .
IMAGE_EXTRAS ?= s3,gcs,azure,fast,gpu,wandb,tensorboard,images,examples
LOCK := .venv-lock/bin/uv pip compile --quiet --config-file requirements/uv.toml --universal --python-version 3.11 \
	--generate-hashes --no-header --no-annotate --no-emit-package torch --constraints constraints.txt
comma := ,
DEMO ?= experiment=gpt_stdlib parallel=fsdp job.nproc=2 run=demo

FUZZ_S ?= 3600

.PHONY: help demo test test-fast test-k8s fuzz check lock bench bench-peers bench-peers-data
.DEFAULT_GOAL := help

help:  ## this page
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(VENV)/demo.stamp  ## train a small GPT with FSDP on two processes, and list its checkpoints
	$(BIN)/everstep run $(DEMO)
	$(BIN)/everstep checkpoint ls runs/demo
	@echo 'The command everstep is in $(VENV): source $(BIN)/activate'

test: $(VENV)/test.stamp  ## all tests; ARGS= goes to pytest
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-fast: $(VENV)/test.stamp  ## those of a few minutes: unit, contract and dist; ARGS= goes to pytest
	$(BIN)/python -m pytest -n 2 $(addprefix tests/,unit contract dist) $(ARGS)

test-k8s: $(VENV)/test.stamp  ## what any cluster can show: KUBECONFIG=… [IMAGE=…/everstep RUN_ROOT=…] [NODES=5] (k8s/README.md)
	EVERSTEP_KUBECONFIG='$(KUBECONFIG)' EVERSTEP_IMAGE='$(IMAGE)' EVERSTEP_RUN_ROOT='$(RUN_ROOT)' \
	EVERSTEP_NODES='$(NODES)' EVERSTEP_KILL_NODE='$(KILL_NODE)' EVERSTEP_FORGET='$(FORGET)' $(BIN)/python -m pytest -v -rs \
		$(addprefix tests/cluster/kube/test_kube_,api.py outage.py faults.py sweep.py extensions.py) $(ARGS)

fuzz: $(VENV)/test.stamp  ## hostile inputs, other ones every time, for FUZZ_S seconds (an hour); stops at the first fault
	export EVERSTEP_FUZZ=2000; timeout $(FUZZ_S) sh -c 'while $(BIN)/python -m pytest --timeout=0 -n 2 \
		--dist worksteal tests/security/fuzz_*.py $(ARGS); do :; done'; test $$? = 124

check: $(VENV)/test.stamp  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock:  ## requirements/*.txt anew, after a change of pyproject.toml or constraints.txt; IMAGE_EXTRAS= is for the image
	[ -x .venv-lock/bin/uv ] || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv==0.13.9; }
	echo 'setuptools' | $(LOCK) - -o requirements/build.txt
	$(LOCK) --extra examples pyproject.toml -o requirements/demo.txt
	$(LOCK) --extra test pyproject.toml -o requirements/test.txt
	$(LOCK) $(addprefix --extra ,$(subst $(comma), ,$(IMAGE_EXTRAS))) pyproject.toml -o requirements/image.txt

bench: $(VENV)/test.stamp  ## measure; ARGS= goes to the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers:  ## the peers that Everstep is measured beside, in an environment of their own
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt

bench-peers-data:  ## those that read and write datasets
	$(PYTHON) -m venv .venv-peers-data
	.venv-peers-data/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/data.txt
	.venv-peers-data/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers/data-alone.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Everstep needs Python 3.11 or newer; say which: make PYTHON=python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(PINS) | $(BIN)/python
	$(LOCKED) -r requirements/build.txt
	$(LOCKED) -r requirements/demo.txt
	$(INSTALL) -c constraints.txt torch
	$(OURS)
	@touch $@

$(VENV)/test.stamp: $(PINS) | $(BIN)/python
	$(LOCKED) -r requirements/build.txt
	$(LOCKED) -r requirements/test.txt
	$(INSTALL) -c constraints.txt torch
	$(OURS)
	@touch $@ $(VENV)/demo.stamp
