"""Real runs on real ranks: killed and resumed, on one rank and two, stopped, refused, exported."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests import launching as runs
from tests.conftest import make_source_model

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


def test_a_killed_run_continues_bit_identically(
    uninterrupted, source_model, protein_data, tmp_path
):
    """SIGKILL at a random step of each stage: of the whole job in one, of one rank in the other.

    Exactly equal, not close: the same additions happen in the same order. MLflow sees one run.
    """
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = runs.write_recipe(
        tmp_path / "killed", source_model, protein_data, tracking={"enabled": True, "uri": uri}
    )
    run_dir = recipe.parent / "run"
    # MLflow cannot mend a SQLite store that a kill left with half its tables: make it first.
    MlflowClient(tracking_uri=uri).search_experiments()
    for stage, whole in (("translate", True), ("finetune", False)):
        process = runs.start(recipe, 2)
        runs.wait_for_line(run_dir, stage, rng.randrange(1, 22), process)
        if whole:
            runs.kill(process)
        else:
            rng.choice(runs.ranks_of(process)).send_signal(signal.SIGKILL)
            assert process.wait(120) != 0, "the launcher must report the dead rank"
            runs.kill(process)
    assert runs.train(recipe, 2) == 0, runs.output(recipe)

    assert runs.losses(run_dir) == runs.losses(uninterrupted), f"kill seed {seed}"
    assert runs.status(run_dir)["state"] == "done"
    assert not list((run_dir / "checkpoints").glob(".*")), "a half-written checkpoint was left"
    _check_mlflow(run_dir, uri)


def _check_mlflow(run_dir: Path, uri: str) -> None:
    """MLflow holds what `metrics.jsonl` holds, in order, every point once."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("s2t2")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["stages.translate.max_steps"] == "24"
    for stage in ("translate", "finetune"):
        written = [
            (line["step"], line["loss"])
            for line in runs.metrics(run_dir)
            if line["stage"] == stage and "loss" in line
        ]
        history = client.get_metric_history(run.info.run_id, f"{stage}/loss")
        assert [(point.step, point.value) for point in history] == written
    for name in ("translate/entropy", "translate/row_error", "finetune/eval_bits_per_byte"):
        assert name in run.data.metrics


def test_sigterm_leaves_a_checkpoint_and_code_3(
    uninterrupted, source_model, protein_data, tmp_path
):
    recipe = runs.write_recipe(tmp_path, source_model, protein_data)
    run_dir = tmp_path / "run"
    process = runs.start(recipe, 2)
    runs.wait_for_line(run_dir, "translate", 7, process)
    for rank in runs.ranks_of(process):
        rank.send_signal(signal.SIGTERM)
    assert process.wait(120) == 3, runs.output(recipe)
    assert runs.status(run_dir)["state"] == "preempted"
    last = runs.metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"translate-{last:06d}" / "COMPLETE").exists()
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    assert runs.losses(run_dir) == runs.losses(uninterrupted)


@pytest.fixture(scope="module")
def one_rank_float32(source_model, protein_data, tmp_path_factory) -> Path:
    """float32, `s2t2 train` without a launcher, four micro-batches per step."""
    recipe = runs.write_recipe(
        tmp_path_factory.mktemp("one-rank"),
        source_model,
        protein_data,
        model={"model_name_or_path": str(source_model), "dtype": "float32"},
    )
    assert runs.train(recipe, 0) == 0, runs.output(recipe)
    return recipe.parent / "run"


def test_one_and_two_ranks_agree(one_rank_float32, source_model, protein_data, tmp_path):
    """The same global batch of 8: four micro-batches on one rank, two on each of two.

    Sums are taken in another order, which float32 shows at 1e-7 relative per step; 1e-4 leaves
    room for 48 steps of training. A step over other rows is off by more than that
    (`test_parity_would_see_a_wrong_batch`).
    """
    recipe = runs.write_recipe(
        tmp_path,
        source_model,
        protein_data,
        model={"model_name_or_path": str(source_model), "dtype": "float32"},
    )
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    one, two = runs.losses(one_rank_float32), runs.losses(tmp_path / "run")
    assert [line[:2] for line in one] == [line[:2] for line in two]
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a[2:4], b[2:4], strict=True):
            assert x == y if x is None else x == pytest.approx(y, rel=1e-4), (a, b)


