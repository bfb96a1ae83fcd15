"""Real runs on real ranks: stopped and resumed on other numbers of them, refused, exported."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.config import load_recipe
from s2t2_dist.errors import S2T2Error
from s2t2_dist.training import start
from tests.conftest import make_source_model
from tests.jobs import launching as runs

pytestmark = pytest.mark.slow

EVALUATE_ALONE = """
import json, math, sys
sys.modules["s2t2_dist"] = None  # any import of it fails
import numpy as np, pyarrow as pa, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, data_dir = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_dir)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
nats = tokens = 0
table = pa.ipc.open_file(pa.memory_map(f"{data_dir}/validation/shard-00000.arrow")).read_all()
for row, length in zip(table["tokens"].to_pylist(), table["length"].to_pylist()):
    ids = torch.tensor([row[:length]])
    if length > 1:
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += length - 1
same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
print(json.dumps({"loss": nats / tokens, "tied": same, "vocabulary": len(tokenizer),
                  "rows": model.get_output_embeddings().weight.shape[0],
                  "eos": [tokenizer.eos_token_id, model.config.eos_token_id,
                          model.generation_config.eos_token_id],
                  "pad": [tokenizer.pad_token_id, model.config.pad_token_id,
                          model.generation_config.pad_token_id]}))
"""


@pytest.fixture(scope="module")
def uninterrupted(source_model, protein_data, tmp_path_factory) -> Path:
    """A bf16 run of both stages on two ranks that nothing disturbed."""
    recipe = runs.write_recipe(tmp_path_factory.mktemp("reference"), source_model, protein_data)
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    return recipe.parent / "run"


# A batch that 1, 2 and 3 ranks can share.
SHARED = {**runs.STAGE, "train_batch_size": 12, "max_steps": 16}


def _float32_recipe(folder: Path, model: Path, data: Path) -> Path:
    """Both stages in float32, with more than one of DeepSpeed's sub-groups of parameters."""
    settings = json.loads(runs.CPU_SETTINGS.read_text())
    settings["zero_optimization"]["sub_group_size"] = 8000
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    return runs.write_recipe(
        folder,
        model,
        data,
        model={"model_name_or_path": str(model), "dtype": "float32"},
        deepspeed=str(folder / "deepspeed.json"),
        stages=[
            {"kind": "translate", "learning_rate": 0.01, **SHARED},
            {"kind": "finetune", "learning_rate": 0.002, **SHARED},
        ],
    )


@pytest.fixture(scope="module")
def two_ranks_float32(source_model, protein_data, tmp_path_factory) -> Path:
    """Both stages on two ranks that nothing disturbed."""
    recipe = _float32_recipe(tmp_path_factory.mktemp("two-ranks"), source_model, protein_data)
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    return recipe.parent / "run"


# How many ranks, and until which step of which stage.
LEGS = [
    (2, "translate", 3),
    (1, "translate", 7),
    (3, "translate", 11),
    (2, "finetune", 3),
    (1, "finetune", 7),
    (3, "finetune", 11),
]


def test_the_number_of_ranks_may_change_at_every_resume(
    two_ranks_float32, source_model, protein_data, tmp_path
):
    """2 -> 1 -> 3 -> 2 in each stage, stopped by SIGTERM and once by the time limit.

    Sums are taken in another order, which float32 shows at 1e-7 relative per step. A step over
    other rows is off by far more (`test_parity_would_see_a_wrong_batch`), and so are moments that
    were lost or counted wrong.
    """
    recipe = _float32_recipe(tmp_path, source_model, protein_data)
    run_dir = tmp_path / "run"
    for ranks, stage, step in LEGS:
        limited = (ranks, stage) == (1, "finetune")
        process = runs.start(recipe, ranks, *(["max_hours=0.001"] if limited else []))
        if not limited:
            runs.wait_for_line(run_dir, stage, step, process)
            if (ranks, stage) == (1, "translate"):
                _check_second_job(recipe, *runs.ranks_of(process))
            for rank in runs.ranks_of(process):
                rank.send_signal(signal.SIGTERM)
        assert process.wait(120) == 3, runs.output(recipe)
        assert runs.status(run_dir)["state"] == "preempted"
        last = runs.metrics(run_dir)[-1]
        name = f"{last['stage']}-{last['step']:06d}"
        assert (run_dir / "checkpoints" / name / "COMPLETE").exists()
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    assert not list((run_dir / "checkpoints").glob(".*")), "a universal copy was left"

    reference, changed = runs.losses(two_ranks_float32), runs.losses(run_dir)
    assert [line[:2] for line in reference] == [line[:2] for line in changed]
    for left, right in zip(reference, changed, strict=True):
        for x, y in zip(left[2:4], right[2:4], strict=True):
            assert x == y if x is None else y == pytest.approx(x, rel=1e-5), (left, right)


