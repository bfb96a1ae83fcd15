"""Peak memory of each rank against `s2t2 plan`, on CPU ranks of this machine.

`python -m tests.bench.memory --help`. Every cell runs a stage's own code under DeepSpeed, gloo and
one thread per rank: it loads the model from sharded safetensors, trains two steps and evaluates.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForCausalLM, OlmoConfig

from s2t2_dist.config import Recipe, Stage
from s2t2_dist.data.batches import load_batch
from s2t2_dist.data.evaluate import evaluate
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm import engine
from s2t2_dist.lm.fold import fold
from s2t2_dist.lm.load import load_lm
from s2t2_dist.sizing.stages import Hardware, Inputs, StageSize, size_stage
from s2t2_dist.training.context import Context, StageRunner
from s2t2_dist.training.finetune import WeightStage
from s2t2_dist.training.translate import TranslateStage
from tests.bench import measure
from tests.data.make_shards import make_data
from tests.jobs.distributed import run_ranks

RESULTS = Path("tests/bench/results")
ASSETS = Path("launch/assets")
TOLERANCE = 0.15
# Freed tensors go back to the kernel at once, so that a peak is of what lives together.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
VOCABULARY = 512
STEPS = 2  # in the second one AdamW's moments are there from the start
# 162 million weights in files of 60 MB, made on the spot.
LARGE = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
MINIATURE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
STAGES = ("translate", "finetune")
PARTS = ("loading", "training", "evaluation")


@dataclass(frozen=True)
class Case:
    """A stage of a model on W ranks."""

    model: str  # tiny, small, large, large-tied
    stage: str  # translate, finetune
    ranks: int
    dtype: str = "bfloat16"
    deepspeed: str = "ds_configs/cpu.json"
    context: int = 256
    rows: int = 4  # of a rank's pass; two passes to a step
    checkpointing: bool = False


def make_model(name: str, folder: Path) -> Path:
    """A demo model's folder, or one with random weights."""
    if (ASSETS / name).is_dir():
        return ASSETS / name
    if not folder.exists():
        torch.manual_seed(0)
        sizes = MINIATURE if name == "miniature" else LARGE
        ids = {"pad_token_id": 1, "eos_token_id": 0}
        config = OlmoConfig(**sizes, **ids, tie_word_embeddings=name == "large-tied")
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lm.save_pretrained(folder, max_shard_size="60MB")
    return folder


def make_recipe(case: Case, folder: Path, data: Path) -> Recipe:
    rows = {"per_device_train_batch_size": case.rows, "per_device_eval_batch_size": case.rows}
    stage = {"kind": case.stage, "max_steps": STEPS, "train_batch_size": 2 * case.rows * case.ranks}
    start = {"init": "truncate"} if case.stage == "finetune" else {}
    start |= {"source_tokens": str(data.parent / f"ids-{folder.name}")} if not start else {}
    values = {
        "output_dir": "never-written",
        "model": {
            "model_name_or_path": str(folder),
            "dtype": case.dtype,
            "gradient_checkpointing": case.checkpointing,
        },
        "data": {"path": data},
        "deepspeed": case.deepspeed,
        "stages": [{**stage, **rows, **start}],
    }
    return Recipe.model_validate(values)


def prepare(case: Case, room: Path) -> tuple[Recipe, Path, Recipe, Path]:
    """Recipe and model folder of the case and of the miniature that warms the ranks up."""
    data = room / f"data-{case.context}"
    if not data.exists():
        documents = torch.randint(3, VOCABULARY, (40, case.context)).tolist()
        make_data(data, documents, case.context, VOCABULARY)
    made = []
    for name in (case.model, "miniature"):
        source = make_model(name, room / name)
        vocab_size = AutoConfig.from_pretrained(source).vocab_size
        (room / f"ids-{source.name}").write_text("\n".join(map(str, range(vocab_size))))
        folder = source
        if case.stage == "finetune":
            folder = room / f"{name}-folded"
            if not folder.exists():
                folder.mkdir()
                ids = {"eos_token_id": 0, "pad_token_id": 1}
                fold(source, folder, lambda weight, _: _first_rows(weight), ids)
        made += [make_recipe(case, source, data), folder]
    return tuple(made)


