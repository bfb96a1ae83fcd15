#!/usr/bin/env bash
# Every test, after the linter; arguments go to pytest: bash launch/test.sh -m "not slow"
# Two at a time, each test to the worker that is free (loadgroup, without groups): many only wait.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed test
cd "$ROOT"
ruff check .
ruff format --check .
exec python -m pytest -n 2 --dist loadgroup "$@"