def test_parity_would_see_a_wrong_batch(two_ranks_float32, source_model, protein_data, tmp_path):
    """Half the rows per step give other losses, by many times the parity tolerance."""
    recipe = _float32_recipe(tmp_path, source_model, protein_data)
    half = "stages.translate.train_batch_size=6"
    assert runs.train(recipe, 0, half, "stages.translate.max_steps=4") == 0, runs.output(recipe)
    full = {line[1]: line[2] for line in runs.losses(two_ranks_float32) if line[0] == "translate"}
    other = {line[1]: line[2] for line in runs.losses(tmp_path / "run") if line[0] == "translate"}
    assert full[1] == pytest.approx(other[1])  # the plan starts uniform: log 64 for any batch
    assert abs(full[4] / other[4] - 1) > 3e-4


def _check_second_job(recipe: Path, running: psutil.Process) -> None:
    """A job in a run directory where another one runs ends at once and names that one."""
    running.suspend()
    second = subprocess.run(
        runs.command(recipe, 0),
        cwd=recipe.parent,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [x for x in second.stderr.splitlines() if x.startswith("error:")]
    assert second.returncode == 2 and len(errors) == 1, second.stderr
    assert f"is in use by process {running.pid} on " in errors[0]
    running.resume()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("float32", 1e-5)])
