"""Parse FASTA, JSON lines and plain text into documents, and count everything that is changed.

A document is an id and a text. The id alone decides the split, the sample and the order, so it
must be stable. It is the first word of a FASTA header, the field `id` of a JSON line, or, if there
is neither, the sha256 of the text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.documents import DEFAULT as DEFAULT_READ
from data_prep.documents import Document, ReadCounts, ReadOptions
from data_prep.fasta import LETTERS, RARE_RESIDUES, RESIDUES, parse_fasta
from data_prep.ids import id_hash, id_hashes, text_id
from data_prep.json_lines import parse_jsonl
from data_prep.progress import OpenFile
from data_prep.sources import Chunk, open_binary, read_chunks
from s2t2_dist.errors import DataError

__all__ = [
    "DEFAULT_READ",
    "LETTERS",
    "RARE_RESIDUES",
    "RESIDUES",
    "Document",
    "ReadCounts",
    "ReadOptions",
    "id_hash",
    "id_hashes",
    "parse_chunk",
    "read_documents",
    "require_documents",
]


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
    columns = (options.field, options.id_field)
    for chunk in read_chunks(paths, chunk_size, open_file, columns):
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
    parse = {"fasta": parse_fasta, "jsonl": parse_jsonl, "text": _parse_text}[chunk.kind]
    documents = parse(chunk, options, counts)
    counts.documents = len(documents)
    counts.characters = sum([len(document.text) for document in documents])
    return documents, counts


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
            documents.append(Document(text_id(text), text))
            paragraph = []
    return documents
