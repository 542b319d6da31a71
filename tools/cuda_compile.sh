#!/bin/sh
# Compile every CUDA source for one architecture and throw the objects away: no GPU is needed.
# usage: cuda_compile.sh [ARCH]   (default sm_90); NVCC names the compiler, JOBS the processes
set -u
cd "$(dirname "$0")/.." || exit 1
arch=${1:-sm_90}

find_nvcc() {
  for candidate in "${NVCC:-}" "$(command -v nvcc 2>/dev/null)" \
    "${CUDA_HOME:-/nonexistent}/bin/nvcc" /usr/local/cuda/bin/nvcc; do
    [ -n "$candidate" ] && [ -x "$candidate" ] && printf '%s\n' "$candidate" && return
  done
}

nvcc=$(find_nvcc)
if [ -z "$nvcc" ]; then
  echo 'cuda-compile: no nvcc here, so the CUDA sources were NOT compiled (set NVCC or CUDA_HOME)'
  exit 0
fi
sources=$(find csrc -name '*.cu' | sort)
if [ -z "$sources" ]; then
  echo 'cuda-compile: no CUDA sources under csrc/'
  exit 0
fi

out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
"$nvcc" --version | tail -n 2 | head -n 1
printf '%s\n' "$sources" | xargs -P "${JOBS:-2}" -I{} sh -c '
  object=$2/$(printf "%s" "$4" | tr "/" "_").o
  if "$1" -arch="$3" -std=c++17 -O3 -Icsrc -Icsrc/common -c "$4" -o "$object"; then
    echo "ok      $4"
  else
    echo "FAILED  $4"
    exit 1
  fi' sh "$nvcc" "$out" "$arch" {} || {
  echo "cuda-compile: some sources do not compile for $arch (see above)" >&2
  exit 1
}
echo "cuda-compile: $(printf '%s\n' "$sources" | wc -l | tr -d ' ') sources compile for $arch"
