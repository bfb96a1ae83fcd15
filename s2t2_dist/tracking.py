"""Metrics: an append-only `metrics.jsonl`, and MLflow fed from it. The only importer of `mlflow`.

The file is the source of truth: rank 0 appends one line per step. A daemon thread ships lines to
MLflow and records how far it came, so a slow or dead server never delays a step, and a resumed
run goes on in the same MLflow run.
"""

import json
import logging
import os
import threading
import time
from pathlib import Path

from s2t2_dist.artifacts import read_json, write_json
from s2t2_dist.config import TrackingConfig

METRICS = "metrics.jsonl"
LINK = "mlflow.json"
SHIP_SECONDS = 2.0
CLOSE_SECONDS = 60.0
BATCH_ITEMS = 1000  # MLflow's limit for one log_batch call
PARAM_CHARACTERS = 6000  # MLflow's limit for one parameter value
_KEYS = ("stage", "stage_index", "step", "time")

_log = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl` of a run directory: one JSON object per line, one line per stage and step."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / METRICS
        self._file = self.path.open("ab")

    def append(self, stage: str, stage_index: int, step: int, values: dict[str, float]) -> None:
        """Write one line and flush it to the operating system."""
        line = {"stage": stage, "stage_index": stage_index, "step": step, **values}
        line["time"] = round(time.time(), 3)
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush to the device; returns the length in bytes, which a checkpoint records."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, length: int) -> None:
        """Forget the lines after a checkpoint: the resumed run writes them again."""
        self._file.truncate(min(length, self._file.seek(0, os.SEEK_END)))
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict]:
    """Every complete line of a run's `metrics.jsonl`; empty where there is none."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


class MLflowShipper:
    """Ships `metrics.jsonl` to one MLflow run from a daemon thread.

    `mlflow.json` in the run directory holds the tracking URI, the run id and the last
    (stage index, step) that the server acknowledged.

    Args:
        params: flat parameters, logged once when the MLflow run is made.
    """

    def __init__(self, run_dir: Path, tracking: TrackingConfig, params: dict[str, str]):
        self.run_dir = run_dir
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri or default_uri()
        self.experiment = tracking.experiment
        self.params = params
        self._stop = threading.Event()
        self._status = "FINISHED"
        self._offset = 0
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, status: str, seconds: float = CLOSE_SECONDS) -> None:
        """Ship what is left and end the MLflow run.

        Args:
            status: FINISHED, KILLED or FAILED.
            seconds: how long a server may take before it is left alone.
        """
        self._status = status
        self._stop.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            _log.warning("MLflow at %s did not answer; metrics are in %s", self.uri, self.run_dir)

    def _run(self) -> None:
        try:
            client, link = self._connect()
            while not self._stop.wait(SHIP_SECONDS):
                self._ship(client, link)
            self._ship(client, link)
            client.set_terminated(link["run_id"], status=self._status)
        except Exception as error:  # tracking must never end a training run
            _log.warning("MLflow at %s: %s; metrics are in %s", self.uri, error, METRICS)

    def _connect(self) -> tuple:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self.uri)
        path = self.run_dir / LINK
        link = read_json(path) if path.exists() else None
        if link is not None:
            client.update_run(link["run_id"], status="RUNNING")
            return client, link
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            experiment_id = client.create_experiment(self.experiment)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=self.run_dir.name)
        link = {"uri": self.uri, "run_id": run.info.run_id, "shipped": [-1, -1]}
        params = [Param(key, value[:PARAM_CHARACTERS]) for key, value in self.params.items()]
        for start in range(0, len(params), 100):  # MLflow's limit for parameters in one call
            client.log_batch(run.info.run_id, params=params[start : start + 100])
        write_json(path, link)
        return client, link

    def _ship(self, client, link: dict) -> None:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        last = link["shipped"]
        for line in self._new_lines():
            position = [line["stage_index"], line["step"]]
            if position <= link["shipped"]:
                continue
            milliseconds = int(line["time"] * 1000)
            metrics = [
                Metric(f"{line['stage']}/{key}", float(value), milliseconds, line["step"])
                for key, value in line.items()
                if key not in _KEYS
            ]
            if len(batch) + len(metrics) > BATCH_ITEMS:
                self._send(client, link, batch, last)
                batch = []
            batch += metrics
            last = position
        if batch:
            self._send(client, link, batch, last)

    def _new_lines(self) -> list[dict]:
        """The complete lines written since the last call."""
        with (self.run_dir / METRICS).open("rb") as f:
            f.seek(self._offset)
            complete, newline, _ = f.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]

    def _send(self, client, link: dict, metrics: list, last: list[int]) -> None:
        client.log_batch(link["run_id"], metrics=metrics)
        link["shipped"] = last
        write_json(self.run_dir / LINK, link)


def default_uri() -> str:
    """The local SQLite store of the working directory."""
    return f"sqlite:///{Path('mlflow.db').resolve()}"


def flatten(values: dict, prefix: str = "") -> dict[str, str]:
    """A nested recipe as MLflow parameters: dotted key to text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = {item.get("name", str(i)): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)
    return flat
