"""Streaming readers: FASTA, JSON lines and plain text, gzipped or not, into documents.

A document is an id and a text. The id alone decides the split, the sample and the order, so it
must be stable: the first word of a FASTA header, the field `id` of a JSON line, or the sha256 of
the text where there is no name.
"""

import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from s2t2_dist.errors import DataError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RARE_RESIDUES = "XBZUOJ"

LETTERS = (RESIDUES + RARE_RESIDUES).encode()
TEXT_FORMATS = {".jsonl": "jsonl", ".txt": "text"}
GZIP_MAGIC = b"\x1f\x8b"
PEEK_BYTES = 1 << 16

OpenFile = Callable[[Path], BinaryIO]


class Document(NamedTuple):
    """One protein or one text."""

    id: str
    text: str


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes, unbuffered by anything of ours."""
    return path.open("rb")


@contextmanager
def reading_progress(doing: str) -> Iterator[OpenFile]:
    """Yield an opener whose files move a progress bar on stderr, where stderr is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        yield lambda path: progress.open(path, "rb", description=f"{doing} {path.name}")


def id_hash(identifier: str, purpose: str) -> int:
    """A 64-bit hash of a document's id; each purpose has its own, independent of the others."""
    person = purpose.encode()
    digest = hashlib.blake2b(identifier.encode(), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little")


def read_documents(paths: Iterable[Path], open_file: OpenFile = open_binary) -> Iterator[Document]:
    """Every document of the files, in file order; memory holds one document at a time.

    Args:
        open_file: how a file is opened (`reading_progress` gives one that shows how far it is).

    Raises:
        DataError: a file is missing, empty, cut, of an unknown format or holds a bad document;
            the message names the file and the line.
    """
    parse = {"fasta": _parse_fasta, "jsonl": _parse_jsonl, "text": _parse_text}
    for path in paths:
        kind = detect_format(path)
        count = 0
        with open_file(path) as raw:
            for document in parse[kind](path, _lines(path, raw)):
                yield document
                count += 1
        if count == 0:
            raise DataError(f"{path} holds no {'record' if kind == 'fasta' else 'document'}")


def detect_format(path: Path) -> str:
    """`jsonl` or `text` by the file's name; any other file must be a FASTA by its first character.

    Raises:
        DataError: the file is missing or empty, or is none of the three.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}; give a FASTA, .jsonl or .txt file, gzipped or not")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in TEXT_FORMATS:
        return TEXT_FORMATS[suffixes[-1]]
    with path.open("rb") as raw, _gzip_errors(path):
        first = _unzipped(raw).read(PEEK_BYTES).lstrip()
    if not first:
        raise DataError(f"{path} is empty")
    if not first.startswith(b">"):
        shown = first[:20].decode("ascii", "replace")
        raise DataError(
            f"{path} is not a FASTA: it starts with {shown!r}, not with '>' (text files are named "
            ".jsonl or .txt)"
        )
    return "fasta"


def _unzipped(raw: BinaryIO) -> BinaryIO:
    """The file itself, or what it holds if it is gzip (of any number of members)."""
    magic = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == GZIP_MAGIC else raw


@contextmanager
def _gzip_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is a truncated or damaged gzip file ({error}); fetch it again"
        ) from None


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, unzipped, without their line ends."""
    with _gzip_errors(path):
        for line in _unzipped(raw):
            yield line.rstrip(b"\r\n")


def _parse_fasta(path: Path, lines: Iterator[bytes]) -> Iterator[Document]:
    header, header_line, parts = None, 0, []
    for number, line in enumerate(lines, start=1):
        if not line.startswith(b">"):
            parts.append(line.strip())
            continue
        if header is not None:
            yield _fasta_record(path, header, header_line, parts)
        header, header_line, parts = line, number, []
    if header is not None:
        yield _fasta_record(path, header, header_line, parts)


def _fasta_record(path: Path, header: bytes, line: int, parts: list[bytes]) -> Document:
    words = header[1:].split(maxsplit=1)
    if not words:
        raise DataError(f"{path} line {line}: a FASTA header without an id after '>'")
    sequence = b"".join(parts).upper().removesuffix(b"*")
    name = words[0].decode("utf-8", "replace")
    if not sequence:
        raise DataError(f"{path} line {line}: record {name} has no residue")
    strange = sequence.translate(None, LETTERS)
    if strange:
        position = sequence.index(strange[:1])
        at = line + 1 + int(np.searchsorted(np.cumsum([len(p) for p in parts]), position, "right"))
        raise DataError(
            f"{path} line {at}: {strange[:1].decode('ascii', 'backslashreplace')!r} in record "
            f"{name} is not an amino acid letter ({RESIDUES} and {RARE_RESIDUES})"
        )
    return Document(name, sequence.decode("ascii"))


def _parse_jsonl(path: Path, lines: Iterator[bytes]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"]
            identifier = str(record["id"]) if "id" in record else _text_id(text)
            (identifier + text).encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path} line {number}: expected a JSON object with the string field 'text'"
            ) from None
        if not text:
            raise DataError(f"{path} line {number}: the field 'text' is empty")
        yield Document(identifier, text)


def _parse_text(path: Path, lines: Iterator[bytes]) -> Iterator[Document]:
    """Documents are separated by blank lines, so that a big file is many documents."""
    paragraph: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line {number}: not UTF-8 text") from None
        if decoded.strip():
            paragraph.append(decoded)
        elif paragraph:
            yield _text_document(paragraph)
            paragraph = []
    if paragraph:
        yield _text_document(paragraph)


def _text_document(lines: list[str]) -> Document:
    text = "\n".join(lines)
    return Document(_text_id(text), text)


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
