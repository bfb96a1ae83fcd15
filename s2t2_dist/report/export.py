"""`s2t2 export`: write a finished run as an ordinary Hugging Face folder, verified first."""

from pathlib import Path

import numpy as np
from huggingface_hub import split_torch_state_dict_into_shards

from s2t2_dist import artifacts
from s2t2_dist.config import Recipe, Translate
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.data.order import rows_at
from s2t2_dist.data.shards import ShardReader, require_tokenizer
from s2t2_dist.errors import ArtifactError, ConfigError, DataError
from s2t2_dist.lm.architecture import SPECIAL_IDS, read_config
from s2t2_dist.lm.fold import save_configs
from s2t2_dist.lm.folder import WeightFiles, local_folder, write_weights
from s2t2_dist.lm.inputs import is_from_hub, recorded_recipe, require_recipe, require_unchanged
from s2t2_dist.lm.result import MAX_SHARD_SIZE, MODEL_DIR, copy_tokenizer
from s2t2_dist.lm.tokenizer import read_tokenizer
from s2t2_dist.lm.translation import RECORD, TRANSLATION_DIR, fold_translation
from s2t2_dist.report.card import model_card
from s2t2_dist.report.contents import UNTRAINED
from s2t2_dist.report.evaluate import score
from s2t2_dist.report.verify import require_verified
from s2t2_dist.run import directory
from s2t2_dist.run.tracking import attach

CARD = "README.md"
# Largest relative difference of the loss between the run and the export: batches of other shapes
# and other kernels round differently. Measured on the CPU: 1e-3 in bfloat16, 1e-5 in float32.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-3}
ROWS_PER_COUNT = 4096


def release(
    run_dir: Path, target: Path, max_shard_size: str = MAX_SHARD_SIZE, evaluation: bool = True
) -> None:
    """Write a finished run's model to `target`: weights, configs, tokenizer, card, manifest.

    If the run ends with a translate stage, it has no `model/`: its translation is folded into the
    base model here.

    Args:
        max_shard_size: largest safetensors file, such as "5GB".
        evaluation: evaluate the folder before it appears, and compare with the card's number.

    Raises:
        ConfigError: `max_shard_size` is not a size.
        ArtifactError: the run is not finished, a file or the base model was altered, `target`
            exists, or the folder fails a check of `verify` or gives another number than the run
            did; nothing is left behind.
        DataError: the run's data folder is missing or was built with another tokenizer.
    """
    _check_size(max_shard_size)
    recipe, found = directory.read_recipe(run_dir), recorded_recipe(run_dir)
    artifacts.require_absent(target)
    train = ShardReader(found.data.path, "train")
    translated = isinstance(recipe.stages[-1], Translate)
    source, info = _finished(run_dir, found)
    require_recipe(run_dir, recipe)
    require_unchanged(run_dir, found, "data", *(["model"] if translated else []))
    record = {key: info[key] for key in ("recipe", "evaluation", "stage", "s2t2_dist")}
    record = {"kind": "model", **record, UNTRAINED: untrained_ids(recipe, train)}
    with (
        artifacts.sealed_directory(target, record) as temporary,
        artifacts.scratch_directory(target, "fold") as folded,
    ):
        if translated:
            fold_translation(source, local_folder(found.model), folded, train.metadata)
            source = folded
        copy_weights(source, temporary, max_shard_size)
        copy_tokenizer(train.directory, temporary)
        tokenizer = read_tokenizer(temporary)
        ids = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
        save_configs(read_config(source), ids, temporary, source)
        stated = Evaluation(**record["evaluation"])
        hub = is_from_hub(run_dir)
        card = model_card(target.name, recipe, train.metadata, stated, hub)
        (temporary / CARD).write_text(card, encoding="utf-8")
        require_verified(temporary, record[UNTRAINED])
        if evaluation:
            _require_number(temporary, found, stated)
    attach(run_dir, [target / CARD])


def _require_number(folder: Path, recipe: Recipe, stated: Evaluation) -> None:
    """The folder gives the validation loss that its card states.

    Raises:
        ArtifactError: it gives another one.
    """
    rows = recipe.stages[-1].per_device_eval_batch_size
    data = recipe.data
    found = score(folder, data.path, "validation", rows, document_mask=data.document_mask)
    if not abs(found.loss - stated.loss) <= TOLERANCE[recipe.model.dtype] * stated.loss:
        raise ArtifactError(
            f"the written model has {found.bits_per_byte:.4f} bits per byte, but the run had "
            f"{stated.bits_per_byte:.4f}: a file that it was made of has changed since"
        )


def _check_size(size: str) -> None:
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
        if not float(size.strip()[:-2]) > 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(
            f"max_shard_size: {size!r} is not a size; give a number with KB, MB, GB or TB, as 5GB"
        ) from None


def _finished(run_dir: Path, recipe: Recipe) -> tuple[Path, dict]:
    """The artifact of the last stage, verified against its manifest, and its record."""
    translated = isinstance(recipe.stages[-1], Translate)
    source = run_dir / (TRANSLATION_DIR if translated else MODEL_DIR)
    if not artifacts.is_complete(source):
        raise ArtifactError(
            f"{run_dir} is not finished ({source.name}/ is not complete); "
            f"s2t2 train {run_dir / 'config.yaml'} resumes it"
        )
    manifest = artifacts.verify(source)
    if translated:
        record = artifacts.read_json(source / RECORD)
        wanted, held = record["target_tokenizer_sha256"], artifacts.read_manifest(recipe.data.path)
        if held["tokenizer_sha256"] != wanted:
            raise DataError(
                f"{recipe.data.path} was built with the tokenizer {held['tokenizer_sha256'][:12]}, "
                f"but {source} was learned for {wanted[:12]}; restore the data"
            )
        return source, record["info"]
    require_tokenizer(artifacts.read_manifest(recipe.data.path), source)
    return source, manifest


def untrained_ids(recipe: Recipe, train: ShardReader) -> list[int]:
    """Token ids that did not occur in any training row of the run, ascending.

    Their embedding rows received no gradient of their own, so they may equal each other. All stages
    share one data order, and each continues where the previous one stopped. So the training rows
    are the first rows of that order. Training rows of another run, whose translation this run uses,
    are not counted.
    """
    visited = sum(stage.max_steps * stage.train_batch_size for stage in recipe.stages)
    seen = np.zeros(train.metadata["vocab_size"], dtype=bool)
    for start in range(0, min(visited, len(train)), ROWS_PER_COUNT):
        positions = np.arange(start, min(start + ROWS_PER_COUNT, visited, len(train)))
        for row in rows_at(positions, len(train), recipe.seed):
            seen[train[row][: train.length(row)]] = True
    return np.flatnonzero(~seen).tolist()


def copy_weights(source: Path, target: Path, max_shard_size: str) -> None:
    """Copy a folder's tensors into files of at most `max_shard_size`, see `write_weights`."""
    weights = WeightFiles(source)
    shapes = {name: weights.on_meta(name) for name in weights.file_of}
    write_weights(target, shapes, weights.read, max_shard_size)
