#!/usr/bin/env bash
# Runs the linter, then all tests but the long ones, in two processes. Arguments go to pytest.
#
#   bash launch/test.sh                 what CI runs
#   bash launch/test.sh -m "not slow"   the quick ones
#   bash launch/test.sh -m soak         the long ones: the whole quickstart, 100 kills, 200,000 cases
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed test
cd "$ROOT"
ruff check .
ruff format --check .
# In order of name: pytest-xdist would start the files with the fewest tests last, and those are the
# slowest.
LANES=(-n 2 --dist loadfile --no-loadscope-reorder)
case "$*" in
"") exec python -m pytest "${LANES[@]}" -m "not soak" ;;
"-m not slow") exec python -m pytest "${LANES[@]}" -m "not slow" ;;
*) exec python -m pytest "$@" ;;
esac
