# serve | test | lint | bench: each creates .venv with pinned dependencies first.
#   TORCH_INDEX=URL    wheel index for torch (CPU-only or ROCm wheels; see README)
#   SYSTEM_TORCH=1     use the torch that PYTHON already has instead of downloading one
#   PYTHON=python3.12  interpreter to build the venv from

SHELL := /bin/bash
ACCEPTED := import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.10; do \
            command -v $$p >/dev/null && $$p -c '$(ACCEPTED)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: serve test lint format bench clean

serve: $(STAMP)
	$(BIN)/rocm-infer serve $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest tests/ -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m bench.accuracy
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.cpu

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found: install one or say PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	grep -v $(if $(SYSTEM_TORCH),-e '^torch==' -e '^triton==',-e '^$$') constraints.txt > $(VENV)/constraints.txt
	$(if $(TORCH_INDEX),$(BIN)/pip install -q torch --index-url $(TORCH_INDEX))
	$(if $(TORCH_INDEX),sed -i -e '/^torch==/d' -e '/^triton==/d' $(VENV)/constraints.txt)
	$(BIN)/pip install -q -c $(VENV)/constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
