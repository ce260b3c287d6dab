#!/usr/bin/env bash
# Trains one run on several machines. Start it on each of them with the same values. The options go to train.py.
#
#     NNODES=2 MASTER_ADDR=FIRST bash examples/torchrun_multinode.sh --config FILE --output_dir DIR --resume auto
#
# The torchruns meet at MASTER_ADDR:MASTER_PORT, on one of the machines, and agree on the ranks. Rank 0 may be on any
# machine, so DIR, prompts and weights must be on a shared file system. The other machines must be able to reach the
# machine of MASTER_ADDR at any port.
set -euo pipefail
: "${NNODES:?how many machines}" "${MASTER_ADDR:?name or address of one of the machines}"

# Seconds that ranks have to finish a step and save after SIGTERM; torchrun's default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# --tee 3 shows what a rank prints, and keeps it in LOG_DIR/HOST/…/RANK_ON_HOST/stdout.log and stderr.log
exec torchrun --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RDZV_ID:-bicot}" \
    --log-dir "${LOG_DIR:-logs}/$(hostname)" --tee 3 \
    "$(dirname "${BASH_SOURCE[0]}")/../train.py" "$@"
