"""What is measured of a finished run, on run directories made without training."""

import json
import math
import shutil
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

from s2t2_dist.config import recipe_values
from s2t2_dist.data.order import row_at
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError, ConfigError
from s2t2_dist.report.runs import read_run
from s2t2_dist.study import schedule
from s2t2_dist.study.config import load_study
from s2t2_dist.study.cost import cost_of, text_bytes
from s2t2_dist.study.figure import draw, training_curves, validation_curve
from s2t2_dist.study.measure import measure, read_record, record_path
from s2t2_dist.study.progress import time_left
from tests.report import runs
from tests.report.runs import BATCH, FINETUNE, TRANSLATE

CPU = torch.device("cpu")
CONTEXT, U, V, D = 32, 64, 400, 32


@pytest.fixture
def study(source_model, protein_data, tmp_path):
    """Two seeds of a translate and a finetune stage."""
    base = tmp_path / "recipe.yaml"
    recipe = runs.make_recipe(tmp_path / "x", source_model, protein_data, [TRANSLATE, FINETUNE])
    base.write_text(yaml.safe_dump(recipe_values(recipe)))
    values = {"output_dir": str(tmp_path / "study"), "base": str(base), "seeds": [17, 18]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**values, "variants": {"s2t2": {}}}))
    return load_study(tmp_path / "study.yaml")


def lines_of(evaluation, shift: float = 0.0) -> list[dict]:
    """Both stages, each step of 0.5 s; the second ends with this evaluation."""
    found = []
    for index, steps in enumerate((10, 5)):
        found.append(runs.metrics_line(index, 0, None, evaluation))
        for step in range(1, steps + 1):
            end = evaluation if step == steps else None
            line = runs.metrics_line(index, step, 3.0 - 0.1 * step + shift, end)
            found.append({**line, "step_seconds": 0.5})
    return found


@pytest.fixture
def finished(study, source_model, protein_data):
    """The first run, done: with a plan and the model that it makes."""
    run = study.runs[0]
    runs.make_exportable_run(run.recipe.output_dir, source_model, protein_data, finetuned=True)
    evaluation = runs.evaluate_folder(run.recipe.output_dir / "model", protein_data)
    (run.recipe.output_dir / "config.yaml").write_text(yaml.safe_dump(recipe_values(run.recipe)))
    (run.recipe.output_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines_of(evaluation))
    )
    return run, evaluation


def test_a_record_holds_both_halves_and_the_whole(study, finished):
    run, evaluation = finished
    record = measure(run, study.output_dir, CPU)
    halves = record["halves"].values()
    assert sum(half["tokens"] for half in halves) == evaluation.tokens
    assert sum(half["bytes"] for half in halves) == evaluation.bytes
    # Batches of other shapes round differently: 1e-5 is what float32 differs by.
    assert sum(half["nats"] for half in halves) == pytest.approx(evaluation.nats, rel=1e-5)
    assert record["bits_per_byte"] == evaluation.bits_per_byte
    assert read_record(study.output_dir, run) == record


def test_a_record_of_another_run_or_altered_is_not_taken(study, finished, caplog):
    run, _ = finished
    measure(run, study.output_dir, CPU)
    path = record_path(study.output_dir, run)
    other = replace(run, recipe=run.recipe.model_copy(update={"max_bad_steps": 9}))
    assert read_record(study.output_dir, other) is None
    text = path.read_text()
    path.write_text(text.replace('"bits_per_byte": 4', '"bits_per_byte": 3'))
    assert path.read_text() != text
    assert read_record(study.output_dir, run) is None
    assert f"{path} was altered after it was written" in caplog.text
    path.write_text("{")
    assert read_record(study.output_dir, run) is None
    path.write_text(text)
    (run.recipe.output_dir / "metrics.jsonl").write_text("")
    assert read_record(study.output_dir, run) is None


def test_a_model_that_is_not_the_runs_is_refused(study, finished):
    run, evaluation = finished
    planted = replace(evaluation, nats=evaluation.nats * 0.9)
    (run.recipe.output_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines_of(planted))
    )
    with pytest.raises(ArtifactError, match="but the run recorded"):
        measure(run, study.output_dir, CPU)
    assert not record_path(study.output_dir, run).exists()


