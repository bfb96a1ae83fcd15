"""Requests: what a result is made from. A result is never made twice or overwritten."""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data_prep.documents import DEFAULT
from data_prep.progress import waiting
from data_prep.release import release_of
from s2t2_dist import artifacts
from s2t2_dist.data.shards import KIND
from s2t2_dist.errors import ArtifactError

REQUEST = "request.json"
FAILED = "failed"
# How long ranks wait for rank 0 to replace the folder of a failed build, and for the first rank to
# state the request.
TAKE_OVER_SECONDS, CLAIM_SECONDS = 60.0, 10.0
POLL_SECONDS = 0.2
# Options that a request names only where they are not these.
READ_OPTIONS = {"id_field": DEFAULT.id_field, "skip_bad": DEFAULT.skip_bad}


def describe_sources(paths: Sequence[Path]) -> list[dict]:
    """Name, size in bytes and sha256 of each file, and its UniProt release if it was checked."""
    described = []
    for path in paths:
        with waiting(f"Hashing {path}"):
            sha256 = artifacts.sha256_file(path)
        entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}
        release = release_of(path, sha256)
        described.append({**entry, "release": release} if release else entry)
    return described


def already_made(target: Path, request: dict) -> bool:
    """Whether `target` is complete and was made from exactly this request.

    Raises:
        ArtifactError: it exists but is unfinished, damaged or made from another request.
    """
    if not target.exists():
        return False
    if target.is_dir() and not any((target / name).exists() for name in artifacts.SEAL):
        raise ArtifactError(
            f"{target} exists and holds no result of s2t2, and is never overwritten; choose "
            "another folder"
        )
    manifest = artifacts.verify(target, hashes=request.get("kind") != KIND)  # shards are large
    differing = differences(request, manifest)
    if differing:
        raise ArtifactError(f"{target} was made with another {differing}; choose another folder")
    return True


def differences(request: dict, other: dict) -> str:
    """Names of what differs between two requests, with short values; empty if nothing does.

    A file of another UniProt release is another file; that its release was checked is no
    difference.
    """
    named = []
    for key in dict.fromkeys([*request, *READ_OPTIONS]):
        found, wanted = (
            _comparable(each.get(key, READ_OPTIONS.get(key))) for each in (other, request)
        )
        if found != wanted:
            short = not isinstance(found, list | dict) and len(f"{found}{wanted}") < 60
            named.append(f"{key} ({found!r}, not {wanted!r})" if short else key)
    return ", ".join(named)


def _comparable(value: object) -> object:
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in entry.items() if k != "release"} for entry in value]


def beside(target: Path, ending: str) -> Path:
    """`.NAME.ENDING` beside a target; of a long NAME the beginning and a hash."""
    name = target.name
    if len(os.fsencode(name)) > artifacts.NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        name = f"{artifacts.beginning(name)}-{digest}"
    return target.parent / f".{name}.{ending}"


def open_partial(target: Path, request: dict, rank: int = 0) -> Path:
    """Create or reopen the folder beside `target` in which any number of processes make it.

    Where a build has failed in it, rank 0 of another request takes the folder over.

    Raises:
        ArtifactError: the folder holds an unfinished result of another request.
    """
    partial = beside(target, "partial")
    begin = time.monotonic()
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            found = _stated(partial, request)
            failed = (partial / FAILED).exists()
        except FileNotFoundError:  # rank 0 has just taken it over
            continue
        if not (differing := differences(request, found)):
            break
        if not failed or (rank and time.monotonic() - begin > TAKE_OVER_SECONDS):
            raise ArtifactError(
                f"{partial} holds an unfinished build with another {differing}; finish it, remove "
                "it, or choose another folder"
            )
        if rank == 0:
            old = partial.with_name(f"{partial.name}-old-{os.getpid()}")
            partial.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        else:
            time.sleep(POLL_SECONDS)
    if rank == 0:
        (partial / FAILED).unlink(missing_ok=True)
    return partial


def is_folder_of(partial: Path, request: dict) -> bool:
    """Whether the folder still is that of a build of this request."""
    try:
        return not differences(request, artifacts.read_json(partial / REQUEST))
    except ArtifactError:
        return False


def mark_failed(partial: Path) -> None:
    """Say that a build has failed in this folder, so that a corrected command may replace it."""
    with suppress(OSError):
        (partial / FAILED).touch()


def _stated(partial: Path, request: dict) -> dict:
    """The request of the build in the folder, which is this one if there is none."""
    stated = partial / REQUEST
    if artifacts.is_complete(partial):  # only the rename is missing
        return artifacts.read_manifest(partial)
    if not stated.exists():
        own = partial / f"{REQUEST}.{os.uname().nodename}-{os.getpid()}"
        artifacts.write_json(own, request)
        try:
            os.link(own, stated)  # unlike a rename, fails if another process was first
        except FileExistsError:
            pass
        except OSError:
            _first_only(own, stated)
        finally:
            own.unlink(missing_ok=True)
    try:
        return artifacts.read_json(stated)
    except ArtifactError:
        if not stated.exists():
            raise FileNotFoundError(stated) from None
        raise


def _first_only(own: Path, stated: Path) -> None:
    """Rename a file unless another process was first, on a file system without hard links."""
    claim = stated.with_name(f"{stated.name}.claim")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + CLAIM_SECONDS
        while not stated.exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if stated.exists():
            return  # otherwise the process that was first was killed in between
    own.replace(stated)
