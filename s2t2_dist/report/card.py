"""The model card (README.md) of an exported folder, from what the run recorded."""

from pathlib import Path

from s2t2_dist.config import INITS, METHODS, Recipe
from s2t2_dist.data.evaluate import Evaluation

_STARTS = {
    "translation": "from the translated vocabulary",
    "truncate": "from the first rows of the source vocabulary",
    "source": "in the source vocabulary",
    **{init: f"new rows without training: {what}" for init, what in INITS.items()},
}


def model_card(
    name: str, recipe: Recipe, data_manifest: dict, evaluation: Evaluation, from_hub: bool
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        name: title of the card: the folder's name.
        data_manifest: manifest of the data folder of the run.
        evaluation: of the exported weights, on the validation split.
        from_hub: whether the base model's name is one of the hub, not of a folder.
    """
    validation = data_manifest["splits"]["validation"]
    return f"""{_front_matter(recipe, from_hub)}
# {name}

{_base(recipe, from_hub)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Data

{_sources(data_manifest)}

{data_manifest["vocab_size"]} tokens, {"one for every character; " * data_manifest["characters"]}\
rows of {data_manifest["context"]} tokens. Documents are held out by the hash of their ids: \
{data_manifest["splits"]["train"]["documents"]:,} to train on, {validation["documents"]:,} to \
validate.

## Evaluation

On the whole validation split:

| | |
|---|---|
| bits per byte | {evaluation.bits_per_byte:.4f} |
| perplexity per token | {evaluation.perplexity:.2f} |
| loss per token (nats) | {evaluation.loss:.4f} |
| bytes per token | {evaluation.bytes / evaluation.tokens:.3f} |

A row's first token is not predicted, and its bytes do not count.

## Training

{_stages(recipe, data_manifest["context"])}

Weights and activations {recipe.model.dtype}, master weights float32, seed {recipe.seed}. The whole
recipe is in `manifest.json`, with the sha256 of every file.

## Licence

This folder holds weights that derive from the base model and from the data above: **the licences
of both apply**. Check them before you publish or use it.
"""


def _front_matter(recipe: Recipe, from_hub: bool) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "license: other"]
    if from_hub:
        lines.append(f"base_model: {recipe.model.model_name_or_path}")
    lines.append("tags: [s2t2, token-translation]")
    return "\n".join(["---", *lines, "---"])


def _base(recipe: Recipe, from_hub: bool) -> str:
    base = recipe.model.model_name_or_path
    if base is None:
        return f"An {recipe.model.model_type} language model, trained from random weights."
    revision = f", revision `{recipe.model.revision}`" if recipe.model.revision else ""
    name = base if from_hub else Path(base).name
    return (
        f"`{name}`{revision}, moved to another domain by sparse Sinkhorn token translation "
        "(Feng et al., *Adapting Language Models via Token Translation*, 2024) with s2t2-dist."
    )


def _sources(data_manifest: dict) -> str:
    rows = [
        f"| `{source['name']}` | {source['bytes']:,} | `{source['sha256']}` |"
        for source in data_manifest["sources"]
    ]
    return "\n".join(["| file | bytes | sha256 |", "|---|---|---|", *rows])


def _stages(recipe: Recipe, context: int) -> str:
    lines = ["| stage | what | steps | tokens | peak learning rate |", "|---|---|---|---|---|"]
    for stage in recipe.stages:
        if stage.kind == "translate":
            begun = f" from {INITS[stage.warm_start]}" if stage.warm_start else ""
            what = f"transport plan, {METHODS[stage.method]}{begun}; language model frozen"
        elif stage.kind == "finetune":
            what = f"every weight, {_STARTS[stage.init]}"
        else:
            what = "every weight, from random weights"
        tokens = stage.max_steps * stage.train_batch_size * context
        numbers = f"{stage.max_steps:,} | {tokens:,} | {stage.learning_rate:g}"
        lines.append(f"| {stage.name} | {what} | {numbers} |")
    return "\n".join(lines)
