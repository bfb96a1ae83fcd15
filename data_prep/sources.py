"""Read input files as a stream of chunks: decompressed, and cut between documents.

The cuts depend only on the files' bytes and the chunk size. So every process sees the same
numbered chunks and can work on its own share of them. Memory holds one chunk.
"""

import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import zstandard
from isal import igzip, isal_zlib

from s2t2_dist.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress

TEXT_FORMATS = {".jsonl": "jsonl", ".txt": "text"}
COMPRESSED = (".gz", ".zst")
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BOM = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20
# Bytes. Small inputs get small chunks, so that every worker has some; large inputs get large ones,
# so that there are few part files.
SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 20, 1 << 23
CHUNKS_OF_SMALL = 32
# Bytes; bounds memory. Far above any protein (36,000 residues) or source file.
LONGEST_DOCUMENT = 1 << 28
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")

OpenFile = Callable[[Path], BinaryIO]


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


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """Yield a progress bar on stderr, which shows only if stderr is a terminal."""
    from rich.console import Console  # imported here because workers never need it
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        yield progress


@contextmanager
def reading_progress(doing: str) -> Iterator[OpenFile]:
    """Yield a function that opens files and shows in a progress bar how far they are read."""
    with progress_bar() as progress:
        yield lambda path: progress.open(path, "rb", description=f"{doing} {path.name}")


def chunk_bytes(paths: Sequence[Path]) -> int:
    """The chunk size for these files in bytes, a function of their sizes."""
    size = sum(path.stat().st_size for path in paths) // CHUNKS_OF_SMALL
    return min(max(size, SMALLEST_CHUNK), LARGEST_CHUNK)


def read_chunks(
    paths: Sequence[Path], size: int | None = None, open_file: OpenFile = open_binary
) -> Iterator[Chunk]:
    """Yield the files, in order, as chunks of about `size` bytes (default: `chunk_bytes`).

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
            for data in _cut(path, kind, _unzipped(path, raw, min(size, READ_BYTES)), size):
                yield Chunk(number, path, kind, line, data)
                line += _count_lines(kind, data)
                number += 1


def _count_lines(kind: str, data: bytes) -> int:
    """Number of line ends; in a FASTA a carriage return alone counts as one."""
    if kind != "fasta" or b"\r" not in data:
        return data.count(b"\n")
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def detect_format(path: Path) -> str:
    """The format of a file: `jsonl` or `text` by its name, `fasta` by its first character.

    Raises:
        DataError: the file is missing or empty, or has none of the three formats.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {what}; give a FASTA, .jsonl or .txt file, plain or compressed (.gz, .zst)"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    if suffixes and suffixes[-1] in TEXT_FORMATS:
        return TEXT_FORMATS[suffixes[-1]]
    with path.open("rb") as raw:
        first = next((b for b in map(bytes.lstrip, _unzipped(path, raw)) if b), b"")
    if not first:
        raise DataError(f"{path} is empty; give a FASTA, .jsonl or .txt file with documents")
    if not first.startswith(b">"):
        shown = first[:20].decode("ascii", "replace")
        raise DataError(
            f"{path} is not a FASTA: it starts with {shown!r}, not with '>' (text files must be "
            "named .jsonl or .txt)"
        )
    return "fasta"


def _unzipped(path: Path, raw: BinaryIO, block_size: int = READ_BYTES) -> Iterator[bytes]:
    """Yield a file's content, decompressed if it is gzip or zstd (of any number of members)."""
    magic = raw.read(4)
    raw.seek(0)
    try:
        if magic == ZSTD_MAGIC:
            yield from _unzstd(raw, block_size)
            return
        if magic.startswith(GZIP_MAGIC):
            raw = igzip.IGzipFile(fileobj=raw)
        while block := raw.read(block_size):
            yield block
    except (EOFError, zlib.error, isal_zlib.IsalError, gzip.BadGzipFile) as error:
        kind, problem = "gzip", error
    except zstandard.ZstdError as error:
        kind, problem = "zstd", error
    else:
        return
    raise DataError(f"{path} is a truncated or damaged {kind} file ({problem}); copy it again")


def _unzstd(raw: BinaryIO, block_size: int) -> Iterator[bytes]:
    """Decompress frame by frame, because the library's reader accepts a truncated file."""
    frame = None
    while block := raw.read(block_size):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if text := frame.decompress(block):
                yield text
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise zstandard.ZstdError("the last frame is incomplete")


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
            wanted = 2 * len(data)
    if held.tell():
        yield held.getvalue()


def _last_cut(kind: str, data: bytes) -> int:
    """Where the last document of `data` begins, which may be incomplete; 0 if there is no other."""
    if kind == "fasta":
        return max(data.rfind(b"\n>"), data.rfind(b"\r>")) + 1
    if kind == "jsonl":
        return data.rfind(b"\n") + 1
    return max((match.end() for match in BLANK_LINE.finditer(data)), default=0)
