# Every target does its own set-up: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench bench-attacks oracle lint types check clean

demo: $(VENV)/.installed
	$(BIN)/nndefense demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/first_path.py --out benchmarks/first_path.json

bench-attacks: $(VENV)/.dev
	$(BIN)/python benchmarks/attacks.py --out benchmarks/attacks.json

# Compares the attacks with those of foolbox, torchattacks and ART, in an environment of its own; writes docs/oracle.md.
oracle:
	$(PYTHON) oracle/run.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
