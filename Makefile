# A newcomer needs Python, git and make. `make ARGS="..." train` passes arguments on; so do test and bench.
PYTHON ?= python3
STAMP := .venv/.stamp
PACKAGES := kernels model rewards grpo toy bench examples docs

.PHONY: setup train test lint bench clean

setup: $(STAMP)

# The repository root is the package: .venv/src/bicot gives it its name for tools that read files instead of importing.
$(STAMP): setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e ".[dev]"
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/bicot
	touch $@

train: $(STAMP)
	.venv/bin/python train.py $(ARGS)

# A process of one thread for each core, up to four; ARGS="-n 0" runs the tests in one process.
test: export OMP_NUM_THREADS ?= 1
test: PYTEST := .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# Triton's interpreter replaces its compiler for a whole process, so its tests have their own; 5: none was selected.
test: $(STAMP)
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m triton $(ARGS) || [ $$? = 5 ]

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(PACKAGES:%=-p bicot.%)
	PYTHONPATH=.venv/src .venv/bin/lint-imports

# All of bench/results, RESULTS.md and the pictures; --tiny measures nothing, and goes elsewhere.
bench: $(STAMP)
	PYTHON=.venv/bin/python bash bench/run.sh $(ARGS) $(if $(findstring --tiny,$(ARGS)),build/tiny,bench)

clean:
	rm -rf .venv build *.egg-info kernels/_native*.so .hypothesis .*_cache
