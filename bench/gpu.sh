#!/usr/bin/env bash
# For the day a GPU is at hand: bash bench/gpu.sh [--quick | --tests] [--tiny] [--device cpu] OUTDIR; see walk.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/walk.py" "$@"
