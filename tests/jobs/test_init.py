"""Finetune stages that start without training, on real ranks."""

import json
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from s2t2_dist import artifacts
from s2t2_dist.config import INITS, load_recipe
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.init import starting_rows
from tests.jobs import launching as runs

pytestmark = pytest.mark.slow

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def recipe_of(folder, model, data, init, steps=2, **keys):
    stage = {"kind": "finetune", "init": init, "max_steps": steps, "learning_rate": 0.002}
    path = folder / "alignment.json"
    if init == "alignment":
        folder.mkdir(exist_ok=True)
        path.write_text(json.dumps({str(i): 5 * i for i in range(64)}))
        keys = {"alignment": str(path), **keys}
    base = {"model_name_or_path": str(model), "dtype": "float32"}
    return runs.write_recipe(
        folder, model, data, model=base, stages=[{**stage, **runs.STAGE, **keys}]
    )


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "init",
    [
        pytest.param("mean", marks=SOAK),
        pytest.param("gaussian", marks=SOAK),
        "subtoken_mean",
        "focus",
    ],
)
def test_two_steps(init, source_model, protein_data, tmp_path):
    """The start is the map of the base's rows, and the run trains it.

    Rows that are all equal are the hardest for the checks of an export.
    """
    recipe = recipe_of(tmp_path, source_model, protein_data, init)
    ranks = 2 if init == "subtoken_mean" else 0
    assert runs.train(recipe, ranks) == 0, runs.output(recipe)
    run_dir, stage = tmp_path / "run", load_recipe(recipe).stages[0]
    data = ShardReader(protein_data, "train")
    start = starting_rows(stage.init, WeightFiles(source_model), data, 17)
    begun = load_file(run_dir / "start-finetune" / "model.safetensors")
    old = load_file(source_model / "model.safetensors")[EMBED]
    for name in (EMBED, HEAD):  # the base is tied
        assert torch.equal(begun[name], start(old))
    found = artifacts.read_manifest(run_dir / "start-finetune")["init"]
    assert found == {"method": init, **start.record}
    counts = ", ".join(f"{what} {count}" for what, count in start.record.items())
    assert f"stage finetune: init {init}, rows {counts}\n" in runs.output(recipe)
    lines = runs.metrics(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    if init != "mean":
        return
    exported = tmp_path / "exported"
    done = subprocess.run(
        [runs.BIN / "s2t2", "export", run_dir, "--out", exported],
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"new rows without training: {INITS[init]}" in (exported / "README.md").read_text()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(source_model, protein_data, tmp_path):
    """And one whose start was lost makes the same start again."""
    whole = recipe_of(tmp_path / "whole", source_model, protein_data, "focus", steps=16)
    assert runs.train(whole, 0) == 0, runs.output(whole)
    recipe = recipe_of(tmp_path / "stopped", source_model, protein_data, "focus", steps=16)
    run_dir = tmp_path / "stopped" / "run"
    process = runs.start(recipe, 0)
    runs.wait_for_line(run_dir, "finetune", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 3, runs.output(recipe)
    weights = run_dir / "start-finetune" / "model.safetensors"
    before = weights.read_bytes()
    (run_dir / "start-finetune" / artifacts.COMPLETE).unlink()
    assert runs.train(recipe, 0) == 0, runs.output(recipe)
    assert weights.read_bytes() == before
    assert runs.losses(run_dir) == runs.losses(tmp_path / "whole" / "run")


def test_another_alignment_is_another_run(source_model, protein_data, tmp_path):
    """It is known by its content: a run resumes with a moved file, not with a changed one."""
    recipe = recipe_of(tmp_path, source_model, protein_data, "alignment")
    assert runs.train(recipe, 0) == 0, runs.output(recipe)
    moved = (tmp_path / "alignment.json").rename(tmp_path / "moved.json")
    key = f"stages.finetune.alignment={moved}"
    assert runs.train(recipe, 0, key) == 0, runs.output(recipe)
    moved.write_text(moved.read_text().replace('"1": 5', '"1": 6'))
    assert runs.train(recipe, 0, key) == 2
    error = "was started with other files (stages.finetune.alignment, file: "
    assert error in runs.output(recipe), runs.output(recipe)


def test_a_plan_begins_at_a_start(source_model, protein_data, tmp_path):
    """On two ranks; its first model is the mixture of the start and of the mean, 9 to 1."""
    stage = {"kind": "translate", "max_steps": 0, "warm_start": "subtoken_mean", **runs.STAGE}
    stages = [stage | {"embed_scale": "convex"}, {"kind": "finetune", "max_steps": 0, **runs.STAGE}]
    base = {"model_name_or_path": str(source_model), "dtype": "float32"}
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, model=base, stages=stages)
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    weights, data = WeightFiles(source_model), ShardReader(protein_data, "train")
    start, mean = (starting_rows(init, weights, data, 17) for init in ("subtoken_mean", "mean"))
    begun = load_file(tmp_path / "run" / "start-finetune" / "model.safetensors")
    old = load_file(source_model / "model.safetensors")[EMBED]
    empty = (start(old) == mean(old)).all(1)  # these take no share
    assert 0 < empty.sum() < 4
    share = torch.where(empty, 0.0, 0.9)[:, None]
    expected = share * start(old) + (1 - share) * mean(old)
    for name in (EMBED, HEAD):
        torch.testing.assert_close(begun[name], expected, rtol=1e-4, atol=1e-6)
