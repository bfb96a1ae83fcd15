"""Write a demo model's card: its held-out English loss beside that of a unigram model.

    python launch/assets/write_card.py build/assets/pretrain-tiny --data build/assets/english \
        --out launch/assets/tiny/README.md
"""

import argparse
import math
from pathlib import Path

import numpy as np
from safetensors import safe_open

from s2t2_dist.artifacts import read_json
from s2t2_dist.config import load_recipe
from s2t2_dist.data.shards import ShardReader

CARD = """---
license: apache-2.0
language: en
---
# {name}

A base model for demonstrations only: OLMo architecture (`OlmoForCausalLM`), {parameters:,}
parameters, width {width}, {layers} layers, {tied} embeddings, bfloat16. Byte-level BPE of
{vocabulary:,} tokens.

Pretrained by this project's own trainer (`launch/recipes/pretrain-{name}.yaml`) on
{tokens_seen:,} tokens of English: docstrings of the Python standard library and of packages under
permissive licences, listed in `../english-sources.json`.

Held-out English ({documents:,} documents, {validation_tokens:,} tokens, 1% by hash of the id):

| | nats per token | bits per byte |
|---|---:|---:|
| {name} | {loss:.3f} | {bits:.3f} |
| unigram model of the same tokens | {unigram:.3f} | {unigram_bits:.3f} |

The unigram model uses the token counts of the train split, each plus one. Both lines leave out the
first token of every row. `launch/assets/write_card.py` wrote this card.
"""


def token_counts(reader: ShardReader, skip: int) -> np.ndarray:
    """How often each token occurs in a split, (vocab,) int64, without each row's first `skip`."""
    counts = np.zeros(len(reader.token_bytes), np.int64)
    for row in range(len(reader)):
        tokens = reader[row][skip : reader.length(row)]
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a finished pretraining run")
    parser.add_argument("--data", type=Path, required=True, help="the data it was trained on")
    parser.add_argument("--out", type=Path, required=True, help="the card to write")
    arguments = parser.parse_args()

    status = read_json(arguments.run_dir / "status.json")
    recipe = load_recipe(arguments.run_dir / "config.yaml")
    stage, model = recipe.stages[-1], recipe.model.config
    train = ShardReader(arguments.data, "train")
    validation = ShardReader(arguments.data, "validation")
    frequencies = token_counts(train, 0) + 1
    held_out = token_counts(validation, 1)
    nats = -(held_out * np.log(frequencies / frequencies.sum())).sum()
    with safe_open(arguments.run_dir / "model" / "model.safetensors", "np") as f:
        parameters = sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118
    card = CARD.format(
        name=arguments.out.parent.name,
        parameters=parameters,
        width=model["hidden_size"],
        layers=model["num_hidden_layers"],
        tied="tied" if model["tie_word_embeddings"] else "untied",
        vocabulary=len(train.token_bytes),
        tokens_seen=stage.max_steps * stage.train_batch_size * train.context,
        documents=validation.metadata["splits"]["validation"]["documents"],
        validation_tokens=held_out.sum(),
        loss=status["eval_loss"],
        bits=status["eval_bits_per_byte"],
        unigram=nats / held_out.sum(),
        unigram_bits=nats / math.log(2) / (held_out * train.token_bytes).sum(),
    )
    arguments.out.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
