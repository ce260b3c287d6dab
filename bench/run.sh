#!/usr/bin/env bash
# The profile of a step, whole steps against the published algorithm, every kernel bench, scaling and the model of a
# step; their JSON and pictures in OUTDIR/results/<name>_<device>.*, and OUTDIR/RESULTS.md made of all that lie there:
#
#     bash bench/run.sh [--tiny] [--device cpu|cuda] [--tests] [--seconds 590] OUTDIR
#
# Nothing has to be installed but torch, triton, transformers, numpy and pytest; peers take part where they import
# (extend PYTHONPATH), and pictures need matplotlib. A failed step does not stop the others; the last lines name it and
# the exit status is 1. All ends within --seconds; what is left then fails. --tests builds, and runs the GPU tests first,
# which on a CPU are only collected. BICOT_COMMIT names the commit where the files are no git repository.
set -uo pipefail

usage() {
    sed -n 's/^#     //p' "$0" >&2
    exit 2
}
python=${PYTHON:-python3} device='' seconds=86400 tests='' options=()
while (($# > 1)); do
    case $1 in
        --tiny) options+=(--tiny) ;;
        --tests) tests=1 ;;
        --device) device=$2 && shift ;;
        --seconds) seconds=$2 && shift ;;
        *) usage ;;
    esac
    shift
done
[[ $# == 1 && $1 != -* ]] || usage
mkdir -p "$1/results" || exit 2
out=$(cd "$1/results" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)

# The repository root is the package: a link of that name makes it importable without an installation.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
trap 'exit 130' INT TERM
ln -s "$root" "$links/bicot"
export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cat >"$links/skip_missing.py" <<'PLUGIN'
"""A test file that needs a package which is not here is skipped; without our own package it is an error."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    lines = [line for line in str(report.longrepr).splitlines() if "ModuleNotFoundError" in line]
    if report.failed and lines and "bicot" not in lines[-1]:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {lines[-1]}")
    return report
PLUGIN
[[ $device ]] || device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
commit=$(git -C "$root" describe --always --dirty --exclude='*' 2>/dev/null) # the results will make it dirty
export BICOT_COMMIT=${BICOT_COMMIT:-$commit}

failed=()
step() { # name, seconds on a GPU, command
    local name=$1 limit=$2 left=$((seconds - SECONDS)) begin=$SECONDS status
    shift 2
    [[ $device == cuda ]] && ((limit <= left)) || limit=$((left > 1 ? left : 1))
    printf '\n===== %s\n' "$name"
    timeout "$limit" "$@"
    status=$?
    printf '===== %s: exit status %d after %d s\n' "$name" "$status" $((SECONDS - begin))
    ((status == 0)) || failed+=("$name")
}
bench() { # module, seconds on a GPU, further options
    local module=$1 limit=$2 name=${1#bench_}
    shift 2
    step "$name" "$limit" "$python" -m "bicot.bench.$module" --device "$device" "${options[@]}" "$@" \
        --output "$out/${name}_$device.json"
}

cd "$root" || exit 2
if [[ $tests ]]; then
    if command -v "${CMAKE:-cmake}" >/dev/null; then # what was built before stays
        step build 60 bash -c '"$1" -S . -B "$2/build" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$2" &&
            "$1" --build "$2/build" && { [[ -e kernels/_native.so ]] || mv "$2/_native.so" kernels; }' \
            build "${CMAKE:-cmake}" "$links"
    else
        echo "the C++ kernels, which are for CPUs alone, are not built: there is no cmake"
    fi
    command=("$python" -m pytest -q -rs -p skip_missing -p no:cacheprovider -m "gpu or triton")
    [[ $device == cuda ]] || command+=(--collect-only)
    step tests 150 "${command[@]}"
fi
if [[ $device == cuda ]]; then
    bench step_profile 120 --shape Janus-Pro-1B --steps 2 # every kernel of every decode step is an event
else
    bench step_profile 60 --steps 5
fi
for limit in step:150 rollout:150 rewards:60 decode_attention:30 rms_norm:20 silu_mul:20 rope_kv_write:20 \
    token_logprobs:40 linear_logprobs:60 grpo_loss:90 cfg_sample:30 group_advantages:20; do
    bench "bench_${limit%:*}" "${limit#*:}"
done
bench scaling 120
step step_model 20 "$python" -m bicot.bench.step_model --results "$out" --output "$out/step_model.json"
step report 20 "$python" -m bicot.bench.report "$out"

printf '\n===== results in %s after %d s\n' "$out" "$SECONDS"
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
