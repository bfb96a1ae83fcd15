"""MLflow, fed from `metrics.jsonl`. The only importer of `mlflow`.

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

What a response brought is kept, so that a server that fails every second request delays the rest
and stops nothing.
"""

import logging
import math
import os
import threading
import time
from pathlib import Path

from s2t2_dist.config import TrackingConfig
from s2t2_dist.errors import ArtifactError, S2T2Error
from s2t2_dist.run import link as links
from s2t2_dist.run import store
from s2t2_dist.run.metrics import METRICS, metric_values, parse_lines, position

SAMPLES = "samples.jsonl"  # of `training.samples`; an artifact of the MLflow run at its end
SHIP_SECONDS = 2.0
RETRY_SECONDS = 0.5
CLOSE_SECONDS = 60.0
BATCH_ITEMS = 1000  # MLflow's limit for one log_batch call
PARAMS_IN_ONE = 100  # MLflow's limit of parameters in one call
PARAM_CHARACTERS = 6000  # MLflow's limit for one parameter value
RUN_KEY = "s2t2.run_key"  # tag that finds an MLflow run whose id was never recorded
IGNORED = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")

_log = logging.getLogger(__name__)


class MLflowShipper:
    """Sends `metrics.jsonl` to one MLflow run from a daemon thread; `link` says what is recorded.

    A failed call is retried. Lines that a job could not send are sent by the next job in the same
    run directory, or by `s2t2 track`.

    Args:
        params: flat parameters, logged once when the MLflow run is created.
        files: files of the run directory that become artifacts, where they are there.

    Attributes:
        problem: what ended it for good, with what to do; None if it may still succeed.
    """

    def __init__(
        self,
        run_dir: Path,
        tracking: TrackingConfig,
        params: dict[str, str],
        files: tuple[str, ...] = (),
    ):
        self.run_dir = run_dir
        self.params, self.files = params, files
        try:
            known = links.read(run_dir)
        except ArtifactError:
            known = None
        self.store = store.choose(tracking.uri, known)
        self.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or tracking.experiment
        for name in filter(os.environ.get, IGNORED):
            _log.warning("%s is ignored: a run directory keeps a run of its own", name)
        self.problem: str | None = None
        self._stop = threading.Event()
        self._status = "FINISHED"
        self._deadline = math.inf
        self._offset = self._lines = 0
        self._ended = False
        self._client = None
        self._link: dict = {}
        self._absent = False  # whether the store surely has no run of this directory
        self._open = False  # whether the MLflow run is set to RUNNING
        self._had: dict[str, set[int]] = {}  # steps of `sending` that the server has, by key
        store.limit_requests()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        """The store, without any password."""
        return self.store.uri

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
        if not self._ended and not self.problem:
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
        failing = False
        while time.monotonic() < self._deadline:
            ending = self._stop.wait(RETRY_SECONDS if failing else SHIP_SECONDS)
            try:
                self._connect()
                self._ship()
                if ending:
                    self._terminate()
                    self._ended = True
                    return
                failing = False
            except Exception as error:  # tracking must never end a training run
                self.problem = self._final(error)
                reason = self.problem or store.one_line(error)
                if self.problem or not failing:
                    _log.warning("MLflow at %s: %s; metrics are in %s", self.uri, reason, METRICS)
                if self.problem:
                    return
                failing = True
                if ending:
                    time.sleep(RETRY_SECONDS)

    def _final(self, error: Exception) -> str | None:
        """What was found and what to do, for an error that does not go away by itself."""
        if isinstance(error, S2T2Error):  # a damaged file
            return store.one_line(error)
        advice = store.final(error, self._link, self.experiment)
        then = f"then `s2t2 track {self.run_dir}`"
        return advice and f"{store.one_line(error)}; {advice}; {then}"

    def _connect(self) -> None:
        """Reach the MLflow run, set to RUNNING. Each answer is kept, and its call not repeated."""
        if self._client is None:
            self._client = _client(self.store)
        if not self._link:
            self._link = links.open_link(self.run_dir, self.store)
            links.save(self.run_dir, self._link)
        if "run_id" not in self._link:
            self._keep(run_id=self._make_run())
        if not self._open:
            self._client.update_run(self._link["run_id"], status="RUNNING")
            self._open = True
            self._keep(status="RUNNING")
        self._log_params()
        self._log_files()

    def _keep(self, **values: object) -> None:
        self._link |= values
        links.save(self.run_dir, self._link)

    def _make_run(self) -> str:
        """The id of the MLflow run; creates it unless an unanswered request already did."""
        from mlflow.tracking.context.registry import resolve_tags

        client, key = self._client, self._link["run_key"]
        if "experiment_id" not in self._link:
            self._keep(experiment_id=self._make_experiment())
        experiment_id = self._link["experiment_id"]
        if not self._absent:
            if made := client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'"):
                return made[0].info.run_id
            self._absent = True
        tags = resolve_tags() | {RUN_KEY: key}  # the user, the source, its git commit
        try:
            with store.without_retries():  # a second one, if the first got no answer
                made = client.create_run(experiment_id, run_name=self.run_dir.name, tags=tags)
        except Exception as error:
            self._absent = store.not_executed(error)
            raise
        return made.info.run_id

    def _make_experiment(self) -> str:
        client, file = self._client, self.store.file
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return found.experiment_id
        # Beside the database; by default MLflow takes the working directory of the moment.
        place = None if file is None else str(file.parent / "mlruns")
        try:
            return client.create_experiment(self.experiment, artifact_location=place)
        except Exception:  # made by another process, or by a request without an answer
            if found := client.get_experiment_by_name(self.experiment):
                return found.experiment_id
            raise

    def _log_params(self) -> None:
        from mlflow.entities import Param

        if self._link.get("params_logged") is True:
            return
        params = [Param(key, value[:PARAM_CHARACTERS]) for key, value in self.params.items()]
        for start in range(self._link.get("params_sent", 0), len(params), PARAMS_IN_ONE):
            part = params[start : start + PARAMS_IN_ONE]
            self._client.log_batch(self._link["run_id"], params=part)
            self._keep(params_sent=start + len(part))
        self._keep(params_logged=True)

    def _log_files(self) -> None:
        """Send the files that are artifacts, once each; a store without artifacts is no reason."""
        for name in self.files:
            sent = self._link.get("artifacts", [])
            if name in sent or not (self.run_dir / name).is_file():
                continue
            if _try_artifact(self._client, self._link["run_id"], self.run_dir / name):
                self._keep(artifacts=[*sent, name])

    def _terminate(self) -> None:
        if (self.run_dir / SAMPLES).is_file():
            _try_artifact(self._client, self._link["run_id"], self.run_dir / SAMPLES)
        self._client.set_terminated(self._link["run_id"], status=self._status)
        self._keep(status=self._status)

    def _ship(self) -> None:
        """Send the lines after `_offset`; advance it when all of them are acknowledged."""
        self._settle()
        lines, offset = self._new_lines()
        batch: list[dict] = []
        items = 0
        for line in lines:
            if position(line) <= self._link["shipped"]:
                continue
            if items + len(line) > BATCH_ITEMS:
                self._send(batch)
                batch, items = [], 0
            batch.append(line)
            items += len(line)
        self._send(batch)
        self._offset, self._lines = offset, self._lines + len(lines)

    def _new_lines(self) -> tuple[list[dict], int]:
        """The complete lines after `_offset`, and the offset of their end."""
        path = self.run_dir / METRICS
        with path.open("rb") as f:
            f.seek(self._offset)
            complete, newline, _ = f.read().rpartition(b"\n")
        lines = parse_lines(path, complete + newline, self._lines + 1)
        return lines, self._offset + len(complete) + len(newline)

    def _send(self, lines: list[dict]) -> None:
        """Send lines in one request, recorded in `sending` until the response arrives."""
        if lines:
            self._had = {name: set() for line in lines for name in metric_values(line)}
            self._keep(sending=lines)
            self._log_points()

    def _settle(self) -> None:
        """Send the points that did not arrive with a request whose response is missing."""
        if "sending" in self._link:
            self._log_points()

    def _log_points(self) -> None:
        """Send the points of `sending`, except the steps of each key that the server has."""
        points = [point for line in self._link["sending"] for point in _points(line)]
        for key in {point.key for point in points} - self._had.keys():
            history = self._client.get_metric_history(self._link["run_id"], key)
            self._had[key] = {point.step for point in history}
        missing = [point for point in points if point.step not in self._had[point.key]]
        had, self._had = self._had, {}  # to be asked again if the next call gets no answer
        try:
            if missing:
                self._client.log_batch(self._link["run_id"], metrics=missing)
        except Exception as error:
            if store.not_executed(error):
                self._had = had
            raise
        sent = self._link.pop("sending")
        self._keep(shipped=position(sent[-1]))


