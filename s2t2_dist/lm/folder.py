"""Language models as folders: read rows of the embedding, fold E' and L' in, make random ones.

Shapes: V source vocabulary, U target vocabulary, D width, R source rows that were asked for.
A folded model is an ordinary Hugging Face folder, untied, made without DeepSpeed: nothing is ever
resized under ZeRO-3.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from s2t2_dist import artifacts
from s2t2_dist.config import ModelConfig
from s2t2_dist.errors import ArtifactError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FOLD_FILE = "1GB"  # of a folded model: what rank 0 holds while it writes
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that config classes take beside their parameters: older names of rope_parameters.
ROPE_KEYS = {"rope_theta", "rope_scaling"}


def local_folder(model: ModelConfig) -> Path:
    """The model's folder on this machine; a hub name is downloaded first.

    Raises:
        ConfigError: neither a folder with a config.json nor a name that the hub knows.
    """
    name = model.model_name_or_path
    assert name is not None, "a model that is made from a config has no folder yet"
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.is_absolute() or path.is_dir() or name.startswith(".") or name.count("/") != 1:
        raise ConfigError(
            f"model.model_name_or_path: {name} is no Hugging Face folder (no config.json in it)"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=wanted))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.model_name_or_path: {name} is no folder here and the hub did not give it: "
            f"{reason}"
        ) from None


def random_lm_config(model: ModelConfig, vocabulary: dict[str, int]) -> PretrainedConfig:
    """The config of a model to pretrain, checked: the library ignores keys that it does not know.

    Args:
        vocabulary: `vocab_size` and special ids of the data, as config keys.

    Raises:
        ConfigError: an unknown model type or key, or values from which no model can be made.
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
        _on_meta(config)
    except Exception as error:  # the library raises errors of many kinds
        raise ConfigError(
            f"model.config makes no {model.model_type} model: {_one_line(error)}"
        ) from None
    return config


def _require_known(path: str, key: str, known: Iterable[str]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see the documentation of transformers"
        raise ConfigError(f"{path}: transformers does not know {key}; {hint}")


def _on_meta(config: PretrainedConfig) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def save_random_lm(model: ModelConfig, vocabulary: dict[str, int], folder: Path) -> None:
    """Write the folder of a model with random weights (the current torch seed), to pretrain.

    Raises:
        ConfigError: as `random_lm_config`.
    """
    config = random_lm_config(model, vocabulary)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.to(getattr(torch, model.dtype)).save_pretrained(folder)


class WeightFiles:
    """The safetensors of a Hugging Face folder, read tensor by tensor.

    Attributes:
        file_of: name of a tensor -> file name.
        config: the model's config.
        head_bias: the LM head adds a bias to the logits.
        as_stored: every weight is in a file under its own name; transformers converts those of
            some architectures (the experts of Mixtral) or completes their names (GPT-2).

    Raises:
        ArtifactError: no safetensors, or a config from which no causal LM can be made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of = _file_of(folder)
        try:
            config = AutoConfig.from_pretrained(folder)
            lm = _on_meta(config)
        except Exception as error:  # the library raises errors of many kinds
            raise ArtifactError(
                f"{folder / 'config.json'} makes no causal LM ({_one_line(error)}); give the "
                "folder of a causal language model"
            ) from None
        self.config = config
        names = {id(parameter): name for name, parameter in lm.named_parameters()}
        self.as_stored = set(names.values()) <= self.file_of.keys() and not (
            get_model_conversion_mapping(lm, add_legacy=False)
        )
        self.embed_name = names[id(lm.get_input_embeddings().weight)]
        self.tied = config.tie_word_embeddings
        head = lm.get_output_embeddings().weight
        self.head_bias = lm.get_output_embeddings().bias is not None
        self.head_name = self.embed_name if self.tied else names[id(head)]
        # A tied model has one parameter; its state dict still knows the head's own name.
        self.head_key = next(
            name
            for name, tensor in lm.state_dict(keep_vars=True).items()
            if tensor is head and (name != self.embed_name)
        )
        self.vocab_size = config.vocab_size

    def read(self, name: str) -> torch.Tensor:
        """A whole weight; its pages are mapped from the file while it lives."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            return f.get_tensor(name)

    def on_meta(self, name: str) -> torch.Tensor:
        """A tensor without data, of the shape and dtype that it has in the file."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            view = f.get_slice(name)
            shape = view.get_shape()
            none = view[tuple(slice(0, 0) for _ in shape)] if shape else f.get_tensor(name)
        return torch.empty(shape, dtype=none.dtype, device="meta")

    def check(self) -> None:
        """Open the header of every file.

        Raises:
            ArtifactError: names the first file that is missing, cut or without one of its tensors.
        """
        for file in sorted(set(self.file_of.values())):
            held = _tensor_names(self.folder / file)
            listed = {name for name, home in self.file_of.items() if home == file}
            if listed - held:
                raise ArtifactError(
                    f"{self.folder / file} lacks {min(listed - held)}, which {INDEX} expects in "
                    "it; copy the model again"
                )

    def rows(self, name: str, token_ids_R: torch.Tensor) -> torch.Tensor:
        """Rows of a (V, D) weight in float32, (R, D); reads no more than the span they cover."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            view = f.get_slice(name)
            if not len(token_ids_R):
                return torch.zeros(0, view.get_shape()[1])
            first, last = int(token_ids_R.min()), int(token_ids_R.max())
            return view[first : last + 1][token_ids_R - first].float()


def _file_of(folder: Path) -> dict[str, str]:
    """Name of a tensor -> file name, from the index or from the only file."""
    if (folder / INDEX).is_file():
        weight_map = artifacts.read_json(folder / INDEX).get("weight_map")
        if not weight_map:
            raise ArtifactError(f"{folder / INDEX} has no weight_map; copy the model again")
        return weight_map
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_tensor_names(folder / SINGLE), SINGLE)
    raise ArtifactError(
        f"{folder} has neither {SINGLE} nor {INDEX}; convert the model to safetensors"
    )


