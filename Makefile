# On a fresh machine with Python 3.11 and make: `make demo` or `make test`, nothing else first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo miniature test test-lowest lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m olavlm.pipelines.demo --output demo_run

# The paper's claim tested in a world small enough to hold; run again, it goes on where it stopped.
miniature: setup
	$(BIN)/python -m benchmarks.miniature run --dir miniature_run

# Three test processes keep two cores busy while one of them waits; more threads in each would wait for one another.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The suite against the lowest versions that pyproject.toml admits.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python tests/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --editable '.[dev]' --constraint .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) .venv-lowest demo_run miniature_run build *.egg-info
