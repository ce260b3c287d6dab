# A newcomer needs Python, git and make. `make ARGS="..." train` passes arguments on; so do test and bench.
PYTHON ?= python3
STAMP := .venv/.stamp
PACKAGES := kernels model rewards grpo bench

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

# Triton's interpreter replaces its compiler for a whole process, so its tests have one of their own; 5: none was selected.
test: $(STAMP)
	.venv/bin/python -m pytest $(ARGS)
	TRITON_INTERPRET=1 .venv/bin/python -m pytest -m triton $(ARGS) || [ $$? = 5 ]

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
