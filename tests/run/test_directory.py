"""A run directory: whose it is, what may change between two starts, one job at a time."""

import json
import os

import pytest
import yaml

from s2t2_dist.config import Recipe
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from s2t2_dist.run.directory import claimed


def entry(**files: str) -> dict:
    hashes = {name.replace("_", "."): {"sha256": value} for name, value in files.items()}
    return {"path": "/somewhere", "given": "somewhere", "files": hashes}


INPUTS = {"data": entry(manifest_json="a" * 64), "model": entry(m_safetensors="7")}


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
    start(
        run_dir,
        save_total_limit=7,
        tracking={"enabled": False},
        stage={"save_steps": 2, "samples": 3},
    )
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["save_total_limit"] == 7 and written["stages"][0]["save_steps"] == 2
    assert written["tracking"]["enabled"] is False
    run_dir.rename(tmp_path / "moved")
    start(tmp_path / "moved", save_total_limit=7)
    assert not run_dir.exists()


def test_what_the_advice_after_out_of_memory_changes_may_change(tmp_path):
    start(tmp_path / "run")
    smaller = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    start(tmp_path / "run", stage=smaller)


@pytest.mark.parametrize("key", ["save_steps", "samples"])
def test_a_run_of_before_such_a_key_existed_is_resumed(tmp_path, key):
    start(tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["stages"][0][key]
    path.write_text(yaml.safe_dump(values))
    start(tmp_path / "run")


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
    swapped = {**INPUTS, "model": entry(m_safetensors="8")}
    with pytest.raises(ConfigError, match=r"other files .*model, m.safetensors: 7 -> 8"):
        start(tmp_path, swapped)
    with pytest.raises(ConfigError, match=r"data, manifest.json: aaaa.* -> b"):
        start(tmp_path, {**INPUTS, "data": entry(manifest_json="b")})
    with pytest.raises(ConfigError, match=r"model, tokenizer.json: none -> c"):
        start(tmp_path, {**INPUTS, "model": entry(m_safetensors="7", tokenizer_json="c")})


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"model_name_or_path": "/elsewhere/m"}},
        {"data": {"path": "d/"}},
        {"data": {"path": "d", "tokenizer": "t"}},
        {"deepspeed": "/elsewhere/z.json"},
    ],
)
def test_a_path_may_change_where_the_content_did_not(changes, tmp_path):
    start(tmp_path)
    start(tmp_path, **changes)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for key, value in changes.items():
        expected = value if isinstance(value, str) else list(value.values())[-1].rstrip("/")
        found = written[key] if isinstance(value, str) else written[key][list(value)[-1]]
        assert found == expected


def test_a_name_that_stands_for_a_path_may_not_change(tmp_path):
    """`bytes` and a file of ids are other rows of P."""
    start(tmp_path, stage={"source_tokens": "bytes"})
    with pytest.raises(ConfigError, match="source_tokens: bytes -> all"):
        start(tmp_path, stage={"source_tokens": "all"})
    with pytest.raises(ConfigError, match="source_tokens: bytes -> a path"):
        start(tmp_path, stage={"source_tokens": "ids.txt"})


def test_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="is not a run directory"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("{}")
    (tmp_path / "inputs.json").write_text("{}")
    start(tmp_path)
    assert json.loads((tmp_path / "inputs.json").read_text())["inputs"] == INPUTS


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
