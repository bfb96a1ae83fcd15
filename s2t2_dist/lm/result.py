"""The Hugging Face folder `model/` that a pretrain or finetune stage writes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from s2t2_dist import artifacts
from s2t2_dist.data.shards import TOKENIZER_DIR
from s2t2_dist.lm.architecture import read_config
from s2t2_dist.lm.fold import save_configs, save_state

MODEL_DIR = "model"
MAX_SHARD_SIZE = "5GB"


def special_ids(data_metadata: dict) -> dict[str, int]:
    """The data's special token ids, under the key names of a model's config."""
    return {key: data_metadata[key] for key in ("eos_token_id", "pad_token_id")}


def copy_tokenizer(data_dir: Path, folder: Path) -> None:
    """Copy the data's tokenizer into a model folder."""
    for path in (data_dir / TOKENIZER_DIR).iterdir():
        shutil.copyfile(path, folder / path.name)


def write_model(
    folder: Path,
    weights: dict[str, torch.Tensor],
    base: Path,
    data_dir: Path,
    ids: dict[str, int],
    record: dict,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write trained weights as a sealed Hugging Face folder. Call on rank 0.

    Args:
        base: the folder the model was loaded from, for its config.
        record: provenance and evaluation, stored in the manifest.
        check: raises an error if the folder is not to appear.
    """
    with artifacts.sealed_directory(folder, {"kind": "model", **record}) as temporary:
        config = read_config(base)
        config.dtype = next(iter(weights.values())).dtype
        save_state(config, weights, temporary, MAX_SHARD_SIZE)
        save_configs(config, ids, temporary, base)
        copy_tokenizer(data_dir, temporary)
        if check:
            check(temporary)
