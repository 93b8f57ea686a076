# Two commands do everything on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
# Each makes its own .venv first. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# Bytecode is kept, whatever the shell says: the tests start hundreds of processes, which would compile the same files anew.
export PYTHONDONTWRITEBYTECODE :=

# Two files of tests at a time: most of them wait for other processes half of the time, and with more of them, on two cores,
# ranks wait for their turn instead. A timeout ends a process of tests: one that is started again in its place may wait for ever.
SHARED := --numprocesses 2 --dist loadfile --max-worker-restart 0

.PHONY: demo test test-full check docs bench gpu clean

demo: .venv/ready
	$(BIN)/distopt-dalle demo

test: check
	$(BIN)/python -m pytest -q $(SHARED)

test-full: check
	DISTOPT_TESTS=full $(BIN)/python -m pytest -q

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: .venv/ready
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo 'build/docs/index.html'

bench: .venv/ready
	$(BIN)/python -m bench

# With the machine's own python, whose torch knows its GPU: nothing is installed.
gpu:
	$(PYTHON) -m bench.gpu

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "distopt needs Python 3.11 or newer, but $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dalle,docs,fairscale,test]'
	touch $@

clean:
	rm -rf .venv runs
