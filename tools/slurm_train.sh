#!/usr/bin/env bash
# Train on a cluster with Slurm. GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS, if
# set, say on what.
#     tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]
set -euo pipefail
partition=${1:?give PARTITION, JOB_NAME, CONFIG and WORK_DIR}
job_name=${2:?give JOB_NAME, CONFIG and WORK_DIR}
config=${3:?give CONFIG and WORK_DIR}
work_dir=${4:?give WORK_DIR}
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}

# SRUN_ARGS holds several words.
# shellcheck disable=SC2086
srun -p "$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$config" \
    --work-dir "$work_dir" --launcher slurm "${@:5}"
