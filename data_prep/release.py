"""Check a UniProt download against the RELEASE.metalink published beside it (Metalink 3.0)."""

import hashlib
from pathlib import Path
from xml.etree import ElementTree

from data_prep.progress import waiting
from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError, DataError

METALINK = "RELEASE.metalink"
CHECKED = "release.json"
BLOCK_BYTES = 1 << 20


def check_release(directory: Path) -> dict:
    """Verify every file in `directory` that its RELEASE.metalink lists; write release.json there.

    Returns:
        `version`, and `files`: bytes, md5 and sha256 of each file by name.

    Raises:
        DataError: RELEASE.metalink is missing or invalid, or none of its files is in `directory`.
        ArtifactError: a file has another size or md5.
    """
    version, listed = _read_metalink(directory / METALINK)
    present = {name: each for name, each in listed.items() if (directory / name).is_file()}
    if not present:
        raise DataError(
            f"{directory} holds none of the {len(listed)} files of release {version} "
            f"({', '.join(list(listed)[:4])}); download one of them beside {METALINK}"
        )
    files = {name: _check_file(directory / name, *each) for name, each in present.items()}
    record = {"version": version, "files": files}
    artifacts.write_json(directory / CHECKED, record)
    return record


def release_of(path: Path, sha256: str) -> str | None:
    """The release of a file, if `check_release` verified the file; otherwise None."""
    checked = path.parent / CHECKED
    if not checked.is_file():
        return None
    try:
        record = artifacts.read_json(checked)
    except ArtifactError:
        return None
    match record:
        case {"version": str(version), "files": {**files}}:
            match files.get(path.name):
                case {"sha256": found} if found == sha256:
                    return version
    return None  # another tool's, or of a file that was changed since


def _read_metalink(path: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """The version, and (size, md5) by file name."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; download it from the folder of the FASTA file")
    try:
        root = ElementTree.fromstring(path.read_bytes())
        version = root.findtext("{*}version", "").strip()
        listed = {
            each.attrib["name"]: (
                int(each.findtext("{*}size", "")),
                each.findtext("{*}verification/{*}hash[@type='md5']", "").strip().lower(),
            )
            for each in root.iterfind("{*}files/{*}file")
        }
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a metalink ({error}); download it again") from None
    if not (version and listed and all(len(md5) == 32 for _, md5 in listed.values())):
        raise DataError(f"{path} states no version, file or md5; download it again")
    return version, listed


def _check_file(path: Path, size: int, md5: str) -> dict:
    found = path.stat().st_size
    if found != size:
        raise ArtifactError(f"{path} has {found} bytes, the release says {size}; download it again")
    hashes = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with waiting(f"Hashing {path}"), path.open("rb") as f:
        while block := f.read(BLOCK_BYTES):
            for each in hashes:
                each.update(block)
    digests = [each.hexdigest() for each in hashes]
    if digests[0] != md5:
        raise ArtifactError(
            f"{path} has the md5 {digests[0]}, the release says {md5}; download it again"
        )
    return {"bytes": size, "md5": md5, "sha256": digests[1]}
