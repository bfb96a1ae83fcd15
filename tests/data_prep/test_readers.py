"""Readers against a plain list of records, rendered in every way that a file may be written."""

import gzip
import json
import random

import pytest
import zstandard

from data_prep.readers import (
    RARE_RESIDUES,
    RESIDUES,
    Document,
    ReadCounts,
    ReadOptions,
    id_hash,
    read_documents,
)
from data_prep.sources import read_chunks
from s2t2_dist.errors import DataError

RECORDS = [
    Document("UniRef50_A0A5A9P0L4", "MAVRPRIQLLDTVTINQIAAGEVIENAVSVVKELVENALDAGADE"),
    Document("SP50_Q5L4T7", "M"),
    Document("UniRef50_RARE", RESIDUES + RARE_RESIDUES),
    Document("UniRef50_LONG", "".join(random.Random(0).choices(RESIDUES, k=1000))),
]
STRICT = ReadOptions(strict=True)
HEADERS = [
    ">UniRef50_A0A5A9P0L4 Peptidylprolyl isomerase n=1 Tax=T. tibetana TaxID=1572043 RepID=A0A5A9",
    ">SP50_Q5L4T7 Cluster: Q5L4T7 n=9 RepID=Q5L4T7",
    ">UniRef50_RARE",
    ">UniRef50_LONG\ttab after the id",
]


def render(width=60, end="\n", final=True, blank=0, lower=False, star=False) -> bytes:
    lines = []
    for header, (_, text) in zip(HEADERS, RECORDS, strict=True):
        text = (text.lower() if lower else text) + ("*" if star else "")
        lines += [header, *(text[i : i + width] for i in range(0, len(text), width)), *[""] * blank]
    return (end.join(lines) + (end if final else "")).encode()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "style",
    [
        {"width": 1},
        {"width": 7},
        {"width": 10_000},
        {"end": "\r\n"},
        {"end": "\r\n", "final": False},
        {"blank": 2},
        {"final": False},
        {"lower": True},
        {"star": True},
        {"star": True, "width": 45, "blank": 1},
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_fasta_reads_the_same_records_however_written(tmp_path, style, zipped):
    content = render(**style)
    path = write(tmp_path / "x.fasta", gzip.compress(content) if zipped else content)
    assert list(read_documents([path])) == RECORDS


def test_gzip_of_several_members(tmp_path):
    content = render()
    # The cuts fall inside a header and inside a sequence.
    parts = [content[:11], content[11:200], content[200:]]
    path = write(tmp_path / "x.fasta.gz", b"".join(map(gzip.compress, parts)))
    assert list(read_documents([path])) == RECORDS


def test_files_are_read_in_order(tmp_path):
    first = write(tmp_path / "a.fa", b">a\nAC\n")
    second = write(tmp_path / "b", b"\n\n>b\nGH")
    assert list(read_documents([first, second])) == [("a", "AC"), ("b", "GH")]


def test_zstd_of_several_frames(tmp_path):
    content = render()
    parts = [content[:11], content[11:200], content[200:]]
    path = write(tmp_path / "x.fasta.zst", b"".join(map(zstandard.compress, parts)))
    assert list(read_documents([path])) == RECORDS
    for cut in (path.read_bytes()[:-3], path.read_bytes()[:50], path.read_bytes() + b"garbage"):
        with pytest.raises(DataError, match="truncated or damaged zstd"):
            list(read_documents([write(tmp_path / "y.fasta.zst", cut)]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\r\n", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"ACDEF\n", "is not a FASTA: it starts with 'ACDEF"),
        (b"\x89PNG\r\n\x1a\n", "is not a FASTA"),
        (b'{"text": "x"}\n', "is not a FASTA.*named .jsonl or .txt"),
        (b">a\n", "line 1: record a has no residue"),
        (b">a\n*\n", "line 1: record a has no residue"),
        (b">a\nAC\n>b\n\n>c\nDE\n", "line 3: record b has no residue"),
        (b">a\nAC\n> \nDE\n", "line 3: .* without an id"),
        (b">a\nAC\nAC\n>b\nACD\nE1F\nGGG\n", "line 6: '1' in record b"),
        (b">a\nAC-DE\n", "line 2: '-' in record a"),
        (b">a\nAC*\nDE\n", r"line 2: '\*' in record a"),
        (b">a\nAC\nDE**\n", r"line 3: '\*' in record a"),
        (b">a\nA C\n", "line 2: ' ' in record a"),
        (b">a\n\n\nA\xc3\xa9C\n", r"line 4: '\\\\xc3' in record a"),
        (gzip.compress(render(), mtime=0)[:60], "truncated or damaged gzip"),
        (gzip.compress(render(), mtime=0)[:-1], "truncated or damaged gzip"),
        (gzip.compress(render(), mtime=0)[:-8] + b"12345678", "truncated or damaged gzip"),
        (gzip.compress(render(), mtime=0) + b"garbage", "truncated or damaged gzip"),
    ],
)
def test_bad_fasta_names_the_file_and_the_line(tmp_path, content, message):
    path = write(tmp_path / "bad.fasta", content)
    with pytest.raises(DataError, match=f"bad.fasta.*{message}"):
        list(read_documents([path], STRICT))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match="absent does not exist"):
        list(read_documents([tmp_path / "absent"]))
    with pytest.raises(DataError, match="is not a file"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl_keeps_text_and_id(tmp_path, zipped):
    texts = ["plain", "two\nlines  ", "é\N{SNOWMAN}\t\r\n", "plain again"]
    lines = [{"id": 7, "text": texts[0]}, *({"text": text, "other": 1} for text in texts[1:])]
    content = "\n\n".join(map(json.dumps, lines)).encode()
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(content) if zipped else content)
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == texts
    assert documents[0].id == "7"
    assert len({document.id for document in documents}) == 4


