# Everything sets itself up: `make quickstart` and `make test` need python3, pip and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the environment depends on; a change of any installs anew, and installs what is missing only.
INPUTS := $(shell cat requirements.lock pyproject.toml | cat - Makefile | cksum | tr -d ' ')
HERE := $(shell printf %s "$(CURDIR)" | cksum | tr -d ' ')
STAMP := $(VENV)/.installed-$(INPUTS)-$(HERE)

.PHONY: quickstart test unit slow golden mutations check docs format bare bench bench-env lock clean

# STEPS=600 trains half as long; it fails if what was learned is not ten times chance.
quickstart: $(STAMP)
	$(BIN)/pmd quickstart $(if $(STEPS),--steps $(STEPS))

test: unit slow

unit: $(STAMP)
	$(BIN)/pytest -m "not slow" -n 2

slow: $(STAMP)
	$(BIN)/pytest -m slow

# Plants one bug after another in a copy of the tree; a unit test must find each. Half an hour.
mutations: $(STAMP)
	$(BIN)/python tests/mutations/mutate.py

# Writes anew what tests/golden compare with: review the diff, and say in the commit why it changed.
golden: $(STAMP)
	$(BIN)/pytest -q tests/golden --golden-rewrite

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

# The pages that the code knows: commands and reasons. Fails if one was stale; commit it then.
docs: $(STAMP)
	$(BIN)/python docs/generate.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A download node: no extras, no torch. Builds the sample world with what `pip install .` brings.
bare:
	test -x $(VENV)-bare/bin/python || $(PYTHON) -m venv $(VENV)-bare
	$(VENV)-bare/bin/pip install --quiet -c requirements.lock .
	! $(VENV)-bare/bin/python -c "import torch"
	$(VENV)-bare/bin/pmd quickstart --out $(VENV)-bare/quickstart --scenes 40 --quiet

bench: $(STAMP)
	$(BIN)/python benchmarks/index.py
	$(BIN)/python benchmarks/pools.py
	$(BIN)/python benchmarks/pixels.py

# img2dataset, which pins what we cannot live beside, in an environment of its own.
bench-env:
	test -x .bench-venv/bin/python || $(PYTHON) -m venv .bench-venv
	.bench-venv/bin/pip install --quiet "img2dataset==1.47.0"

# Versions that CI and `make` install; `make lock` takes the newest that pyproject.toml allows.
# torch is left to its range: on a machine without a GPU, pip then takes the CPU build it offers.
lock:
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet "torch>=2.11,<2.14"
	.lock-venv/bin/pip install --quiet ".[dev]"
	.lock-venv/bin/pip freeze --exclude pmd-flava \
	  | grep -v '^torch==\|^nvidia-\|^triton==\|^cuda-' > requirements.lock
	rm -rf .lock-venv

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c requirements.lock "torch>=2.11,<2.14"
	$(BIN)/pip install --quiet -c requirements.lock -e ".[dev]"
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-bare .bench-venv quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
