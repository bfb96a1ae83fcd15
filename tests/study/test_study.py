"""Real studies: killed, stopped, gone on with, and bit for bit what `s2t2 train` makes."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from s2t2_dist import artifacts, cli
from s2t2_dist.run import directory
from s2t2_dist.run.stopping import SIGNALS
from tests.jobs import launching

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def handlers():
    """A study in this process handles signals; afterwards pytest does again."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


STAGE = {"train_batch_size": 4, "per_device_train_batch_size": 4, "eval_steps": 6, "save_steps": 2}
RUNS = ("s2t2_seed-17", "truncated_seed-17", "s2t2_seed-18", "truncated_seed-18")


def write_study(folder: Path, model: Path, data: Path, variants: dict | None = None) -> Path:
    """S2T2 and the truncated vocabulary, each with two seeds."""
    float32 = {"model_name_or_path": str(model), "dtype": "float32"}
    stages = [
        {"kind": "translate", "max_steps": 6, "learning_rate": 0.01, **STAGE},
        {"kind": "finetune", "max_steps": 6, "learning_rate": 0.002, **STAGE},
    ]
    base = launching.write_recipe(folder / "base", model, data, model=float32, stages=stages)
    only = [{**stages[1], "init": "truncate"}]
    other = launching.write_recipe(folder / "other", model, data, model=float32, stages=only)
    values = {
        "output_dir": str(folder / "study"),
        "base": str(base),
        "seeds": [17, 18],
        "variants": variants or {"s2t2": {"label": "S2T2"}, "truncated": {"base": str(other)}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "study.yaml"


@pytest.fixture
def start():
    """Starts `s2t2 study` as a user does; nothing of it outlives the test."""
    started = []

    def go(study: Path) -> subprocess.Popen:
        with (study.parent / "output.txt").open("ab") as file:
            process = subprocess.Popen(
                [launching.BIN / "s2t2", "study", study],
                env=launching.environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield go
    for process in started:
        launching.kill(process)


def output(study: Path) -> str:
    return (study.parent / "output.txt").read_text()


def wait_for(run: str, study: Path, process: subprocess.Popen, stage: str, step: int) -> None:
    run_dir = study.parent / "study" / "runs" / run
    launching.wait_for_line(run_dir, stage, step, process, timeout=600)


def worker_of(process: subprocess.Popen) -> psutil.Process:
    """The process that runs, beside multiprocessing's own."""
    children = psutil.Process(process.pid).children()
    (worker,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return worker


def states(study: Path) -> dict[str, str]:
    stored = json.loads((study.parent / "study" / "study.json").read_text())
    return {run["run"]: run["state"] for run in stored["runs"]}


def contents(run_dir: Path) -> dict[str, tuple[int, bytes]]:
    """What a run wrote, with the time of each file's last change; not its lock."""
    files = (path for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.soak
@pytest.mark.timeout(1200)  # many starts; on a busy machine each takes a minute
def test_a_study_goes_on_after_every_kind_of_end(start, source_model, protein_data, tmp_path):
    study = write_study(tmp_path, source_model, protein_data)
    runs = tmp_path / "study" / "runs"

    process = start(study)
    wait_for(RUNS[0], study, process, "translate", 3)
    worker_of(process).kill()  # the others go on, in another process
    wait_for(RUNS[1], study, process, "finetune", 1)
    assert f"{RUNS[0]} failed: its process was killed by signal 9; see " in output(study)
    worker = worker_of(process)
    process.kill()  # its worker saves and ends
    process.wait()
    worker.wait(300)
    assert launching.status(runs / RUNS[1])["state"] in ("preempted", "done")
    assert not (tmp_path / "study" / "study.json").exists()

    process = start(study)
    wait_for(RUNS[2], study, process, "finetune", 1)
    kept = contents(runs / RUNS[0])
    process.terminate()
    assert process.wait(300) == 3, output(study)
    assert "stopped, with checkpoints written; the same command goes on" in output(study)
    assert launching.status(runs / RUNS[2])["state"] == "preempted"
    assert not (runs / RUNS[3]).exists()

    assert cli.run(["study", str(study), "--jobs", "2"]) == 0
    assert states(study) == dict.fromkeys(RUNS, "done")
    assert contents(runs / RUNS[0]) == kept, "a finished run was touched"
    assert "resuming from translate-00000" in (tmp_path / "study/logs/study-1.txt").read_text()
    check_against_train(study)
    before = contents(runs)
    assert cli.run(["study", str(study)]) == 0
    assert contents(runs) == before, "a finished run was touched"


def check_against_train(study: Path) -> None:
    """Runs that were killed, stopped, and neither, by `s2t2 train` alone: the same metrics."""
    for run in (RUNS[0], RUNS[2], RUNS[3]):
        made = study.parent / "study" / "runs" / run
        alone = study.parent / "alone" / run
        alone.mkdir(parents=True)
        shutil.copyfile(made / "config.yaml", alone / "recipe.yaml")
        where = f"output_dir={alone / 'run'}"
        assert launching.train(alone / "recipe.yaml", 0, where) == 0, run
        found = launching.losses(made)
        assert found == launching.losses(alone / "run"), run
        assert len(found) == (14 if run.startswith("s2t2") else 7)
        weights = [folder / "model" / "model.safetensors" for folder in (made, alone / "run")]
        assert weights[0].read_bytes() == weights[1].read_bytes(), run


def test_a_run_that_fails_is_one_line_and_leaves_nothing_for_the_next(
    start, source_model, protein_data, tmp_path
):
    """Weights that overflow, then the same recipe with a sane rate: bit for bit as if alone."""
    rate = "stages.finetune.learning_rate"
    variants = {"wild": {"overrides": {rate: 1e30}}, "tame": {"overrides": {rate: 0.002}}}
    study = write_study(tmp_path, source_model, protein_data, variants)
    values = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**values, "seeds": [17]}, sort_keys=False))
    assert start(study).wait(300) == 2
    assert states(study) == {"wild_seed-17": "failed", "tame_seed-17": "done"}
    told = [x for x in output(study).splitlines() if x.startswith("wild_seed-17 failed: ")]
    assert len(told) == 2 and told[0] == f"{told[1]} (the others go on)"  # at once, and at the end
    assert "finetune" in told[1]
    assert "| wild |  | failed |" in (tmp_path / "study" / "table.md").read_text()
    made = tmp_path / "study" / "runs" / "tame_seed-17"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(made / "config.yaml", alone / "recipe.yaml")
    assert launching.train(alone / "recipe.yaml", 0, f"output_dir={alone / 'run'}") == 0
    assert launching.losses(made) == launching.losses(alone / "run")


@pytest.mark.soak
def test_a_run_that_another_job_has_is_waited_for(start, source_model, protein_data, tmp_path):
    study = write_study(tmp_path, source_model, protein_data, {"s2t2": {}})
    values = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**values, "seeds": [17]}, sort_keys=False))
    run_dir = tmp_path / "study" / "runs" / "s2t2_seed-17"
    run_dir.mkdir(parents=True)
    with directory.locked(run_dir):
        process = start(study)
        deadline = time.monotonic() + 300
        while "busy" not in output(study) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert f"is in use by process {os.getpid()} on " in output(study)
    assert process.wait(300) == 0, output(study)


