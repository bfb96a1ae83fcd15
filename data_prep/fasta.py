"""Parse FASTA: the 26 letters are kept, and what is no sequence is refused, left out or counted."""

import re
from pathlib import Path

from data_prep.documents import Document, ReadCounts, ReadOptions, bad_record
from data_prep.fasta_lines import COMMENT, has_title, is_words
from data_prep.formats import BOM, COMMENTS
from data_prep.ids import fasta_id, text_id
from data_prep.sources import Chunk
from s2t2_dist.errors import DataError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RARE_RESIDUES = "XBZUOJ"
LETTERS = (RESIDUES + RARE_RESIDUES).encode()

# Marks before a line, of files that were put end to end.
BOM_LINE = re.compile(rb"\n(?:" + BOM + rb")+")
BLANKS = re.compile(rb"\s*")


def parse_fasta(chunk: Chunk, options: ReadOptions, counts: ReadCounts) -> list[Document]:
    """The records of a chunk; see `readers.parse_chunk`."""
    data, documents = chunk.data, []
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if BOM in data:  # files with one were put end to end
        data = BOM_LINE.sub(b"\n", data)
    position = _first_record(data, counts) if chunk.line == 1 else 0
    assert data[position : position + 1] in (b">", b""), "a chunk starts with a record"
    for record in data[position + 1 :].split(b"\n>") if data[position:] else []:
        header, _, body = record.partition(b"\n")
        cased = body.translate(None, b"\n")
        sequence = cased.upper()
        name = fasta_id(header)
        if sequence.translate(None, LETTERS) or not (sequence and name):
            line = chunk.line + data.count(b"\n", 0, position)
            try:
                cased, sequence = _unusual(chunk.path, line, header, body, options, counts)
            except _NoSequenceError as error:
                bad_record(chunk.path, error.line, str(error), options, counts)
                cased = sequence = b""
        if cased != sequence:
            counts.lower_case += len(cased) - len(cased.translate(None, LETTERS.lower()))
        if sequence:
            text = sequence.decode("ascii")
            documents.append(Document((options.id_field and name) or text_id(text), text))
        position += len(record) + 2
    return documents


def _first_record(data: bytes, counts: ReadCounts) -> int:
    """Where the first record of a file begins, after blank lines and comments."""
    start = BLANKS.match(data).end()
    end = COMMENTS.match(data, start).end()
    lines = data[start:end].split(b"\n")
    counts.comments += sum(line.lstrip().startswith(COMMENT) for line in lines)
    return end


class _NoSequenceError(Exception):
    """A line of a record is no sequence."""

    def __init__(self, line: int, problem: str):
        super().__init__(problem)
        self.line = line


def _unusual(
    path: Path, line: int, header: bytes, body: bytes, options: ReadOptions, counts: ReadCounts
) -> tuple[bytes, bytes]:
    """Clean the sequence of a record that has other bytes than letters, no letters or no id.

    Args:
        line: line number of the record's header.

    Returns:
        The sequence in the case of the file, and in upper case.
    """
    name = fasta_id(header)
    lines = _sequence_lines(header, body, line, counts)
    if b"".join(lines).endswith(b"*"):
        last = max(number for number, text in enumerate(lines) if text)
        lines[last] = lines[last][:-1]
        counts.stops += 1
    for number, text in enumerate(lines, start=line + 1):
        if strange := text.upper().translate(None, LETTERS):
            shown = [chr(byte).encode("ascii", "backslashreplace").decode() for byte in strange]
            if options.strict:
                raise DataError(
                    f"{path} line {number}: {shown[0]!r} in record {name} is not an amino acid "
                    f"letter ({RESIDUES} and {RARE_RESIDUES}); correct it or drop --strict"
                )
            counts.add_illegal(path, number, shown)
    cased = b"".join(lines)
    cased = cased.translate(None, bytes(set(cased) - set(LETTERS + LETTERS.lower())))
    if options.strict and not name:
        raise DataError(
            f"{path} line {line}: a FASTA header without an id after '>'; add one or drop --strict"
        )
    if options.strict and not cased:
        raise DataError(
            f"{path} line {line}: record {name} has no residue; remove it or drop --strict"
        )
    counts.empty += not cased
    counts.unnamed += bool(cased and not name)
    return cased, cased.upper()


def _sequence_lines(header: bytes, body: bytes, line: int, counts: ReadCounts) -> list[bytes]:
    """The lines of a record, stripped; comments and the title of a PIR record are empty.

    Raises:
        _NoSequenceError: a line holds `>` or is a line of words.
    """
    lines = [text.strip(b" \t") for text in body.split(b"\n")]
    if has_title(header, lines):
        counts.comments += bool(lines[0])
        lines[0] = b""
    for number, text in enumerate(lines):
        if text.startswith(COMMENT):
            counts.comments += 1
            lines[number] = b""
        elif b">" in text:
            raise _NoSequenceError(
                line + 1 + number,
                "'>' inside a sequence: a header that does not begin its line (were files without "
                "a last line end put end to end?); put it on a line of its own",
            )
        elif is_words(text):
            shown = text[:60].decode("utf-8", "backslashreplace")
            raise _NoSequenceError(
                line + 1 + number,
                f"{shown!r} is a line of words, not a sequence; move it into the header, or begin "
                "it with ';' to make it a comment",
            )
    return lines
