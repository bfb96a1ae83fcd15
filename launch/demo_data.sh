# Sourced by the scripts of the demo, which run in the root of the project: its data.

PROTEINS=launch/assets/proteins.fasta.gz
MODEL=launch/assets/tiny
DATA=runs/data
CONTEXT=128

# step LABEL COMMAND...: runs the command and prints how long it took.
step() {
  local label=$1 begin=$SECONDS
  shift
  printf '\n== %s\n' "$label"
  "$@"
  printf '== %s: %d s\n' "$label" $((SECONDS - begin))
}

# demo_data: what is there is not made again.
demo_data() {
  step "tokenizer of 512 tokens" \
    s2t2 tokenizer train "$PROTEINS" --vocab-size 512 --out "$DATA/tokenizer-512"
  step "shards in the new tokens" \
    s2t2 data build "$PROTEINS" --tokenizer "$DATA/tokenizer-512" --context "$CONTEXT" \
    --validation-fraction 0.05 --out "$DATA/proteins-512"
  step "shards in the source's single characters" \
    s2t2 data build "$PROTEINS" --tokenizer "$MODEL" --characters --context "$CONTEXT" \
    --validation-fraction 0.05 --out "$DATA/proteins-characters"
}
