#!/usr/bin/env bash
# Every test, after the linter; arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed test
cd "$ROOT"
ruff check .
ruff format --check .
if [[ $# -gt 0 ]]; then
  exec python -m pytest "$@"
fi
# In the order of their names: the files with the fewest tests, which take longest, are not last.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"
exec python -m pytest -m alone
