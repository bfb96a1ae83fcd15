"""What a run stands on, known by its content: `inputs.json`.

Every file that a run reads is hashed once. A later start hashes it again only if its size, times or
inode differ from those beside its hash. So weights that were replaced by others of the same size
are seen, and a folder that was moved, or is named in another way, is the same input.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm, agree
from s2t2_dist.errors import ArtifactError, S2T2Error, collective

INPUTS = "inputs.json"
FORMAT = 2
DEEPSPEED = "deepspeed"
# Bytes to hash from which rank 0 says so, as it may take a while.
NOTABLE = 1 << 30
_STAT = ("bytes", "mtime_ns", "ctime_ns", "inode")


@dataclass(frozen=True)
class Input:
    """One input of a run.

    Attributes:
        given: as the recipe names it.
        path: the folder or the file.
        files: what the run reads of it, by name.
    """

    given: str
    path: Path
    files: dict[str, Path]


def identify(inputs: dict[str, Input], known: dict, comm: Comm) -> dict:
    """The content of every input, as `inputs.json` holds it. A collective: ranks share the hashing.

    Args:
        inputs: by their role: `model`, `data`.
        known: what an earlier start found; may be empty.

    Raises:
        S2T2Error: on every rank, if a file cannot be read or is being written.
    """
    everything = [(role, name) for role in sorted(inputs) for name in sorted(inputs[role].files)]
    _require_same_files(inputs, everything, comm)

    def look() -> list[dict]:
        mine = everything[comm.rank :: comm.size]
        paths = [inputs[role].files[name] for role, name in mine]
        before = [_known(known, role, name) for role, name in mine]
        _announce(paths, before, comm)
        return [_entry(path, entry) for path, entry in zip(paths, before, strict=True)]

    parts = comm.gather_objects(agree(comm, look, "hashing the inputs"))
    found: dict = {}
    for role, what in inputs.items():
        found[role] = {"path": str(what.path.absolute()), "given": what.given, "files": {}}
    for number, (role, name) in enumerate(everything):
        found[role]["files"][name] = parts[number % comm.size][number // comm.size]
    return found


def _require_same_files(
    inputs: dict[str, Input], everything: list[tuple[str, str]], comm: Comm
) -> None:
    """Every rank sees files of the same names and sizes; each then hashes some of them.

    Raises:
        S2T2Error: on every rank; names the first difference.
    """

    def sizes() -> list[tuple[str, str, int]]:
        return [(*each, inputs[each[0]].files[each[1]].stat().st_size) for each in everything]

    found = comm.gather_objects(agree(comm, sizes, "listing the inputs"))
    for rank, other in enumerate(found):
        if different := sorted(set(other) ^ set(found[0])):
            role, name, _ = different[0]
            raise collective(
                S2T2Error(
                    f"{comm.name(rank)} and {comm.name(0)} read other files: {role}, {name} is "
                    "missing or of another size on one of them; give every node the same"
                )
            )


def _known(known: dict, role: str, name: str) -> dict:
    return known.get(role, {}).get("files", {}).get(name, {})


def _announce(paths: list[Path], before: list[dict], comm: Comm) -> None:
    todo = [p for p, entry in zip(paths, before, strict=True) if not _unchanged(_stat(p), entry)]
    size = sum(path.stat().st_size for path in todo) * comm.size
    if comm.rank == 0 and size >= NOTABLE:
        print(f"hashing about {size / 2**30:.1f} GiB of inputs, once", flush=True)


def _stat(path: Path) -> dict[str, int]:
    found = path.stat()
    values = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    return dict(zip(_STAT, values, strict=True))


def _unchanged(stat: dict[str, int], entry: dict) -> bool:
    return "sha256" in entry and all(entry.get(key) == stat[key] for key in _STAT)


def _entry(path: Path, known: dict) -> dict:
    """Size, times, inode and sha256 of a file."""
    stat = _stat(path)
    if _unchanged(stat, known):
        return known
    sha256 = artifacts.sha256_file(path)
    if _stat(path) != stat:
        raise S2T2Error(f"{path} was written while it was read; start again when it is complete")
    return {"sha256": sha256, **stat}


def of_value(value: dict, given: object) -> dict:
    """The entry of an input that is known by what its JSON says, whatever its formatting."""
    files = {"settings": {"sha256": artifacts.sha256_json(value)}}
    return {"path": str(Path(str(given)).absolute()), "given": str(given), "files": files}


def write(run_dir: Path, inputs: dict) -> None:
    """Write `inputs.json`."""
    record = {"format": FORMAT, "output_dir": str(run_dir.absolute()), "inputs": inputs}
    record["sha256"] = artifacts.sha256_json(record)
    artifacts.write_json(run_dir / INPUTS, record)


def read(run_dir: Path) -> dict:
    """What `inputs.json` holds: `output_dir`, and `inputs` by role; one of format 1 is converted.

    Raises:
        ArtifactError: there is no such file, or it is not what a start wrote.
    """
    path = run_dir / INPUTS
    record = artifacts.read_json(path)
    if "format" not in record and "data manifest sha256" in record:
        record = {"output_dir": str(run_dir.absolute()), "inputs": _of_format_1(record)}
    elif record.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has the format {record.get('format')}, expected {FORMAT}; restore the file, "
            "or start in another output_dir"
        )
    else:
        stated = record.pop("sha256", None)
        if stated != artifacts.sha256_json(record) or not _well_formed(record):
            raise ArtifactError(
                f"{path} was altered after it was written; restore the file, or start in another "
                "output_dir"
            )
    return record


def _well_formed(record: dict) -> bool:
    inputs = record.get("inputs")
    return (
        isinstance(record.get("output_dir"), str)
        and isinstance(inputs, dict)
        and all(isinstance(entry, dict) and _is_input(entry) for entry in inputs.values())
    )


def _is_input(entry: dict) -> bool:
    files = entry.get("files")
    texts = all(isinstance(entry.get(key), str | None) for key in ("path", "given"))
    return texts and isinstance(files, dict) and all(isinstance(x, dict) for x in files.values())


def _of_format_1(record: dict) -> dict:
    """Version 0.1.0 knew weights by their size, and other files by no role."""
    inputs = {
        "data": {"files": {artifacts.MANIFEST: {"sha256": record["data manifest sha256"]}}},
        DEEPSPEED: {"files": {"settings": {"sha256": record.get("deepspeed settings sha256")}}},
    }
    if "model config.json sha256" in record:
        weights = record.get("model weight files (bytes)", {})
        files = {name: {"bytes": size} for name, size in weights.items()}
        files["config.json"] = {"sha256": record["model config.json sha256"]}
        inputs["model"] = {"files": files, "partial": True}
    return inputs


def known(run_dir: Path) -> dict:
    """The inputs of an earlier start, for their hashes; empty if they cannot be read."""
    try:
        return read(run_dir)["inputs"]
    except (ArtifactError, OSError):
        return {}


def differences(old: dict, new: dict, roles: Iterable[str] | None = None) -> list[str]:
    """One text for every file in which inputs differ: `model, config.json: 1a2b -> 3c4d`.

    Args:
        roles: compare these alone; default: all that `new` has.
    """
    found = []
    for role in sorted(new if roles is None else roles):
        before, now = old.get(role), new[role]["files"]
        if before is None:
            continue  # of format 1, which knew no such role
        names = before["files"].keys() if before.get("partial") else {*before["files"], *now}
        for name in sorted(names):
            a, b = before["files"].get(name, {}), now.get(name, {})
            key = "sha256" if "sha256" in a or not a else "bytes"
            if a.get(key) != b.get(key):
                found.append(f"{role}, {name}: {_short(a.get(key))} -> {_short(b.get(key))}")
    return found


def _short(value: object) -> str:
    return "none" if value is None else str(value)[:12]


def places(record: dict, role: str, run_dir: Path) -> list[Path]:
    """Where an input of a run may be now: where it was, or as far from the run as it was.

    Args:
        record: of `read`.
    """
    path = record["inputs"].get(role, {}).get("path")
    if path is None:
        return []
    beside = Path(os.path.relpath(path, record["output_dir"]))
    return [Path(path), Path(os.path.normpath(run_dir.absolute() / beside))]
