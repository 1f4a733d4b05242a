# Two commands: `make serve` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CONFIG ?= deploy/local.yaml
PORT ?=
ifndef ACCELERATOR
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
ifeq ($(filter cpu gpu,$(ACCELERATOR)),)
$(error ACCELERATOR is "$(ACCELERATOR)"; expected cpu or gpu)
endif
export PYTHON

bin := .venv/bin
requirements := deploy/requirements
# Written when .venv holds what these files ask for; older than one of them, the set-up runs again.
ready := .venv/.ready-$(ACCELERATOR)
inputs := pyproject.toml deploy/setup.sh $(addprefix $(requirements)/,$(ACCELERATOR).txt model.txt system.txt)

# The quick ones first, two files at a time; what starts whole deployments has the machine for itself. Every
# folder of tests is taken, so that a new one is not forgotten.
test_folders := $(filter-out tests/__pycache__/ tests/end_to_end/,$(wildcard tests/*/))
quick_tests = -n 2 --dist loadfile $(wildcard tests/test_*.py) $(test_folders)

.PHONY: help serve test test-all lint bench bench-peers bench-accounts pins clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  CONFIG=path        the configuration to serve (deploy/local.yaml)'
	@echo '  PORT=n             listen on this port instead of the configured one'
	@echo '  ACCELERATOR=cpu    or gpu; gpu where nvidia-smi finds one. They exclude each other in one .venv'
	@echo '  ONLY=names         the promises that make bench measures; benchmarks/README.md has their names'
	@echo '  PEERS_OPTIONS=...  for make bench-peers: --rounds 1, --peers trunkline vllm-rust, and others'
	@echo '  PYTHON=path        the Python 3.11 or 3.12 to make .venv with'

# exec: the server stands where the recipe's shell stood, so that signals meant for it reach it.
serve: $(ready) ## Set up, start the models of $(CONFIG), serve until Ctrl-C
	@exec $(bin)/trunkline serve '$(CONFIG)' $(if $(PORT),--port '$(PORT)')

test: lint ## Set up, then linters, type checker and all tests but the slow ones
	$(bin)/pytest -m 'not slow' $(quick_tests)
	$(bin)/pytest -m 'not slow' tests/end_to_end

test-all: test ## make test, then the slow tests: soaks, many thousand requests
	$(bin)/pytest -m slow tests

lint: $(ready)-dev ## Set up, then ruff (format, rules) and mypy --strict
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/mypy

bench: $(ready) ## Set up, then measure each time and size that was promised
	$(bin)/python -m benchmarks.promises $(if $(ONLY),--only $(ONLY))

bench-peers: $(ready)-dev ## Set up, then measure Trunkline beside its peers, for about an hour
	$(bin)/python -m benchmarks.peers $(PEERS_OPTIONS)

$(ready): $(inputs)
	@deploy/setup.sh $(ACCELERATOR)

$(ready)-dev: $(inputs) $(requirements)/dev.txt
	@deploy/setup.sh $(ACCELERATOR) dev

# Keeps the versions that stand in the files where they still fit; PINS_OPTIONS=--upgrade takes newer ones.
# The engines are resolved apart, as they disagree about some packages; the test tools must fit both.
compile := $(bin)/uv pip compile --quiet --no-header --no-emit-index-url --no-emit-find-links \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 $(PINS_OPTIONS)
cpu_note := \# Installed with --no-deps. torchvision, torchaudio, torchcodec, triton and the CUDA libraries are left out on \
	purpose: cpu.overrides.txt says why.

peers := benchmarks/peers/requirements

bench-accounts: $(ready) ## Set up, then measure what accounts cost on the hot path
	$(bin)/python -m benchmarks.accounts

pins: $(ready) ## Resolve pyproject.toml into deploy/requirements/{cpu,gpu,dev}.txt, and what the peers need
	$(bin)/python -m pip install --quiet uv==0.9.30
	$(compile) pyproject.toml --extra cpu --override $(requirements)/cpu.overrides.txt -o $(requirements)/cpu.txt
	$(compile) pyproject.toml --extra gpu -o $(requirements)/gpu.txt
	$(compile) --group pyproject.toml:dev -c $(requirements)/cpu.txt -c $(requirements)/gpu.txt -o $(requirements)/dev.txt
	sed -i '1i # Made by `make pins`.' $(requirements)/{cpu,gpu,dev}.txt
	sed -i '2i $(cpu_note)' $(requirements)/cpu.txt
	for peer in litellm vllm-router; do $(compile) $(peers)/$$peer.in -o $(peers)/$$peer.txt || exit; done
	$(compile) $(peers)/ray-serve-llm.in --override $(requirements)/cpu.overrides.txt \
		--override $(peers)/overrides.txt -o $(peers)/ray-serve-llm.txt

clean: ## Remove .venv and every cache; the checkout is as it was cloned
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist *.egg-info tests/artefacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
