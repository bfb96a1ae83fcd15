"""A dry run: what a start would find in the run directory, said or refused, and nothing written."""

import json
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from s2t2_dist.comm import Comm
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from s2t2_dist.run import checkpoint, directory
from s2t2_dist.run.checkpoint import Position
from s2t2_dist.training import start
from s2t2_dist.training.context import Context

LINE = '{"stage": "translate", "stage_index": 0, "step": 1, "loss": 2.0, "time": 3.0}\n'
BYTES = len(LINE)


def tree(folder: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Every path below a folder, with the time of its last change and its bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def rehearse(context: Context, resume: str = "auto") -> None:
    before = tree(context.run_dir.parent)
    try:
        start._rehearse(context, resume)
    finally:
        assert tree(context.run_dir.parent) == before


def stopped(context: Context, *positions: Position) -> Context:
    """A run that was stopped after some checkpoints; its metrics take BYTES."""
    with ExitStack() as held:
        start._claim(context, "auto", held)
    for position in positions:
        checkpoint.save(
            context.run_dir, position, lambda d: (d / "s").write_text("x") and None, Comm(), 9
        )
    (context.run_dir / "metrics.jsonl").write_text(LINE)
    (context.run_dir / "checkpoints" / ".tmp-translate-000009").mkdir(parents=True)  # killed
    return context


def test_a_new_run_and_what_it_needs(context, capsys):
    rehearse(context)
    assert not context.run_dir.exists()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        f"{context.run_dir} would start from step 0",
        "translate: 10 steps of 8 rows; each of 1 ranks makes 1 passes of 8 rows per step",
        "finetune: 5 steps of 8 rows; each of 1 ranks makes 1 passes of 8 rows per step",
    ]
    assert re.fullmatch(r"at least 0\.\d\d GiB of memory .* checkpoint", printed[3])
    assert printed[4:] == ["every check passed; nothing was written"]


def test_a_stopped_run_goes_on_from_its_newest_valid_checkpoint(context, capsys):
    run = stopped(context, *(Position(0, "translate", step, 1, BYTES) for step in (3, 6)))
    rehearse(run)
    assert f"{run.run_dir} would resume from translate-000006\n" in capsys.readouterr().out
    (run.run_dir / "checkpoints/translate-000006/s").write_text("y")
    rehearse(run)
    line = capsys.readouterr().out.splitlines()[0]
    assert "would resume from translate-000003, since " in line
    assert "translate-000006/s was altered" in line


def test_a_finished_run_is_said_to_be(context, capsys):
    run = stopped(context, Position(1, "finetune", 5, 1, BYTES))
    directory.write_status(run.run_dir, "done")
    rehearse(run)
    assert f"{run.run_dir} is done\n" in capsys.readouterr().out


def test_resume_must_fit(context, tmp_path):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        rehearse(context, str(tmp_path / "x"))
    run = stopped(context, *(Position(0, "translate", step, 1, BYTES) for step in (3, 6)))
    with pytest.raises(ConfigError, match="--resume is never"):
        rehearse(run, "never")
    with pytest.raises(ConfigError, match=r"holds newer checkpoints \(translate-000006\)"):
        rehearse(run, str(run.run_dir / "checkpoints/translate-000003"))
    with pytest.raises(ArtifactError, match="is not a checkpoint of"):
        rehearse(run, str(tmp_path / "x"))


def test_another_recipe_is_refused(context):
    stopped(context)
    other = replace(context, recipe=context.recipe.model_copy(update={"seed": 3}))
    with pytest.raises(ConfigError, match=r"another recipe \(seed: 17 -> 3\)"):
        rehearse(other)


def test_damage_alone_is_refused(context):
    run = stopped(context, Position(0, "translate", 3, 1, BYTES))
    (run.run_dir / "checkpoints/translate-000003/s").write_text("y")
    with pytest.raises(ArtifactError, match="no checkpoint to resume from"):
        rehearse(run)


def test_metrics_shorter_than_at_the_checkpoint_are_refused(context):
    run = stopped(context, Position(0, "translate", 3, 1, BYTES + 1))
    with pytest.raises(
        ArtifactError, match=f"has {BYTES} bytes, but had {BYTES + 1} when the checkpoint"
    ):
        rehearse(run)


@pytest.mark.parametrize(
    ("zero", "position", "refused"),
    [
        (0, Position(1, "finetune", 3, 2, BYTES), True),
        (0, Position(1, "finetune", 3, 1, BYTES), False),
        (0, Position(0, "translate", 3, 2, BYTES), False),
        (3, Position(1, "finetune", 3, 2, BYTES), False),
    ],
)
def test_without_zero_3_weights_need_the_ranks_that_wrote_them(context, zero, position, refused):
    settings = {"zero_optimization": {"stage": zero}}
    run = stopped(replace(context, deepspeed=settings), position)
    if not refused:
        rehearse(run)
        return
    with pytest.raises(ConfigError, match=r"written by 2 ranks under ZeRO 0.*start with 2"):
        rehearse(run)


