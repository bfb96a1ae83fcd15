"""What a file holds, by its first bytes: compression, encoding, format. Names only break ties.

| begins with (decompressed, decoded) | format |
|---|---|
| `PAR1` | Parquet |
| `>`, perhaps after comment lines; in a file named .txt, only before sequences | FASTA |
| a JSON object | JSON lines |
| anything else, in a file named .txt | text |
"""

import bz2
import codecs
import functools
import gzip
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from isal import igzip, isal_zlib

from data_prep.fasta_lines import looks_like_fasta
from s2t2_dist.errors import DataError

READ_BYTES = 1 << 20
BOM = codecs.BOM_UTF8
NAMED = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
FASTA_NAMES = (".fasta", ".fa", ".faa", ".fas", ".fsa", ".pep", ".seq")
COMPRESSED = (".gz", ".bgz", ".zst", ".zstd", ".xz", ".bz2")
GZIP, BZIP2, XZ, ZSTD, PARQUET = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PAR1"
# A frame of other data, which pzstd writes first: its first byte is 0x50 to 0x5f.
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
# Bytes of history that a frame may ask for; what `zstd --long=31` writes asks for all of them.
ZSTD_WINDOW = 1 << 31
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar", b"\x1f\x9d": "compress"}
# UTF-32 first, because its little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    BOM: None,
}
DAMAGED = (EOFError, zlib.error, isal_zlib.IsalError, gzip.BadGzipFile, lzma.LZMAError, OSError)
# Bytes that a format is told by.
HEAD = 1 << 16
LIKE_JSON = re.compile(r"\{\s*[\"']|\[\s*[\[{\"']")
COMMENTS = re.compile(rb"(?:[;#][^\n]*(?:\n\s*|\Z))*")


def detect_format(path: Path) -> str:
    """The format of a file: `fasta`, `jsonl`, `text` or `parquet`.

    Raises:
        DataError: the file is missing or empty, cannot be read, or has none of the formats.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {what}; give a FASTA, .jsonl, .txt or Parquet file, plain or compressed "
            "(.gz, .zst, .xz, .bz2)"
        )
    try:
        with path.open("rb") as raw:
            if raw.read(4) == PARQUET:
                return "parquet"
            head = _head(path, raw)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); ask for permission") from None
    name = name_suffix(path)
    named = NAMED.get(name)
    if not head:
        if named:
            return named  # and the reader says that it holds no document
        raise DataError(f"{path} is empty; give a FASTA, .jsonl or .txt file with documents")
    start = head.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    start = start[COMMENTS.match(start).end() :]
    if start.startswith(b">"):
        if named is None or looks_like_fasta(start):
            return "fasta"
        if named == "text":
            _warn_of_text(path)
    if name not in FASTA_NAMES and named != "jsonl" and _is_json_lines(head):
        return "jsonl"
    if named:
        return named
    raise DataError(f"{path} {_unknown(head)}")


@functools.cache
def _warn_of_text(path: Path) -> None:
    logging.getLogger(__name__).warning(
        "%s begins with '>' and is read as text, because its lines are no sequences; if it is a "
        "FASTA, name it .fasta",
        path,
    )


def name_suffix(path: Path) -> str:
    """The last suffix of a file's name that is not of a compression, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def text_suffix(path: Path) -> str:
    """What a file of no known format should be named: .jsonl or .txt, or nothing if it is no text.

    What begins like JSON, but is none by lines, is named so too, for its faults to be told.
    """
    with path.open("rb") as raw:
        head = _head(path, raw)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return ""
    if not text or "\0" in text:
        return ""
    return ".jsonl" if LIKE_JSON.match(text) else ".txt"


def _head(path: Path, raw: BinaryIO) -> bytes:
    """The first bytes of the text of a file, at least HEAD if it has so many, without blanks."""
    head = b""
    for block in decoded(path, raw, HEAD):
        head = (head + block).lstrip()
        if len(head) >= HEAD:
            break
    return head


def _is_json_lines(head: bytes) -> bool:
    line, end, _ = head.partition(b"\n")
    if not end and len(head) >= HEAD:  # a line longer than the head
        return re.match(rb'\{\s*"', line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unknown(head: bytes) -> str:
    """What to say of a file that has none of the formats."""
    for magic, kind in ARCHIVES.items():
        if head.startswith(magic):
            return f"is a {kind} archive; unpack it and give the files in it"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it and give the files in it"
    shown = head[:20].decode("ascii", "backslashreplace")
    return (
        f"is not a FASTA: it starts with {shown!r}, not with '>' (text files must be named .jsonl "
        "or .txt)"
    )


def decoded(path: Path, raw: BinaryIO, block_size: int = READ_BYTES) -> Iterator[bytes]:
    """Yield a file's text as UTF-8, decompressed, without a byte order mark.

    UTF-16 and UTF-32 are told by their mark, UTF-16 also by the zero bytes of its first letters.
    Other text passes as it is.

    Raises:
        DataError: the file is truncated or damaged.
    """
    blocks = _unzipped(path, raw, block_size)
    first = b""
    while len(first) < 4 and (block := next(blocks, b"")):
        first += block
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    encoding = MARKS.get(mark)
    if not mark and len(first) >= 4:
        zeros = [byte == 0 for byte in first[:4]]
        encoding = {
            (False, True, False, True): "utf-16-le",
            (True, False, True, False): "utf-16-be",
        }.get(tuple(zeros))
    first = first[len(mark) :]
    if encoding is None:
        if first:
            yield first
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        yield decoder.decode(first).encode()
        for block in blocks:
            yield decoder.decode(block).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise DataError(
            f"{path} is truncated or damaged {encoding.upper()} text ({error}); copy it again"
        ) from None


def _unzipped(path: Path, raw: BinaryIO, block_size: int) -> Iterator[bytes]:
    """Yield a file's content, decompressed (of any number of members)."""
    raw.seek(0)
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(GZIP):
        kind, blocks = "gzip", _blocks(igzip.IGzipFile(fileobj=raw), block_size)
    elif magic.startswith(ZSTD) or (magic[1:4] == ZSTD_SKIPPABLE and magic[0] >> 4 == 5):
        # Frame by frame, because the library's reader accepts a truncated file.
        library = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        kind, blocks = "zstd", _members(raw, block_size, library.decompressobj)
    elif magic == XZ:
        kind, blocks = "xz", _members(raw, block_size, lzma.LZMADecompressor, padding=b"\0")
    elif magic.startswith(BZIP2) and magic[3:4].isdigit():
        kind, blocks = "bzip2", _members(raw, block_size, bz2.BZ2Decompressor)
    else:
        yield from _blocks(raw, block_size)
        return
    try:
        yield from blocks
    except (*DAMAGED, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the file
        problem = str(error)
        raise DataError(
            f"{path} is a truncated or damaged {kind} file ({problem}); copy it again"
        ) from None


def _blocks(raw: BinaryIO, block_size: int) -> Iterator[bytes]:
    while block := raw.read(block_size):
        yield block


def _members(
    raw: BinaryIO, block_size: int, start: Callable[[], Any], padding: bytes = b""
) -> Iterator[bytes]:
    """Decompress members one after the other; `padding` may follow each."""
    member = None
    while block := raw.read(block_size):
        while block:
            if member is None and padding and not (block := block.lstrip(padding)):
                break
            member = member or start()
            if text := member.decompress(block):
                yield text
            block = member.unused_data if member.eof else b""
            member = None if member.eof else member
    if member:
        raise EOFError("the last part is incomplete")
