#!/usr/bin/env bash
# Trains on several GPUs of this machine: tools/dist_train.sh CONFIG GPUS [further options of `xtuner train`]
set -euo pipefail
config=$1 gpus=$2
exec python -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$(dirname "$0")/train.py" "$config" \
  --launcher pytorch "${@:3}"
