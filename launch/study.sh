#!/usr/bin/env bash
# Runs a study of the demo on every core: makes the data, then the runs that are missing, then the
# table and the figure. A second call continues where the first was stopped.
#
#   bash launch/study.sh                             launch/studies/demo.yaml
#   bash launch/study.sh STUDY.yaml [--dry-run]      another one over the same data
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/demo_data.sh"

ensure_installed run
cd "$ROOT"
demo_data
study=${1-launch/studies/demo.yaml}
step "study" s2t2 study "$study" --jobs "$(nproc)" "${@:2}"
