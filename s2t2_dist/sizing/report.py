"""`s2t2 plan`: which DeepSpeed JSON a recipe fits with, on given GPUs.

Every JSON beside the recipe's own is tried. All figures come from `stages`: arithmetic, no
measurement.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from s2t2_dist import artifacts
from s2t2_dist.config import Recipe, Translate
from s2t2_dist.data.shards import TOKENIZER_JSON
from s2t2_dist.errors import ConfigError
from s2t2_dist.lm import engine
from s2t2_dist.lm.architecture import random_lm_config
from s2t2_dist.lm.vocabulary import source_token_ids
from s2t2_dist.sizing.stages import DEFAULTS, Hardware, Inputs, StageSize, run_disk, size_stage

GIB = 1 << 30
CPU_FILE = "cpu.json"
RESERVED = 0.1  # of a GPU, for the CUDA context, NCCL's buffers and fragmentation: a guess
BYTE_TOKENS = 256  # single-byte tokens of a byte-level tokenizer, where there is none to count


@dataclass(frozen=True)
class FileSize:
    """Every stage under one DeepSpeed JSON, without and with gradient checkpointing."""

    file: Path
    hpz: int  # ranks of a node that share a copy of the weights, 1: off
    offloads: bool
    stages: dict[bool, list[StageSize]]


@dataclass(frozen=True)
class RecipeSize:
    """A recipe on given GPUs under every JSON that they can run."""

    recipe: Recipe
    hardware: Hardware
    gpu_bytes: float
    inputs: Inputs
    files: list[FileSize]

    def fits(self, *stages: StageSize) -> bool:
        return all(stage.peak <= (1 - RESERVED) * self.gpu_bytes for stage in stages)

    @property
    def take(self) -> FileSize | None:
        """The first choice of those that fit as the recipe is: hpZ, then plain, then offload."""
        return self._first(self.recipe.model.gradient_checkpointing)

    def _first(self, checkpointing: bool) -> FileSize | None:
        fitting = [file for file in self.files if self.fits(*file.stages[checkpointing])]
        return min(fitting, key=lambda file: (file.offloads, file.hpz == 1), default=None)

    def advice(self) -> str:
        """One line: what to take, or what to change."""
        if self.take:
            return f"It fits: take deepspeed={self.take.file}"
        if other := self._first(True):
            return (
                "It does not fit as it is; it fits with model.gradient_checkpointing=true and "
                f"deepspeed={other.file}"
            )
        return (
            "It does not fit: take more GPUs or larger ones, a smaller per_device_train_batch_size "
            "or per_device_eval_batch_size"
        )

    def values(self) -> dict:
        """As JSON; sizes in bytes."""
        return {
            "gpus": self.hardware.ranks,
            "gpus_per_node": self.hardware.per_node,
            "gpu_bytes": self.gpu_bytes,
            "source_rows": self.inputs.source_rows,
            "vocab_size": self.inputs.vocab_size,
            "context": self.inputs.context,
            "take": str(self.take.file) if self.take else None,
            "advice": self.advice(),
            "files": [
                {
                    "file": str(file.file),
                    "gradient_checkpointing": on,
                    "stages": [s.values() | {"fits": self.fits(s)} for s in stages],
                    "disk": run_disk(self.recipe, stages),
                }
                for file in self.files
                for on, stages in file.stages.items()
            ],
        }


def size_recipe(
    recipe: Recipe,
    hardware: Hardware,
    gpu_bytes: float,
    config: Path | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
) -> RecipeSize:
    """Size a recipe under each ZeRO-3 JSON in the folder of its own.

    Args:
        config: a folder with the model's config.json, instead of the recipe's model.
        vocab_size, context: of the data, instead of those of `data.path`.

    Raises:
        ConfigError: the model's config or the data is not here, or the ranks cannot share a batch.
    """
    inputs = find_inputs(recipe, config, vocab_size, context)
    files = []
    for path in sorted({recipe.deepspeed, *recipe.deepspeed.parent.glob("*.json")}):
        settings = engine.load_settings(path)
        zero = {**DEFAULTS, **settings.get("zero_optimization", {})}
        hpz = zero["zero_hpz_partition_size"]
        if path.name == CPU_FILE or zero.get("stage") != 3 or not _suits(hpz, hardware):
            continue
        stages = {}
        for on in (False, True):
            lm = recipe.model.model_copy(update={"gradient_checkpointing": on})
            changed = recipe.model_copy(update={"model": lm})
            stages[on] = [
                size_stage(changed, stage, inputs, settings, hardware) for stage in recipe.stages
            ]
        offloads = any(zero.get(f"offload_{what}") for what in ("optimizer", "param"))
        files.append(FileSize(path, hpz, offloads, stages))
    if not files:
        raise ConfigError(f"{recipe.deepspeed.parent} holds no ZeRO-3 JSON for GPUs")
    return RecipeSize(recipe, hardware, gpu_bytes, inputs, files)


def _suits(hpz: int, hardware: Hardware) -> bool:
    """hpZ pays between nodes, and its groups must be within them."""
    return hpz == 1 or (hardware.nodes > 1 and hardware.per_node % hpz == 0)


def find_inputs(
    recipe: Recipe, config: Path | None, vocab_size: int | None, context: int | None
) -> Inputs:
    """What is known of model and data; see `size_recipe`."""
    data = recipe.data.path
    if vocab_size is None or context is None:
        if not artifacts.is_complete(data):
            raise ConfigError(
                f"data.path: {data} is not here; give --vocab-size and --context of the data"
            )
        manifest = artifacts.read_manifest(data)
        vocab_size = vocab_size or manifest["vocab_size"]
        context = context or manifest["context"]
    if recipe.model.config is not None and config is None:
        ids = dict.fromkeys(("eos_token_id", "pad_token_id"), 0)
        made = random_lm_config(recipe.model, {"vocab_size": vocab_size, **ids})
    else:
        made = _read_config(recipe, config)
    folder = config or Path(recipe.model.model_name_or_path or "")
    return Inputs(made, _source_rows(recipe, folder, made.vocab_size), vocab_size, context)


def _read_config(recipe: Recipe, config: Path | None) -> PretrainedConfig:
    name = config or recipe.model.model_name_or_path
    try:
        return AutoConfig.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=False
        )
    except Exception as error:  # the library raises errors of many kinds
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"the config of {name} is not here ({reason}); give --config FOLDER, the folder of its "
            "config.json"
        ) from None


def _source_rows(recipe: Recipe, folder: Path, vocab_size: int) -> int:
    """V; without a tokenizer every row of the embedding, or 256 bytes."""
    choices = [stage.source_tokens for stage in recipe.stages if isinstance(stage, Translate)]
    if not choices:
        return 0
    if choices[0] not in ("all", "bytes") or (folder / TOKENIZER_JSON).is_file():
        return len(source_token_ids(choices[0], folder, vocab_size))
    return vocab_size if choices[0] == "all" else BYTE_TOKENS


def show(size: RecipeSize) -> Group:
    """The sizes as tables."""
    shown = size.take or next((f for f in size.files if f.file == size.recipe.deepspeed), None)
    shown = shown or size.files[0]
    stages = shown.stages[size.recipe.model.gradient_checkpointing]
    disk = ", ".join(f"{s.stage} {s.checkpoint / 1e9:.1f} GB" for s in stages)
    return Group(
        _files_table(size),
        _parts_table(shown, stages, size.recipe.model.gradient_checkpointing),
        f"Disk: a checkpoint of {disk}; the run at its fullest "
        f"{run_disk(size.recipe, stages) / 1e9:.1f} GB.",
        size.advice(),
    )


def _files_table(size: RecipeSize) -> Table:
    """A line for each JSON, with and without gradient checkpointing, and stage."""
    hardware, inputs = size.hardware, size.inputs
    title = (
        f"{size.recipe.output_dir.name}: {hardware.ranks} GPUs of {size.gpu_bytes / GIB:g} GiB, "
        f"{hardware.per_node} to a node\nby arithmetic, not measured; V {inputs.source_rows:,}, "
        f"U {inputs.vocab_size:,}, T {inputs.context:,}"
    )
    table = Table(title=title)
    table.add_column("DeepSpeed JSON", no_wrap=True)
    table.add_column("recompute")  # activations, gradient_checkpointing
    table.add_column("stage")
    for column in ("GiB\na GPU", "GB sent\na step", "host GiB\na node"):
        table.add_column(column, justify="right")
    table.add_column("fits")
    for file in size.files:
        for on, stages in file.stages.items():
            for stage in stages:
                table.add_row(
                    file.file.name,
                    "yes" if on else "no",
                    stage.stage,
                    f"{stage.peak / GIB:.1f}",
                    f"{sum(stage.traffic.values()) / 1e9:.1f}",
                    f"{stage.host / GIB:.0f}",
                    "yes" if size.fits(stage) else "no",
                )
    return table


def _parts_table(file: FileSize, stages: list[StageSize], checkpointing: bool) -> Table:
    """What is held at the peak of each stage."""
    switch = "with" if checkpointing else "without"
    title = f"GiB per GPU at the peak\n{file.file.name}, {switch} gradient checkpointing"
    table = Table(title=title)
    table.add_column("")
    for stage in stages:
        table.add_column(f"{stage.stage}: {stage.peak_phase}", justify="right")
    peaks = [stage.phases[stage.peak_phase] for stage in stages]
    for part in dict.fromkeys(part for parts in peaks for part in parts):
        cells = [f"{parts[part] / GIB:.3g}" if parts.get(part) else "" for parts in peaks]
        if any(cells):
            table.add_row(part, *cells)
    table.add_row("sum", *(f"{stage.peak / GIB:.2f}" for stage in stages))
    return table