def test_jsonl_without_id_is_named_by_its_text(tmp_path):
    first = write(tmp_path / "a.jsonl", b'{"text": "same"}\n{"text": "other"}\n')
    second = write(tmp_path / "b.jsonl", b'{"x": 0, "text": "same"}')
    same, other, again = read_documents([first, second])
    assert same.id == again.id != other.id


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"id": 1}', '{"text": 1}', '{"text": ""}', r'{"text": "\ud800"}']
)
def test_bad_jsonl_names_the_line(tmp_path, line):
    path = write(tmp_path / "x.jsonl", b'{"text": "ok"}\n' + line.encode())
    with pytest.raises(DataError, match=r"x\.jsonl line 2"):
        list(read_documents([path], STRICT))


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    path = write(tmp_path / "x.txt", "\n\none\n  two \r\n \n\nthrée".encode())
    assert [document.text for document in read_documents([path])] == ["one\n  two ", "thrée"]


def test_bad_text(tmp_path):
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        list(read_documents([write(tmp_path / "x.txt", b"a\n\xff\n")]))
    with pytest.raises(DataError, match="holds no document"):
        list(read_documents([write(tmp_path / "y.txt", b"\n")]))


def read(path, options=ReadOptions(), chunk_size=None):  # noqa: B008
    counts = ReadCounts()
    return list(read_documents([path], options, counts, chunk_size=chunk_size)), counts


