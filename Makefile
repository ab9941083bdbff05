# The commands a newcomer and CI run. PYTHON may name any Python 3.11 or 3.12; else the first that runs is taken.
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test coverage check clean

help:
	@echo "make quickstart   install, then pre-train a small model on the bundled photographs"
	@echo "make test         install, then run the whole test suite"
	@echo "make coverage     the same, and which lines ran; takes half as long again"
	@echo "make check        install, then lint, format check and type check"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c '$(FITS)' || { echo "ummim needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

quickstart: install
	$(BIN)/python -m data_prep build ummim/sample_images runs/quickstart/shards --shard-count 32
	$(BIN)/python train.py quickstart
	$(BIN)/ummim export runs/quickstart/run runs/quickstart/encoder.safetensors --format safetensors
	@echo "Look at runs/quickstart/run/reconstructions/epoch-0060.png"

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

coverage: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
