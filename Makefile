# Everything sets itself up: `make quickstart` and `make test` need python3, pip and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml Makefile | cksum | tr -d ' ')

.PHONY: quickstart test check format docs lock clean

quickstart: $(STAMP)
	$(BIN)/pmd quickstart

test: $(STAMP)
	$(BIN)/pytest -m "not slow" -n 2
	$(BIN)/pytest -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Versions that CI and `make` install; `make lock` takes the newest that pyproject.toml allows.
# torch is left to its range: on a machine without a GPU, pip then takes the CPU build it offers.
lock:
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet "torch>=2.11,<2.14" && .lock-venv/bin/pip install --quiet ".[dev]"
	.lock-venv/bin/pip freeze --exclude pmd-flava | grep -v '^torch==\|^nvidia-\|^triton==\|^cuda-' > requirements.lock
	rm -rf .lock-venv

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.11,<2.14" -c requirements.lock
	$(BIN)/pip install --quiet -c requirements.lock -e ".[dev]"
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) quickstart .pytest_cache .mypy_cache .ruff_cache
