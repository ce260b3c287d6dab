#!/usr/bin/env bash
# For the day a GPU is at hand: the GPU tests, the profile of a step, whole steps against the published algorithm, then
# every bench, in under ten minutes. Options, results and what has to be installed are those of bench/run.sh:
#
#     bash bench/gpu.sh [--tiny] [--device cpu] OUTDIR
exec bash "$(dirname "$0")/run.sh" --tests --seconds 590 --device cuda "$@"
