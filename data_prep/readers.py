"""Parse FASTA, JSON lines and plain text into documents, and count everything that is changed.

A document is an id and a text. The id alone decides the split, the sample and the order, so it
must be stable. It is the first word of a FASTA header, the field `id` of a JSON line, or, if there
is neither, the sha256 of the text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.sources import Chunk, OpenFile, open_binary, read_chunks
from s2t2_dist.errors import DataError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RARE_RESIDUES = "XBZUOJ"

LETTERS = (RESIDUES + RARE_RESIDUES).encode()
SHOWN_PLACES = 10


class Document(NamedTuple):
    """One protein or one text."""

    id: str
    text: str


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        strict: raise an error for what is otherwise only counted: bytes of a FASTA that are no
            amino acid letter, empty documents, and records without an id.
        field: JSON field that holds the text.
    """

    strict: bool = False
    field: str = "text"


@dataclass
class ReadCounts:
    """Counts of what was read, left out and changed.

    Attributes:
        documents, characters: kept.
        empty: documents without text, left out.
        unnamed: FASTA records without an id, kept; the hash of the sequence is their id.
        stops: `*` at the end of a sequence, left out.
        lower_case: letters read as upper case.
        illegal: bytes that are no amino acid letter, left out; how often each occurred.
        places: file and line of the first of these bytes, at most SHOWN_PLACES.
    """

    documents: int = 0
    characters: int = 0
    empty: int = 0
    unnamed: int = 0
    stops: int = 0
    lower_case: int = 0
    illegal: Counter = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, other: "ReadCounts") -> None:
        """Add the counts of the next part of the input."""
        for name in ("documents", "characters", "empty", "unnamed", "stops", "lower_case"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.illegal.update(other.illegal)
        self.places = (self.places + other.places)[:SHOWN_PLACES]

    @classmethod
    def of(cls, record: dict) -> "ReadCounts":
        """The inverse of `record`."""
        return cls(**{**record, "illegal": Counter(record.get("illegal", {}))})

    def record(self) -> dict:
        """The counts as a JSON object, for the manifest."""
        return {**asdict(self), "illegal": dict(sorted(self.illegal.items()))}

    def summary(self) -> str:
        """One line on what was changed or left out; empty if nothing was."""
        shown = ", ".join(f"{byte} {count:,}" for byte, count in sorted(self.illegal.items()))
        parts = [
            f"{self.illegal.total():,} bytes that are no amino acid letter left out ({shown}; "
            f"{', '.join(self.places)}{' ...' * (len(self.places) == SHOWN_PLACES)})"
            * bool(self.illegal),
            f"{self.empty:,} empty documents left out" * bool(self.empty),
            f"{self.unnamed:,} records without an id" * bool(self.unnamed),
            f"{self.stops:,} stops '*' left out" * bool(self.stops),
            f"{self.lower_case:,} lower-case letters read as upper case" * bool(self.lower_case),
        ]
        return "; ".join(filter(None, parts))


DEFAULT_READ = ReadOptions()


def id_hash(identifier: str, purpose: str) -> int:
    """A 64-bit hash of a document's id. Hashes for different purposes are independent."""
    return int(id_hashes([identifier], purpose)[0])


def id_hashes(identifiers: Iterable[str], purpose: str) -> np.ndarray:
    """`id_hash` of each id, (ids,) uint64."""
    start = hashlib.blake2b(digest_size=8, person=purpose.encode())
    digests = bytearray()
    for identifier in identifiers:
        state = start.copy()
        state.update(identifier.encode())
        digests += state.digest()
    return np.frombuffer(bytes(digests), "<u8")


def read_documents(
    paths: Sequence[Path],
    options: ReadOptions = DEFAULT_READ,
    counts: ReadCounts | None = None,
    open_file: OpenFile = open_binary,
    chunk_size: int | None = None,
) -> Iterator[Document]:
    """Yield every document of the files, in file order; memory holds one chunk of them.

    Args:
        counts: receives the counts of what was read.
        open_file: opens a file (`reading_progress` gives a function that shows progress).
        chunk_size: bytes; affects only memory and speed.

    Raises:
        DataError: a file is missing, truncated, damaged, of an unknown format or without
            documents, or a document is bad; names the file, and the line of a bad document.
    """
    counts = ReadCounts() if counts is None else counts
    held = Counter()
    for chunk in read_chunks(paths, chunk_size, open_file):
        documents, found = parse_chunk(chunk, options)
        counts.add(found)
        held[chunk.path] += len(documents)
        yield from documents
    require_documents(paths, held)


def require_documents(paths: Sequence[Path], held: dict[Path, int]) -> None:
    """Check that each file gave at least one document.

    Args:
        held: number of documents by file.

    Raises:
        DataError: names the first file that gave none.
    """
    for path in paths:
        if not held[path]:
            raise DataError(
                f"{path} holds no document with a residue or text; leave it out, or check its "
                "content"
            )


def parse_chunk(chunk: Chunk, options: ReadOptions) -> tuple[list[Document], ReadCounts]:
    """The documents of a chunk, and the counts of what was read.

    Raises:
        DataError: a document is bad; names the file and the line.
    """
    counts = ReadCounts()
    parse = {"fasta": _parse_fasta, "jsonl": _parse_jsonl, "text": _parse_text}[chunk.kind]
    documents = parse(chunk, options, counts)
    counts.documents = len(documents)
    counts.characters = sum([len(document.text) for document in documents])
    return documents, counts


def _parse_fasta(chunk: Chunk, options: ReadOptions, counts: ReadCounts) -> list[Document]:
    data, documents = chunk.data, []
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    position = len(data) - len(data.lstrip()) if chunk.line == 1 else 0
    assert data[position : position + 1] in (b">", b""), "a chunk starts with a record"
    for record in data[position + 1 :].split(b"\n>") if data[position:] else []:
        header, _, body = record.partition(b"\n")
        cased = body.translate(None, b"\n")
        sequence = cased.upper()
        name = header.split(maxsplit=1)[0].decode("utf-8", "replace") if header.strip() else ""
        if sequence.translate(None, LETTERS) or not (sequence and name):
            line = chunk.line + data.count(b"\n", 0, position)
            sequence = _unusual(chunk.path, line, name, body, options, counts)
        if cased != sequence:
            counts.lower_case += len(cased) - len(cased.translate(None, LETTERS.lower()))
        if sequence:
            text = sequence.decode("ascii")
            documents.append(Document(name or _text_id(text), text))
        position += len(record) + 2
    return documents


def _unusual(
    path: Path, line: int, name: str, body: bytes, options: ReadOptions, counts: ReadCounts
) -> bytes:
    """Clean the sequence of a record that has other bytes than letters, no letters or no id.

    Args:
        line: line number of the record's header.
    """
    lines = [text.strip(b" \t").upper() for text in body.split(b"\n")]
    if b"".join(lines).endswith(b"*"):
        last = max(number for number, text in enumerate(lines) if text)
        lines[last] = lines[last][:-1]
        counts.stops += 1
    for number, text in enumerate(lines, start=line + 1):
        if strange := text.translate(None, LETTERS):
            shown = [chr(byte).encode("ascii", "backslashreplace").decode() for byte in strange]
            if options.strict:
                raise DataError(
                    f"{path} line {number}: {shown[0]!r} in record {name} is not an amino acid "
                    f"letter ({RESIDUES} and {RARE_RESIDUES}); correct it or drop --strict"
                )
            counts.illegal.update(map(repr, shown))
            counts.places = [*counts.places, f"{path.name} line {number}"][:SHOWN_PLACES]
    sequence = b"".join(lines)
    sequence = sequence.translate(None, bytes(set(sequence) - set(LETTERS)))
    if options.strict and not name:
        raise DataError(
            f"{path} line {line}: a FASTA header without an id after '>'; add one or drop --strict"
        )
    if options.strict and not sequence:
        raise DataError(
            f"{path} line {line}: record {name} has no residue; remove it or drop --strict"
        )
    counts.empty += not sequence
    counts.unnamed += bool(sequence and not name)
    return sequence


def _parse_jsonl(chunk: Chunk, options: ReadOptions, counts: ReadCounts) -> list[Document]:
    documents = []
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.line):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record[options.field]
            identifier = str(record["id"]) if "id" in record else _text_id(text)
            (identifier + text).encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{chunk.path} line {number}: expected a JSON object with the string field "
                f"{options.field!r}; correct the line, or name another field with --field"
            ) from None
        if text:
            documents.append(Document(identifier, text))
        else:
            _empty(chunk.path, number, options, counts)
    return documents


def _empty(path: Path, line: int, options: ReadOptions, counts: ReadCounts) -> None:
    if options.strict:
        raise DataError(
            f"{path} line {line}: the field {options.field!r} is empty; remove the line or drop "
            "--strict"
        )
    counts.empty += 1


def _parse_text(chunk: Chunk, _: ReadOptions, counts: ReadCounts) -> list[Document]:
    """Blank lines separate documents."""
    documents, paragraph = [], []
    for number, line in enumerate([*chunk.data.split(b"\n"), b""], start=chunk.line):
        try:
            decoded = line.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"{chunk.path} line {number}: not UTF-8 text; convert the file to UTF-8"
            ) from None
        if decoded.strip():
            paragraph.append(decoded)
        elif paragraph:
            text = "\n".join(paragraph)
            documents.append(Document(_text_id(text), text))
            paragraph = []
    return documents


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
