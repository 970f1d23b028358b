# Paths are relative on purpose: the checkout may live in a directory with spaces.
SHELL := /bin/sh
BIN := .venv/bin
FRAME := pyproject.toml constraints.txt scripts/setup.sh

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types test-vllm test-sglang clean

# An environment that was copied or moved with its checkout would run the code of the old place.
ifneq ($(shell cat .venv/.root 2>/dev/null),$(shell pwd -P))
.PHONY: .venv/.installed .venv/.installed-dev
endif

help:
	@echo "make demo    set up .venv and run the whole loop on a tiny model"
	@echo "make test    set up .venv for development and run the tests"
	@echo "make lint    check style and formatting (ruff)"
	@echo "make types   check types (mypy --strict)"
	@echo "make test-vllm    train with a real vLLM on the CPU, in an environment made for it"
	@echo "make test-sglang  train with a real SGLang: SGLANG_PYTHON=... names its interpreter"
	@echo "make clean   remove .venv, caches and build outputs"
	@echo "PYTHON=...   the interpreter for .venv, 3.11 or newer"

.venv/.installed: $(FRAME)
	@sh scripts/setup.sh

.venv/.installed-dev: $(FRAME)
	@sh scripts/setup.sh dev

demo: .venv/.installed
	@echo "demo: retrain demo"
	@$(BIN)/retrain demo

test: .venv/.installed-dev
	@echo "test: pytest"
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope

lint: .venv/.installed-dev
	@echo "lint: ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/.installed-dev
	@echo "types: mypy --strict src"
	@$(BIN)/mypy --strict src

test-vllm: .venv/.installed .venv-vllm/.installed
	@echo "test-vllm: scripts/verify_engine.py"
	@$(BIN)/python scripts/verify_engine.py vllm --python "$(CURDIR)/.venv-vllm/bin/python" \
		--log docs/verified/vllm_cpu.md

.venv-vllm/.installed: scripts/setup_vllm.sh
	@sh scripts/setup_vllm.sh

SGLANG_PYTHON ?= .venv-sglang/bin/python

test-sglang: .venv/.installed
	@echo "test-sglang: scripts/verify_engine.py"
	@$(BIN)/python scripts/verify_engine.py sglang --python "$(SGLANG_PYTHON)" \
		--log docs/verified/sglang.md

clean:
	@echo "clean: removing .venv, caches and build outputs"
	@rm -rf .venv .venv-vllm build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + \
		2>/dev/null || true
