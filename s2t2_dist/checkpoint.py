"""Checkpoints of a run: `checkpoints/STAGE-STEP/`, complete and hashed or not there at all.

DeepSpeed marks a checkpoint as the latest before every rank has written it. So every rank writes
into a temporary directory; after a barrier the ranks share the hashing, rank 0 writes the
manifest and `COMPLETE`, and one rename makes it a checkpoint. The directory must be on a file
system that every rank sees.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from s2t2_dist import artifacts
from s2t2_dist.comm import LocalComm, agree
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """Where a run stands: after `step` optimizer steps of stage number `stage_index`."""

    stage_index: int
    stage: str
    step: int
    world_size: int
    metrics_bytes: int  # length of metrics.jsonl at this point


def save(
    run_dir: Path,
    position: Position,
    write: Callable[[Path], None],
    comm: LocalComm,
    keep: int,
) -> None:
    """Write a checkpoint. A collective, phase by phase: a rank that fails holds up no other.

    Args:
        write: writes this rank's state below the directory it is given. It may hold collectives
            and must then reach them all even where it fails (`engine.TrainedLM.save` does).
        keep: how many checkpoints stay; older ones are removed afterwards.

    Raises:
        S2T2Error: on every rank, when the disk of any is full or not writable; earlier
            checkpoints are untouched.
    """
    target = run_dir / "checkpoints" / f"{position.stage}-{position.step:06d}"
    temporary = target.with_name(f".tmp-{target.name}")

    def prepare() -> None:
        if comm.rank == 0:
            _clear_temporary(target.parent)
            temporary.mkdir(parents=True)

    def describe() -> dict[str, dict]:
        names = artifacts.list_files(temporary)
        return artifacts.describe_files(temporary, names[comm.rank :: comm.size])

    def publish() -> None:
        if comm.rank == 0:
            files = {name: entry for part in described for name, entry in part.items()}
            artifacts.seal(temporary, {"kind": "checkpoint", **asdict(position)}, files)
            shutil.rmtree(target, ignore_errors=True)
            artifacts.publish(temporary, target)
            for old in list_checkpoints(run_dir)[keep:]:
                shutil.rmtree(old)

    def phase(step: Callable[[], T]) -> T:
        return agree(comm, lambda: _with_clear_error(step, target), f"saving {target}")

    try:
        phase(prepare)
        phase(lambda: write(temporary))
        described = comm.gather_objects(phase(describe))
        phase(publish)
    except S2T2Error:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(run_dir: Path, path: Path) -> tuple[Path, Position]:
    """Check every file of a checkpoint of this run.

    Raises:
        ArtifactError: of another run, incomplete or altered.
    """
    if path.resolve().parent != (run_dir / "checkpoints").resolve():
        raise ArtifactError(f"{path} is no checkpoint of {run_dir}; name one in its checkpoints/")
    manifest = artifacts.verify(path)
    return path, Position(**{key: manifest[key] for key in Position.__dataclass_fields__})


def find(run_dir: Path, comm: LocalComm, path: Path | None = None) -> tuple[Path, Position] | None:
    """The checkpoint to resume from, its every file checked by rank 0. A collective.

    Args:
        path: the one that was asked for; default: the newest that is whole, or None. One that
            fails the check is then passed over with a warning.

    Raises:
        ArtifactError: on every rank, where `path` is damaged or of another run.
        ConfigError: on every rank, where `path` is not the newest: the metrics and checkpoints
            after it would mix with those that are written again.
    """

    def look() -> tuple[Path, Position] | None:
        if comm.rank != 0:
            return None
        _clear_temporary(run_dir / "checkpoints")
        return _newest(run_dir) if path is None else _asked_for(run_dir, path)

    return comm.broadcast_object(agree(comm, look, "looking for a checkpoint"))


def _newest(run_dir: Path) -> tuple[Path, Position] | None:
    for path in list_checkpoints(run_dir):
        try:
            return load(run_dir, path)
        except ArtifactError as error:
            _log.warning("checkpoint passed over: %s", error)
    return None


def _asked_for(run_dir: Path, path: Path) -> tuple[Path, Position]:
    found = load(run_dir, path)
    names = [other.name for other in list_checkpoints(run_dir)]
    newer = names[: names.index(path.resolve().name)]
    if newer:
        raise ConfigError(
            f"--resume {path}: {run_dir / 'checkpoints'} holds newer checkpoints "
            f"({', '.join(newer)}); move them out of the run directory first"
        )
    return found


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Sealed checkpoints, newest position first; one whose manifest is unreadable is left out."""
    sealed = []
    for path in (run_dir / "checkpoints").glob("[!.]*"):
        if not artifacts.is_complete(path):
            continue
        try:
            manifest = artifacts.read_json(path / artifacts.MANIFEST)
            sealed.append(((manifest["stage_index"], manifest["step"]), path))
        except (ArtifactError, KeyError) as error:
            _log.warning("checkpoint passed over: %s: %s", path, error)
    return [path for _, path in sorted(sealed, reverse=True)]


def _clear_temporary(directory: Path) -> None:
    """Remove what a killed save left behind."""
    for path in directory.glob(".tmp-*"):
        shutil.rmtree(path)


def _with_clear_error(step: Callable[[], T], target: Path) -> T:
    """Run one phase of a save; torch reports a full disk as a RuntimeError."""
    try:
        return step()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _save_error(error, target) from error


def _save_error(error: Exception, target: Path) -> S2T2Error:
    """The one-line error of a failed save; torch reports a full disk as a RuntimeError."""
    if isinstance(error, OSError):
        known = artifacts.disk_error(error, f"saving {target}")
        if known:
            return known
    free = shutil.disk_usage(target.parent).free
    reason = " ".join(str(error).split())[:200]
    return S2T2Error(
        f"checkpoint {target} could not be written ({free / 2**20:.0f} MiB free on its disk): "
        f"{reason}; the checkpoints before it are intact"
    )
