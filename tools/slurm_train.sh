#!/usr/bin/env bash
# Trains under Slurm: [GPUS=8] [GPUS_PER_NODE=8] tools/slurm_train.sh PARTITION JOB_NAME CONFIG [further options]
set -euo pipefail
partition=$1 job=$2 config=$3
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
exec srun -p "$partition" --job-name "$job" --gres "gpu:$per_node" --ntasks "$gpus" --ntasks-per-node "$per_node" \
  --kill-on-bad-exit=1 python "$(dirname "$0")/train.py" "$config" --launcher slurm "${@:4}"
