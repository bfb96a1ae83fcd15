"""The disk contract: a result directory is complete and hashed, or it does not exist.

A result is written in this order:

1. its files, in a directory with a temporary name beside the target;
2. `manifest.json`: size and sha256 of every file, and whatever the writer records;
3. `COMPLETE`: the sha256 of the manifest;
4. one rename to the target.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2t2_dist.errors import ArtifactError, S2T2Error

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
SEAL = (MANIFEST, COMPLETE)
# Errors of a path that no folder or file can have.
UNUSABLE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); was it edited or cut?") from None


def list_files(directory: Path) -> list[str]:
    """Relative paths of the files that a manifest covers, sorted."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in SEAL
    )


def describe_files(directory: Path, names: list[str]) -> dict[str, dict]:
    """Size in bytes and sha256 of the named files, each flushed to the device first."""
    entries = {}
    for name in names:
        path = directory / name
        fsync_path(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return entries


def seal(directory: Path, record: dict, files: dict[str, dict] | None = None) -> None:
    """Write `manifest.json` and then `COMPLETE` into a directory whose files are all written.

    Args:
        record: what else the manifest says; must not have the key `files`.
        files: the file entries, if the caller has them already (ranks may share the hashing).
    """
    if files is None:
        files = describe_files(directory, list_files(directory))
    write_json(directory / MANIFEST, {**record, "files": files})
    write_text(directory / COMPLETE, sha256_file(directory / MANIFEST) + "\n")


def is_complete(directory: Path) -> bool:
    """Whether the directory was sealed. Does not check its files: see `verify`."""
    return (directory / COMPLETE).is_file()


def read_manifest(directory: Path) -> dict:
    """The manifest of a sealed directory.

    Raises:
        ArtifactError: the directory was not sealed, or the manifest was changed since.
    """
    if not is_complete(directory):
        if not directory.is_dir():
            what = "is a file, not a folder" if directory.exists() else "is missing"
            raise ArtifactError(
                f"{directory} {what}; give a folder that was made, or make it again"
            )
        raise ArtifactError(
            f"{directory} has no {COMPLETE} file: it was not finished; make it again"
        )
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise ArtifactError(f"{manifest} is missing beside {COMPLETE}; copy the folder again")
    if (directory / COMPLETE).read_bytes().strip() != sha256_file(manifest).encode():
        raise ArtifactError(f"{manifest} was changed after it was sealed")
    return read_json(manifest)


def verify(
    directory: Path, hashes: bool = True, share: tuple[int, int] = (0, 1), exact: bool = False
) -> dict:
    """Check every file of a sealed directory against its manifest and return the manifest.

    Args:
        hashes: compare sha256 as well as sizes (reads every byte).
        share: (rank, size): check only this rank's share of the files.
        exact: also raise an error for a file that the manifest does not list.

    Raises:
        ArtifactError: a file is missing, altered, of another size or unlisted; names the first.
    """
    manifest = read_manifest(directory)
    rank, size = share
    for name, entry in sorted(manifest["files"].items())[rank::size]:
        verify_file(directory / name, entry, hashes)
    unlisted = set(list_files(directory)) - manifest["files"].keys() if exact else ()
    if unlisted:
        raise ArtifactError(f"{directory / min(unlisted)} is not in the manifest; remove it")
    return manifest


def verify_file(path: Path, entry: dict, hashes: bool) -> None:
    """Check one file against its entry in the manifest; raises what `verify` raises."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        raise ArtifactError(f"{path} {what}, but the manifest lists it; make it again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(f"{path} has {size} bytes, the manifest says {entry['bytes']}")
    if hashes and sha256_file(path) != entry["sha256"]:
        raise ArtifactError(f"{path} was altered: its sha256 is not the manifest's")


def publish(temporary: Path, target: Path) -> None:
    """Rename a sealed directory to its final name; from that moment the result exists."""
    fsync_path(temporary)
    temporary.rename(target)
    fsync_path(target.parent)


def make_parent(target: Path) -> None:
    """Make the folders above a result.

    Raises:
        ArtifactError: one of them is a file.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ArtifactError(
            f"{target} cannot be made, because a folder above it is a file; choose another folder"
        ) from None


@contextmanager
def sealed_directory(target: Path, record: dict) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target`, sealed, when the block succeeds.

    On any exception the temporary directory is removed and `target` stays absent. The caller may
    add to `record` inside the block.

    Raises:
        ArtifactError: `target` exists; it is never overwritten.
    """
    if target.exists():
        raise ArtifactError(f"{target} exists; choose another folder or remove it yourself")
    make_parent(target)
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        seal(temporary, record)
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def disk_error(error: OSError, doing: str) -> S2T2Error | None:
    """The one-line error for a full or read-only disk or a wrong path; None for another OSError.

    Args:
        doing: what was being done, for the message: "saving X".
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return S2T2Error(f"no space left while {doing} ({error}); free space and run again")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        path = Path(os.fsdecode(error.filename or ""))
        if path.is_file() and not os.access(path, os.R_OK):
            return S2T2Error(f"not allowed to read while {doing} ({error}); ask for permission")
        return S2T2Error(f"not allowed to write while {doing} ({error}); choose another folder")
    if error.errno in UNUSABLE:
        return S2T2Error(f"a path cannot be used while {doing} ({error}); give another one")
    return None
