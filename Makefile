# The commands a newcomer and CI run. PYTHON may name any Python 3.11 or 3.12.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test check clean

help:
	@echo "make quickstart   install, then pre-train a small model on the bundled photographs"
	@echo "make test         install, then run the whole test suite"
	@echo "make check        install, then lint, format check and type check"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and \
		"ummim needs Python 3.11 or 3.12, this is %d.%d: run make PYTHON=/path/to/python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

quickstart: install
	$(BIN)/python -m data_prep build ummim/sample_images runs/quickstart/shards --shard-count 32
	$(BIN)/python train.py quickstart
	$(BIN)/ummim export runs/quickstart/run runs/quickstart/encoder.safetensors --format safetensors
	@echo "Look at runs/quickstart/run/reconstructions/: the newest picture is the last epoch's."

test: install
	$(BIN)/python -m pytest --cov --cov-report=term

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
