"""Parquet as JSON lines: one object per row, with the columns of the text and the id."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from s2t2_dist.errors import DataError

ROWS_AT_ONCE = 256


def parquet_lines(
    path: Path, raw: BinaryIO, columns: Sequence[str], longest: int
) -> Iterator[bytes]:
    """Yield the rows of a Parquet file as JSON lines, so that line N is row N.

    Args:
        columns: the text's, which must be there, and the id's.
        longest: bytes that a line may have.

    Raises:
        DataError: the file is damaged, or has no such column of text, or an id or a text cannot be.
    """
    try:
        file = pa.parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        if columns[0] not in names:
            raise DataError(
                f"{path} has the columns {', '.join(map(repr, names))}, not {columns[0]!r}; name "
                "the one of the text with --field"
            )
        wanted = [name for name in dict.fromkeys(columns) if name in names]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
            yield b"".join(_line(path, row, columns[0], longest) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the file
        raise DataError(
            f"{path} is a truncated or damaged Parquet file ({error}); copy it again"
        ) from None


def _line(path: Path, row: dict, field: str, longest: int) -> bytes:
    try:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except TypeError:
        kinds = {name: type(value).__name__ for name, value in row.items()}
        if _is_json(row[field]):
            name = next(name for name in row if not _is_json(row[name]))
            raise DataError(
                f"{path}: the id column {name!r} holds {kinds[name]}, neither text nor numbers; "
                "name another one with --id-field, or '' to name documents by the hash of their "
                "text"
            ) from None
        shown = ", ".join(f"{name!r} {kind}" for name, kind in kinds.items())
        raise DataError(
            f"{path} has no text in its columns ({shown}); name one of strings with --field"
        ) from None
    if len(line) > longest:
        raise DataError(f"{path}: a document is longer than {longest:,} bytes; split it")
    return line


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
