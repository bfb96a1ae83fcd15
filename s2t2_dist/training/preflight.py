"""Checks before a model is loaded: one line for each thing that does not hold. None writes.

`check_agreement` compares the ranks: a node with another version or an old copy of a file would
train on, wrongly. `check_inputs` compares model, data, translations and DeepSpeed's settings with
each other, from headers and configs. `check_room` compares each rank's disk and memory with what
the run needs. `check_shared` makes sure that every rank sees rank 0's run directory, and
`check_resume` that this job can go on from a checkpoint. All but `check_inputs` are collectives.
"""

import os
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm, agree, announced
from s2t2_dist.config import (
    INITS,
    Finetune,
    Pretrain,
    Recipe,
    Stage,
    Translate,
    recipe_values,
)
from s2t2_dist.config.overrides import changed_keys
from s2t2_dist.data.shards import (
    TOKENIZER_DIR,
    ShardReader,
    require_tokenizer,
    tokenizer_sha256,
)
from s2t2_dist.errors import ConfigError, DataError, PreflightError, collective
from s2t2_dist.lm.fold import require_translatable
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.init import source_weights
from s2t2_dist.lm.sizes import (
    CHECKPOINT_BYTES,
    accumulation_dtype,
    count_weights,
    plan_count,
    weight_states,
)
from s2t2_dist.lm.tokenizer import check_end_and_padding, check_round_trip, read_tokenizer
from s2t2_dist.lm.translation import check_translation, load_translation
from s2t2_dist.lm.vocabulary import source_rows
from s2t2_dist.ot.sizes import cost_states
from s2t2_dist.run.checkpoint import Position
from s2t2_dist.run.directory import CONFIG, LOCK
from s2t2_dist.run.metrics import METRICS, read_metrics, require_length, require_unaltered
from s2t2_dist.training.context import Context

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "pyarrow")
# So long NFS may believe that a file it was asked for before is still not there.
SHARED_SECONDS = 60.0
GIB = 2**30

FROZEN_ZERO_STAGES = (0, 3)


def check_agreement(recipe: Recipe, comm: Comm) -> None:
    """Every rank runs the same packages on the same recipe and data as rank 0.

    Raises:
        PreflightError: on every rank, with a line per host and difference.
    """
    everyone = comm.gather_objects(_facts(recipe))
    _require_none(comm, [_differences(everyone[0], facts) for facts in everyone])


def _facts(recipe: Recipe) -> dict:
    """What has to be the same on every rank, as a mapping that `changed_keys` compares."""
    manifest = recipe.data.path / artifacts.MANIFEST
    code = {"python": platform.python_version(), "sources of s2t2_dist": _sources()}
    return {
        "version": code | {package: _version(package) for package in PACKAGES},
        "recipe": recipe_values(recipe),
        "data": {str(manifest): _sha256(manifest)},
    }


def _differences(rank_0: dict, here: dict) -> list[str]:
    fix = {
        "version": "install the same on every node",
        "recipe": "start every node with the same recipe and overrides",
        "data": "give every node the same data",
    }
    return [
        f"{kind} {line} (rank 0 -> here); {fix[kind]}"
        for kind in fix
        for line in changed_keys(rank_0[kind], here[kind])
    ]


def _sources() -> str:
    """This package's own code, whose version says little in a checkout."""
    folder = Path(__file__).parents[1]
    found = [f for f in folder.rglob("*") if f.suffix in (".py", ".cpp", ".h")]
    files = {str(f.relative_to(folder)): _sha256(f) for f in found}
    return artifacts.sha256_json(files)[:12]


