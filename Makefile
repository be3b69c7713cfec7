# Set-up is part of every target: a fresh machine needs Python and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
# What the commands import, compiled once at the installation. Where the environment forbids Python to
# keep compiled files, as many containers do, every start would compile them again, for 8 seconds.
COMPILED := import open_clip, ldm.training.train, ldm.models.diffusion.ddpm, ldm.models.autoencoder, \
	transformers.models.clip.modeling_clip

.PHONY: install demo test lint format

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "$(COMPILED)"
	touch $@

demo: install
	$(BIN)/python scripts/demo.py $(if $(SUBJECT),--subject "$(SUBJECT)") $(if $(CLASS),--class_word "$(CLASS)") $(if $(MODEL),--model "$(MODEL)")

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