def _client(place: store.Store):
    """MLflow's client of a store. A new SQLite database is made by one process at a time."""
    from mlflow import MlflowClient

    with store.first_use(place.file):
        client = MlflowClient(tracking_uri=place.secret_uri)
        if place.file is not None:
            client.search_experiments(max_results=1)  # makes its tables
    return client


def _try_artifact(client, run_id: str, path: Path) -> bool:
    """Whether a file became an artifact; if not, one line says why."""
    try:
        client.log_artifact(run_id, str(path))
    except Exception as error:  # many libraries store artifacts
        _log.warning("%s is not an artifact in MLflow: %s", path, store.one_line(error))
        return False
    return True


def attach(run_dir: Path, files: list[Path]) -> bool:
    """Add files to the MLflow run of a run directory, if it has one.

    Returns:
        False if that failed, which one line says: it is no reason to do nothing else.
    """
    try:
        link = links.read(run_dir)
    except ArtifactError:
        link = None
    if link is None or "run_id" not in link:
        return True
    store.limit_requests()
    try:
        client = _client(store.choose(None, link))
    except Exception as error:
        _log.warning(
            "MLflow at %s: %s; %s has the files", link["uri"], store.one_line(error), files
        )
        return False
    with store.without_retries():
        return all(_try_artifact(client, link["run_id"], path) for path in files)


def _points(line: dict) -> list:
    """A line of `metrics.jsonl` as MLflow metrics."""
    from mlflow.entities import Metric

    milliseconds = int(line["time"] * 1000)
    return [
        Metric(name, float(value), milliseconds, line["step"])
        for name, value in metric_values(line).items()
    ]
