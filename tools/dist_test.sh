#!/usr/bin/env bash
# Test on the GPUs of a machine, or of several: run it on each of them, with NNODES,
# NODE_RANK and MASTER_ADDR set.
#     tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
set -euo pipefail
config=${1:?give a CONFIG, a CHECKPOINT and the number of GPUS}
checkpoint=${2:?give a CHECKPOINT and the number of GPUS}
gpus=${3:?give the number of GPUS}

python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" \
    --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${PORT:-29500}" \
    --nproc_per_node "$gpus" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
