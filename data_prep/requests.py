"""Requests: what a result is made from. A result is never made twice or overwritten."""

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.documents import DEFAULT
from data_prep.progress import waiting
from data_prep.release import release_of
from s2t2_dist import artifacts
from s2t2_dist.data.shards import KIND
from s2t2_dist.errors import ArtifactError

REQUEST = "request.json"
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
    if differing := differences(request, found):
        raise ArtifactError(
            f"{partial} holds an unfinished build with another {differing}; finish it, remove it, "
            "or choose another folder"
        )
    return partial
