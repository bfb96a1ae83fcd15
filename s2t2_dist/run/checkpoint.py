"""Checkpoints of a run: `checkpoints/STAGE-STEP/`, written atomically and hashed.

DeepSpeed marks a checkpoint as the latest before every rank has written it. To avoid that:

1. every rank writes into a temporary directory on the shared file system;
2. after a barrier, each rank hashes its share of the files;
3. rank 0 writes the manifest and `COMPLETE`, then renames the directory to its final name.

A checkpoint is loaded only after every file in it has been verified against the manifest.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm, agree
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error, collective

# Name prefix of the temporary copies that `reshard.converted` makes for another number of ranks.
CONVERTED = ".tmp-universal-"

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
    metrics_sha256: str | None = None  # of these bytes; none in checkpoints of version 0.1.0


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from.

    Attributes:
        damaged: the newer ones that are not valid, with what is wrong with each.
    """

    path: Path
    position: Position
    damaged: dict[Path, str]


def save(
    run_dir: Path,
    position: Position,
    write: Callable[[Path], None],
    comm: Comm,
    keep: int,
    keep_steps: int | None = None,
) -> None:
    """Write a checkpoint. A collective: if one rank fails in a phase, all ranks raise after it.

    Args:
        write: writes this rank's state below the given directory. If it calls collectives, it
            must reach all of them even when it fails (`engine.TrainedLM.save` does).
        keep: number of newest checkpoints to keep; older ones are removed afterwards.
        keep_steps: checkpoints at a multiple of this many steps of their stage are never removed.

    Raises:
        S2T2Error: on every rank, if the disk of any rank is full or not writable; earlier
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
            _remove(target)
            artifacts.publish(temporary, target)
            _remove_old(run_dir, keep, keep_steps)

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


def find(run_dir: Path, comm: Comm, path: Path | None = None) -> tuple[Path, Position] | None:
    """`choose` a checkpoint, and clear the way for the run that resumes from it. A collective.

    What a killed job left behind is removed. Newer checkpoints that are damaged are renamed to
    `.damaged-NAME`, because the run writes their steps again.
    """

    def clear() -> None:
        if comm.rank == 0:
            _clear_temporary(run_dir / "checkpoints")

    def set_aside() -> None:
        if comm.rank == 0:
            _set_aside(choice)

    agree(comm, clear, "clearing up after a killed job")
    choice = choose(run_dir, comm, path)
    if choice is None:
        return None
    agree(comm, set_aside, "setting a checkpoint aside")
    return choice.path, choice.position


def choose(run_dir: Path, comm: Comm, path: Path | None = None) -> Choice | None:
    """The checkpoint to resume from, with every file verified; None in a new run. A collective.

    The ranks share the hashing. Nothing is written.

    Args:
        path: the checkpoint to use; default: the newest valid one.

    Raises:
        ArtifactError: on every rank, if `path` is damaged or belongs to another run, or if there
            are checkpoints and none is valid.
        ConfigError: on every rank, if `path` is not the newest: later metrics and checkpoints
            would mix with those that are written again.
    """

    def look() -> list[Path]:
        if comm.rank != 0:
            return []
        return _candidates(run_dir) if path is None else [_asked_for(run_dir, path)]

    candidates = comm.broadcast_object(agree(comm, look, "looking for a checkpoint"))
    damaged: dict[Path, str] = {}
    for candidate in candidates:
        problem = _problem(candidate, comm)
        if problem is None:
            return Choice(candidate, _position(candidate), damaged)
        damaged[candidate] = problem
    if not damaged:
        return None
    problems = "; ".join(damaged.values())
    if path is None:
        problems = f"no checkpoint to resume from: {problems}; restore one, or remove all"
    raise collective(ArtifactError(problems))


def _problem(path: Path, comm: Comm) -> str | None:
    """What is wrong with a checkpoint, the same on every rank. A collective."""
    problem = None
    try:
        artifacts.verify(path, share=(comm.rank, comm.size), exact=True)
        _position(path)
    except (ArtifactError, OSError) as error:  # a failing disk gives OSErrors
        problem = str(error)
    except KeyError as error:
        problem = f"{path / artifacts.MANIFEST} is not the manifest of a checkpoint: no key {error}"
    return next(filter(None, comm.gather_objects(problem)), None)


def _set_aside(choice: Choice) -> None:
    """Rename the damaged checkpoints and log why, and which one is used instead."""
    used = choice.path.name
    for path, problem in choice.damaged.items():
        aside = _rename(path)
        _log.warning("resuming from %s because %s; kept as %s", used, problem, aside.name)


def _rename(path: Path) -> Path:
    aside = path.with_name(f".damaged-{path.name}")
    _remove(aside)
    path.rename(aside)
    return aside


def is_intact(path: Path) -> bool:
    """Whether a sealed result is there, unaltered; a damaged one is set aside, with a line."""
    if not os.path.lexists(path):
        return False
    try:
        artifacts.verify(path)
    except ArtifactError as error:
        aside = _rename(path)
        _log.warning("%s; kept as %s; it is made again", error, aside.name)
        return False
    return True


def _candidates(run_dir: Path) -> list[Path]:
    """Directories to try, in order: those with an unreadable position, then newest first."""
    sealed = list_checkpoints(run_dir)
    return sorted({*(run_dir / "checkpoints").glob("[!.]*")} - {*sealed}) + sealed


def _asked_for(run_dir: Path, path: Path) -> Path:
    if path.resolve().parent != (run_dir / "checkpoints").resolve():
        raise ArtifactError(
            f"{path} is not a checkpoint of {run_dir}; give the path of one in its checkpoints/"
        )
    names = [other.name for other in list_checkpoints(run_dir)]
    newer = names[: names.index(path.resolve().name)] if path.resolve().name in names else []
    if newer:
        raise ConfigError(
            f"--resume {path}: {run_dir / 'checkpoints'} holds newer checkpoints "
            f"({', '.join(newer)}); move them out of the run directory first"
        )
    return path


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Sealed checkpoints, newest position first; their files are not verified."""
    sealed = []
    for path in (run_dir / "checkpoints").glob("[!.]*"):
        with contextlib.suppress(ArtifactError, OSError, KeyError):
            position = _position(path)
            sealed.append(((position.stage_index, position.step), path))
    return [path for _, path in sorted(sealed, reverse=True)]


