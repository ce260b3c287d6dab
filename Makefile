# It needs Python, git and make. `make ARGS="..." train` passes arguments on, and so do test and bench.
PYTHON ?= python3
STAMP := .venv/.stamp
PACKAGES := kernels model rewards grpo toy bench examples docs

.PHONY: setup train test lint bench clean

setup: $(STAMP)

# The repository root is the package. Tools that read files instead of importing it find it as .venv/src/bicot.
# --no-compile: to compile every module takes pip a minute, and Python compiles a module when it is first imported.
$(STAMP): setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --no-compile -c constraints.txt -e ".[dev]"
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/bicot
	touch $@

train: $(STAMP)
	.venv/bin/python train.py $(ARGS)

# The tests run in one process of one thread for each core, up to four; ARGS="-n 0" runs them in a single process.
test: export OMP_NUM_THREADS ?= 1
test: PYTEST := .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# Triton's interpreter replaces its compiler in a whole process, so its tests run apart. Status 5: no test was selected.
test: $(STAMP)
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m triton $(ARGS) || [ $$? = 5 ]

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(PACKAGES:%=-p bicot.%)
	PYTHONPATH=.venv/src .venv/bin/lint-imports

# Writes bench/results, RESULTS.md and the pictures. With --tiny it measures nothing, and writes to build/tiny.
bench: $(STAMP)
	PYTHON=.venv/bin/python bash bench/run.sh $(ARGS) $(if $(findstring --tiny,$(ARGS)),build/tiny,bench)

clean:
	rm -rf .venv build *.egg-info kernels/_native*.so .hypothesis .*_cache
