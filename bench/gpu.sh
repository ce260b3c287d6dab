#!/usr/bin/env bash
# The GPU tests, the profile of a toy step, then every bench, with their JSON in OUTDIR/<name>.json, in under ten minutes:
#
#     bash bench/gpu.sh [--tiny] [--device cpu] OUTDIR
#
# Nothing has to be installed but torch, triton, transformers, numpy and pytest; peers take part where they import
# (extend PYTHONPATH). A failed step does not stop the others; the last lines name it and the exit status is 1.
# BICOT_COMMIT names the commit where the files are no git repository. On a CPU the GPU tests are only collected.
set -uo pipefail

usage() {
    sed -n 's/^#     //p' "$0" >&2
    exit 2
}
python=${PYTHON:-python3} device=cuda options=()
while (($# > 1)); do
    case $1 in
        --tiny) options+=(--tiny) ;;
        --device) device=$2 && shift ;;
        *) usage ;;
    esac
    shift
done
[[ $# == 1 && $1 != -* ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)

# The repository root is the package: a link of that name makes it importable without an installation.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
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

failed=()
step() { # name, seconds, command
    local name=$1 limit=$2 left=$((590 - SECONDS)) begin=$SECONDS status
    shift 2
    ((limit <= left)) || limit=$((left > 1 ? left : 1))
    printf '\n===== %s\n' "$name"
    timeout "$limit" "$@"
    status=$?
    printf '===== %s: exit status %d after %d s\n' "$name" "$status" $((SECONDS - begin))
    ((status == 0)) || failed+=("$name")
}

cd "$root" || exit 2
tests=("$python" -m pytest -q -rs -p skip_missing -p no:cacheprovider -m "gpu or triton")
[[ $device == cuda ]] || tests+=(--collect-only)
step tests 200 "${tests[@]}"
if "$python" -c "import jsonargparse, matplotlib, tqdm, yaml"; then # what training needs besides
    step step_profile 60 "$python" -m bicot.bench.step_profile --device "$device" "${options[@]}" \
        --output "$out/step_profile.json"
fi
for bench in rollout:180 rewards:90 decode_attention:40 rms_norm:20 silu_mul:20 rope_kv_write:20 \
    token_logprobs:60 linear_logprobs:90 grpo_loss:120 cfg_sample:40 group_advantages:20; do
    name=${bench%:*}
    step "$name" "${bench#*:}" \
        "$python" -m "bicot.bench.bench_$name" --device "$device" "${options[@]}" --output "$out/$name.json"
done

printf '\n===== results in %s after %d s\n' "$out" "$SECONDS"
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
