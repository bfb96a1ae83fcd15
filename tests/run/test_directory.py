"""A run directory: whose it is, what may change between two starts, one job at a time."""

import json
import os

import pytest
import yaml

from s2t2_dist.config import Recipe
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from s2t2_dist.run.directory import claimed, identify_inputs

INPUTS = {"data manifest sha256": "a" * 64, "model weight files (bytes)": {"m.safetensors": 7}}


def recipe(run_dir, **changes) -> Recipe:
    stage = {"kind": "translate", "max_steps": 3, **changes.pop("stage", {})}
    values = {"output_dir": run_dir, "model": {"model_name_or_path": "m"}, "data": {"path": "d"}}
    return Recipe.model_validate({**values, "deepspeed": "z.json", "stages": [stage], **changes})


def start(run_dir, inputs=INPUTS, resume="auto", **changes) -> None:
    with claimed(run_dir, recipe(run_dir, **changes), inputs, resume):
        pass


def test_keys_that_cannot_change_a_result_may_change(tmp_path):
    run_dir = tmp_path / "run"
    start(run_dir)
    start(run_dir, save_total_limit=7, tracking={"enabled": False}, stage={"save_steps": 2})
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["save_total_limit"] == 7 and written["stages"][0]["save_steps"] == 2
    assert written["tracking"]["enabled"] is False
    run_dir.rename(tmp_path / "moved")
    start(tmp_path / "moved", save_total_limit=7)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 4}, "seed: 17 -> 4"), ({"stage": {"iterations": 9}}, "iterations: 3 -> 9")],
)
def test_another_recipe_is_refused(tmp_path, changes, named):
    start(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=f"started with another recipe .*{named}"):
        start(tmp_path, **changes)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_other_files_behind_the_same_paths_are_refused(tmp_path):
    start(tmp_path)
    swapped = {**INPUTS, "model weight files (bytes)": {"m.safetensors": 8}}
    with pytest.raises(ConfigError, match=r"other files .*m.safetensors: 7 -> 8"):
        start(tmp_path, swapped)
    with pytest.raises(ConfigError, match=r"data manifest sha256: aaaa.* -> b"):
        start(tmp_path, {**INPUTS, "data manifest sha256": "b"})


def test_inputs_are_known_by_what_they_hold(source_model, protein_data, source_data):
    found = identify_inputs(protein_data, {"zero_optimization": {"stage": 3}}, source_model)
    assert found["model weight files (bytes)"].keys() == {"model.safetensors"}
    read = ["uniform", str(source_data), str(source_model / "config.json")]
    more = identify_inputs(protein_data, {"zero_optimization": {"stage": 3}}, source_model, read)
    assert len(more) == len(found) + 2 and found.items() <= more.items()
    assert more[f"{source_data} sha256"] != more[f"{source_model / 'config.json'} sha256"]
    other = identify_inputs(source_data, {"zero_optimization": {"stage": 2}}, None)
    same = {key for key in other if other[key] == found[key]}
    assert not same and len(other) == 2


def test_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="is not a run directory"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("{}")
    (tmp_path / "inputs.json").write_text("{}")
    start(tmp_path)
    assert json.loads((tmp_path / "inputs.json").read_text()) == INPUTS


@pytest.mark.parametrize("resume", ["never", "checkpoints/translate-000001"])
def test_resume_must_fit(tmp_path, resume):
    if resume == "never":
        start(tmp_path)
    with pytest.raises(ConfigError, match=f"--resume (is )?{resume}|--resume is never"):
        start(tmp_path, resume=resume)


def test_one_job_at_a_time(tmp_path):
    """The lock is on the open file, so that two openings in one process are as two jobs."""
    with (
        claimed(tmp_path, recipe(tmp_path), INPUTS, "auto"),
        pytest.raises(S2T2Error, match=f"in use by process {os.getpid()} on .*kill"),
    ):
        start(tmp_path)
    start(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
