#!/usr/bin/env bash
# What the tests on a cluster in a box need and pip cannot bring; without it they skip and say so.
set -euo pipefail

PROGRAMS=(ip pdsh ssh-keygen /usr/sbin/sshd munged slurmctld slurmd sbatch)
PACKAGES=(iproute2 pdsh openssh-client openssh-server munge slurm-wlm)

is_complete() {
  local program
  for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || return 1; done
}

if is_complete; then exit 0; fi
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "cluster tests will skip: as root on Debian or Ubuntu this would install ${PACKAGES[*]}"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
install() {
  apt-get update && apt-get install -y --no-install-recommends "${PACKAGES[@]}"
}
if ! output=$(install 2>&1); then
  tail -n 5 <<<"$output" >&2
  echo "cluster tests will skip: apt-get failed" >&2
fi
