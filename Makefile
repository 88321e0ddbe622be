# The five things that one does with a checkout. Everything is installed in .venv; set PYTHON to use another interpreter.
VENV ?= .venv
# Where `make gpu` writes its figures.
OUT ?= benchmarks/results
INSTALLED := $(VENV)/.installed

ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
SETUP := $(INSTALLED)
endif

.PHONY: demo test lint gpu soak

demo: $(SETUP)
	$(PYTHON) -m mep_lightning.cli fit --config quickstart

test: $(SETUP)
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

gpu: $(SETUP)
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m benchmarks all --base sd15 --device cuda --out $(OUT)
	test "$(OUT)" != benchmarks/results || $(PYTHON) -m benchmarks tables

# Kills, damages and long runs: about an hour, and docs/reliability.md anew.
soak: $(SETUP)
	$(PYTHON) -m reliability kill
	$(PYTHON) -m reliability mutate
	$(PYTHON) -m reliability soak
	$(PYTHON) -m reliability tables

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,dev]"
	touch $@