def _tensor_names(path: Path) -> set[str]:
    """What a safetensors file holds; its header says how long the file must be."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy the model again")
    try:
        with safe_open(path, "pt") as f:
            return set(f.keys())
    except SafetensorError as error:
        raise ArtifactError(f"{path} is cut or damaged ({error}); copy the model again") from None


def write_weights(
    target: Path,
    shapes: dict[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    max_shard_size: str,
) -> None:
    """Write weights as safetensors of at most this size, one file in memory at a time.

    Writes the index that `from_pretrained` reads where there are several files. A single weight
    that is larger gets a file of its own.

    Args:
        shapes: by name, tensors of the weights' shape and dtype, with data or on the meta device.
        read: gives the weight of a name.
        max_shard_size: as "5GB".
    """
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: read(name).contiguous() for name in names}
        save_file(tensors, target / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def fold(
    source: Path,
    target: Path,
    translate: Callable[[torch.Tensor, str], torch.Tensor],
    special_ids: dict[str, int],
) -> None:
    """Copy a model folder with another vocabulary: untied, with new embedding and head rows.

    `target` is an existing, empty folder. Every other weight keeps its bytes. In memory are the
    embedding in float32 and the new rows, then one file of what is written at a time.

    Args:
        translate: maps a (V, D) float32 weight and "embed" or "head" to its (U, D) successor.
        special_ids: bos/eos/pad ids of the new tokenizer, as `*_token_id` keys.
    """
    weights = WeightFiles(source)

    def translated(name: str, which: str) -> torch.Tensor:
        weight_VD = weights.read(name)
        return translate(weight_VD.float(), which).to(weight_VD.dtype, copy=True)

    new = {
        weights.embed_name: translated(weights.embed_name, "embed"),
        weights.head_key: translated(weights.head_name, "head"),
    }
    replaced = {*new, weights.head_name}
    kept = {name: weights.on_meta(name) for name in weights.file_of if name not in replaced}

    def read(name: str) -> torch.Tensor:
        return new[name] if name in new else weights.read(name)

    write_weights(target, kept | new, read, FOLD_FILE)
    U = len(new[weights.embed_name])
    config = AutoConfig.from_pretrained(source)
    config.update({"vocab_size": U, "tie_word_embeddings": False})
    save_configs(config, special_ids, target)


def save_configs(config, special_ids: dict[str, int], folder: Path) -> None:
    """Write config.json and generation_config.json with the tokenizer's special ids in both."""
    ids = {name: special_ids.get(name) for name in SPECIAL_IDS}
    config.update(ids)
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
