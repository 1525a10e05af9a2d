#!/usr/bin/env bash
# Trains under Slurm: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=8] [SRUN_ARGS=...] tools/slurm_train.sh PARTITION JOB_NAME \
#   CONFIG [more options of `xtuner train`]
# PYTHON sets the Python interpreter (default: python).
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
partition=$1 job=$2 config=$3
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
[ "$per_node" -le "$gpus" ] || per_node=$gpus
# shellcheck disable=SC2086  # SRUN_ARGS is a list of words
exec srun -p "$partition" --job-name "$job" --gres "gpu:$per_node" --ntasks "$gpus" --ntasks-per-node "$per_node" \
  --cpus-per-task "${CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  "${PYTHON:-python}" "$(dirname "$0")/train.py" "$config" --launcher slurm "${@:4}"
