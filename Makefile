# Set-up is part of every target: a fresh machine needs Python and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint format

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/python scripts/demo.py $(if $(SUBJECT),--subject "$(SUBJECT)") $(if $(CLASS),--class_word "$(CLASS)")

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
