#!/usr/bin/env bash
# The main job on the protein sample with the model `tiny`, on two processes: a tokenizer, shards,
# translation and finetuning, three other ways to finetune, the export and the comparison.
# Run again, it goes on where it was stopped and repeats nothing that is finished.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PROTEINS=launch/assets/proteins.fasta.gz
MODEL=launch/assets/tiny
DATA=runs/data
CONTEXT=128

# step LABEL COMMAND...: run it and say how long it took.
step() {
  local label=$1 begin=$SECONDS
  shift
  printf '\n== %s\n' "$label"
  "$@"
  printf '== %s: %d s\n' "$label" $((SECONDS - begin))
}

# train NAME: a recipe on two processes. The launcher's exit code alone is not reliable, so the
# status file that the run leaves has to agree.
train() {
  local recipe=launch/recipes/$1.yaml port
  if is_done "$1"; then
    echo "runs/$1 is done"
    return
  fi
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  deepspeed --num_gpus 2 --master_port "$port" --log_level error --module s2t2_dist.train "$recipe"
  is_done "$1" ||
    fail "runs/$1 did not finish; see runs/$1/status.json, and run this script again to go on"
}

is_done() {
  grep -qs '"state": "done"' "runs/$1/status.json"
}

main() {
  local begin=$SECONDS
  step "tokenizer of 512 tokens" \
    s2t2 tokenizer train "$PROTEINS" --vocab-size 512 --out "$DATA/tokenizer-512"
  step "shards in the new tokens" \
    s2t2 data build "$PROTEINS" --tokenizer "$DATA/tokenizer-512" --context "$CONTEXT" \
    --validation-fraction 0.05 --out "$DATA/proteins-512"
  step "shards in the source's single characters" \
    s2t2 data build "$PROTEINS" --tokenizer "$MODEL" --characters --context "$CONTEXT" \
    --validation-fraction 0.05 --out "$DATA/proteins-characters"
  step "translate, then finetune (S2T2)" train quickstart
  step "finetune with the new tokenizer, truncated embeddings" train quickstart-truncated
  step "the same, with as many steps as S2T2 has in all" train quickstart-truncated-long
  step "finetune with the source tokenizer" train quickstart-source
  if [[ ! -f runs/quickstart-hf/config.json ]]; then
    step "export" s2t2 export runs/quickstart --out runs/quickstart-hf
  fi
  step "comparison" s2t2 compare runs/quickstart runs/quickstart-truncated \
    runs/quickstart-truncated-long runs/quickstart-source --out runs/quickstart-report
  cat <<END

Finished in $((SECONDS - begin)) s.
  curves   .venv/bin/mlflow ui --backend-store-uri ${MLFLOW_TRACKING_URI:-sqlite:///$ROOT/mlflow.db}
  model    runs/quickstart-hf (AutoModelForCausalLM, AutoTokenizer)
  figure   $(find runs/quickstart-report -name '*.png' | sort | head -n 1)
END
}

ensure_installed run
cd "$ROOT"
main
