# Sourced by the scripts beside it: makes .venv once, reuses it, sets the environment of a run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
INSTALL_LOG=$VENV/install.log
UNFINISHED=$VENV/.unfinished

fail() {
  echo "error: $*" >&2
  exit 2
}

# What an install depends on: when one of these files changes, pip runs again.
install_hash() {
  (cd "$ROOT" && cat setup.cfg pyproject.toml constraints.txt launch/common.sh) | sha256sum | cut -c 1-64
}

# is_installed run|test: a finished install that still fits. One with the tests' packages fits both.
is_installed() {
  local hash
  hash=$(install_hash)
  [[ ! -e $UNFINISHED && $(cat "$VENV/.installed-$1" 2>/dev/null) == "$hash" ]] && is_usable
}

# A copied or moved checkout has a .venv whose scripts point to the old place.
is_usable() {
  grep -qF "$VENV" "$VENV/bin/activate" 2>/dev/null && "$VENV/bin/python" -c "" 2>/dev/null
}

# require_tools PYTHON: everything that pip cannot bring.
require_tools() {
  command -v "$1" >/dev/null || fail "$1 not found; install Python 3.11 or later"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$1" --version) is too old; install Python 3.11 or later, or set PYTHON=python3.11"
  "$1" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "this python has no venv; install it (Debian, Ubuntu: apt-get install python3-venv)"
  "$1" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' ||
    fail "Python.h not found; install it (Debian, Ubuntu: apt-get install python3-dev)"
  command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler; install one (Debian, Ubuntu: apt-get install g++) or set CXX"
}

# logged LABEL COMMAND...: one line on the terminal, the output in the log.
logged() {
  local label=$1 begin=$SECONDS
  shift
  printf '%s ... ' "$label"
  if ! "$@" >>"$INSTALL_LOG" 2>&1; then
    printf 'failed\n'
    tail -n 20 "$INSTALL_LOG" >&2
    fail "the installation stopped; all of its output is in $INSTALL_LOG"
  fi
  printf '%d s\n' $((SECONDS - begin))
}

# Every rank would compile them in the first run otherwise.
build_passes() {
  python -c '
import torch
from s2t2_dist.ot.native import library
library.can_call(torch.ones(1))'
}

# install run|test [EXTRA]: the steps, without a look at what is there.
install() {
  local pip=(python -m pip install --no-input --progress-bar off -c "$ROOT/constraints.txt")
  local python=${PYTHON:-python3}
  require_tools "$python"
  python=$("$python" -c 'import sys; print(sys._base_executable)') # .venv may be the active one
  if [[ -d $VENV ]] && { [[ -e $UNFINISHED ]] || ! is_usable; }; then
    echo "the last installation was interrupted, or $VENV was moved: making it again"
    rm -rf "$VENV"
  fi
  mkdir -p "$VENV"
  touch "$UNFINISHED"
  : >"$INSTALL_LOG"
  logged "install 1/4: virtual environment" "$python" -m venv "$VENV"
  use_environment
  # DeepSpeed's setup.py imports torch; without these first, pip would fetch a second torch for it.
  logged "install 2/4: torch and build tools" \
    "${pip[@]}" torch numpy ninja setuptools wheel packaging psutil py-cpuinfo
  logged "install 3/4: s2t2-dist and its requirements" \
    "${pip[@]}" --no-build-isolation -e "$ROOT${2:-}"
  logged "install 4/4: compile the transport's passes for a CPU" build_passes
  rm -f "$UNFINISHED"
}

# ensure_installed run|test: returns in a moment when a finished install fits.
ensure_installed() {
  (
    if command -v flock >/dev/null; then flock 9; fi # two scripts at once: the second one waits
    is_installed "$1" && exit
    if [[ $1 == test ]]; then install test "[test]"; else install run; fi
    install_hash >"$VENV/.installed-run"
    if [[ $1 == test ]]; then cp "$VENV/.installed-run" "$VENV/.installed-test"; fi
  ) 9<"$ROOT"
  use_environment
}

# use_environment: what every process of a run needs; values that are set already are kept.
use_environment() {
  export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
  export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions
  if ! nvidia-smi >/dev/null 2>&1; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
}
