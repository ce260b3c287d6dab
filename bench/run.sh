#!/usr/bin/env bash
# Every bench, however long it takes: bash bench/run.sh [--tiny] [--device cpu|cuda] OUTDIR; see walk.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/walk.py" --all "$@"