def test_a_run_in_which_a_job_runs_is_refused(context):
    run = stopped(context)
    with directory.locked(run.run_dir), pytest.raises(S2T2Error, match="is in use by process"):
        rehearse(run)
    rehearse(run)
    with directory.locked(run.run_dir):  # nobody holds it any more
        pass


# What a run stands on


@pytest.fixture
def own(context, tmp_path) -> Context:
    """A stopped run whose model, data and settings are copies that a test may change."""
    model = shutil.copytree(context.recipe.model.model_name_or_path, tmp_path / "model")
    data = shutil.copytree(context.recipe.data.path, tmp_path / "data")
    return stopped(moved(context, model, data))


def moved(context: Context, model: Path | str, data: Path | str, **stages: dict) -> Context:
    recipe = context.recipe
    changes = {
        "model": recipe.model.model_copy(update={"model_name_or_path": str(model)}),
        "data": recipe.data.model_copy(update={"path": Path(data)}),
        "stages": [s.model_copy(update=stages.get(s.name, {})) for s in recipe.stages],
    }
    return replace(context, recipe=recipe.model_copy(update=changes))


def other_weights(folder: Path) -> None:
    """Of the same size, with the times of the old file."""
    path = folder / "model.safetensors"
    size, before = path.stat().st_size, path.stat()
    weights = load_file(path)
    save_file({k: -v for k, v in weights.items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == size


def other_json(name: str):
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "other": 1}))

    return change


def one_file_more(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "model, model.safetensors: "),
        (other_json("tokenizer.json"), "model, tokenizer.json: "),
        (other_json("tokenizer_config.json"), "model, tokenizer_config.json: "),
        (other_json("config.json"), "model, config.json: "),
        (one_file_more, "model, special_tokens_map.json: none -> "),
    ],
)
def test_a_base_model_that_changed_is_refused(change, named, own):
    change(Path(own.recipe.model.model_name_or_path))
    with pytest.raises(ConfigError, match=f"was started with other files .*{named}"):
        rehearse(own)


def test_other_data_are_refused(own, source_data):
    with pytest.raises(ConfigError, match=r"other files \(data, manifest.json: "):
        rehearse(moved(own, own.recipe.model.model_name_or_path, source_data))


def test_files_that_stages_read_are_inputs(context, source_data, tmp_path):
    """A file of token ids and a folder of source data; what is not read may change."""
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(map(str, range(400))))
    folder = shutil.copytree(source_data, tmp_path / "source")
    choice = {"source_tokens": str(ids), "source_marginal": str(folder)}
    where = (context.recipe.model.model_name_or_path, context.recipe.data.path)
    run = stopped(moved(context, *where, translate=choice))
    rehearse(run)
    ids.write_text("\n".join(map(str, range(399))))
    with pytest.raises(ConfigError, match=r"stages.translate.source_tokens, file: "):
        rehearse(run)
    ids.write_text("\n".join(map(str, range(400))))
    shutil.rmtree(folder)
    shutil.copytree(context.recipe.data.path, folder)
    with pytest.raises(ConfigError, match=r"stages.translate.source_marginal, manifest.json: "):
        rehearse(run)


def test_another_spelling_and_another_place_are_the_same_inputs(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, data in (("model/", "./data"), (tmp_path / "model", "data/../data")):
        rehearse(moved(own, model, data))
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "data", tmp_path / "copied")
    there = moved(own, "elsewhere", "copied")
    rehearse(there)
    (tmp_path / "own.json").write_text(json.dumps(own.deepspeed, indent=7))
    settings = {"deepspeed": Path("own.json")}
    rehearse(replace(there, recipe=there.recipe.model_copy(update=settings)))


def test_a_run_of_the_earlier_version_resumes(own, caplog):
    """Its inputs.json knew the sizes of weights alone; the next start knows their content."""
    path = own.run_dir / "inputs.json"
    inputs = json.loads(path.read_text())["inputs"]

    def sha(role: str, name: str) -> str:
        return inputs[role]["files"][name]["sha256"]

    old = {
        "data manifest sha256": sha("data", "manifest.json"),
        "deepspeed settings sha256": sha("deepspeed", "settings"),
        "model config.json sha256": sha("model", "config.json"),
        "model weight files (bytes)": {
            "model.safetensors": inputs["model"]["files"]["model.safetensors"]["bytes"]
        },
    }
    path.write_text(json.dumps({**old, "data manifest sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"data, manifest.json: 000000000000 -> "):
        rehearse(own)
    path.write_text(json.dumps(old))
    with ExitStack() as held:
        start._claim(own, "auto", held)
    assert "is of an earlier version: its weights are compared by size" in caplog.text
    assert json.loads(path.read_text())["inputs"] == inputs
