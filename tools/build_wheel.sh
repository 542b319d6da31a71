#!/usr/bin/env bash
# Build a wheel with compiled kernels, to be installed where there is no compiler.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: tools/build_wheel.sh [--cpu] [FOLDER]

--cpu   without CUDA kernels; needs no nvcc
FOLDER  receives the wheel (dist)

The wheel runs with every Python from 3.10 on, and with the torch of $PYTHON (python3) alone, which
its metadata requires; any other one is served by the PyTorch implementations. The machine needs that
torch, setuptools 77 or newer, wheel, a C++ compiler and nvcc, but no GPU.

TORCH_CUDA_ARCH_LIST (7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX)  MAX_JOBS (the number of cores)
TEXT
    exit 2
}

cuda=1
[[ ${1:-} == --cpu ]] && { cuda=0; shift; }
[[ $# -le 1 && ${1:-} != -* ]] || usage
mkdir -p "${1:-dist}"
output=$(cd "${1:-dist}" && pwd)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# setuptools would pack what an earlier build left there.
rm -rf build/lib* build/bdist.*
export MMVIM_WHEEL=1 MMVIM_FORCE_CUDA=$cuda
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX}
# Elsewhere than in the checkout, of whose own metadata the version of the wheel is not.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" setup.py -q egg_info --egg-base "$scratch" bdist_wheel --dist-dir "$output"
ls -l "$output"/mmvim-*+torch*.whl
