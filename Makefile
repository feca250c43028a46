# Every target installs what it needs into $(VENV); python3, pip and make must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A change of any of these files, or of the folder, runs pip again.
INPUTS := $(shell cat requirements.lock pyproject.toml | cat - Makefile | cksum | tr -d ' ')
HERE := $(shell printf %s "$(CURDIR)" | cksum | tr -d ' ')
STAMP := $(VENV)/.installed-$(INPUTS)-$(HERE)

.PHONY: quickstart test unit slow golden mutations check docs format bare bench bench-env lock clean

# STEPS=600 trains half as long. The target fails if R@1 is below ten times chance.
quickstart: $(STAMP)
	$(BIN)/pmd quickstart $(if $(STEPS),--steps $(STEPS))

test: unit slow

unit: $(STAMP)
	$(BIN)/pytest -m "not slow" -n 2

slow: $(STAMP)
	$(BIN)/pytest -m slow

# Plants one bug at a time in a copy of the tree; a unit test must fail for each. About 20 minutes, not in CI.
mutations: $(STAMP)
	$(BIN)/python tests/mutations/mutate.py

# Rewrites the files that tests/golden compares with. Review the diff; the commit states the reason.
golden: $(STAMP)
	$(BIN)/pytest -q tests/golden --golden-rewrite

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

# Writes docs/cli.md and docs/reasons.md from the code. Fails if one has changed; commit it then.
docs: $(STAMP)
	$(BIN)/python docs/generate.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An environment without extras and torch, as on a download node; builds the sample world in it.
bare:
	test -x $(VENV)-bare/bin/python || $(PYTHON) -m venv $(VENV)-bare
	$(VENV)-bare/bin/pip install --quiet -c requirements.lock .
	! $(VENV)-bare/bin/python -c "import torch"
	$(VENV)-bare/bin/pmd quickstart --out $(VENV)-bare/quickstart --scenes 40 --quiet

bench: $(STAMP)
	$(BIN)/python benchmarks/index.py
	$(BIN)/python benchmarks/pools.py
	$(BIN)/python benchmarks/pixels.py

# img2dataset in an environment of its own, since it pins versions that conflict with ours.
bench-env:
	test -x .bench-venv/bin/python || $(PYTHON) -m venv .bench-venv
	.bench-venv/bin/pip install --quiet "img2dataset==1.47.0"

# Writes requirements.lock, the versions that CI and `make` install: the newest that pyproject.toml allows.
# torch is not pinned, so that pip can take the build for this machine.
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
