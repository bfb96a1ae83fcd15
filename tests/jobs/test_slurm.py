"""launch/slurm.sbatch under a real Slurm: requeued by the operator and before its time limit."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import launching as runs
from tests.jobs.slurm import Slurm, missing, slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

# What the file asks for and this machine does not have.
HERE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture
def box(tmp_path) -> Iterator[Slurm]:
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm") as made:
        yield made


def test_a_requeued_job_goes_on(box, tmp_path, monkeypatch):
    """`scontrol requeue` in mid-run; then USR1, as before the time limit. One job, three starts."""
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "workspace").mkdir()
    workspace = runs.quickstart_workspace(tmp_path / "workspace")
    run_dir = workspace / "runs" / "job"
    sbatch = (
        "sbatch",
        "--parsable",
        "--chdir",
        workspace,
        "--output",
        workspace / "job.log",
        *HERE,
    )
    number = box.run(*sbatch, workspace / "launch/slurm.sbatch", *runs.short_quickstart("job"))
    number = number.strip()
    try:
        _wait_for_step(box, number, run_dir, "translate", 7)
        box.run("scontrol", "requeue", number)
        _wait_for_state(box, number, "PENDING")
        assert runs.status(run_dir)["state"] == "preempted", (workspace / "job.log").read_text()
        step = runs.metrics(run_dir)[-1]["step"]
        assert (run_dir / f"checkpoints/translate-{step:06d}/COMPLETE").exists()

        _wait_for_step(box, number, run_dir, "finetune", 7)
        box.run("scancel", "--signal=USR1", number)  # what --signal=USR1@600 sends
        _wait_for_state(box, number, "COMPLETED")
    finally:
        printed = (workspace / "job.log").read_text()
    assert box.job(number)["Restarts"] == "2", printed
    assert runs.status(run_dir)["state"] == "done"
    steps = [(line["stage"], line["step"]) for line in runs.metrics(run_dir)]
    assert steps == [(stage, i) for stage in ("translate", "finetune") for i in range(17)]
    assert [line for line in printed.splitlines() if line.startswith(f"job {number}, start")] == [
        f"job {number}, start {i} on {box.job(number)['NodeList']}: runs/job" for i in (1, 2, 3)
    ]


def _wait_for_step(box: Slurm, number: str, run_dir: Path, stage: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any((x["stage"], x["step"]) == (stage, step) for x in runs.metrics(run_dir)):
        assert time.monotonic() < deadline, f"{stage} {step} not reached: {box.job(number)}"
        assert box.job(number)["JobState"] not in ("FAILED", "COMPLETED"), box.job(number)
        time.sleep(0.2)


def _wait_for_state(box: Slurm, number: str, state: str) -> None:
    deadline = time.monotonic() + 120
    while (found := box.job(number)["JobState"]) != state:
        assert time.monotonic() < deadline and found != "FAILED", box.job(number)
        time.sleep(0.2)
