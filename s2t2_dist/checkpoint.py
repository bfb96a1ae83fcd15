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

from s2t2_dist import artifacts
from s2t2_dist.comm import LocalComm
from s2t2_dist.errors import ArtifactError, S2T2Error

_log = logging.getLogger(__name__)


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
    """Write a checkpoint. A collective.

    Args:
        write: writes this rank's state below the directory it is given.
        keep: how many checkpoints stay; older ones are removed afterwards.

    Raises:
        S2T2Error: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = run_dir / "checkpoints" / f"{position.stage}-{position.step:06d}"
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        if comm.rank == 0:
            _clear_temporary(target.parent)
            temporary.mkdir(parents=True)
        comm.barrier()
        write(temporary)
        comm.barrier()
        names = artifacts.list_files(temporary)
        mine = artifacts.describe_files(temporary, names[comm.rank :: comm.size])
        hashed = comm.gather_objects(mine)
        if comm.rank == 0:
            files = {name: entry for part in hashed for name, entry in part.items()}
            artifacts.seal(temporary, {"kind": "checkpoint", **asdict(position)}, files)
            shutil.rmtree(target, ignore_errors=True)
            artifacts.publish(temporary, target)
            for old in list_checkpoints(run_dir)[keep:]:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _save_error(error, target) from error
    comm.barrier()


def load(run_dir: Path, path: Path) -> tuple[Path, Position]:
    """Check every file of a checkpoint of this run.

    Raises:
        ArtifactError: of another run, incomplete or altered.
    """
    if path.resolve().parent != (run_dir / "checkpoints").resolve():
        raise ArtifactError(f"{path} is no checkpoint of {run_dir}; name one in its checkpoints/")
    manifest = artifacts.verify(path)
    return path, Position(**{key: manifest[key] for key in Position.__dataclass_fields__})


def find(run_dir: Path, comm: LocalComm) -> tuple[Path, Position] | None:
    """The newest checkpoint whose every file has the sha256 of its manifest, or None.

    Rank 0 looks and tells the others. One that fails the check is passed over with a warning.
    """
    found = None
    if comm.rank == 0:
        _clear_temporary(run_dir / "checkpoints")
        for path in list_checkpoints(run_dir):
            try:
                found = load(run_dir, path)
                break
            except ArtifactError as error:
                _log.warning("checkpoint passed over: %s", error)
    return comm.broadcast_object(found)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Sealed checkpoints, newest position first."""
    sealed = []
    for path in (run_dir / "checkpoints").glob("[!.]*"):
        if artifacts.is_complete(path):
            manifest = artifacts.read_json(path / artifacts.MANIFEST)
            sealed.append(((manifest["stage_index"], manifest["step"]), path))
    return [path for _, path in sorted(sealed, reverse=True)]


def _clear_temporary(directory: Path) -> None:
    """Remove what a killed save left behind."""
    for path in directory.glob(".tmp-*"):
        shutil.rmtree(path)


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