def _sha256(path: Path) -> str | None:
    return artifacts.sha256_file(path)[:12] if path.is_file() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_inputs(context: Context) -> None:
    """Check everything that a run's stages read.

    Raises:
        ConfigError: no model folder, a model that a stage cannot use, or a vocabulary, context or
            ZeRO stage that does not fit.
        DataError: the data's tokenizer is not the one that a stage needs, or the model has none.
        ArtifactError: weights or a translation that are incomplete or altered.
    """
    recipe = context.recipe
    if not (context.run_dir / CONFIG).exists():  # else the result is worth having all the same
        _check_tokenizer(context.train.directory / TOKENIZER_DIR)
    if recipe.model.config is not None:
        _check_length(context.config_of(recipe.stages[0]), context.train.context)
        return
    weights = context.base
    weights.check()
    if recipe.model.gradient_checkpointing and not weights.recomputes:
        raise ConfigError(
            f"model.gradient_checkpointing: {weights.config.model_type} models have none in "
            "transformers; set it to false"
        )
    _check_length(weights.config, context.train.context)
    tokenizer_sha256(weights.folder)
    for stage in recipe.stages:
        assert not isinstance(stage, Pretrain), "a pretrain stage has no folder to start from"
        if isinstance(stage, Translate):
            _check_translate(stage, weights, context)
        else:
            _check_finetune(stage, weights, context.train)


def _check_tokenizer(folder: Path) -> None:
    """An export would be refused for it at the end."""
    tokenizer = read_tokenizer(folder)
    for check in (check_end_and_padding, check_round_trip):
        try:
            check(tokenizer)
        except DataError as error:
            raise DataError(
                f"{folder}: {error}; a model with it could not be exported: build the data with "
                "another tokenizer"
            ) from None


def _check_length(config: PretrainedConfig, rows_of: int) -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and rows_of > longest:
        raise ConfigError(
            f"the data's rows have {rows_of} tokens, but the model's max_position_embeddings is "
            f"{longest}; build the data with --context {longest} or less"
        )


def _check_translate(stage: Translate, weights: WeightFiles, context: Context) -> None:
    zero = context.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if zero not in FROZEN_ZERO_STAGES:
        raise ConfigError(
            f"deepspeed: zero_optimization.stage is {zero}, which cannot hold a frozen model; "
            f"stage {stage.name} needs 3 (or 0, a whole model on every rank)"
        )
    require_translatable(weights, context.train.metadata["vocab_size"])
    source_rows(stage, weights)
    if stage.warm_start is not None:
        source_weights(stage.warm_start, weights, context.train)


def _check_finetune(stage: Finetune, weights: WeightFiles, train: ShardReader) -> None:
    data = train.metadata
    if stage.init == "source":
        require_tokenizer(data, weights.folder)
        return
    U, V = data["vocab_size"], weights.vocabulary.size
    require_translatable(weights, U)
    if stage.init == "truncate" and U > V:
        raise ConfigError(
            f"stages.{stage.name}.init: truncate keeps {U} rows, but the "
            f"model has {V}; take a smaller vocabulary"
        )
    if stage.init == "translation" and stage.translation is not None:
        check_translation(load_translation(stage.translation), weights.folder, data)
    if stage.init in INITS:
        source_weights(stage.init, weights, train, stage.alignment)


def check_room(context: Context) -> None:
    """Every rank has the memory and the disk that the run needs.

    Raises:
        PreflightError: on every rank, with a line per host and problem.
    """
    need = needs(context)
    problems = _disk_problems(context, need.checkpoint) + _memory_problems(context, need.memory)
    _require_none(context.comm, context.comm.gather_objects(problems))


def check_shared(run_dir: Path, comm: Comm) -> None:
    """Every rank sees the run directory that rank 0 has just claimed.

    Raises:
        PreflightError: on every rank, with a line per host that sees none, or one of its own.
    """
    lock = run_dir / LOCK
    wanted = comm.broadcast_object(_text(lock))
    deadline = time.monotonic() + SHARED_SECONDS
    who = f"{comm.name(comm.rank)} waits for a sight of {lock}, for up to {SHARED_SECONDS:.0f} s"
    with announced(lambda: who):
        while (found := _text(lock)) != wanted and time.monotonic() < deadline:
            time.sleep(SHARED_SECONDS / 100)
    line = f"{run_dir} is not what rank 0 sees; put it on a shared disk"
    _require_none(comm, comm.gather_objects([] if found == wanted else [line]))


