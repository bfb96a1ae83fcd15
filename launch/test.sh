#!/usr/bin/env bash
# Every test, after the linter; arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed test
cd "$ROOT"
ruff check .
ruff format --check .
exec python -m pytest "$@"
