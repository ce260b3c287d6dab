#!/usr/bin/env bash
# One run on several machines: start this on each of them, with the same values. Options go to train.py.
#
#     NNODES=2 MASTER_ADDR=first-machine bash examples/torchrun_multinode.sh --config FILE --output_dir DIR --resume auto
#
# The torchruns meet at MASTER_ADDR:MASTER_PORT, on one of the machines, and agree on the ranks themselves. Rank 0 may be
# on any machine, and all of them read weights and prompts: DIR, prompts and weights are on a file system that they share.
# The machine of MASTER_ADDR has to be reachable from the others at any port.
set -euo pipefail
: "${NNODES:?how many machines}" "${MASTER_ADDR:?name or address of one of the machines}"

# Time to finish a step and save after SIGTERM; torchrun's own is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# --tee 3: what a rank says is shown, and kept in LOG_DIR/HOST/…/RANK_ON_HOST/stdout.log and stderr.log
exec torchrun --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RDZV_ID:-bicot}" \
    --log-dir "${LOG_DIR:-logs}/$(hostname)" --tee 3 \
    "$(dirname "${BASH_SOURCE[0]}")/../train.py" "$@"
