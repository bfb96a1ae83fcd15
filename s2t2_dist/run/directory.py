"""A run directory: the recipe and inputs it was started with, its lock and its status.

`config.yaml` holds the resolved recipe. `inputs.json` holds hashes and sizes of the files that the
recipe names. If both are unchanged, a start resumes the run; otherwise it is refused. Rank 0 holds
`.lock` while a job runs.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TextIO

from s2t2_dist import artifacts, yaml12
from s2t2_dist.config import Recipe, changed_keys, recipe_values
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error

STATUS = "status.json"
CONFIG = "config.yaml"
INPUTS = "inputs.json"
LOCK = ".lock"
# Recipe keys that cannot change a result, besides `save_steps` of each stage.
FREE_KEYS = (
    "output_dir",
    "tracking",
    "save_total_limit",
    "keep_steps",
    "max_hours",
    "max_bad_steps",
    "collective_timeout",
    "heartbeat_timeout",
)

_log = logging.getLogger(__name__)


@contextmanager
def claimed(run_dir: Path, recipe: Recipe, inputs: dict, resume: str) -> Iterator[None]:
    """Create or take over a run directory and hold its lock. On rank 0 only.

    Args, Raises: see `check`; and S2T2Error if another job runs in it.
    """
    check(run_dir, recipe, inputs, resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        if not (run_dir / CONFIG).exists():
            artifacts.write_json(run_dir / INPUTS, inputs)
        # Written last, because it makes this a run directory. Rewritten at each start, because
        # the keys in FREE_KEYS may change.
        values = recipe_values(recipe)
        artifacts.write_text(run_dir / CONFIG, yaml12.dump(values))
        yield


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    Raises:
        S2T2Error: another job runs in it.
    """
    with (run_dir / LOCK).open("a+", encoding="utf-8") as lock:
        if _take(lock, run_dir, fcntl.LOCK_EX):
            lock.truncate(0)
            lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            lock.flush()
            os.fsync(lock.fileno())  # other hosts read it
        yield


def check_unlocked(run_dir: Path) -> None:
    """No job runs in a run directory. Holds the lock for a moment, and writes nothing.

    Raises:
        S2T2Error: another job runs in it.
    """
    path = run_dir / LOCK
    if path.exists():
        with path.open(encoding="utf-8") as lock:
            _take(lock, run_dir, fcntl.LOCK_SH)


def identify_inputs(
    data_dir: Path, deepspeed: dict, model_dir: Path | None, others: Iterable[str] = ()
) -> dict:
    """Hashes and sizes that identify the files of a recipe, without reading large files.

    Args:
        model_dir: the base model; None if the run starts from a config.
        others: files and data directories that stages read; anything else is ignored.
    """
    inputs = {
        "data manifest sha256": artifacts.sha256_file(data_dir / artifacts.MANIFEST),
        "deepspeed settings sha256": artifacts.sha256_json(deepspeed),
    }
    if model_dir is not None:
        inputs["model config.json sha256"] = artifacts.sha256_file(model_dir / "config.json")
        weights = {path.name: path.stat().st_size for path in model_dir.glob("*.safetensors")}
        inputs["model weight files (bytes)"] = weights
    for path in map(Path, others):
        file = path / artifacts.MANIFEST if path.is_dir() else path
        if file.is_file():
            inputs[f"{path} sha256"] = artifacts.sha256_file(file)
    return inputs


def read_state(run_dir: Path) -> str | None:
    """The state in a run's `status.json`: running, preempted, failed or done."""
    path = run_dir / STATUS
    return artifacts.read_json(path)["state"] if path.exists() else None


def write_status(run_dir: Path, state: str, **more: object) -> None:
    """Replace `status.json`. On rank 0 only."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    artifacts.write_json(run_dir / STATUS, {"state": state, **more, **where})


def record_loss(run_dir: Path, reason: str) -> None:
    """Record the loss of a rank, if `status.json` is still the one that this process wrote."""
    path = run_dir / STATUS
    if path.exists():
        found = artifacts.read_json(path)
        mine = (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        if mine and found["state"] in ("running", "failed"):
            write_status(run_dir, "failed", reason=reason)


def check(run_dir: Path, recipe: Recipe, inputs: dict, resume: str) -> None:
    """Check that a run may start or resume in a directory. Writes nothing.

    Args:
        inputs: from `identify_inputs`.
        resume: `auto`, `never` or the path of a checkpoint, as in `start.run`.

    Raises:
        ConfigError: the directory holds a run with another recipe or other inputs (the message
            lists the changes), or its state does not allow `resume`.
        ArtifactError: the directory holds something that is not a run.
    """
    config = run_dir / CONFIG
    if not config.exists():
        # A job that was killed at its start may have left these two.
        if run_dir.exists() and {path.name for path in run_dir.iterdir()} - {LOCK, INPUTS}:
            raise ArtifactError(
                f"{run_dir} exists and is not a run directory (no {CONFIG} in it); choose another "
                "output_dir or remove it yourself"
            )
        if resume not in ("auto", "never"):
            raise ConfigError(
                f"--resume {resume}: {run_dir} holds no run to resume; start it without --resume"
            )
        return
    if resume == "never":
        raise ConfigError(f"{run_dir} holds a run and --resume is never; choose another output_dir")
    old = _decisive(yaml12.parse(config.read_text(encoding="utf-8")))
    changes = changed_keys(old, _decisive(recipe_values(recipe)))
    if changes:
        raise ConfigError(
            f"{run_dir} was started with another recipe ({'; '.join(changes)}); "
            "undo the change or choose another output_dir"
        )
    changes = changed_keys(artifacts.read_json(run_dir / INPUTS), inputs)
    if changes:
        raise ConfigError(
            f"{run_dir} was started with other files ({'; '.join(changes)}); "
            "restore them or choose another output_dir"
        )


def _decisive(values: dict) -> dict:
    """A resolved recipe without the keys that cannot change a result; a resume may change those."""
    values = deepcopy(values)
    for key in FREE_KEYS:
        values.pop(key, None)
    for stage in values["stages"]:
        stage.pop("save_steps", None)
    return values


def _take(lock: TextIO, run_dir: Path, kind: int) -> bool:
    """Lock a file until it is closed; returns False, with a warning, if its disk has no locks.

    Best effort: a network file system without flock does not show the lock to other hosts. The
    kernel releases the lock when the process ends.

    Args:
        kind: fcntl.LOCK_EX, or fcntl.LOCK_SH in a file that is open for reading alone.
    """
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = json.loads(lock.read() or "{}")
        pid, host = holder.get("pid", "unknown"), holder.get("host", "unknown")
        raise S2T2Error(
            f"{run_dir} is in use by process {pid} on {host}; wait until it is done, or stop it "
            f"there (kill {pid}) and start again"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _log.warning("%s cannot be locked (%s): do not start a second job in it", run_dir, error)
        return False
    return True
