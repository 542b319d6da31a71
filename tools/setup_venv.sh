#!/bin/sh
# Make or bring up to date the virtual environment that the Makefile uses.
# usage: setup_venv.sh install|build VENV
#   install  the environment, PyTorch, the OpenMMLab packages, mmvim's dependencies
#   build    mmvim itself in editable mode, with the extension when a compiler is there
# pip writes to VENV/pip.log, whose end is shown when it fails.
# environment: PYTHON (python3), TORCH_SPEC ('torch torchvision'), PIP_ARGS (for every pip install,
# such as --index-url ...), EXTRAS (onedl,quickstart,export,serve,dev), NEEDED_MIB (10240, free disk space required)
set -u

PYTHON=${PYTHON:-python3}
TORCH_SPEC=${TORCH_SPEC:-torch torchvision}
PIP_ARGS=${PIP_ARGS:-}
EXTRAS=${EXTRAS:-onedl,quickstart,export,serve,dev}
NEEDED_MIB=${NEEDED_MIB:-10240}
PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_DISABLE_PIP_VERSION_CHECK

say() { printf '==> %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$1" >&2
  shift
  for line in "$@"; do printf '       %s\n' "$line" >&2; done
  exit 1
}

check_python() {
  command -v "$PYTHON" >/dev/null 2>&1 ||
    die "no Python found as '$PYTHON'" 'install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3 ...'
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    die "'$PYTHON' does not run" 'name another one: make PYTHON=/path/to/python3 ...'
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "'$PYTHON' is Python $version and mmvim needs 3.10 or newer" \
      'install a newer one and name it: make PYTHON=python3.12 ...'
}

make_venv() {
  [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
  check_python
  say "making $VENV with Python $version"
  "$PYTHON" -m venv --clear "$VENV" ||
    die "could not make $VENV" \
      "on Debian and Ubuntu: apt-get install python$version-venv" \
      'elsewhere: check that the folder is writable and the disk is not full (df -h .)'
}

check_disk() {
  "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1 && return
  free=$(df -Pk "$VENV" | awk 'NR == 2 { print int($4 / 1024) }')
  [ "$free" -ge "$NEEDED_MIB" ] ||
    die "$free MiB free where $VENV lies; PyTorch and the rest need about $NEEDED_MIB MiB" \
      'free some space, or put the environment elsewhere: make VENV=/other/disk/venv ...' \
      "or take the smaller CPU build: make NEEDED_MIB=3000 TORCH_SPEC='torch torchvision --index-url URL' ..." \
      '(pytorch.org names the URL of the CPU wheels)'
}

pip_install() {
  what=$1
  shift
  say "installing $what"
  printf '\n==> %s\n' "$what" >>"$LOG"
  # Word splitting is wanted: PIP_ARGS and TORCH_SPEC hold several arguments.
  # shellcheck disable=SC2086
  "$VENV/bin/python" -m pip install $PIP_ARGS "$@" >>"$LOG" 2>&1 || {
    tail -n 20 "$LOG" >&2
    die "could not install $what (the end of pip's output is above, all of it in $LOG)" \
      'no network or a proxy: check that pip reaches its index; pip reads pip.conf and PIP_INDEX_URL' \
      "another index or wheel folder: make PIP_ARGS='--index-url URL' or PIP_ARGS='--find-links DIR' ..." \
      'no space left: df -h . "${TMPDIR:-/tmp}"; TMPDIR=/other/disk moves pip'"'"'s scratch space' \
      "no matching torch: your Python may be too new or too old: make PYTHON=python3.12 ... after rm -r $VENV"
  }
}

# opencv-python (which mmcv asks for) needs a desktop's libGL; the headless build does not.
check_cv2() {
  error=$("$VENV/bin/python" -c 'import cv2' 2>&1) && return
  say "OpenCV cannot be imported here ($(printf '%s' "$error" | tail -n 1)); taking its headless build"
  pip_install 'opencv-python-headless' --force-reinstall --no-deps opencv-python-headless
  "$VENV/bin/python" -c 'import cv2' || die 'OpenCV still cannot be imported (see above)'
}

install() {
  make_venv
  check_disk
  : >"$LOG"
  pip_install 'pip, setuptools, wheel and ninja' --upgrade 'pip>=23.1' 'setuptools>=77' wheel ninja
  # shellcheck disable=SC2086
  pip_install "PyTorch ($TORCH_SPEC; several GB for the CUDA build; log: $LOG)" $TORCH_SPEC
  # With build isolation: mmcv then builds without torch and skips its operators, which would take
  # an hour; mmvim supplies them from torchvision.
  pip_install "the OpenMMLab packages and mmvim's dependencies [$EXTRAS]" -e ".[$EXTRAS]"
  check_cv2
}

build() {
  if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
    say "no C++ compiler (${CXX:-c++}): going on with the PyTorch operators, which are slower;" \
      'install one (Debian, Ubuntu: apt-get install g++) and run make setup again for the compiled ones'
  fi
  pip_install 'mmvim, compiling its extension where a compiler is there (minutes)' \
    --no-build-isolation --no-deps -e .
}

[ $# -eq 2 ] || die 'usage: setup_venv.sh install|build VENV'
VENV=$2
LOG=$VENV/pip.log
case $1 in
  install) install ;;
  build) build ;;
  *) die "unknown step '$1': install or build" ;;
esac