def test_parity_would_see_a_wrong_batch(one_rank_float32, source_model, protein_data, tmp_path):
    """Half the rows per step give other losses, by several times the parity tolerance."""
    recipe = runs.write_recipe(
        tmp_path,
        source_model,
        protein_data,
        model={"model_name_or_path": str(source_model), "dtype": "float32"},
    )
    half = "stages.translate.train_batch_size=4"
    assert runs.train(recipe, 0, half, "stages.translate.max_steps=4") == 0, runs.output(recipe)
    full = {line[1]: line[2] for line in runs.losses(one_rank_float32) if line[0] == "translate"}
    other = {line[1]: line[2] for line in runs.losses(tmp_path / "run") if line[0] == "translate"}
    assert full[1] == pytest.approx(other[1])  # the plan starts uniform: log 64 for any batch
    assert abs(full[4] / other[4] - 1) > 3e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("float32", 1e-5)])
def test_the_export_reproduces_the_validation_loss_without_us(
    dtype, tolerance, uninterrupted, one_rank_float32, protein_data, tmp_path
):
    """In a process that cannot import the package. bf16 differs by the shape of the batches."""
    run_dir = uninterrupted if dtype == "bfloat16" else one_rank_float32
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
        shutil.copytree(disk / "run", tmp_path / "moved")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert runs.train(recipe, 0, f"output_dir={tmp_path / 'moved'}") == 0, runs.output(recipe)


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
        ({"model": {"model_name_or_path": "./nowhere"}}, "./nowhere is no Hugging Face folder"),
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
def test_bad_input_is_one_line_and_leaves_nothing(
    changes, named, source_model, protein_data, tmp_path
):
    (tmp_path / "own.json").write_text('{"train_batch_size": 4}')
    shutil.copytree(source_model, tmp_path / "model")
    if "data" in changes:
        changes = {"data": {"path": str(protein_data), **changes["data"]}}
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, **changes)
    assert runs.train(recipe, 0) == 2, runs.output(recipe)
    errors = [x for x in runs.output(recipe).splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and named in errors[0], runs.output(recipe)
    assert "Traceback" not in runs.output(recipe)
    assert not (tmp_path / "run").exists()


def test_two_ranks_report_a_mistake_once(source_model, protein_data, tmp_path):
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, data={"path": "nodata"})
    assert runs.train(recipe, 2) == 2, runs.output(recipe)
    assert runs.output(recipe).count("error: ") == 1


def test_a_translate_stage_resumes_on_fewer_ranks_and_a_weight_stage_does_not(
    one_rank_float32, source_model, protein_data, tmp_path
):
    """The rows of C are cut anew; DeepSpeed's moments cannot be, which is said up front.

    The losses agree as those of one and two ranks do: see `test_one_and_two_ranks_agree`.
    """
    recipe = runs.write_recipe(
        tmp_path,
        source_model,
        protein_data,
        model={"model_name_or_path": str(source_model), "dtype": "float32"},
    )
    run_dir = tmp_path / "run"
    process = runs.start(recipe, 2)
    runs.wait_for_line(run_dir, "translate", 7, process)
    runs.kill(process)
    process = runs.start(recipe, 0)
    runs.wait_for_line(run_dir, "finetune", 7, process)
    process.send_signal(signal.SIGSTOP)
    _check_second_job(recipe, process.pid)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 3, runs.output(recipe)
    one, changed = runs.losses(one_rank_float32), runs.losses(run_dir)
    assert {line[0] for line in changed} == {"translate", "finetune"}
    for left, right in zip(one, changed, strict=False):
        assert left[:2] == right[:2]
        assert right[2:4] == tuple(v and pytest.approx(v, rel=1e-4) for v in left[2:4])

    before = runs.metrics(run_dir)
    assert runs.train(recipe, 2) == 2, runs.output(recipe)
    errors = [x for x in runs.output(recipe).splitlines() if x.startswith("error:")]
    assert len(errors) == 1, runs.output(recipe)
    assert "was written by 1 ranks, this job has 2; start it with 1" in errors[0]
    assert runs.metrics(run_dir) == before


def _check_second_job(recipe: Path, running: int) -> None:
    """A job in a run directory where another one runs ends at once and names that one."""
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
    assert f"is in use by process {running} on " in errors[0]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    source_model, protein_data, tmp_path
):
    """A learning rate that blows the weights up; two ranks, one line."""
    stage = {**runs.STAGE, "learning_rate": 1e30, "max_grad_norm": 0, "save_steps": 1}
    recipe = runs.write_recipe(
        tmp_path,
        source_model,
        protein_data,
        stages=[{"kind": "finetune", "init": "truncate", "max_steps": 20, **stage}],
    )
    assert runs.train(recipe, 2) == 2, runs.output(recipe)
    (error,) = [x for x in runs.output(recipe).splitlines() if x.startswith("error:")]
    assert "the loss of stage finetune is nan at step" in error
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved and f"the last checkpoint is {tmp_path / 'run/checkpoints' / saved[-1]}" in error
    assert runs.status(tmp_path / "run")["state"] == "failed"


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
