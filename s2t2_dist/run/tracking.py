"""Metrics: an append-only `metrics.jsonl`, and MLflow fed from it. The only importer of `mlflow`.

The file is the source of truth and the spool: rank 0 appends one line per step. A daemon thread
sends the lines to MLflow and records the last one that arrived. A slow, hung or dead server
therefore never delays a step, and a resumed run continues the same MLflow run.

Every point arrives exactly once, although MLflow only appends and a request without a response may
or may not have been executed:

- the lines of a request are written to `mlflow.json` before it is sent;
- if a response is missing, even after a SIGKILL, the client asks which points arrived and sends
  the rest unchanged;
- if the first request is executed after that, its points are exact duplicates, timestamps
  included, and MLflow's database ignores them.
"""

import json
import logging
import math
import os
import threading
import time
import uuid
from pathlib import Path

from s2t2_dist.artifacts import read_json, write_json
from s2t2_dist.config import TrackingConfig
from s2t2_dist.errors import ArtifactError

METRICS = "metrics.jsonl"
LINK = "mlflow.json"
SAMPLES = "samples.jsonl"  # of `training.samples`; an artifact of the MLflow run at its end
SHIP_SECONDS = 2.0
RETRY_SECONDS = 0.5
CLOSE_SECONDS = 60.0
BATCH_ITEMS = 1000  # MLflow's limit for one log_batch call
PARAM_CHARACTERS = 6000  # MLflow's limit for one parameter value
RUN_KEY = "s2t2.run_key"  # tag that finds an MLflow run whose id was never recorded
# MLflow's own retries would block the thread for minutes; the thread retries itself.
HTTP = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
_KEYS = ("stage", "stage_index", "step", "time")

