#!/usr/bin/env bash
# Tests and benches for a machine with a GPU: bash bench/gpu.sh [--quick | --tests] [--tiny] [--device cpu] OUTDIR; see walk.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/walk.py" "$@"