def test_no_launcher(monkeypatch, source_model, protein_data, tmp_path, capsys):
    study = write_study(tmp_path, source_model, protein_data)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert cli.run(["study", str(study)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a launcher started this one" in line
    assert not (tmp_path / "study").exists()


def test_other_text_and_missing_data_are_refused_before_the_first_run(
    source_model, protein_data, tmp_path, capsys
):
    variants = {"a": {}, "b": {"overrides": {"data.path": str(tmp_path / "none")}}}
    study = write_study(tmp_path, source_model, protein_data, variants)
    assert cli.run(["study", str(study), "--dry-run"]) == 2
    assert f"{tmp_path / 'none'} is missing; give a folder" in capsys.readouterr().err
    shutil.copytree(protein_data, tmp_path / "none")
    manifest = artifacts.read_manifest(protein_data)
    manifest["splits"]["validation"]["byte_counts"]["A"] += 1
    artifacts.write_json(tmp_path / "none" / "manifest.json", manifest)
    sha256 = artifacts.sha256_file(tmp_path / "none" / "manifest.json")
    artifacts.write_text(tmp_path / "none" / "COMPLETE", sha256 + "\n")
    assert cli.run(["study", str(study), "--dry-run"]) == 2
    assert "hold different text in train or validation" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_dry_run_lists_what_is_missing(source_model, protein_data, tmp_path, capsys):
    study = write_study(tmp_path, source_model, protein_data)
    assert cli.run(["study", str(study), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{tmp_path / 'study'}: 4 runs: 4 missing",
        "missing    s2t2_seed-17 (6 + 6 steps)",
        "missing    truncated_seed-17 (6 steps)",
        "missing    s2t2_seed-18 (6 + 6 steps)",
        "missing    truncated_seed-18 (6 steps)",
        "1 rates for each of 2 variants",
        "36 optimizer steps of 36 are to do",
        "every recipe was read; nothing was written",
    ]
    assert not (tmp_path / "study").exists()
