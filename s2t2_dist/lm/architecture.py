"""What an architecture of transformers looks like, from its config alone: no weight is allocated.

Shapes: V source vocabulary, U target vocabulary, D width.
"""

import copy
import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from s2t2_dist.config import ModelConfig
from s2t2_dist.errors import ArtifactError, ConfigError

# Keys that config classes accept besides their parameters: older names of rope_parameters.
ROPE_KEYS = {"rope_theta", "rope_scaling"}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGER = 64  # rows: what changes its shape with them depends on the vocabulary


def on_meta(config: PretrainedConfig) -> torch.nn.Module:
    """The model with its weights on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a causal LM. Code that the folder brings along is never run.

    Raises:
        ArtifactError: transformers cannot make a causal LM of it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        on_meta(config)
    except Exception as error:  # the library raises errors of many kinds
        raise ArtifactError(
            f"{folder / 'config.json'} does not describe a causal LM that transformers knows "
            f"({one_line(error)}); give the folder of a causal language model"
        ) from None
    return config


def with_vocabulary(config: PretrainedConfig, size: int, untied: bool = False) -> PretrainedConfig:
    """A copy of a config with another number of tokens, and with a head of its own if untied."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for name in part.to_dict():
            if name.startswith("vocab_size"):  # also vocab_size_per_layer_input
                setattr(part, name, size)
        for name in SPECIAL_IDS:  # embeddings refuse padding that is none of their rows
            value = getattr(part, name, None)
            if isinstance(value, int) and value >= size:
                setattr(part, name, 0)
        if untied:
            part.tie_word_embeddings = False
    return config


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Where an architecture keeps a row or a number for each token; names as in its state dict.

    Attributes:
        embed: of the embedding (V, D).
        heads: of the LM head (V, D), its own name last; of a tied model the first is `embed`.
        biases: of the head's bias (V,); some architectures list it twice, most have none.
        size: V.
        width: D.
        other: tensors beside these that grow with the vocabulary.
    """

    embed: str
    heads: tuple[str, ...]
    biases: tuple[str, ...]
    size: int
    width: int
    other: tuple[str, ...]

    @property
    def tied(self) -> bool:
        return self.embed in self.heads

    @property
    def head(self) -> str:
        """Where the head's weights are stored."""
        return self.heads[0]


def find_vocabulary(lm: torch.nn.Module) -> Vocabulary:
    """Find the tensors of the vocabulary: those that change their shape with its size.

    Args:
        lm: on the meta device.

    Raises:
        ConfigError: the model has no embedding or no LM head with a row for each token, or their
            shapes differ.
    """
    embed, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if getattr(embed, "weight", None) is None or getattr(head, "weight", None) is None:
        raise ConfigError(
            f"{type(lm).__name__} has no embedding or no LM head with a row for each token, which "
            "S2T2 translates; choose another model"
        )
    if embed.weight.shape != head.weight.shape:
        raise ConfigError(
            f"{type(lm).__name__} has an embedding {tuple(embed.weight.shape)} and an LM head "
            f"{tuple(head.weight.shape)}, which must have one shape; choose another model"
        )
    held = lm.state_dict(keep_vars=True)

    def names_of(tensor: torch.Tensor | None) -> tuple[str, ...]:
        return tuple(name for name, other in held.items() if other is tensor)

    embed_name, bias = names_of(embed.weight)[0], getattr(head, "bias", None)
    heads, biases = names_of(head.weight), names_of(bias) if bias is not None else ()
    larger = on_meta(with_vocabulary(lm.config, len(embed.weight) + LARGER)).state_dict()
    grown = [n for n, t in held.items() if n in larger and larger[n].shape != t.shape]
    return Vocabulary(
        embed=embed_name,
        heads=heads,
        biases=biases,
        size=len(embed.weight),
        width=embed.weight.shape[1],
        other=tuple(name for name in grown if name not in {embed_name, *heads, *biases}),
    )


def random_lm_config(model: ModelConfig, vocabulary: dict[str, int]) -> PretrainedConfig:
    """The config of a model to pretrain. Its keys are checked; transformers ignores unknown ones.

    Args:
        vocabulary: `vocab_size` and special ids of the data, as config keys.

    Raises:
        ConfigError: an unknown model type or key, or values from which no model can be created.
    """
    given = model.config or {}
    _require_known("model.model_type", model.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kind = CONFIG_MAPPING[model.model_type]
    known = ROPE_KEYS | kind.attribute_map.keys()
    for class_ in (kind, PretrainedConfig):
        known |= inspect.signature(class_).parameters.keys() - {"kwargs"}
    for key in given:
        _require_known(f"model.config.{key}", key, known)
    try:
        config = AutoConfig.for_model(model.model_type, **{**given, **vocabulary})
        on_meta(config)
    except Exception as error:  # the library raises errors of many kinds
        raise ConfigError(
            f"model.config is not a valid {model.model_type} config: "
            f"{one_line(error)}; correct its values"
        ) from None
    return config


def _require_known(path: str, key: str, known: Iterable[str]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see the documentation of transformers"
        raise ConfigError(f"{path}: transformers does not know {key}; {hint}")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
