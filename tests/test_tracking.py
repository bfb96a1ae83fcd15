"""Metrics on disk and in a real MLflow store, across a resume."""

import json
import sqlite3
import time

import pytest
from mlflow import MlflowClient

from s2t2_dist.config import TrackingConfig
from s2t2_dist.errors import ArtifactError
from s2t2_dist.tracking import MetricsFile, MLflowShipper, flatten, is_shipped, read_metrics


@pytest.fixture(autouse=True)
def no_server_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_metrics_survive_a_cut_line(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.append("translate", 0, 1, {"loss": 0.1 + 0.2})
    metrics.append("translate", 0, 2, {"loss": 2.0})
    length = metrics.sync()
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"stage": "transl')  # killed in mid-write
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == 0.1 + 0.2  # to the last bit
    resumed = MetricsFile(tmp_path)
    resumed.truncate(length)
    resumed.append("translate", 0, 3, {"loss": 3.0})
    resumed.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_metrics_shorter_than_at_the_checkpoint_are_refused(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.append("translate", 0, 1, {"loss": 1.0})
    length = metrics.sync()
    with pytest.raises(ArtifactError, match=f"has {length} bytes, but had {length + 9} when"):
        metrics.truncate(length + 9)
    metrics.close()
    assert len(read_metrics(tmp_path)) == 1


def _history(uri: str, run_dir, key: str) -> list[tuple[int, float]]:
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    points = MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = TrackingConfig(uri=uri, experiment="proteins")
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    metrics = MetricsFile(run_dir)
    shipper = MLflowShipper(run_dir, tracking, {"seed": "17", "long": "x" * 7000})
    for step in range(1, 5):
        metrics.append("translate", 0, step, {"loss": 1.0 / step, "entropy": float(step)})
    shipper.close("KILLED")
    first = json.loads((run_dir / "mlflow.json").read_text())
    assert first["shipped"] == [0, 4]
    assert MlflowClient(tracking_uri=uri).get_run(first["run_id"]).info.status == "KILLED"

    # The checkpoint was at step 2: steps 3 and 4 are written again, and not shipped again.
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics.truncate(sum(len(line) for line in lines[:2]))
    shipper = MLflowShipper(run_dir, tracking, {"seed": "17"})
    for step in range(3, 7):
        metrics.append("translate", 0, step, {"loss": 1.0 / step, "entropy": float(step)})
    metrics.append("finetune", 1, 0, {"eval_loss": 0.5})
    shipper.close("FINISHED")
    metrics.close()

    assert json.loads((run_dir / "mlflow.json").read_text())["run_id"] == first["run_id"]
    expected = [(step, 1.0 / step) for step in range(1, 7)]
    assert _history(uri, run_dir, "translate/loss") == expected
    assert _history(uri, run_dir, "finetune/eval_loss") == [(0, 0.5)]
    run = MlflowClient(tracking_uri=uri).get_run(first["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "17" and len(run.data.params["long"]) == 6000


def _wait_until(reached, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@pytest.mark.slow
def test_an_outage_delays_metrics_and_loses_none(tmp_path, caplog):
    """The store is locked by someone else, once in the middle of a run and once at its end."""
    database = tmp_path / "mlflow.db"
    uri = f"sqlite:///{database}"
    tracking = TrackingConfig(uri=uri)
    metrics = MetricsFile(tmp_path)

    def shipped(step: int) -> bool:
        link = tmp_path / "mlflow.json"
        return link.exists() and json.loads(link.read_text())["shipped"] == [0, step]

    def append(step: int) -> None:
        metrics.append("translate", 0, step, {"loss": 1.0 / step})

    append(1)
    shipper = MLflowShipper(tmp_path, tracking, {})
    _wait_until(lambda: shipped(1), "first line")
    with sqlite3.connect(database, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        append(2)
        _wait_until(lambda: "locked" in caplog.text, "a failed call")
        append(3)
        other.execute("ROLLBACK")
        _wait_until(lambda: shipped(3), "lines after the outage")
        other.execute("BEGIN EXCLUSIVE")
        append(4)
        shipper.close("FINISHED", seconds=1)
        _wait_until(lambda: not shipper.alive, "the shipper gives up")
        other.execute("ROLLBACK")
    assert not is_shipped(tmp_path)
    MLflowShipper(tmp_path, tracking, {}).close("FINISHED")
    metrics.close()
    assert is_shipped(tmp_path)
    assert _history(uri, tmp_path, "translate/loss") == [(step, 1.0 / step) for step in range(1, 5)]
    ours = [record.message for record in caplog.records if record.name == "s2t2_dist.tracking"]
    assert len(ours) == 3, "one line for each outage, one as the run ended"


@pytest.mark.slow
def test_an_unreachable_server_does_not_stop_a_run(tmp_path, caplog):
    """Nothing listens on port 9; closing waits a bounded time and training was never held up."""
    tracking = TrackingConfig(uri="http://127.0.0.1:9")
    shipper = MLflowShipper(tmp_path, tracking, {})
    metrics = MetricsFile(tmp_path)
    began = time.monotonic()
    metrics.append("translate", 0, 1, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    shipper.close("FINISHED", seconds=3)
    assert time.monotonic() - began < 10
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0]
    assert "metrics are in" in caplog.text


def test_flat_parameters_name_the_stage():
    values = {"seed": 1, "stages": [{"name": "translate", "max_steps": 5}], "data": {"path": "d"}}
    flat = flatten(values)
    expected = {"seed": "1", "stages.translate.max_steps": "5", "data.path": "d"}
    assert flat == expected | {"stages.translate.name": "translate"}
