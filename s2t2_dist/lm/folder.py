"""Hugging Face model folders: find one, read its weights tensor by tensor, write one.

Shapes: V source vocabulary, D width, R requested source rows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging

from s2t2_dist import artifacts
from s2t2_dist.config import ModelConfig
from s2t2_dist.errors import ArtifactError, ConfigError
from s2t2_dist.lm.architecture import (
    find_vocabulary,
    on_meta,
    one_line,
    random_lm_config,
    read_config,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_log = getLogger(__name__)


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


def save_random_lm(model: ModelConfig, vocabulary: dict[str, int], folder: Path) -> None:
    """Write a model folder with random weights, drawn with the current torch seed.

    Raises:
        ConfigError: as `random_lm_config`.
    """
    config = random_lm_config(model, vocabulary)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    lm.to(getattr(torch, model.dtype)).save_pretrained(folder)


class WeightFiles:
    """The safetensors of a Hugging Face folder, read tensor by tensor.

    Attributes:
        file_of: tensor name -> file name.
        config: the model's config.
        vocabulary: names of the tensors with a row for each token.
        persistent: names of everything that the architecture stores, tied names included.
        recomputes: whether it can recompute activations (gradient checkpointing).
        as_stored: whether every weight is in a file under its own name and in its own form. It is
            not where transformers converts (the experts of Mixtral) or renames them (GPT-2).

    Raises:
        ArtifactError: no safetensors, or a config from which no causal LM can be created.
        ConfigError: a model without an embedding and an LM head, or with quantized weights.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of = _file_of(folder)
        self.config = read_config(folder)
        quantized = getattr(self.config, "quantization_config", None)
        if quantized:
            method = dict(quantized).get("quant_method", "unknown")
            raise ConfigError(
                f"{folder} holds quantized weights ({method}), which cannot be trained; give the "
                "model's full-precision folder"
            )
        lm = on_meta(self.config)
        self.vocabulary = find_vocabulary(lm)
        self.persistent = frozenset(lm.state_dict())
        self.recomputes = lm.supports_gradient_checkpointing
        converted = get_model_conversion_mapping(lm, add_legacy=False)
        names = {name for name, _ in lm.named_parameters()}
        self.as_stored = not converted and names <= self.file_of.keys()

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
        report = loading_report(self.folder)
        for name in report.missing:
            if name not in self.vocabulary.heads[1:]:  # of a tied model the embedding is named
                raise ArtifactError(f"{self.folder} holds no {name}; copy the model again")
        for name, found, expected in report.mismatched:
            raise ArtifactError(
                f"{self.folder}: {name} has shape {tuple(found)}, but the config makes it "
                f"{tuple(expected)}; use config.json and weights of the same model"
            )
        if report.unexpected:
            names = ", ".join(report.unexpected[:3])
            _log.warning("%s: the architecture does not use %s; left out", self.folder, names)

    def rows(self, name: str, token_ids_R: torch.Tensor) -> torch.Tensor:
        """Rows of a (V, ...) weight, (R, ...) float32; reads only the span of them."""
        with safe_open(self.folder / self.file_of[name], "pt") as f:
            view = f.get_slice(name)
            if not len(token_ids_R):
                return torch.zeros(0, *view.get_shape()[1:])
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


@dataclass(frozen=True)
class LoadingReport:
    """What transformers says of a folder's files, by the names of weights, sorted.

    Attributes:
        missing: in no file: transformers would give them random values.
        unexpected: in a file, but not in the architecture.
        mismatched: names with the shape in the file and the shape that the config makes.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple, tuple]]


def loading_report(folder: Path) -> LoadingReport:
    """Compare the files with the architecture, from their headers, by transformers' own rules.

    Raises:
        ArtifactError: transformers gives up.
    """
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it prints a table of what is returned here
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the library raises errors of many kinds
        raise ArtifactError(
            f"{folder} cannot be loaded by transformers ({one_line(error)}); copy the model again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    kinds = info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]
    return LoadingReport(*map(sorted, kinds))


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
