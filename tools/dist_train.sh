#!/usr/bin/env bash
# Trains on several GPUs of one or more nodes: tools/dist_train.sh CONFIG GPUS [more options of `xtuner train`]
# On each node: NNODES=4 NODE_RANK=0..3 MASTER_ADDR=HOST [PORT=29500] tools/dist_train.sh CONFIG GPUS_PER_NODE
# PYTHON sets the Python interpreter (default: python).
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
config=$1 gpus=$2
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:?set it to the address of node 0}"
    --master-port "${MASTER_PORT:-${PORT:-29500}}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" --nproc-per-node "$gpus" "$(dirname "$0")/train.py" \
  "$config" --launcher pytorch "${@:3}"
