# From a bare checkout: `make demo` or `make test`. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# Threads that wait for work leave their core to others: on a shared machine, many times faster.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: install demo test check docs clean

# Memory that is free stays with the process: asked for anew at every step it took a quarter of the time.
demo: export MALLOC_TRIM_THRESHOLD_ = 4000000000
demo: export MALLOC_MMAP_THRESHOLD_ = 4000000000
demo: $(INSTALLED)
	$(BIN)/moshi-ttt demo

# Processes that run tests, each on one thread. A file of tests stays in one process, as its tests
# share runs.
WORKERS ?= 2

test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the generated pages, and builds the site into build/site; a link that leads nowhere fails.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/python -c 'from finetune import cli; cli.write_docs()'
	$(BIN)/mkdocs build

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
