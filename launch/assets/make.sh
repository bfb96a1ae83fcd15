#!/usr/bin/env bash
# Remakes the base models from scratch: collects English text, trains a tokenizer, builds shards and
# pretrains two models. Takes hours on two cores; a second call continues after an interruption.
# Intermediate files go to WORK (default: build/assets).
#
# The protein sample is drawn from a larger file. To draw it again, give that file:
#     bash launch/assets/make.sh [swissprot50.fasta.gz]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# Installs the tests' packages too, because their docstrings are part of the English text.
ensure_installed test
cd "$ROOT"
ASSETS=launch/assets
WORK=${WORK:-build/assets}
mkdir -p "$WORK"

if [[ $# -gt 0 ]]; then
  python $ASSETS/sample_proteins.py "$1" --clusters 4000 --out $ASSETS/proteins.fasta.gz
fi

if [[ ! -f $WORK/english.jsonl.gz ]]; then
  python $ASSETS/collect_docstrings.py \
    --out "$WORK/new.jsonl.gz" --sources $ASSETS/english-sources.json
  mv "$WORK/new.jsonl.gz" "$WORK/english.jsonl.gz"
fi
s2t2 tokenizer train "$WORK/english.jsonl.gz" --vocab-size 4096 --sample 60000000 --out "$WORK/tokenizer"
s2t2 data build "$WORK/english.jsonl.gz" \
  --tokenizer "$WORK/tokenizer" --context 256 --out "$WORK/english"

for name in tiny small; do
  run=$WORK/pretrain-$name
  deepspeed --num_gpus 1 --module s2t2_dist.train launch/recipes/pretrain-$name.yaml \
    "output_dir=$run" "data.path=$WORK/english"
  grep -q '"state": "done"' "$run/status.json" || fail "$run did not finish; run this again"
  mkdir -p $ASSETS/$name
  cp "$run"/model/{config,generation_config,tokenizer,tokenizer_config}.json \
    "$run/model/model.safetensors" $ASSETS/$name/
  python $ASSETS/write_card.py "$run" --data "$WORK/english" --out $ASSETS/$name/README.md
done
