"""`metrics.jsonl`: one JSON object per line, one line per stage and step; the source of truth."""

import hashlib
import json
import math
import os
import time
from pathlib import Path

from s2t2_dist.errors import ArtifactError

METRICS = "metrics.jsonl"
_TYPES = {"stage": str, "stage_index": int, "step": int, "time": int | float}


class MetricsFile:
    """`metrics.jsonl` of a run directory."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / METRICS
        self._file = self.path.open("ab")
        self._hash = hashlib.sha256(self.path.read_bytes())

    def append(self, stage: str, stage_index: int, step: int, values: dict[str, float]) -> None:
        """Write one line and flush it to the operating system. Non-finite values are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        line = {"stage": stage, "stage_index": stage_index, "step": step, **finite}
        line["time"] = round(time.time(), 3)
        written = json.dumps(line).encode() + b"\n"
        self._file.write(written)
        self._file.flush()
        self._hash.update(written)

    def sync(self) -> int:
        """Flush to the device; returns the length in bytes, which a checkpoint records."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, length: int) -> None:
        """Remove the lines after a checkpoint: the resumed run writes them again.

        Args:
            length: bytes of the file at the checkpoint.

        Raises:
            ArtifactError: the file is shorter than that.
        """
        require_length(self.path, length)
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)
        self._hash = hashlib.sha256(self.path.read_bytes())

    @property
    def sha256(self) -> str:
        """Hex sha256 of what was written; a checkpoint and the end of a run record it."""
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()


def require_length(path: Path, length: int) -> None:
    """A `metrics.jsonl` still holds the lines that it held at a checkpoint.

    Raises:
        ArtifactError: it has fewer bytes than `length`.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < length:
        raise ArtifactError(
            f"{path} has {found} bytes, but had {length} when the checkpoint was written: "
            "it was truncated or replaced; restore it, or start again in a new output_dir"
        )


def require_unaltered(path: Path, length: int | None, sha256: str | None) -> None:
    """The first `length` bytes of a `metrics.jsonl` (None: all) are those that were recorded.

    Args:
        sha256: of these bytes; None if an earlier version recorded none.

    Raises:
        ArtifactError: they are others.
    """
    if sha256 is None:
        return
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content[:length]).hexdigest() != sha256:
        raise ArtifactError(
            f"{path} was altered after it was written: its sha256 is not the recorded one; restore "
            "it, or start again in a new output_dir"
        )


def read_metrics(run_dir: Path, length: int | None = None) -> list[dict]:
    """Every complete line of a run's `metrics.jsonl`; empty if there is no file.

    Args:
        length: read so many bytes of it, as a checkpoint recorded; default: all.

    Raises:
        ArtifactError: a line is not what a step wrote.
    """
    path = run_dir / METRICS
    if not path.exists():
        return []
    return parse_lines(path, path.read_bytes()[:length])


def parse_lines(path: Path, content: bytes, first: int = 1) -> list[dict]:
    """The complete lines in a part of `metrics.jsonl`, whose first line has number `first`.

    Raises:
        ArtifactError: names the first line that is not what a step wrote.
    """
    lines = []
    for number, text in enumerate(content.split(b"\n")[:-1], first):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not is_line(line):
            raise ArtifactError(
                f"{path} is damaged: its line {number} is not what a step wrote; restore the file, "
                "or start again in a new output_dir"
            )
        lines.append(line)
    return lines


def is_line(line: object) -> bool:
    """Whether each key has a number, and those of every line have their type."""
    if not isinstance(line, dict) or isinstance(line.get("time"), bool):
        return False
    numbers = (value for key, value in line.items() if key != "stage")
    return all(isinstance(line.get(key), kind) for key, kind in _TYPES.items()) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in numbers
    )


def position(line: dict) -> list[int]:
    """Number of the stage, and step in it."""
    return [line["stage_index"], line["step"]]


def metric_values(line: dict) -> dict[str, float]:
    """The values of a line by their names in MLflow: `translate/loss`."""
    return {f"{line['stage']}/{key}": value for key, value in line.items() if key not in _TYPES}
