#!/usr/bin/env bash
# Test on a Slurm cluster: one task per GPU.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of tools/test.py]

GPUS (8) tasks in total, GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS (more arguments of srun);
PYTHON (python) is the interpreter.
TEXT
    exit 2
}

[[ $# -ge 4 ]] || usage

GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
[[ $GPUS_PER_NODE -le $GPUS ]] || GPUS_PER_NODE=$GPUS

# SRUN_ARGS holds several arguments.
# shellcheck disable=SC2086
exec srun -p "$1" \
    --job-name="$2" \
    --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/test.py" \
    "$3" "$4" --launcher=slurm "${@:5}"