def _first_rows(weight_VD: torch.Tensor) -> torch.Tensor:
    repeated = weight_VD.repeat(-(-VOCABULARY // len(weight_VD)), 1)
    return repeated[:VOCABULARY]


def as_launched(comm) -> None:
    """What the launcher and `engine.init_distributed` set."""
    names = {"RANK": comm.rank, "LOCAL_RANK": comm.rank, "WORLD_SIZE": comm.size}
    os.environ.update({name: str(value) for name, value in names.items()})
    warnings.simplefilter("ignore", FutureWarning)
    engine._quiet()


def measure_rank(comm, case: Case, prepared: tuple, saved: Path) -> dict[str, int]:
    """Peak bytes of each part of the stage on this rank, above those before its model is loaded.

    The baseline is the process after the same stage on a miniature model: imports, the process
    group, compiled code and the library's caches are in it. `VmHWM` counts resident pages, those
    of mapped files too.
    """
    as_launched(comm)
    recipe, folder, mini_recipe, mini_folder = prepared
    settings = engine.load_settings(recipe.deepspeed)
    _run_stage(comm, mini_recipe, mini_folder, settings, lambda part: None, saved / "mini")
    base = measure.reset_peak()
    peaks = {}

    def note(part: str) -> None:
        peaks[part] = measure.status_bytes("VmHWM") - base
        measure.reset_peak()

    _run_stage(comm, recipe, folder, settings, note, saved / "full")
    files = [path for path in (saved / "full").rglob("*") if path.is_file()]
    return peaks | {"checkpoint": sum(path.stat().st_size for path in files)}


def _run_stage(
    comm, recipe: Recipe, folder: Path, settings: dict, note: Callable[[str], None], saved: Path
) -> None:
    (stage,) = recipe.stages
    train, validation = (ShardReader(recipe.data.path, split) for split in ("train", "validation"))
    device = torch.device("cpu")
    context = Context(recipe, Path("never-written"), comm, device, settings, train, validation)
    full = engine.engine_settings(settings, recipe.model, stage, comm.size)
    load_lm(folder, recipe.model, full)
    note("loading")
    runner = _make(context, stage, folder)
    _, passes = engine.split_batch(stage, comm.size)
    for step in range(STEPS):
        rows = range(stage.per_device_train_batch_size)
        batches = [load_batch(train, [(step + row) % len(train) for row in rows])] * passes
        runner.train_step(batches, 1000, 1e-4)
        del batches
    note("training")
    runner.evaluation_mode(True)
    evaluate(runner.logits, validation, stage.per_device_eval_batch_size, device, comm)
    runner.evaluation_mode(False)
    note("evaluation")
    saved.mkdir(parents=True, exist_ok=True)
    runner.save(saved)
    comm.barrier()
    runner.close()


def _make(context: Context, stage: Stage, folder: Path) -> StageRunner:
    if stage.kind == "translate":
        return TranslateStage(context, stage)
    return WeightStage(context, stage, folder)


def plan_of(case: Case, recipe: Recipe) -> StageSize:
    config = AutoConfig.from_pretrained(recipe.model.model_name_or_path)
    inputs = Inputs(config, config.vocab_size, VOCABULARY, case.context)
    settings = engine.load_settings(recipe.deepspeed)
    return size_stage(recipe, recipe.stages[0], inputs, settings, Hardware(case.ranks, cpu=True))


def computed(plan: StageSize, ranks: int) -> dict[str, int]:
    """The plan's peaks by the parts that are measured; a CPU rank holds what is offloaded too."""
    host = plan.host // ranks
    training = [size for phase, size in plan.totals.items() if phase not in PARTS]
    return {
        "loading": plan.totals["loading"],
        "training": max(training) + host,
        "evaluation": plan.totals["evaluation"] + host,
    }


def ratios(measured: list[dict[str, int]], plan: dict[str, int]) -> dict[str, float]:
    """Measured over computed, of the largest rank, by part."""
    return {part: max(rank[part] for rank in measured) / plan[part] for part in PARTS}


def run_case(case: Case, room: Path) -> dict:
    """Measure a case; every figure of it as JSON."""
    prepared = prepare(case, room)
    staged = plan_of(case, prepared[0])
    plan = computed(staged, case.ranks)
    with tempfile.TemporaryDirectory(dir=room) as saved:
        arguments = (case, prepared, Path(saved))
        measured = run_ranks(
            measure_rank, case.ranks, room / "ranks", *arguments, timeout=900, fresh=True
        )
    disk = measured[0]["checkpoint"] / staged.checkpoint
    found = {"ratios": ratios(measured, plan), "checkpoint_ratio": disk}
    return {**asdict(case), "plan": plan, "measured": measured, **found}


SHORT = {"rows": 2, "context": 128}
CASES = [
    *(Case(name, stage, 2, "float32") for name in ("tiny", "small") for stage in STAGES),
    *(Case("large", stage, ranks, **SHORT) for stage in STAGES for ranks in (1, 2, 4)),
    Case("large", "finetune", 1, checkpointing=True),
    Case("large", "finetune", 2, deepspeed="ds_configs/zero3-offload.json", **SHORT),
]


def main(
    only: Annotated[str, typer.Option(help="Measure models of this name only.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of memory.md and .json.")] = RESULTS,
):
    """Measure peak memory per rank on 1, 2 and 4 CPU ranks; check it against the plan.

    Exits with 1 where a peak is more than 15% away from the plan.

    Example: `python -m tests.bench.memory --only tiny --out /tmp/bench`
    """
    os.environ.update(MALLOC)
    report = {"machine": measure.machine(1), "cases": []}
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*columns) as progress, tempfile.TemporaryDirectory() as room:
        for case in (case for case in CASES if only in case.model):
            task = progress.add_task(f"{case.stage} {case.model} on {case.ranks} ranks", total=1)
            report["cases"].append(run_case(case, Path(room)))
            progress.advance(task)
            (out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "memory.md").write_text(markdown(report))
    print(f"wrote {out / 'memory.md'}")
    worst = max(abs(peak_ratio(case) - 1) for case in report["cases"])
    if worst > TOLERANCE:
        print(f"measured and computed differ by {worst:.0%}; at most {TOLERANCE:.0%} is expected")
        raise typer.Exit(1)


def peak_ratio(case: dict) -> float:
    """Measured over computed peak of a whole stage, of the largest rank."""
    measured = max(rank[part] for rank in case["measured"] for part in PARTS)
    return measured / max(case["plan"].values())


def markdown(report: dict) -> str:
    """The report as a page."""
    machine = report["machine"]
    lines = [
        "# Peak memory per rank against `s2t2 plan`",
        "",
        "`python -m tests.bench.memory`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, CPU ranks over "
        f"gloo, one thread each, torch {machine['torch']}. MiB of the rank that holds most.",
        "",
        "Counted is the rise of a process's resident memory (VmHWM, mapped files included) above "
        "what it holds after the same work on a miniature model, so that imports, DeepSpeed and "
        "gloo are not in it; glibc gives freed tensors back at once "
        f"({', '.join(f'{key}={value}' for key, value in MALLOC.items())}).",
        "",
        f"Rows of tokens as in the table, two passes to a step, {STEPS} steps, V = all rows of the "
        f"embedding, U = {VOCABULARY}. Each cell: measured MiB (measured / planned). *peak* is the "
        "largest of the three, and must be within 15%; parts of few MiB are not: a process needs "
        "some 10 MiB for what nobody plans. *disk* is a checkpoint, measured / planned.",
        "",
        f"| model | stage | ranks | dtype | settings | rows | {' | '.join(PARTS)} | peak | disk |",
        "|---|---|---:|---|---|---|---:|---:|---:|---:|---:|",
        *(_case_line(case) for case in report["cases"]),
    ]
    return "\n".join(lines) + "\n"


def _case_line(case: dict) -> str:
    settings = Path(case["deepspeed"]).name
    settings += ", checkpointing" if case["checkpointing"] else ""
    cells = [case[key] for key in ("model", "stage", "ranks", "dtype")]
    cells += [settings, f"{case['rows']} x {case['context']}"]
    for part in PARTS:
        largest = max(rank[part] for rank in case["measured"])
        cells.append(f"{_mib(largest)} ({case['ratios'][part]:.2f})")
    cells += [f"{peak_ratio(case):.2f}", f"{case['checkpoint_ratio']:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def _mib(size: int) -> str:
    return f"{size / measure.MIB:,.0f}"


if __name__ == "__main__":
    typer.run(main)
