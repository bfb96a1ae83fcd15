"""Requests: what a result is made from. A result is never made twice or overwritten."""

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.release import release_of
from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError

REQUEST = "request.json"


def describe_sources(paths: Sequence[Path]) -> list[dict]:
    """Name, size in bytes and sha256 of each file, and its UniProt release if it was checked."""
    described = []
    for path in paths:
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
    manifest = artifacts.verify(target, hashes=False)
    differing = [key for key, value in request.items() if manifest.get(key) != value]
    if differing:
        raise ArtifactError(
            f"{target} was made with another {', '.join(differing)}; choose another folder"
        )
    return True


def open_partial(target: Path, request: dict) -> Path:
    """Create or reopen the folder beside `target` in which any number of processes make it.

    Raises:
        ArtifactError: the folder holds an unfinished result of another request.
    """
    partial = target.parent / f".{target.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    stated = partial / REQUEST
    sealed = artifacts.is_complete(partial)  # only the rename is missing
    if not (sealed or stated.exists()):
        own = partial / f"{REQUEST}.{os.uname().nodename}-{os.getpid()}"
        artifacts.write_json(own, request)
        try:
            os.link(own, stated)  # unlike a rename, fails if another process was first
        except FileExistsError:
            pass
        finally:
            own.unlink()
    found = artifacts.read_manifest(partial) if sealed else artifacts.read_json(stated)
    differing = [key for key, value in request.items() if found.get(key) != value]
    if differing:
        raise ArtifactError(
            f"{partial} holds an unfinished build with another {', '.join(differing)}; finish it, "
            "remove it, or choose another folder"
        )
    return partial
