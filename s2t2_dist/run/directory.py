"""A run directory: the recipe and inputs it was started with, its lock and its status.

`config.yaml` holds the resolved recipe, `inputs.json` the hashes of its inputs (see `identity`). If
both are unchanged, a start resumes the run; otherwise it is refused. A path in the recipe may
change: it is the content behind it that counts. Rank 0 holds `.lock` while a job runs.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TextIO

from s2t2_dist import artifacts
from s2t2_dist.config import Recipe, load_recipe, recipe_values, yaml12
from s2t2_dist.config.overrides import changed_keys
from s2t2_dist.errors import ArtifactError, ConfigError, InUseError, without_secrets
from s2t2_dist.run import identity
from s2t2_dist.run.identity import INPUTS

STATUS = "status.json"
STATES = ("running", "preempted", "failed", "done")
CONFIG = "config.yaml"
LOCK = ".lock"
# Keys of each stage that cannot change a result but by rounding, as the number of ranks does.
FREE_STAGE_KEYS = (
    "save_steps",
    "samples",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
)
# The same of the recipe.
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

# Keys of inputs that are paths; two of them may be names instead.
PATH_KEYS = (
    "path",
    "deepspeed",
    "model_name_or_path",
    "translation",
    "alignment",
    "source_tokens",
    "source_marginal",
)
NAMES = {"source_tokens": ("all", "bytes"), "source_marginal": ("uniform",)}

_log = logging.getLogger(__name__)


@contextmanager
def claimed(run_dir: Path, recipe: Recipe, inputs: dict, resume: str) -> Iterator[None]:
    """Create or take over a run directory and hold its lock. On rank 0 only.

    Args, Raises: see `check`; and InUseError if another job runs in it.
    """
    check(run_dir, recipe, inputs, resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        identity.write(run_dir, inputs)
        # Written last, because it makes this a run directory. Both are rewritten at each start,
        # because paths and the keys in FREE_KEYS may change.
        values = recipe_values(recipe)
        artifacts.write_text(run_dir / CONFIG, yaml12.dump(values))
        yield


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    Raises:
        InUseError: another job runs in it.
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
        InUseError: another job runs in it.
    """
    path = run_dir / LOCK
    if path.exists():
        with path.open(encoding="utf-8") as lock:
            _take(lock, run_dir, fcntl.LOCK_SH)


def read_state(run_dir: Path) -> str | None:
    """The state in a run's `status.json`: running, preempted, failed or done.

    None if there is no such file, or none that can be read: the checkpoints then say where the run
    stands, and one line says so.
    """
    path = run_dir / STATUS
    if not path.exists():
        return None
    try:
        state = artifacts.read_json(path).get("state")
    except ArtifactError as error:
        state, problem = None, error
    else:
        problem = f"{path} has the state {state!r}"
    if state in STATES:
        return state
    _log.warning("%s; the checkpoints say where the run stands", problem)
    return None


def write_status(run_dir: Path, state: str, **more: object) -> None:
    """Replace `status.json`. On rank 0 only."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    more = {k: without_secrets(v) if isinstance(v, str) else v for k, v in more.items()}
    artifacts.write_json(run_dir / STATUS, {"state": state, **more, **where})


def record_loss(run_dir: Path, reason: str) -> None:
    """Record the loss of a rank, if `status.json` is still the one that this process wrote."""
    with suppress(ArtifactError):
        found = artifacts.read_json(run_dir / STATUS)
        mine = (found.get("host"), found.get("pid")) == (socket.gethostname(), os.getpid())
        if mine and found.get("state") in ("running", "failed"):
            write_status(run_dir, "failed", reason=reason)


def check(run_dir: Path, recipe: Recipe, inputs: dict, resume: str) -> None:
    """Check that a run may start or resume in a directory. Writes nothing.

    Args:
        inputs: from `identity.identify`.
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
    found = changed_keys(_decisive(_values(config)), _decisive(recipe_values(recipe)))
    if found:
        raise ConfigError(
            f"{run_dir} was started with another recipe ({'; '.join(found)}); "
            "undo the change or choose another output_dir"
        )
    old = identity.read(run_dir)["inputs"]
    if any(entry.get("partial") for entry in old.values()):
        _log.warning("%s is of an earlier version: its weights are compared by size", run_dir)
    found = identity.differences(old, inputs)
    if found:
        raise ConfigError(
            f"{run_dir} was started with other files ({'; '.join(found)}); "
            "restore them or choose another output_dir"
        )


def _values(config: Path) -> dict:
    """The keys of a `config.yaml`, which may be of an earlier version.

    Raises:
        ArtifactError: it is not what a start wrote.
    """
    try:
        values = yaml12.parse(config.read_text(encoding="utf-8"))
        kinds = {"model": dict, "data": dict, "stages": list}
        if all(isinstance(values[key], kind) for key, kind in kinds.items()) and all(
            isinstance(stage, dict) for stage in values["stages"]
        ):
            return values
        problem = "it lacks a part of a recipe"
    except (ConfigError, UnicodeDecodeError) as error:
        problem = str(error)
    except (KeyError, TypeError):
        problem = "it holds no recipe"
    raise ArtifactError(
        f"{config} is damaged ({problem}); restore it, or start again in a new output_dir"
    )


def read_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run, as it was started the last time.

    Raises:
        ArtifactError: not a run directory.
        ConfigError: its config.yaml is not a recipe.
    """
    if not (run_dir / CONFIG).is_file():
        raise ArtifactError(
            f"{run_dir} is not a run directory (no {CONFIG} in it); give a run's output_dir"
        )
    return load_recipe(run_dir / CONFIG)


def is_path(key: str, value: object) -> bool:
    """Whether a recipe's value is the path of an input; `source_tokens` may be `all`."""
    return value is not None and value not in NAMES.get(key, ())


def changes(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for everything that can change a result and differs."""
    return changed_keys(_decisive(recipe_values(old)), _decisive(recipe_values(new)))


def _decisive(values: dict) -> dict:
    """A resolved recipe without what cannot change a result; a resume may change that.

    Of a path it is known that there is one: `inputs.json` knows what it leads to.
    """
    values = deepcopy(values)
    for key in FREE_KEYS:
        values.pop(key, None)
    for stage in values["stages"]:
        for key in FREE_STAGE_KEYS:
            stage.pop(key, None)
    values["data"].pop("tokenizer", None)
    for key in ("revision", "gradient_checkpointing"):
        values["model"].pop(key, None)
    for mapping in (values, values["data"], values["model"], *values["stages"]):
        for key in PATH_KEYS:
            if key in mapping and is_path(key, mapping[key]):
                mapping[key] = "a path"
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
        pid, host = _holder(lock)
        raise InUseError(
            f"{run_dir} is in use by process {pid} on {host}; wait until it is done, or stop it "
            f"there (kill {pid}) and start again"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _log.warning("%s cannot be locked (%s): do not start a second job in it", run_dir, error)
        return False
    return True


def _holder(lock: TextIO) -> tuple[object, object]:
    """The process and the host that a lock file names."""
    holder = {}
    with suppress(ValueError):
        lock.seek(0)
        holder = json.loads(lock.read())
    if not isinstance(holder, dict):
        holder = {}
    return holder.get("pid", "unknown"), holder.get("host", "unknown")
