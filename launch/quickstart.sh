#!/usr/bin/env bash
# Runs the main job on the protein sample with the demo model `tiny`, on two processes: trains a
# tokenizer, builds shards, translates and finetunes, runs three baselines, exports and compares.
# A second call continues where the first was stopped and repeats nothing that is finished.
#
#   bash launch/quickstart.sh           all steps of the recipes; results in runs/
#   bash launch/quickstart.sh --short   10 steps per stage, to check that it works; in runs/short/
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/demo_data.sh"

RUNS=runs
SHORT=() # with --short, overrides for every stage

# train NAME RECIPE [KEY=VALUE...]: runs a recipe on two processes, in the run directory NAME. The
# launcher's exit code is not reliable, so status.json must say that the run is done.
train() {
  local name=$1 recipe=launch/recipes/$2.yaml port stage
  shift 2
  if is_done "$name"; then
    echo "$RUNS/$name is done"
    return
  fi
  local overrides=("output_dir=$RUNS/$name" "$@")
  for stage in $(sed -n 's/^ *- kind: *\([a-z]*\).*/\1/p' "$recipe"); do
    overrides+=("${SHORT[@]/#/stages.$stage.}")
  done
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  deepspeed --num_gpus 2 --master_port "$port" --log_level error \
    --module s2t2_dist.train "$recipe" "${overrides[@]}"
  is_done "$name" ||
    fail "$RUNS/$name did not finish; see $RUNS/$name/status.json, and run this script again to resume"
}

is_done() {
  grep -qs '"state": "done"' "$RUNS/$1/status.json"
}

main() {
  local begin=$SECONDS
  demo_data
  step "translate, then finetune (S2T2)" train quickstart quickstart
  step "finetune with the new tokenizer, truncated embeddings" \
    train quickstart-truncated quickstart-truncated
  step "the same, with as many steps as S2T2 has in all" \
    train quickstart-truncated-long quickstart-truncated \
    stages.finetune.max_steps=135 stages.finetune.eval_steps=135 stages.finetune.save_steps=45
  step "finetune with the source tokenizer" train quickstart-source quickstart-source
  if [[ ! -f $RUNS/quickstart-hf/config.json ]]; then
    step "export" s2t2 export "$RUNS/quickstart" --out "$RUNS/quickstart-hf"
  fi
  step "comparison" s2t2 compare "$RUNS/quickstart" "$RUNS/quickstart-truncated" \
    "$RUNS/quickstart-truncated-long" "$RUNS/quickstart-source" --out "$RUNS/quickstart-report"
  cat <<END

Finished in $((SECONDS - begin)) s.
  curves   .venv/bin/mlflow ui --backend-store-uri ${MLFLOW_TRACKING_URI:-sqlite:///$ROOT/mlflow.db}
  model    $RUNS/quickstart-hf (AutoModelForCausalLM, AutoTokenizer)
  figure   $RUNS/quickstart-report/figure.png
END
}

case ${1-} in
"") ;;
--short) RUNS=runs/short SHORT=(max_steps=10 eval_steps=10 save_steps=4) ;;
*) fail "unknown argument $1; give none, or --short" ;;
esac
ensure_installed run
cd "$ROOT"
main
