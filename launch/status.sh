# Sourced by run_node.sh and slurm.sbatch. Reads from the run directory how a run ended, because a
# launcher's exit code is not reliable: DeepSpeed's is 0 when its node launcher was killed.

# output_dir RECIPE [KEY=VALUE]...: prints the run directory; one line on stderr if the recipe is wrong.
output_dir() {
  python -c '
import sys
from pathlib import Path
from s2t2_dist.config import load_recipe
from s2t2_dist.errors import S2T2Error
try:
    print(load_recipe(Path(sys.argv[1]), sys.argv[2:]).output_dir)
except S2T2Error as error:
    sys.exit("\n".join(f"error: {line}" for line in error.lines))' "$@"
}

# status_of RUN_DIR: prints its status.json, which changes with every start and end of a job.
status_of() {
  cat "$1/status.json" 2>/dev/null || true
}

# field NAME STATUS: prints a text or number of a status.json.
field() {
  sed -nE "s/^ *\"$1\": \"?(.*[^\",])\"?,?\$/\\1/p" <<<"$2"
}

# exit_code RUN_DIR BEFORE CODE: prints the exit code of a run, from its status before and after the
# job and the launcher's exit code: 0 done, 2 a user's mistake, 3 stopped with a checkpoint, 1 other.
exit_code() {
  local run_dir=$1 before=$2 code=$3 now state
  now=$(status_of "$run_dir")
  state=$(field state "$now")
  if [[ $state == done && ($code == 0 || $now != "$before") ]]; then
    echo 0
  elif [[ $state == preempted && $now != "$before" ]]; then
    echo 3
  elif [[ $code == 2 && ($state == failed || $now == "$before") ]]; then
    echo 2
  else
    echo 1
    if [[ $now == "$before" ]]; then
      echo "error: the job ended with code $code before it could start; see its output" >&2
    else
      echo "error: the run did not finish (code $code, ${run_dir}/status.json: $state" \
        "$(field reason "$now")); start it again to resume from its last checkpoint" >&2
    fi
  fi
}
