"""The disk contract: a result directory is complete and hashed, or it does not exist.

A result is written in this order:

1. its files, in a directory with a temporary name beside the target;
2. `manifest.json`: size and sha256 of every file, and whatever the writer records;
3. `COMPLETE`: the sha256 of the manifest;
4. one rename to the target.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from s2t2_dist.errors import ArtifactError, S2T2Error

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
SEAL = (MANIFEST, COMPLETE)
NAME_BYTES = 200  # of a name that a temporary one repeats: names may have 255
NEW_FILE = 0o666  # permissions of a new file, before the umask


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


def beginning(name: str) -> str:
    """As much of a file's name as the name of a temporary one can repeat."""
    return os.fsdecode(os.fsencode(name)[:NAME_BYTES])


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{beginning(path.name)}.tmp-{os.getpid()}-{threading.get_ident()}")
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
        ArtifactError: the file is missing, or is not JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise ArtifactError(f"{path} is not valid JSON ({error}); was it edited or cut?") from None
    if not isinstance(found, dict):
        raise ArtifactError(
            f"{path} holds a {type(found).__name__}, expected an object; was it edited?"
        )
    return found


def list_files(directory: Path) -> list[str]:
    """Relative paths of the files that a manifest covers, sorted."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in SEAL
    )


def describe_files(directory: Path, names: list[str]) -> dict[str, dict]:
    """Size in bytes and sha256 of the named files, each flushed to the device first.

    They get the permissions of any new file: safetensors makes its own for the owner alone.
    """
    entries = {}
    for name in names:
        path = directory / name
        _let_umask_decide(path)
        fsync_path(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return entries


def _let_umask_decide(path: Path) -> None:
    """Give a file the permissions of any new file.

    The umask is read from /proc: Python can only read it by setting it, for every thread.
    """
    status = Path("/proc/self/status").read_text()
    umask = int(re.search(r"^Umask:\s*(\d+)", status, re.MULTILINE)[1], 8)
    wanted = NEW_FILE & ~umask
    if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != wanted:
        with suppress(PermissionError):  # of file systems without permissions, as vfat or SMB
            path.chmod(wanted)


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
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{path} is missing beside {COMPLETE}; copy the folder again")
    if (directory / COMPLETE).read_bytes().strip() != sha256_file(path).encode():
        raise ArtifactError(f"{path} was changed after it was sealed, or {COMPLETE} was")
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ArtifactError(f"{path} lists no files; make {directory} again")
    return manifest


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


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


def require_absent(target: Path) -> None:
    """Raise an ArtifactError if there is something at `target`, be it a link that leads nowhere."""
    if os.path.lexists(target):
        raise ArtifactError(f"{target} exists; choose another folder or remove it yourself")


@contextmanager
def scratch_directory(target: Path, kind: str = "tmp") -> Iterator[Path]:
    """Yield a new hidden folder beside `target`, removed at the end unless it was renamed.

    Those that killed processes left beside the same target are removed first: nobody holds their
    lock.
    """
    prefix = f".{beginning(target.name)}.{kind}-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):  # in use, or on a disk without locks
            held = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    temporary = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(3)}"
    temporary.mkdir()
    held = None
    with suppress(OSError):
        held = _lock(temporary)
    try:
        yield temporary
    finally:
        if held is not None:
            os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed; an OSError if another process has."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


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
    require_absent(target)
    make_parent(target)
    with scratch_directory(target) as temporary:
        yield temporary
        seal(temporary, record)
        publish(temporary, target)


def disk_error(error: OSError, doing: str) -> S2T2Error | None:
    """The one-line error for what a disk or a path does not allow; None for any other OSError.

    Args:
        doing: what was being done, for the message: "saving X".
    """
    path = Path(os.fsdecode(error.filename or ""))
    if (
        error.errno in (errno.EACCES, errno.EPERM)
        and path.is_file()
        and not os.access(path, os.R_OK)
    ):
        return S2T2Error(f"not allowed to read while {doing} ({error}); ask for permission")
    for numbers, what, advice in _DISK_ERRORS:
        if error.errno in numbers:
            return S2T2Error(f"{what} while {doing} ({error}); {advice}")
    return None


_DISK_ERRORS = (
    ((errno.ENOSPC, errno.EDQUOT), "no space left", "free space and run again"),
    (
        (errno.EROFS, errno.EACCES, errno.EPERM),
        "not allowed to write",
        "change the permissions or choose another folder",
    ),
    ((errno.ENAMETOOLONG,), "a name is too long", "names may have 255 bytes: choose a shorter one"),
    (
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
        "a file is where a folder is needed, or the reverse,",
        "choose another path",
    ),
    ((errno.ENOENT,), "a file is missing", "another program may have removed it"),
    ((errno.EMFILE, errno.ENFILE), "too many open files", "raise `ulimit -n`"),
)
