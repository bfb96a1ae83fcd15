# Sourced by the scripts of this project. Installs .venv once, and sets the environment of a run.

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

# is_installed run|test: whether a finished install is up to date. One for tests serves runs too.
is_installed() {
  local hash
  hash=$(install_hash)
  [[ ! -e $UNFINISHED && $(cat "$VENV/.installed-$1" 2>/dev/null) == "$hash" ]] && is_usable
}

# In a copied or moved checkout the scripts of .venv point to the old path.
is_usable() {
  grep -qF "$VENV" "$VENV/bin/activate" 2>/dev/null && "$VENV/bin/python" -c "" 2>/dev/null
}

# require_tools PYTHON: fails if something is missing that pip cannot install.
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

# logged LABEL COMMAND...: prints one line; the command's output goes to the log.
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

# Compiles now; otherwise every rank would in the first run.
build_passes() {
  python -c '
import torch
from s2t2_dist.ot.native import library
library.can_call(torch.ones(1))'
}

# install run|test [EXTRA]: runs every step, without checking for an earlier install.
install() {
  local pip=(python -m pip install --no-input --progress-bar off -c "$ROOT/constraints.txt")
  local python=${PYTHON:-python3}
  require_tools "$python"
  python=$("$python" -c 'import sys; print(sys._base_executable)') # .venv's own may be active
  if [[ -d $VENV ]] && { [[ -e $UNFINISHED ]] || ! is_usable; }; then
    echo "the last installation was interrupted, or $VENV was moved: making it again"
    rm -rf "$VENV"
  fi
  mkdir -p "$VENV"
  touch "$UNFINISHED"
  : >"$INSTALL_LOG"
  logged "install 1/4: virtual environment" "$python" -m venv "$VENV"
  use_environment
  # DeepSpeed's setup.py imports torch. If torch is installed first, pip fetches no second one.
  logged "install 2/4: torch and build tools" \
    "${pip[@]}" torch numpy ninja setuptools wheel packaging psutil py-cpuinfo
  logged "install 3/4: s2t2-dist and its requirements" \
    "${pip[@]}" --no-build-isolation -e "$ROOT${2:-}"
  logged "install 4/4: compile the transport's passes for a CPU" build_passes
  rm -f "$UNFINISHED"
}

# ensure_installed run|test: installs, unless a finished install is up to date.
ensure_installed() {
  (
    if command -v flock >/dev/null && ! flock -n 9; then # of two scripts at once, the second waits
      echo "waiting for another script that installs into $VENV" >&2
      flock 9
    fi
    is_installed "$1" && exit
    if [[ $1 == test ]]; then install test "[test]"; else install run; fi
    install_hash >"$VENV/.installed-run"
    if [[ $1 == test ]]; then cp "$VENV/.installed-run" "$VENV/.installed-test"; fi
  ) 9<"$ROOT"
  use_environment
}

# use_environment: what every process of a run needs. DS_ACCELERATOR and OMP_NUM_THREADS are kept
# if they are set.
use_environment() {
  export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
  export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions
  if ! nvidia-smi >/dev/null 2>&1; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
}
