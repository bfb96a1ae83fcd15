"""The Hugging Face folder `model/` that a pretrain or finetune stage writes."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig

from s2t2_dist import artifacts
from s2t2_dist.data.shards import TOKENIZER_DIR
from s2t2_dist.lm.folder import save_configs

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
) -> None:
    """Write trained weights as a sealed Hugging Face folder. Call on rank 0.

    Args:
        base: the folder the model was loaded from, for its config.
        record: provenance and evaluation, stored in the manifest.
    """
    with artifacts.sealed_directory(folder, {"kind": "model", **record}) as temporary:
        save_torch_state_dict(weights, temporary, max_shard_size=MAX_SHARD_SIZE)
        config = AutoConfig.from_pretrained(base)
        config.dtype = next(iter(weights.values())).dtype
        save_configs(config, ids, temporary)
        copy_tokenizer(data_dir, temporary)