def test_what_is_left_out_is_counted_and_named_by_line(tmp_path):
    content = b">a\nac-D1\nE F\n>empty\n\n*\n> \nGG*\n>b\n\tWW \nK**\n>c\nx\xc3\xa9y\n"
    path = write(tmp_path / "odd.fasta", content)
    documents, counts = read(path)
    assert [text for _, text in documents] == ["ACDEF", "GG", "WWK", "XY"]
    assert [name for name, _ in documents][::2] == ["a", "b"]
    assert (counts.documents, counts.characters) == (4, 12)
    assert (counts.empty, counts.unnamed, counts.stops, counts.lower_case) == (1, 1, 3, 4)
    assert counts.illegal == {
        "'-'": 1, "'1'": 1, "' '": 1, "'*'": 1, "'\\\\xc3'": 1, "'\\\\xa9'": 1
    }  # fmt: skip
    assert counts.places == [f"odd.fasta line {line}" for line in (2, 3, 11, 13)]
    summary = counts.summary()
    assert "6 bytes that are no amino acid letter left out" in summary
    assert "odd.fasta line 2, odd.fasta line 3" in summary
    for part in ("1 empty", "1 records without an id", "3 stops", "4 lower-case"):
        assert part in summary
    assert ReadCounts.of(json.loads(json.dumps(counts.record()))) == counts
    assert ReadCounts(documents=3, characters=9).summary() == ""


def test_only_the_first_places_are_named(tmp_path):
    path = write(tmp_path / "x.fasta", b">a\n" + b"A1\n" * 1000)
    counts = read(path, chunk_size=10)[1]
    assert counts.illegal == {"'1'": 1000}
    assert len(counts.places) == 10
    assert counts.summary().count("line") == 10


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000, None])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_chunks_cut_between_records_and_count_lines(tmp_path, chunk_size, end):
    path = write(tmp_path / "x.fasta", b"\n\n" + render(end=end, blank=1, width=45))
    assert read(path, chunk_size=chunk_size) == read(path)
    content = path.read_bytes()
    assert b"".join(chunk.data for chunk in read_chunks([path], chunk_size)) == content
    bad = write(tmp_path / "y.fasta", content + f"{end}>z{end}AC{end}A1{end}".encode())
    line = content.decode().replace("\r\n", "\n").replace("\r", "\n").count("\n") + 4
    with pytest.raises(DataError, match=f"line {line}: '1' in record z"):
        read(bad, STRICT, chunk_size)
    assert len(list(read_chunks([path], 1))) >= len(RECORDS)


@pytest.mark.parametrize("chunk_size", [1, 40, None])
def test_chunks_of_text(tmp_path, chunk_size):
    path = write(tmp_path / "x.txt", b"one\ntwo\n\n  \nthree\n \t\r\nfour\n\n\n\nfive")
    texts = [document.text for document in read(path, chunk_size=chunk_size)[0]]
    assert texts == ["one\ntwo", "three", "four", "five"]
    lines = write(tmp_path / "x.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n{"text": 1}')
    with pytest.raises(DataError, match="line 4"):
        read(lines, chunk_size=chunk_size)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.LONGEST_DOCUMENT", 1 << 21)
    path = write(tmp_path / "x.fasta", b">a\n" + b"A" * (5 << 20))
    with pytest.raises(DataError, match="a document is longer than 2,097,152 bytes"):
        read(path)


def test_another_field_of_json_lines(tmp_path):
    path = write(tmp_path / "x.jsonl.zst", zstandard.compress(b'{"content": "x", "text": ""}\n'))
    documents, _ = read(path, ReadOptions(field="content"))
    assert [document.text for document in documents] == ["x"]
    with pytest.raises(DataError, match=r"line 1: expected .* 'code'"):
        read(path, ReadOptions(field="code"))
    with pytest.raises(DataError, match="holds no document"):
        read(path)


def test_id_hash_is_stable_and_independent_between_purposes():
    # Changing these numbers would move documents between train and validation.
    assert id_hash("UniRef50_A0A5A9P0L4", "split") == 17_095_316_792_041_913_361
    ids = [f"id{i}" for i in range(4000)]
    low = [id_hash(i, "split") < 2**63 for i in ids]
    also = [id_hash(i, "sample") < 2**63 for i in ids]
    both = sum(a and b for a, b in zip(low, also, strict=True))
    # Independent halves share a quarter: 1000 expected, standard deviation 27; five of them.
    assert abs(both - 1000) < 137
