# From a bare checkout: `make demo` or `make test`. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# Threads that wait for work leave their core to others: on a shared machine, many times faster.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: install demo test check docs clean

demo: $(INSTALLED)
	$(BIN)/moshi-ttt demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -c 'from finetune import cli; cli.write_docs()'

install: $(INSTALLED)

# torchaudio does not name the torch it was built for: it must be of the same release.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