def test_the_export_reproduces_the_validation_loss_without_us(
    dtype, tolerance, uninterrupted, two_ranks_float32, protein_data, tmp_path
):
    """In a process that cannot import the package. bf16 differs by the shape of the batches."""
    run_dir = uninterrupted if dtype == "bfloat16" else two_ranks_float32
    exported = tmp_path / "exported"
    done = subprocess.run(
        [runs.BIN / "s2t2", "export", run_dir, "--out", exported],
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, "-c", EVALUATE_ALONE, exported, protein_data],
        cwd=tmp_path,
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    found = json.loads(alone.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(runs.status(run_dir)["eval_loss"], rel=tolerance)
    assert found["tied"] is False
    assert found["rows"] == found["vocabulary"] == 64
    assert len(set(found["eos"])) == len(set(found["pad"])) == 1
    assert found["eos"] != found["pad"]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    source_model, protein_data, tmp_path
):
    """A small tmpfs as the run directory's disk fills up while the run writes checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        recipe = runs.write_recipe(
            tmp_path, source_model, protein_data, output_dir=str(disk / "run"), save_total_limit=99
        )
        assert runs.train(recipe, 0) == 2, runs.output(recipe)
        errors = [x for x in runs.output(recipe).splitlines() if x.startswith("error:")]
        assert len(errors) == 1 and "Traceback" not in runs.output(recipe)
        assert "MiB free" in errors[0] or "no space left" in errors[0]
        sealed = [p for p in (disk / "run/checkpoints").iterdir() if (p / "COMPLETE").exists()]
        assert sealed, "checkpoints written before the disk was full must stay"
        newest = max(sealed, key=lambda path: path.stat().st_mtime).name
        shutil.copytree(disk / "run", tmp_path / "moved")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert runs.train(recipe, 0, f"output_dir={tmp_path / 'moved'}") == 0, runs.output(recipe)
    assert f"resuming from {newest}\n" in runs.output(recipe)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its bytes."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_dry_run_checks_everything_and_writes_nothing(
    uninterrupted, source_model, protein_data, tmp_path
):
    """Of a new and a stopped run on two ranks; of one that is done, with a key changed or not."""
    recipe = runs.write_recipe(tmp_path, source_model, protein_data)
    (tmp_path / "output.txt").touch()
    before = tree(tmp_path).keys()
    assert runs.train(recipe, 2, "--dry-run") == 0, runs.output(recipe)
    printed = runs.output(recipe)
    assert printed.count(f"{tmp_path / 'run'} would start from step 0\n") == 1
    assert "translate: 24 steps of 8 rows; each of 2 ranks makes 2 passes of 2 rows" in printed
    assert printed.count("every check passed; nothing was written\n") == 1
    assert tree(tmp_path).keys() == before

    done, before = uninterrupted.parent / "recipe.yaml", tree(uninterrupted)
    assert runs.train(done, 0, "--dry-run") == 0
    assert f"{uninterrupted} is done\n" in runs.output(done)
    assert runs.train(done, 0, "--dry-run", "seed=5") == 2
    errors = [x for x in runs.output(done).splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and "seed: 17 -> 5" in errors[0]
    assert tree(uninterrupted) == before

    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "status.json").unlink()
    before = tree(tmp_path / "run")
    assert runs.train(recipe, 2, "--dry-run") == 0, runs.output(recipe)
    assert f"{tmp_path / 'run'} would resume from finetune-000024\n" in runs.output(recipe)
    assert tree(tmp_path / "run") == before


def test_a_resume_with_a_changed_recipe_is_refused(uninterrupted):
    recipe = uninterrupted.parent / "recipe.yaml"
    before = (uninterrupted / "status.json").read_bytes()
    assert runs.train(recipe, 0, "stages.translate.learning_rate=0.5") == 2
    line = [x for x in runs.output(recipe).splitlines() if x.startswith("error:")][-1]
    assert "stages.translate.learning_rate: 0.01 -> 0.5" in line
    assert (uninterrupted / "status.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"model_name_or_path": "./nowhere"}}, "./nowhere is not a Hugging Face folder"),
        ({"data": {"path": "nodata"}}, "nodata"),
        ({"data": {"tokenizer": "model"}}, "the shards were made with the tokenizer"),
        ({"deepspeed": "own.json"}, "train_batch_size is set by the recipe"),
        (
            {"stages": [{"kind": "finetune", "init": "source", "max_steps": 1}]},
            "the shards were made with the tokenizer",
        ),
        (
            {"stages": [{"kind": "translate", "max_steps": 1, "source_tokens": "ids.txt"}]},
            "ids.txt is not all, bytes or a file",
        ),
    ],
    ids=["model", "data", "tokenizer", "deepspeed", "source", "tokens"],
)
def test_bad_input_is_refused_by_name_before_anything_is_written(
    changes, named, source_model, protein_data, tmp_path, monkeypatch
):
    """What a start checks first, without a start; the line on the terminal: the next test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"train_batch_size": 4}')
    shutil.copytree(source_model, tmp_path / "model")
    if "data" in changes:
        changes = {"data": {"path": str(protein_data), **changes["data"]}}
    path = runs.write_recipe(tmp_path, source_model, protein_data, **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(S2T2Error) as raised:
        start._open_inputs(load_recipe(path), Comm(), torch.device("cpu"))
    assert named in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_ranks_report_a_mistake_once_and_leave_nothing(source_model, protein_data, tmp_path):
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, data={"path": "nodata"})
    assert runs.train(recipe, 2) == 2, runs.output(recipe)
    errors = [x for x in runs.output(recipe).splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and "nodata" in errors[0], runs.output(recipe)
    assert runs.output(recipe).count("error: ") == 1
    assert "Traceback" not in runs.output(recipe)
    assert not (tmp_path / "run").exists()


def test_every_translator_and_baseline_trains(source_model, source_data, protein_data, tmp_path):
    """The variants of the paper's table, each a recipe: they run, and translation learns."""
    short = {**runs.STAGE, "max_steps": 6, "learning_rate": 0.01, "eval_steps": 6}
    variants = {
        "dense": [{"kind": "translate", "method": "dense", **short}],
        "plain": [{"kind": "translate", "method": "plain", **short}],
        "dual": [{"kind": "translate", "method": "dual", **short}],
        "separate": [
            {
                "kind": "translate",
                "plans": "separate",
                "source_marginal": str(source_data),
                "target_marginal": "frequency",
                **short,
            },
            {"kind": "finetune", **short, "max_steps": 1},
        ],
        "bytes": [
            {
                "kind": "translate",
                "source_tokens": "bytes",
                "units": "literal",
                "embed_scale": "convex",
                "entropy_weight": 1e-3,
                **{**short, "learning_rate": 1e-4},
            }
        ],
        "truncate": [{"kind": "finetune", "init": "truncate", **short}],
        "source": [{"kind": "finetune", "init": "source", **short}],
    }
    for name, stages in variants.items():
        data = source_data if name == "source" else protein_data
        recipe = runs.write_recipe(tmp_path / name, source_model, data, stages=stages)
        assert runs.train(recipe, 0) == 0, runs.output(recipe)
        lines = runs.metrics(tmp_path / name / "run")
        assert lines[-1]["eval_loss"] < lines[0]["eval_loss"], name


def test_a_translation_serves_another_model(
    uninterrupted, source_tokenizer, protein_data, tmp_path
):
    """Transfer: P learned on one model folded into another with the same source tokenizer."""
    other = make_source_model(tmp_path / "other", source_tokenizer, tied=False)
    stage = {"kind": "finetune", "translation": str(uninterrupted / "translation"), "max_steps": 2}
    recipe = runs.write_recipe(
        tmp_path / "transfer",
        other,
        protein_data,
        stages=[{**stage, **runs.STAGE}],
        model={
            "model_name_or_path": str(other),
            "dtype": "float32",
            "gradient_checkpointing": True,
        },
    )
    assert runs.train(recipe, 0) == 0, runs.output(recipe)
    lines = runs.metrics(tmp_path / "transfer" / "run")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
