"""Parquet as JSON lines: one object per row, with the columns of the text and the id."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from s2t2_dist.errors import DataError

ROWS_AT_ONCE = 256


def parquet_lines(path: Path, raw: BinaryIO, columns: Sequence[str]) -> Iterator[bytes]:
    """Yield the rows of a Parquet file as JSON lines, so that line N is row N.

    Args:
        columns: the text's, which must be there, and the id's.

    Raises:
        DataError: the file is damaged, or has no such column of text.
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
            yield b"".join(_line(path, row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the file
        raise DataError(
            f"{path} is a truncated or damaged Parquet file ({error}); copy it again"
        ) from None


def _line(path: Path, row: dict) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except TypeError:
        kinds = ", ".join(f"{name!r} {type(value).__name__}" for name, value in row.items())
        raise DataError(
            f"{path} has no text in its columns ({kinds}); name one of strings with --field"
        ) from None
