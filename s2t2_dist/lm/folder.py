"""Hugging Face model folders: read embedding rows, fold E' and L' in, create random models.

A folded model is an ordinary, untied Hugging Face folder. It is written without DeepSpeed, so no
embedding is ever resized under ZeRO-3.

Shapes: V source vocabulary, U target vocabulary, D width, R requested source rows.
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
FOLD_FILE = "1GB"  # largest file of a folded model; rank 0 holds one in memory while it writes
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that config classes accept besides their parameters: older names of rope_parameters.
ROPE_KEYS = {"rope_theta", "rope_scaling"}


def local_folder(model: ModelConfig) -> Path:
    """The model's local folder; a hub name is downloaded first.

    Raises:
        ConfigError: neither a folder with a config.json nor a name that can be downloaded.
    """
    name = model.model_name_or_path
    assert name is not None, "a model that is created from a config has no folder yet"
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.is_absolute() or path.is_dir() or name.startswith(".") or name.count("/") != 1:
        raise ConfigError(
            f"model.model_name_or_path: {name} is not a Hugging Face folder (no config.json in "
            "it); give such a folder or a hub name OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=wanted))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.model_name_or_path: {name} is not a local folder, and its download from the "
            f"hub failed: {reason}; check the name, or give a local folder"
        ) from None


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
        _on_meta(config)
    except Exception as error:  # the library raises errors of many kinds
        raise ConfigError(
            f"model.config is not a valid {model.model_type} config: "
            f"{_one_line(error)}; correct its values"
        ) from None
    return config


def _require_known(path: str, key: str, known: Iterable[str]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see the documentation of transformers"
        raise ConfigError(f"{path}: transformers does not know {key}; {hint}")


def _on_meta(config: PretrainedConfig) -> torch.nn.Module:
    """The model with its weights on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def save_random_lm(model: ModelConfig, vocabulary: dict[str, int], folder: Path) -> None:
    """Write a model folder with random weights, drawn with the current torch seed.

    Raises:
        ConfigError: as `random_lm_config`.
    """
    config = random_lm_config(model, vocabulary)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.to(getattr(torch, model.dtype)).save_pretrained(folder)


class WeightFiles:
    """The safetensors of a Hugging Face folder, read tensor by tensor.

    Attributes:
        file_of: tensor name -> file name.
        config: the model's config.
        head_bias: whether the LM head adds a bias to the logits.
        as_stored: whether every weight is in a file under its own name. It is not for
            architectures whose weights transformers converts (the experts of Mixtral) or renames
            (GPT-2).

    Raises:
        ArtifactError: no safetensors, or a config from which no causal LM can be created.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of = _file_of(folder)
        try:
            config = AutoConfig.from_pretrained(folder)
            lm = _on_meta(config)
        except Exception as error:  # the library raises errors of many kinds
            raise ArtifactError(
                f"{folder / 'config.json'} does not describe a causal LM ({_one_line(error)}); "
                "give the folder of a causal language model"
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
        # A tied model has one parameter; its state dict still lists the head's own name.
        self.head_key = next(
            name
            for name, tensor in lm.state_dict(keep_vars=True).items()
            if tensor is head and (name != self.embed_name)
        )
        self.vocab_size = config.vocab_size

    def read(self, name: str) -> torch.Tensor:
        """A whole weight, memory-mapped from the file."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            return f.get_tensor(name)

    def on_meta(self, name: str) -> torch.Tensor:
        """A meta tensor with the shape and dtype of the weight in the file."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            view = f.get_slice(name)
            shape = view.get_shape()
            none = view[tuple(slice(0, 0) for _ in shape)] if shape else f.get_tensor(name)
        return torch.empty(shape, dtype=none.dtype, device="meta")

    def check(self) -> None:
        """Open the header of every file.

        Raises:
            ArtifactError: a file is missing, truncated, or lacks one of its tensors (the message
                names the first such file); or the embedding does not have `vocab_size` rows.
        """
        for file in sorted(set(self.file_of.values())):
            held = _tensor_names(self.folder / file)
            listed = {name for name, home in self.file_of.items() if home == file}
            if listed - held:
                raise ArtifactError(
                    f"{self.folder / file} lacks {min(listed - held)}, which {INDEX} expects in "
                    "it; copy the model again"
                )
        rows = len(self.on_meta(self.embed_name)) if self.embed_name in self.file_of else None
        if rows not in (None, self.vocab_size):
            raise ArtifactError(
                f"{self.folder}: config.json has vocab_size {self.vocab_size}, but the embedding "
                f"has {rows} rows; use config.json and weights of the same model"
            )

    def rows(self, name: str, token_ids_R: torch.Tensor) -> torch.Tensor:
        """Rows of a (V, D) weight, (R, D) float32; reads only the span from first to last row."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            view = f.get_slice(name)
            if not len(token_ids_R):
                return torch.zeros(0, view.get_shape()[1])
            first, last = int(token_ids_R.min()), int(token_ids_R.max())
            return view[first : last + 1][token_ids_R - first].float()


def _file_of(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the only file."""
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
    """Tensor names in a safetensors file; opening it checks its length against its header."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy the model again")
    try:
        with safe_open(path, "pt") as f:
            return set(f.keys())
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is truncated or damaged ({error}); copy the model again"
        ) from None


def write_weights(
    target: Path,
    shapes: dict[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    max_shard_size: str,
) -> None:
    """Write weights as safetensors files, with one file in memory at a time.

    If there are several files, it also writes the index that `from_pretrained` reads. A single
    weight larger than `max_shard_size` gets a file of its own.

    Args:
        shapes: name -> tensor with the weight's shape and dtype, with data or on the meta device.
        read: returns the weight with a given name.
        max_shard_size: largest file, such as "5GB".
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

    Every other weight keeps its bytes. Memory: the embedding in float32 and the new rows; then one
    output file at a time.

    Args:
        target: an existing, empty folder.
        translate: maps a (V, D) float32 weight and "embed" or "head" to the new (U, D) weight.
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
