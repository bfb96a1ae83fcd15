"""Six kills by the script of the hundred: `tests/bench/kills.py` says what is checked."""

import json
import os
import shutil
from pathlib import Path

import pytest

from s2t2_dist import artifacts
from s2t2_dist.run.checkpoint import list_checkpoints
from tests.bench.kills import KINDS, STEPS, Killer, write_report
from tests.jobs import launching


@pytest.mark.slow
def test_six_kills_and_a_flipped_byte(tmp_path, monkeypatch):
    for name in ("HOME", "TMPDIR"):  # the script sets both
        monkeypatch.setenv(name, os.environ.get(name, "/tmp"))
    seed = int.from_bytes(os.urandom(4))
    killer = Killer(tmp_path, seed)
    try:
        killer.run(6)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    assert sum(kill["inside_write"] for kill in killer.kills) >= 1
    assert {kill["stage"] for kill in killer.kills} >= {"finetune"}
    write_report(tmp_path, tmp_path / "report.md", "command")
    assert "# 6 kills" in (tmp_path / "report.md").read_text()
    _flip_a_byte(killer)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path, monkeypatch):
    for name in ("HOME", "TMPDIR"):  # the script sets both
        monkeypatch.setenv(name, os.environ.get(name, "/tmp"))
    killer = Killer(tmp_path, seed=17)
    killer.run(100)
    assert {kill["kind"] for kill in killer.kills} == set(KINDS)
    assert {kill["stage"] for kill in killer.kills} >= {"translate", "finetune"}
    assert sum(kill["inside_write"] for kill in killer.kills) >= 20


def _flip_a_byte(killer: Killer) -> None:
    """One byte of DeepSpeed's file in the last checkpoint: found, and the one before is used."""
    folder = sorted(killer.work.glob("run-*/checked"))[-1].parent
    shutil.rmtree(folder / "run/model")
    newest, before = list_checkpoints(folder / "run")[:2]
    state = next(newest.rglob("*optim_states.pt"))
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    artifacts.write_json(folder / "run/status.json", {"state": "running"})
    recipe = folder / "recipe.yaml"
    assert launching.train(recipe, 2) == 0, launching.output(recipe)
    (line,) = [x for x in launching.output(recipe).splitlines() if "altered" in x]
    assert f"resuming from {before.name} because {state} was altered" in line
    assert launching.losses(folder / "run") == killer.reference
    assert json.loads((newest / "manifest.json").read_text())["step"] == STEPS
    assert Path(newest.with_name(f".damaged-{newest.name}")).exists()
