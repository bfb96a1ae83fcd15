"""Runs of the demo model by `launch/run_node.sh`, on a GPU or, shorter, on a CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.jobs import launching

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "launch" / "assets" / "tiny"
SETTINGS = {"cuda": "zero3.json", "cpu": "cpu.json"}
STEPS = {"cuda": 30, "cpu": 6}  # of each stage
ROWS = {"cuda": 48, "cpu": 4}  # of a batch, in two micro-batches


def write_recipe(folder: Path, data: Path, device: str, dtype: str = "bfloat16", **changes) -> Path:
    """A recipe of both stages in `folder`; `changes` replace keys of both."""
    steps, rows = STEPS[device], ROWS[device]
    stage = {"max_steps": steps, "train_batch_size": rows, "per_device_train_batch_size": rows // 2}
    stage |= {"save_steps": steps // 3, "eval_steps": steps // 2, **changes}
    values = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(MODEL), "dtype": dtype},
        "data": {"path": str(data)},
        "deepspeed": str(ROOT / "ds_configs" / SETTINGS[device]),
        "stages": [
            {"kind": "translate", "learning_rate": 3e-2, **stage},
            {"kind": "finetune", "learning_rate": 3e-3, **stage},
        ],
        "tracking": {"enabled": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def keep_stage(recipe: Path, kind: str) -> None:
    """Leave one of the stages; finetuning then starts from the first rows of the embedding."""
    values = yaml.safe_load(recipe.read_text())
    values["stages"] = [stage for stage in values["stages"] if stage["kind"] == kind]
    if kind == "finetune":
        values["stages"][0]["init"] = "truncate"
    recipe.write_text(yaml.safe_dump(values))


def environment(folder: Path, device: str) -> dict[str, str]:
    """This interpreter and this checkout first; `python` and `s2t2` under their own names."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, call in (("python", ""), ("s2t2", " -m s2t2_dist.cli")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{call} "$@"\n')
        (programs / name).chmod(0o755)
    changes = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    if device == "cpu":
        changes |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    dropped = ("MLFLOW", "TRITON_INTERPRET", "DS_ACCELERATOR")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | changes


def start(recipe: Path, device: str) -> subprocess.Popen:
    """`launch/run_node.sh --gpus 1`, in a session of its own; output beside the recipe."""
    with (recipe.parent / "output.txt").open("ab") as file:
        return subprocess.Popen(
            ["bash", ROOT / "launch" / "run_node.sh", "--gpus", "1", recipe],
            cwd=recipe.parent,
            env=environment(recipe.parent, device),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def train(recipe: Path, device: str, timeout: float = 400) -> int:
    """To the end, from where an earlier start ended; the exit code."""
    process = start(recipe, device)
    try:
        return process.wait(timeout)
    finally:
        launching.kill(process)


def kill_after(recipe: Path, device: str, stage: str, step: int) -> None:
    """Start, and send SIGKILL to the rank as soon as it has written this step."""
    process = start(recipe, device)
    try:
        launching.wait_for_line(recipe.parent / "run", stage, step, process)
        status = launching.status(recipe.parent / "run")
        os.kill(status["pid"], signal.SIGKILL)
        assert process.wait(120) != 0, output(recipe)
    finally:
        launching.kill(process)


def s2t2(folder: Path, device: str, *words: object) -> str:
    """Run a command to its end; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "s2t2_dist.cli", *map(str, words)],
        cwd=folder,
        env=environment(folder, device),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def output(recipe: Path) -> str:
    """The end of everything that the runs of a recipe printed."""
    return launching.output(recipe)[-6000:]


def losses(run_dir: Path) -> list[tuple]:
    """What must not depend on when a run was stopped."""
    return launching.losses(run_dir)


def training_losses(run_dir: Path) -> list[tuple]:
    """(stage, step, loss) of every step."""
    lines = launching.metrics(run_dir)
    return [(line["stage"], line["step"], line["loss"]) for line in lines if "loss" in line]


def first_difference(one: Path, other: Path) -> str:
    """The first line of metrics in which two runs differ, for a test's message."""
    for a, b in zip(losses(one), losses(other), strict=False):
        if a != b:
            return json.dumps([a, b])
    return f"{len(losses(one))} and {len(losses(other))} lines"
