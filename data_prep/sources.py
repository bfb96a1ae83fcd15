"""Read input files as a stream of chunks: decompressed, and cut between documents.

The cuts depend only on the files' bytes and the chunk size. So every process sees the same
numbered chunks and can work on its own share of them. Memory holds one chunk.
"""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.formats import READ_BYTES, decoded, detect_format
from data_prep.parquet import parquet_lines
from data_prep.progress import OpenFile
from s2t2_dist.errors import DataError

# Bytes. Small inputs get small chunks, so that every worker has some; large inputs get large ones,
# so that there are few part files.
SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 20, 1 << 23
CHUNKS_OF_SMALL = 32
# Bytes; bounds memory. Far above any protein (36,000 residues) or source file.
LONGEST_DOCUMENT = 1 << 28
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class Chunk(NamedTuple):
    """Whole documents of one file.

    Attributes:
        number: number of the chunk over all files, from 0.
        kind: `fasta`, `jsonl` or `text`.
        line: line of the file at which `data` begins, from 1.
    """

    number: int
    path: Path
    kind: str
    line: int
    data: bytes


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes."""
    return path.open("rb")


def chunk_bytes(paths: Sequence[Path]) -> int:
    """The chunk size for these files in bytes, a function of their sizes."""
    size = sum(path.stat().st_size for path in paths) // CHUNKS_OF_SMALL
    return min(max(size, SMALLEST_CHUNK), LARGEST_CHUNK)


def read_chunks(
    paths: Sequence[Path],
    size: int | None = None,
    open_file: OpenFile = open_binary,
    columns: Sequence[str] = ("text", "id"),
) -> Iterator[Chunk]:
    """Yield the files, in order, as chunks of about `size` bytes (default: `chunk_bytes`).

    Args:
        columns: of a Parquet file, whose rows become JSON lines: the text's and the id's.

    Raises:
        DataError: a file is missing, empty, truncated, damaged or of an unknown format, or a
            document is longer than LONGEST_DOCUMENT bytes.
    """
    kinds = [detect_format(path) for path in paths]
    size = size or chunk_bytes(paths)
    number = 0
    for path, kind in zip(paths, kinds, strict=True):
        line = 1
        with open_file(path) as raw:
            if kind == "parquet":
                kind, blocks = "jsonl", parquet_lines(path, raw, columns, LONGEST_DOCUMENT)
            else:
                blocks = decoded(path, raw, min(size, READ_BYTES))
            for data in _cut(path, kind, blocks, size):
                yield Chunk(number, path, kind, line, data)
                line += _count_lines(kind, data)
                number += 1


def _count_lines(kind: str, data: bytes) -> int:
    """Number of line ends; in a FASTA a carriage return alone counts as one."""
    if kind != "fasta" or b"\r" not in data:
        return data.count(b"\n")
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _cut(path: Path, kind: str, blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Join blocks into chunks of at least `size` bytes that end with a document, and the rest."""
    held, wanted = io.BytesIO(), size
    for block in blocks:
        held.write(block)
        if held.tell() < wanted:
            continue
        data = held.getvalue()
        end = _last_cut(kind, data)
        if end:
            yield data[:end]
            held, wanted = io.BytesIO(), size
            held.write(data[end:])
        elif len(data) > LONGEST_DOCUMENT:
            raise DataError(
                f"{path}: a document is longer than {LONGEST_DOCUMENT:,} bytes; split it, or check "
                "that the file has line ends"
            )
        else:
            wanted = min(2 * len(data), LONGEST_DOCUMENT + 1)
    if held.tell():
        yield held.getvalue()


def _last_cut(kind: str, data: bytes) -> int:
    """Where the last document of `data` begins, which may be incomplete; 0 if there is no other."""
    if kind == "fasta":
        return max(data.rfind(b"\n>"), data.rfind(b"\r>")) + 1
    if kind == "jsonl":
        return data.rfind(b"\n") + 1
    return max((match.end() for match in BLANK_LINE.finditer(data)), default=0)
