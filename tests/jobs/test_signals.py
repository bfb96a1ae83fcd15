"""Launchers that are ended, terminals that hang up, readers that have enough: no step is lost."""

import contextlib
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs import launching as runs

pytestmark = pytest.mark.slow
SHORT = {**runs.STAGE, "save_steps": 100, "eval_steps": 100}


@pytest.fixture
def recipe(source_model, protein_data, tmp_path) -> Path:
    """A long stage, of which nothing but a stop saves a checkpoint."""
    stages = [{"kind": "translate", "max_steps": 100_000, "learning_rate": 1e-3, **SHORT}]
    stages[0]["save_steps"] = 100_000
    return runs.write_recipe(tmp_path, source_model, protein_data, stages=stages)


@contextlib.contextmanager
def running(recipe: Path, ranks: int, **streams) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        runs.command(recipe, ranks), cwd=recipe.parent, env=runs.environment(), **streams
    )
    try:
        runs.wait_for_line(recipe.parent / "run", "translate", 3, process)
        yield process
    finally:
        runs.kill(process)


def stopped_with_everything(recipe: Path) -> None:
    """The last step that was logged is the step of the checkpoint."""
    run_dir = recipe.parent / "run"
    deadline = time.monotonic() + 60
    while runs.status(run_dir)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert runs.status(run_dir)["state"] == "preempted"
    last = runs.metrics(run_dir)[-1]["step"]
    assert (run_dir / f"checkpoints/translate-{last:06d}/COMPLETE").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)]
)
def test_the_end_of_deepspeeds_runner_stops_its_ranks(number, recipe):
    log = (recipe.parent / "output.txt").open("wb")
    streams = {"stdout": log, "stderr": log, "start_new_session": True}
    with log, running(recipe, 2, **streams) as runner:
        family = psutil.Process(runner.pid).children(recursive=True)
        runner.send_signal(number)
        runner.wait(60)
        stopped_with_everything(recipe)
        _, alive = psutil.wait_procs(family, 60)
        assert not alive


def test_a_terminal_that_hangs_up_loses_no_step(recipe):
    """The kernel sends SIGHUP to the terminal's job, whose output then fails."""
    ours, theirs = pty.openpty()

    def on_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # becomes the controlling terminal

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with running(recipe, 0, preexec_fn=on_terminal, **streams) as job:
        os.close(theirs)
        os.close(ours)
        assert job.wait(60) == 3
        stopped_with_everything(recipe)


@pytest.mark.soak
def test_head_does_not_end_a_run(recipe):
    with running(recipe, 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        job.stdout.close()
        at = runs.metrics(recipe.parent / "run")[-1]["step"]
        runs.wait_for_line(recipe.parent / "run", "translate", at + 300, job)
        job.send_signal(signal.SIGTERM)
        with job.stderr:
            told = job.stderr.read().decode()
        assert job.wait(60) == 3
        assert "Traceback" not in told
        stopped_with_everything(recipe)
