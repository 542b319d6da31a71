#!/usr/bin/env bash
# Train on several devices: one process per device, started by torchrun.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]

CONFIG  config file
GPUS    processes on this machine: one per GPU (on a machine without GPUs, CPU processes)

Several machines: run this on each of them with these variables set.
NNODES (1)  NODE_RANK (0)  MASTER_ADDR (127.0.0.1)  PORT (29500)
PYTHON (python) is the interpreter.
TEXT
    exit 2
}

[[ $# -ge 2 ]] || usage
[[ $2 =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive number, not '$2'" >&2; usage; }

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" "$1" --launcher pytorch "${@:3}"