def _position(path: Path) -> Position:
    manifest = artifacts.read_manifest(path)
    found = {key: manifest[key] for key in Position.__dataclass_fields__ if key in manifest}
    if not all(isinstance(value, Position.__annotations__[key]) for key, value in found.items()):
        raise ArtifactError(f"{path / artifacts.MANIFEST} is not the manifest of a checkpoint")
    try:
        return Position(**found)
    except TypeError:
        raise ArtifactError(f"{path / artifacts.MANIFEST} lacks a key of a checkpoint") from None


def _remove_old(run_dir: Path, keep: int, keep_steps: int | None) -> None:
    for old in list_checkpoints(run_dir)[keep:]:
        if not keep_steps or _position(old).step % keep_steps:
            _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint; if killed in the middle, leave nothing that looks like a checkpoint."""
    if os.path.lexists(path):
        doomed = path.with_name(f".tmp-removed-{path.name}")
        _delete(doomed)
        path.rename(doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    """Remove a folder, or a file or a link in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear_temporary(directory: Path) -> None:
    """Remove what a killed job left behind.

    The converter of a killed job may still be writing into its copy, so errors are ignored there.
    """
    for path in directory.glob(".tmp-*"):
        if path.name.startswith(CONVERTED):
            shutil.rmtree(path, ignore_errors=True)
        else:
            _delete(path)


def _with_clear_error(step: Callable[[], T], target: Path) -> T:
    """Run one phase of a save and turn its failure into a one-line error."""
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
        f"{reason}; earlier checkpoints are intact: fix the cause and start again"
    )
