# Every target does its own set-up: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo serve-demo test test-slow bench bench-attacks bench-training bench-serving bench-baselines bench-index bench-reading oracle docs notebooks lint types check clean

demo: $(VENV)/.installed
	$(BIN)/nndefense demo --out runs/demo

# Serves the database that `make demo` made, with its page and the attacks on it, until interrupted.
serve-demo: $(VENV)/.serve runs/demo/database/guard.json
	$(BIN)/nndefense serve --database runs/demo/database --demo-attacks

runs/demo/database/guard.json:
	$(MAKE) demo

# Each test runs in one thread; two processes share the files of tests out, in the order of tests/conftest.py.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/first_path.py --out benchmarks/first_path.json

bench-attacks: $(VENV)/.dev
	$(BIN)/python benchmarks/attacks.py --out benchmarks/attacks.json

bench-training: $(VENV)/.dev
	$(BIN)/python benchmarks/training.py --out benchmarks/training.json

bench-baselines: $(VENV)/.dev
	$(BIN)/python benchmarks/total_variation.py --out benchmarks/total_variation.json
	$(BIN)/python benchmarks/quilting.py --out benchmarks/quilting.json

# AUTOFAISS: a Python that has autofaiss (numpy < 2, pyarrow < 20); without it that comparison is left out.
bench-index: $(VENV)/.dev
	$(BIN)/python benchmarks/index.py $(if $(AUTOFAISS),--autofaiss $(AUTOFAISS)) --plot docs/images/index/scaling.png --out benchmarks/index.json

bench-reading: $(VENV)/.dev
	$(BIN)/python benchmarks/reading.py --out benchmarks/reading.json

# Needs wrk, a load tool of the system's packages.
bench-serving: $(VENV)/.serve
	$(BIN)/python benchmarks/serving.py --out benchmarks/serving.json

# Compares the attacks with those of foolbox, torchattacks and ART, in an environment of its own; writes docs/oracle.md.
oracle:
	$(PYTHON) oracle/run.py

# The documentation as a site in build/site, without a network. A broken link, a page that docs/README.md does not list, and a
# public name without a description are errors.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs -d build/site-trees . build/site
	@echo "build/site/index.html"

# Runs the notebooks and keeps what they show; the slow tests run them, too, and compare.
notebooks: $(VENV)/.dev
	$(BIN)/python tests/test_notebooks.py

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

$(VENV)/.serve: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
