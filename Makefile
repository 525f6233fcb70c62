PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

# Train on handwritten digits, draw samples, measure them: runs/digits.
demo: .venv/core
	$(BIN)/pmf digits --out runs/digits --overwrite
	$(BIN)/pmf eval runs/digits

# Lint, formatting, types and every test.
test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

clean:
	rm -rf .venv

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