def test_cost(finished, protein_data):
    """By hand: an OLMo of two layers of width 32 and MLPs of 64, source vocabulary 400, tied."""
    run, _ = finished
    cost = cost_of(read_run(run.recipe.output_dir))
    tokens = 15 * BATCH * CONTEXT
    assert (cost.steps, cost.tokens, cost.seconds) == (15, tokens, 7.5)
    backbone = 2 * (4 * D * D + 3 * D * 64)
    attention = 12 * 2 * D * CONTEXT
    translate = 4 * backbone + 6 * U * D + attention
    finetune = 6 * (backbone + U * D) + attention
    products = 4 * V * U * D * 10
    expected = BATCH * CONTEXT * (10 * translate + 5 * finetune) + products
    assert cost.flops == expected
    reader = ShardReader(protein_data, "train")
    held = 0
    for position in range(15 * BATCH):
        row = row_at(position, len(reader), 17)
        held += int(reader.token_bytes[reader[row][: reader.length(row)]].sum())
    assert cost.text_bytes == held


@pytest.mark.parametrize(("epochs", "extra"), [(0, 17), (1, 0), (1, 1), (2, 3)])
def test_text_of_whole_epochs(protein_data, epochs, extra):
    reader = ShardReader(protein_data, "train")
    rows = epochs * len(reader) + extra
    each = [
        int(reader.token_bytes[reader[row][: reader.length(row)]].sum())
        for row in (row_at(position, len(reader), 5) for position in range(rows))
    ]
    assert text_bytes(reader, rows, 5) == sum(each)


def test_where_a_run_stands(study, finished):
    run, _ = finished
    assert schedule.standing(study, study.runs[1]) == schedule.NEW
    settings = json.loads(run.recipe.deepspeed.read_text())
    inputs = schedule.identified(run.recipe, run.recipe.output_dir, settings, schedule.Comm())
    schedule.directory.identity.write(run.recipe.output_dir, inputs)
    assert schedule.standing(study, run) == schedule.MEASURE
    measure(run, study.output_dir, CPU)
    assert schedule.standing(study, run) == schedule.DONE
    shutil.rmtree(run.recipe.output_dir / "model")  # to free the disk
    assert schedule.standing(study, run) == schedule.DONE
    status = run.recipe.output_dir / "status.json"
    status.write_text(status.read_text().replace("done", "preempted"))
    assert schedule.standing(study, run) == schedule.RESUME
    stages = [stage.model_copy(update={"max_steps": 11}) for stage in run.recipe.stages]
    other = replace(run, recipe=run.recipe.model_copy(update={"stages": stages}))
    with pytest.raises(ConfigError, match=r"another recipe \(stages.finetune.max_steps: 5 -> 11"):
        schedule.standing(study, other)


def test_steps_done_and_time_left(study, finished, tmp_path):
    run, _ = finished
    metrics = run.recipe.output_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert schedule.steps_done(study.runs[1]) == 0
    for count, steps in ((1, 0), (4, 3), (11, 10), (12, 10), (14, 12), (17, 15)):
        metrics.write_text("".join(lines[:count]))
        assert schedule.steps_done(run) == steps
    metrics.write_text("".join(lines[:4]) + lines[4][:20])  # a line that is being written
    assert schedule.steps_done(run) == 3
    assert time_left(10.0, 0, 5) == ""
    assert time_left(100.0, 10, 378) == "1:03:00 left"


def test_curves_and_figure(study, finished, tmp_path):
    """The mean over seeds at each step, and a picture with a band."""
    _, evaluation = finished
    second = study.runs[1]
    shifted = replace(evaluation, nats=evaluation.nats * 1.01)
    runs.write_run(second.recipe, lines_of(shifted, shift=0.2))
    found = [read_run(one.recipe.output_dir) for one in study.runs]
    steps, bits = training_curves(found, 0)
    assert steps.tolist() == list(range(1, 11)) and bits.shape == (2, 10)
    per_nat = 1 / math.log(2) / found[0].bytes_per_token("train")
    assert np.diff(bits, axis=0) == pytest.approx(np.full((1, 10), 0.2 * per_nat), rel=1e-9)
    at, points = validation_curve(found)
    assert at.tolist() == [0, 10, 10, 15] and points.shape == (2, 4)
    assert points[:, -1].tolist() == [evaluation.bits_per_byte, shifted.bits_per_byte]
    draw(tmp_path / "figure.png", {"both $eeds": found, "one": found[:1], "none": []})
    image = matplotlib.image.imread(tmp_path / "figure.png")
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50, "an empty picture"
    assert not list(tmp_path.glob(".*png*"))
    draw(tmp_path / "figure.png", {"none": []})