def check_resume(context: Context, path: Path, position: Position) -> None:
    """This number of ranks can load the checkpoint, and the metrics reach as far as it does.

    Raises:
        ConfigError: on every rank: weights written by another number of ranks without ZeRO-3.
        ArtifactError: on every rank: `metrics.jsonl` is shorter than it was, or damaged.
    """
    ranks, stage = context.comm.size, context.recipe.stages[position.stage_index]
    zero = context.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if position.world_size != ranks and zero != 3 and not isinstance(stage, Translate):
        raise collective(
            ConfigError(
                f"{path} was written by {position.world_size} ranks under ZeRO {zero} and needs as "
                f"many to load: start with {position.world_size} (ZeRO 3 resumes with any number)"
            )
        )

    def look() -> None:
        if context.comm.rank == 0:  # the file's writer: other hosts may see an older length
            path, length = context.run_dir / METRICS, position.metrics_bytes
            require_length(path, length)
            read_metrics(context.run_dir, length)
            require_unaltered(path, length, position.metrics_sha256)

    agree(context.comm, look, "looking at the metrics")


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


@dataclass(frozen=True)
class Needs:
    """What the most demanding stage of a run needs at least, in bytes.

    Attributes:
        memory: of a rank at all times: without activations and buffers; 0 where not known.
        checkpoint: of one checkpoint on disk.
    """

    memory: int
    checkpoint: int


def needs(context: Context) -> Needs:
    """By the arithmetic of `s2t2 plan`."""
    found = [_stage_needs(context, stage) for stage in context.recipe.stages]
    return Needs(max(n.memory for n in found), max(n.checkpoint for n in found))


def _stage_needs(context: Context, stage: Stage) -> Needs:
    """Of C with its gradient and moments; or of the weights, with theirs and master weights."""
    settings, ranks = context.recipe.model, context.comm.size
    vocab_size = context.train.metadata["vocab_size"]
    if isinstance(stage, Translate):
        rows = len(source_rows(stage, context.base)[0])
        plans = plan_count(stage)
        memory = plans * sum(cost_states(rows, vocab_size, ranks).values())
        return Needs(memory, CHECKPOINT_BYTES * plans * rows * vocab_size)
    trained = count_weights(context.config_of(stage)).total
    zero = context.deepspeed.get("zero_optimization", {})
    known = zero.get("stage") == 3 and not {"offload_optimizer", "offload_param"} & zero.keys()
    accumulated = accumulation_dtype(context.deepspeed, settings.dtype)
    states = weight_states(trained, ranks, settings.dtype, accumulated)
    return Needs(sum(states.values()) if known else 0, CHECKPOINT_BYTES * trained)


def _disk_problems(context: Context, checkpoint: int) -> list[str]:
    """Room for two checkpoints, of which those that are there already count."""
    place = next(p for p in (context.run_dir, *context.run_dir.parents) if p.exists())
    held = sum(f.stat().st_size for f in context.run_dir.glob("checkpoints/*/**/*") if f.is_file())
    need = 2 * checkpoint - held
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return [f"{place} is not writable; choose another output_dir"]
    if free < need:
        return [
            f"{place} has {free / GIB:.1f} GiB free, two checkpoints need {need / GIB:.1f} GiB; "
            "free some or choose another output_dir"
        ]
    return []


def _memory_problems(context: Context, need: int) -> list[str]:
    if context.device.type == "cuda":
        free, of = torch.cuda.mem_get_info(context.device)[0], "of the GPU"
    else:
        here = context.comm.hosts.count(context.comm.hosts[context.comm.rank])
        free, of = psutil.virtual_memory().available // here, "for each rank"
    if free >= need:
        return []
    return [
        f"{free / GIB:.1f} GiB of memory {of} are free, weights and optimizer alone take "
        f"{need / GIB:.1f} GiB; take more ranks, or offload (ds_configs/README.md)"
    ]


def _require_none(comm: Comm, problems: list[list[str]]) -> None:
    """Raise every rank's problems, with the ranks of a host that share one in one line."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, lines in enumerate(problems):
        for line in lines:
            ranks.setdefault((comm.hosts[rank], line), []).append(rank)
    if not ranks:
        return
    lines = []
    for (host, line), found in ranks.items():
        who = f"rank {found[0]}" if len(found) == 1 else f"ranks {', '.join(map(str, found))}"
        lines.append(f"{who} on {host}: {line}")
    raise PreflightError(lines)
