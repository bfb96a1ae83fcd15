"""Fold E' and L' into a model: an ordinary, untied Hugging Face folder with another vocabulary.

It is written without DeepSpeed, so no embedding is ever resized under ZeRO-3.

Shapes: V source vocabulary, U target vocabulary, D width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from s2t2_dist.errors import ConfigError
from s2t2_dist.lm.architecture import (
    SPECIAL_IDS,
    find_vocabulary,
    on_meta,
    one_line,
    with_vocabulary,
)
from s2t2_dist.lm.folder import WeightFiles, write_weights

FOLD_FILE = "1GB"  # largest file of a folded model; rank 0 holds one in memory while it writes
GENERATION = "generation_config.json"

RowMap = Callable[[torch.Tensor, str], torch.Tensor]


def fold(source: Path, target: Path, translate: RowMap, special_ids: dict[str, int]) -> None:
    """Copy a model folder with another vocabulary: untied, with new embedding and head rows.

    Every other weight keeps its bytes. Memory: the embedding in float32 and the new rows; then one
    output file at a time. A model whose files transformers converts is loaded as a whole.

    Args:
        target: an existing, empty folder.
        translate: maps a (V, D) float32 weight and "embed" or "head" to the new (U, D) weight. The
            head's bias comes as a "head" of one column.
        special_ids: bos/eos/pad ids of the new tokenizer, as `*_token_id` keys.

    Raises:
        ConfigError: the model cannot have another vocabulary.
    """
    weights = WeightFiles(source)
    if weights.as_stored:
        held: dict[str, torch.Tensor] = {}
        read, stored = weights.read, weights.file_of.keys() & weights.persistent
    else:
        lm = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
        held = lm.state_dict()
        read, stored = held.__getitem__, held.keys()
    vocabulary = weights.vocabulary

    def translated(name: str, which: str) -> torch.Tensor:
        weight = read(name)
        new = translate(weight.float().reshape(len(weight), -1), which)
        return new.reshape(-1, *weight.shape[1:]).to(weight.dtype, copy=True)

    head = translated(vocabulary.head, "head")
    new = {vocabulary.embed: translated(vocabulary.embed, "embed"), vocabulary.heads[-1]: head}
    new |= {name: translated(vocabulary.biases[0], "head") for name in vocabulary.biases[:1]}
    replaced = {vocabulary.embed, *vocabulary.heads, *vocabulary.biases}
    config = folded_config(weights.config, len(head))
    if weights.as_stored:
        kept = {name: weights.on_meta(name) for name in stored - replaced}
        write_weights(target, kept | new, lambda n: new[n] if n in new else read(n), FOLD_FILE)
    else:
        state = {name: held[name] for name in stored - replaced} | new
        save_state(config, state, target, FOLD_FILE)
    save_configs(config, special_ids, target, source)


def require_translatable(weights: WeightFiles, size: int) -> None:
    """Check that the model can have another vocabulary: that of `size` tokens.

    Raises:
        ConfigError: more than an embedding and a head depends on tokens, or they cannot be apart.
    """
    if weights.vocabulary.other:
        raise ConfigError(
            f"{weights.folder}: beside embedding and LM head the model holds "
            f"{weights.vocabulary.other[0]}, which depends on the vocabulary and has no "
            "translation; choose another model"
        )
    folded_config(weights.config, size)


def folded_config(config: PretrainedConfig, size: int) -> PretrainedConfig:
    """The config of a model with U tokens, untied.

    Raises:
        ConfigError: the architecture ties its matrices whatever the config says, or does not exist
            with so many tokens.
    """
    config = with_vocabulary(config, size, untied=True)
    try:
        found = find_vocabulary(on_meta(config))
    except ValueError as error:
        raise ConfigError(
            f"no {config.model_type} model of {size} tokens can be made: {one_line(error)}; choose "
            "another model"
        ) from None
    if found.tied:
        raise ConfigError(
            f"{config.model_type} models cannot have an LM head apart from the embedding, which a "
            "translation needs; choose another model"
        )
    return config


def save_state(
    config: PretrainedConfig, state: dict[str, torch.Tensor], folder: Path, max_shard_size: str
) -> None:
    """Write weights as transformers' own `save_pretrained` does, in the form of its files.

    Args:
        state: parameters and persistent buffers, by their names in the architecture.
    """
    lm = on_meta(config)
    lm.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def save_configs(
    config: PretrainedConfig, special_ids: dict[str, int], folder: Path, source: Path
) -> None:
    """Write config.json and generation_config.json with the tokenizer's special ids in both.

    What else the source's generation_config.json holds (sampling settings) is kept.
    """
    ids = {name: special_ids.get(name) for name in SPECIAL_IDS}
    for part in (config, config.get_text_config()):
        for name, value in ids.items():
            _set_id(part, name, value, ids["eos_token_id"])
    config.save_pretrained(folder)
    generation = GenerationConfig()
    if (source / GENERATION).is_file():
        generation = GenerationConfig.from_pretrained(source)
    generation.update(**{name: getattr(config.get_text_config(), name) for name in ids})
    generation.save_pretrained(folder)


def _set_id(config: PretrainedConfig, name: str, value: int | None, instead: int | None) -> None:
    """Set a special id; some config classes want one where the tokenizer has none."""
    try:
        setattr(config, name, value)
        type(config).from_dict(config.to_dict())
    except (TypeError, ValueError, StrictDataclassError):
        setattr(config, name, instead)
