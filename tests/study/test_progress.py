"""What a study prints off a terminal."""

import pytest

from s2t2_dist.study import progress
from s2t2_dist.study.config import load_study
from s2t2_dist.study.progress import StudyProgress
from s2t2_dist.study.work import Answer


@pytest.fixture
def study(write):
    return load_study(write())


def line(stage: int, step: int) -> str:
    return f'{{"stage": "s", "stage_index": {stage}, "step": {step}, "time": 0.0}}\n'


def test_lines_with_the_time_left(study, monkeypatch, capsys):
    """Eight runs of 10 and 2 steps; two are done, one has 3 steps from before."""
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    todo = study.runs[2:]
    active = todo[2]
    active.recipe.output_dir.mkdir(parents=True)
    metrics = active.recipe.output_dir / "metrics.jsonl"
    metrics.write_text(line(0, 0) + line(0, 3))
    with StudyProgress(study.runs, todo) as shown:
        assert (shown.total, shown.past, shown.first) == (48, 20, 23)
        clock[0] += 59
        shown.shown([active])
        clock[0] += 1
        shown.shown([active])
        metrics.write_text(metrics.read_text() + line(0, 8) + line(1, 0) + line(1, 1))
        shown.told(todo[0], Answer("done", "4.2 bits per byte"))
        shown.told(todo[1], Answer("busy", "x is in use by process 1 on h"))
        clock[0] += 60
        shown.shown([active])
        shown.told(active, Answer("failed", "no"))
        clock[0] += 60
        shown.shown([])
    assert capsys.readouterr().out.splitlines() == [
        f"2 of 8 runs, 23 of 48 steps; now {active.name}",
        f"{todo[0].name} done: 4.2 bits per byte",
        f"{todo[1].name} busy: x is in use by process 1 on h",
        # 2 + 6 steps in two minutes; 17 are left
        f"3 of 8 runs, 31 of 48 steps, 0:04:15 left; now {active.name}",
        f"{active.name} failed: no (the others go on)",
        "4 of 8 runs, 32 of 48 steps, 0:05:20 left",
    ]
