# `make demo` and `make test` are all a fresh machine with python3 and make needs.
PYTHON ?= python3
VENV   ?= .venv
# Named first and exactly, so that pip looks for no other build of torch afterwards.
TORCH  ?= torch==2.13.0
# Further words for pytest, such as ARGS='-k merge' or ARGS='-m slow'.
ARGS   ?=
# Processes that share the tests; `pytest` alone takes one.
WORKERS ?= auto
BIN    := $(VENV)/bin

.PHONY: help demo demo-real unit test check style clean

help:           ## list the verbs
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo    ## train a tiny InternLM, fine-tune it in 4 bits, merge it, compare the answers (CPU, minutes)
	$(BIN)/python demo/demo.py

demo-real: $(VENV)/.demo    ## fine-tune and merge a real model of 135 M parameters in 4 bits (downloads 93 MB; CPU, minutes)
	$(BIN)/python demo/real.py

unit: $(VENV)/.test    ## run the tests that import neither torch nor transformers (less than a minute)
	$(BIN)/python -m pytest --unit -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

test: $(VENV)/.test    ## run all tests but the slow ones and those that need real files or a GPU (docs/testing.md)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

check: $(VENV)/.test   ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.test   ## mend lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:          ## remove the environment and what the demo made
	rm -rf $(VENV) work_dirs/demo work_dirs/real

$(VENV)/.demo: pyproject.toml
	@echo "making an environment in $(VENV) (once, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@