_log = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl` of a run directory: one JSON object per line, one line per stage and step."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / METRICS
        self._file = self.path.open("ab")

    def append(self, stage: str, stage_index: int, step: int, values: dict[str, float]) -> None:
        """Write one line and flush it to the operating system. Non-finite values are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        line = {"stage": stage, "stage_index": stage_index, "step": step, **finite}
        line["time"] = round(time.time(), 3)
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush to the device; returns the length in bytes, which a checkpoint records."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, length: int) -> None:
        """Remove the lines after a checkpoint: the resumed run writes them again.

        Args:
            length: bytes of the file at the checkpoint.

        Raises:
            ArtifactError: the file is shorter than that.
        """
        require_length(self.path, length)
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def require_length(path: Path, length: int) -> None:
    """A `metrics.jsonl` still holds the lines that it held at a checkpoint.

    Raises:
        ArtifactError: it has fewer bytes than `length`.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < length:
        raise ArtifactError(
            f"{path} has {found} bytes, but had {length} when the checkpoint was written: "
            "it was truncated or replaced; restore it, or start again in a new output_dir"
        )


def read_metrics(run_dir: Path) -> list[dict]:
    """Every complete line of a run's `metrics.jsonl`; empty if there is no file."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


class MLflowShipper:
    """Sends `metrics.jsonl` to one MLflow run from a daemon thread.

    `mlflow.json` in the run directory holds:

    - the tracking URI and the run id;
    - `shipped`: the last (stage index, step) that the server acknowledged;
    - `sending`: lines whose response is missing;
    - `status`: the status last set in MLflow.

    A failed call is retried. Lines that a job could not send are sent by the next job in the same
    run directory, or by `s2t2 track`.

    Args:
        params: flat parameters, logged once when the MLflow run is created.
    """

    def __init__(self, run_dir: Path, tracking: TrackingConfig, params: dict[str, str]):
        self.run_dir = run_dir
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri or default_uri()
        self.experiment = tracking.experiment
        self.params = params
        self._stop = threading.Event()
        self._status = "FINISHED"
        self._deadline = math.inf
        self._offset = 0
        self._ended = False
        os.environ.update({key: os.environ.get(key, value) for key, value in HTTP.items()})
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, status: str, seconds: float = CLOSE_SECONDS) -> bool:
        """Send the remaining lines and end the MLflow run; returns whether all of it arrived.

        Args:
            status: FINISHED, KILLED or FAILED.
            seconds: how long to try before giving up.
        """
        self._status = status
        self._deadline = time.monotonic() + seconds
        self._stop.set()
        self._thread.join(seconds)
        if not self._ended:
            _log.warning(
                "MLflow at %s did not accept everything in %.0f s; `s2t2 track %s` sends the rest",
                self.uri,
                seconds,
                self.run_dir,
            )
        return self._ended

    @property
    def alive(self) -> bool:
        """Whether the thread may still send something."""
        return self._thread.is_alive()

    def _run(self) -> None:
        """Send until the run has ended; consecutive failures are logged once."""
        connection, failing = None, False
        while time.monotonic() < self._deadline:
            ending = self._stop.wait(SHIP_SECONDS)
            try:
                connection = connection or self._connect()
                self._ship(*connection)
                if ending:
                    self._terminate(*connection)
                    self._ended = True
                    return
                failing = False
            except Exception as error:  # tracking must never end a training run
                if not failing:
                    reason = " ".join(str(error).split())[:200]
                    _log.warning("MLflow at %s: %s; metrics are in %s", self.uri, reason, METRICS)
                failing = True
                if ending:
                    time.sleep(RETRY_SECONDS)

    def _connect(self) -> tuple:
        """The client and the contents of `mlflow.json`, with the MLflow run set to RUNNING."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self.uri)
        path = self.run_dir / LINK
        link = read_json(path) if path.exists() else None
        if link is None or link["uri"] != self.uri:
            link = {"uri": self.uri, "run_key": uuid.uuid4().hex, "shipped": [-1, -1]}
            write_json(path, link)
        if "run_id" not in link:
            link["run_id"] = self._make_run(client, link["run_key"])
        client.update_run(link["run_id"], status="RUNNING")
        write_json(path, {**link, "status": "RUNNING"})
        if not link.get("params_logged"):
            params = [Param(key, value[:PARAM_CHARACTERS]) for key, value in self.params.items()]
            for start in range(0, len(params), 100):  # MLflow's limit for parameters in one call
                client.log_batch(link["run_id"], params=params[start : start + 100])
        link |= {"params_logged": True, "status": "RUNNING"}
        write_json(path, link)
        return client, link

    def _make_run(self, client, run_key: str) -> str:
        """The id of the MLflow run; creates it unless an unanswered request already did."""
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            experiment_id = client.create_experiment(self.experiment)
        else:
            experiment_id = experiment.experiment_id
        made = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{run_key}'")
        if not made:
            name, tags = self.run_dir.name, {RUN_KEY: run_key}
            made = [client.create_run(experiment_id, run_name=name, tags=tags)]
        return made[0].info.run_id

    def _terminate(self, client, link: dict) -> None:
        if (self.run_dir / SAMPLES).is_file():
            client.log_artifact(link["run_id"], str(self.run_dir / SAMPLES))
        client.set_terminated(link["run_id"], status=self._status)
        write_json(self.run_dir / LINK, {**link, "status": self._status})

    def _ship(self, client, link: dict) -> None:
        """Send the lines after `_offset`; advance it when all of them are acknowledged."""
        self._settle(client, link)
        lines, offset = self._new_lines()
        batch: list[dict] = []
        items = 0
        for line in lines:
            if _position(line) <= link["shipped"]:
                continue
            if items + len(line) > BATCH_ITEMS:
                self._send(client, link, batch)
                batch, items = [], 0
            batch.append(line)
            items += len(line)
        self._send(client, link, batch)
        self._offset = offset

    def _new_lines(self) -> tuple[list[dict], int]:
        """The complete lines after `_offset`, and the offset of their end."""
        with (self.run_dir / METRICS).open("rb") as f:
            f.seek(self._offset)
            complete, newline, _ = f.read().rpartition(b"\n")
        lines = [json.loads(line) for line in complete.splitlines()]
        return lines, self._offset + len(complete) + len(newline)

    def _send(self, client, link: dict, lines: list[dict]) -> None:
        """Send lines in one request, recorded in `sending` until the response arrives."""
        if not lines:
            return
        link["sending"] = lines
        write_json(self.run_dir / LINK, link)
        self._log_points(client, link, had={})

    def _settle(self, client, link: dict) -> None:
        """Send the points that did not arrive with a request whose response is missing."""
        if "sending" not in link:
            return
        keys = {point.key for line in link["sending"] for point in _points(line)}
        had = {
            key: {point.step for point in client.get_metric_history(link["run_id"], key)}
            for key in keys
        }
        self._log_points(client, link, had)

    def _log_points(self, client, link: dict, had: dict[str, set[int]]) -> None:
        """Send the points of `sending`, except the steps of each key that the server has."""
        points = [point for line in link["sending"] for point in _points(line)]
        missing = [point for point in points if point.step not in had.get(point.key, ())]
        if missing:
            client.log_batch(link["run_id"], metrics=missing)
        link["shipped"] = _position(link.pop("sending")[-1])
        write_json(self.run_dir / LINK, link)


def _position(line: dict) -> list[int]:
    return [line["stage_index"], line["step"]]


def _points(line: dict) -> list:
    """A line of `metrics.jsonl` as MLflow metrics."""
    from mlflow.entities import Metric

    milliseconds = int(line["time"] * 1000)
    return [
        Metric(f"{line['stage']}/{key}", float(value), milliseconds, line["step"])
        for key, value in line.items()
        if key not in _KEYS
    ]


def is_shipped(run_dir: Path) -> bool:
    """Whether MLflow acknowledged the end of a finished run, and so every line before it."""
    path = run_dir / LINK
    return path.exists() and read_json(path).get("status") == "FINISHED"


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
