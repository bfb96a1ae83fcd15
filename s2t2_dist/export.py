"""Hugging Face folders: what a run leaves for everyone else to load."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig

from s2t2_dist import artifacts
from s2t2_dist.data import TOKENIZER_DIR
from s2t2_dist.errors import ArtifactError
from s2t2_dist.model import save_configs

MODEL_DIR = "model"
MAX_SHARD_SIZE = "5GB"


def special_ids(data_metadata: dict) -> dict[str, int]:
    """The data's special token ids, by the names that a model's config uses."""
    return {key: data_metadata[key] for key in ("eos_token_id", "pad_token_id")}


def copy_tokenizer(data_dir: Path, folder: Path) -> None:
    """Put the tokenizer that the data was made with into a model folder."""
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
        record: what the manifest says of the model's origin and evaluation.
    """
    with artifacts.sealed_directory(folder, {"kind": "model", **record}) as temporary:
        save_torch_state_dict(weights, temporary, max_shard_size=MAX_SHARD_SIZE)
        save_configs(AutoConfig.from_pretrained(base), ids, temporary)
        copy_tokenizer(data_dir, temporary)


def export(run_dir: Path, target: Path) -> dict:
    """Copy a finished run's model to `target` after checking every file of it.

    Returns:
        the model's manifest.

    Raises:
        ArtifactError: the run has no finished model, or a file was altered, or `target` exists.
    """
    source = run_dir / MODEL_DIR
    if not artifacts.is_complete(source):
        raise ArtifactError(
            f"{run_dir} has no finished model ({source} is not complete); let the run finish: "
            "s2t2 train resumes it"
        )
    manifest = artifacts.verify(source)
    record = {key: value for key, value in manifest.items() if key != "files"}
    with artifacts.sealed_directory(target, record) as temporary:
        for name in manifest["files"]:
            shutil.copyfile(source / name, temporary / name)
    return manifest
