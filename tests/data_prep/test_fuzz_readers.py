"""Random bytes as FASTA: no crash, and every byte is a residue, a line end, or counted.

The oracle reads byte by byte and shares nothing with the reader but the alphabet.
"""

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.readers import LETTERS, ReadCounts, ReadOptions, parse_chunk, read_documents
from data_prep.sources import Chunk, _cut
from s2t2_dist.errors import DataError

PIECES = [
    *[b"\n", b"\r\n", b"\r", b">", b"\n>", b"*", b" ", b"\t", b"\n\n", b"*\n>", b"\x0b"],
    *[b">id", b">id two words", b"ACDEF", b"acx", b"MK", b"W" * 70],
    *[b"-", b"1", b"\x00", b"\xff", b"\xc3\xa9", b";", b"\n#", b"\n>P1;t"],
]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join) | st.binary(max_size=60)
SIZES = [1, 3, 10, 50, 10**6]
# Drawing an example takes twenty times as long as checking it, so one test makes several of each
# draw: a length, a chunk size, and as many bytes that stand for pieces or for themselves.
CASE_BYTES, CASES = 42, 12


def cases_of(drawn: bytes) -> list[tuple[bytes, int]]:
    """(content, chunk size) of every CASE_BYTES bytes."""
    cases = []
    for first in range(0, len(drawn), CASE_BYTES):
        length, choice, *codes = drawn[first : first + CASE_BYTES]
        codes = codes[: length % CASE_BYTES]
        pieces = [PIECES[code % len(PIECES)] for code in codes]
        content = bytes(codes) if choice & 1 else b"".join(pieces)
        cases.append((content, SIZES[(choice >> 1) % len(SIZES)]))
    return cases


def is_words(line: str) -> bool:
    """Two words or more, which are no blocks of a sequence: see docs/data.md."""
    words = [word for word in line.replace("\t", " ").split(" ") if word]
    numbered = any(set(word) <= set("0123456789") for word in words)
    sizes = [len(word) for word in words if not set(word) <= set("0123456789")]
    if len(sizes) < 2:
        return False
    full = set(sizes[:-1])
    short = sizes[-1] < sizes[0]
    if len(full) > 1 or sizes[-1] > sizes[0] or (short and sizes[0] < 10):
        return True
    return not numbered and any("a" <= letter <= "z" for letter in line)


class Refused(Exception):  # noqa: N818
    """A line of a sequence that is none."""


def oracle(data: bytes) -> tuple[list[bytes], ReadCounts]:
    """Sequences of the records with residues, and the counts, one byte at a time."""
    text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").lstrip()
    counts, sequences = ReadCounts(), []
    while text[:1] in (b";", b"#"):
        counts.comments += 1
        text = text.partition(b"\n")[2].lstrip()
    for record in (b"\n" + text).split(b"\n>")[1:]:
        header, *lines = record.split(b"\n")
        lines = [line.strip(b" \t") for line in lines]
        if header.startswith(b"P1;") and b"".join(lines)[-1:] == b"*":
            counts.comments += lines[0] != b""
            lines[0] = b""
        for number, line in enumerate(lines):
            if line[:1] in (b";", b"#"):
                counts.comments += 1
                lines[number] = b""
            elif b">" in line or is_words(line.decode("latin-1")):
                raise Refused
        body = [byte for line in lines for byte in line]
        if body[-1:] == [ord("*")]:
            body.pop()
            counts.stops += 1
        kept = bytearray()
        for byte in body:
            upper = byte - 32 if ord("a") <= byte <= ord("z") else byte
            if upper in LETTERS:
                kept.append(upper)
                counts.lower_case += upper != byte
            else:
                counts.illegal[repr(chr(byte).encode("ascii", "backslashreplace").decode())] += 1
        if kept:
            sequences.append(bytes(kept))
            counts.unnamed += not header.strip()
        else:
            counts.empty += 1
    counts.documents, counts.characters = len(sequences), sum(map(len, sequences))
    return sequences, counts


def assert_agrees(data: bytes, size: int) -> None:
    """The reader agrees with the oracle, cut into chunks of any size."""
    try:
        sequences, expected = oracle(data)
    except Refused:
        with pytest.raises(DataError, match=r"inside a sequence|line of words"):
            read_in_chunks(data, size)
        return
    texts, counts = read_in_chunks(data, size)
    assert texts == sequences
    counts.places = []
    assert counts == expected


def read_in_chunks(data: bytes, size: int) -> tuple[list[bytes], ReadCounts]:
    blocks = [data[i : i + 7] for i in range(0, len(data), 7)]
    counts, texts, line = ReadCounts(), [], 1
    for number, part in enumerate(_cut(Path("x"), "fasta", iter(blocks), size)):
        chunk = Chunk(number, Path("x"), "fasta", line, part)
        documents, found = parse_chunk(chunk, ReadOptions())
        counts.add(found)
        texts += [document.text.encode() for document in documents]
        line += 1 + part.count(b"\n")
    return texts, counts


def with_start(data: bytes) -> bytes:
    """What `detect_format` lets through: the first byte that is not blank is '>'."""
    start = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").lstrip()
    while start[:1] in (b";", b"#"):
        start = start.partition(b"\n")[2].lstrip()
    return data if start.startswith(b">") or not data.strip() else b">" + data


def fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@fuzz(200)
@given(CONTENT, st.sampled_from(SIZES))
@example(b" \n >a\nAC", 1)
@example(b">a\r\nAC\r\n>b\rDE\r\r>c", 1)
def test_the_reader_loses_nothing(data, size):
    assert_agrees(with_start(data), size)


@pytest.mark.parametrize("cases", [5_000, pytest.param(200_000, marks=pytest.mark.soak)])
def test_the_reader_loses_nothing_in_many_cases(cases):
    seen = set()

    @fuzz(math.ceil(1.14 * cases / CASES))  # some are drawn twice
    @given(st.binary(min_size=CASES * CASE_BYTES, max_size=CASES * CASE_BYTES))
    def fuzzed(drawn):
        for content, size in cases_of(drawn):
            data = with_start(content)
            assert_agrees(data, size)
            seen.add(hash((data, size)))

    fuzzed()
    assert len(seen) >= cases  # different ones


@fuzz(300)
@given(st.binary(max_size=80) | CONTENT, st.booleans())
def test_any_file_is_read_or_refused(data, strict):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x"
        path.write_bytes(data)
        try:
            documents = list(read_documents([path], ReadOptions(strict)))
        except DataError:
            return
    if with_start(data) != data.replace(b"\0", b""):
        return  # JSON lines, or UTF-16
    texts, counts = oracle(data)
    assert [document.text.encode() for document in documents] == texts
    assert not strict or not (counts.illegal or counts.empty or counts.unnamed)
