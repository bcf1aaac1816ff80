# `make` lists the targets. Everything happens in .venv, which is made and refreshed as needed.
# PYTHON chooses the interpreter (3.11 or newer), PIP_ARGS is passed to pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo up test check protos bench bench-mesh faults hostile bench-peers clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 14

demo: $(INSTALLED) ## set up all there is to set up, bring a mesh up, send it mixed prompts, show what came of them
	headrace demo

up: $(INSTALLED) ## bring the mesh up on 127.0.0.1:50051 and keep it up until Ctrl-C
	headrace up

test: $(INSTALLED) ## run all tests, in a process more than cores; fetches the default models first
	headrace fetch
	pytest -p tests.flaky -n auto --durations=10

faults: $(INSTALLED) ## kill, stall and overload real processes; prints what was lost (LONG=1: ten minutes of soak)
	$(if $(LONG),HEADRACE_FAULTS_LONG=1 )pytest tests/faults

hostile: $(INSTALLED) ## flood, fuzz and abuse real processes; prints the latency of an honest caller beside each attack
	pytest tests/hostile

check: $(INSTALLED) ## ruff, mypy, buf lint, stub drift, import arrows
	ruff check .
	ruff format --check .
	mypy
	buf lint protos
	lint-imports
	pytest -q tests/test_contract.py

OUT ?= services
protos: $(INSTALLED) ## regenerate the stubs after a change of protos/
	python -m grpc_tools.protoc -I protos --python_out=$(OUT) --grpc_python_out=$(OUT) \
		--mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet:$(OUT) protos/headrace/v1/*.proto

bench: $(INSTALLED) ## measure mesh and engine, beside the peers that `make bench-peers` has set up
	python -m benchmarks.mesh
	headrace fetch
	python -m benchmarks.serving
	python -m benchmarks.scaling
	python -m benchmarks.quality

bench-mesh: $(INSTALLED) ## measure what the mesh itself costs, on an engine that computes nothing
	python -m benchmarks.mesh $(if $(BEFORE),--before $(BEFORE))

bench-peers: $(INSTALLED) ## set up what Headrace is measured against: vLLM, OpenVINO, llama.cpp, transformers
	headrace fetch
	python -m benchmarks.serving.peers

clean: ## remove the environment and everything that was built; fetched models stay
	rm -rf $(VENV) build dist services/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or newer; say make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' 'setuptools>=77' wheel
	@echo "installing into $(VENV): torch and transformers are large, this takes a minute or several"
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	touch $@
