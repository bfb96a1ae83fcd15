"""Lines of a FASTA that are no sequence: refused or left out, never read as residues."""

import time

import pytest

from data_prep.readers import ReadCounts, ReadOptions, parse_chunk, read_documents
from data_prep.sources import Chunk
from s2t2_dist.errors import DataError


def read(folder, content, **options):
    path = folder / "x.fasta"
    path.write_bytes(content)
    counts = ReadCounts()
    documents = list(read_documents([path], ReadOptions(**options), counts))
    return [tuple(document) for document in documents], counts


GLUED = [
    (b">a kinase\nMKVLAAGIV>b heat shock protein\nMRRWWYYAC\n", 2),
    (b">a\nMKV\nLAA >sp|P1|X\nMRR\n", 3),
    (b">a\nMKV\n  >b\nMRR\n", 3),
    (b">a\nMKV*>b\nMRR\n", 2),
    (b">a\r\nMKV\r\nLAA\xef\xbb\xbf>b\r\nMRR", 3),
]


@pytest.mark.parametrize(("content", "line"), GLUED)
@pytest.mark.parametrize("strict", [False, True])
def test_a_header_inside_a_sequence_is_refused(tmp_path, content, line, strict):
    with pytest.raises(DataError, match=rf"x\.fasta line {line}: '>' inside a sequence.*line end"):
        read(tmp_path, content, strict=strict)


WORDS = [
    b"crystallin alpha B chain - mouse",
    b"Sequence unavailable",
    b"SEQUENCE UNAVAILABLE",
    b"Protein kinase",
    b"cytochrome oxidase",
    b"heat shock protein 70",
    b"Insulin A chain",
]


@pytest.mark.parametrize("line", WORDS)
def test_a_line_of_words_is_no_sequence(tmp_path, line):
    content = b">a\nMKV\n>b\n" + line + b"\nMRR\n"
    with pytest.raises(DataError, match=r"x\.fasta line 4: '.*' is a line of words"):
        read(tmp_path, content)
    documents, counts = read(tmp_path, content, skip_bad=True)
    assert documents == [("a", "MKV")]
    assert (counts.bad, counts.bad_places) == (1, ["x.fasta line 4"])
    assert "1 bad records left out (x.fasta line 4)" in counts.summary()


BLOCKS = [
    (b"MKVLAAGIVK MKVLAAGIVR ACD", "MKVLAAGIVKMKVLAAGIVRACD"),
    (b"        1 mkvlaagivk mkvlaagivr acd", "MKVLAAGIVKMKVLAAGIVRACD"),
    (b"MKVLAAGIVK MKVLAAGIVR 60", "MKVLAAGIVKMKVLAAGIVR"),
    (b"  MKVLAA\t", "MKVLAA"),
    (b"A C D E", "ACDE"),
]


@pytest.mark.parametrize(("line", "sequence"), BLOCKS)
def test_blocks_of_a_sequence_are_read(tmp_path, line, sequence):
    assert read(tmp_path, b">a\n" + line + b"\n")[0] == [("a", sequence)]


COMMENTS = [
    (b">a\n;hand checked\nMKVLAAGIV\n", "MKVLAAGIV", 1),
    (b">a\n# hand checked by AB\nMKV\n#again\nLAA\n", "MKVLAA", 2),
    (b"; made by a tool\n;\n\n# really\n>a\nMKV\n", "MKV", 3),
    (b">a\nMKV\n ; indented > here\n", "MKV", 1),
    (b">P1;CRAB\ncrystallin alpha B chain - mouse\nMKVLAAGIV\n*\n", "MKVLAAGIV", 1),
    (b">F1;X\nINSULIN\nMKV\nLAA*\n", "MKVLAA", 1),
    (b">P1;X\n\nMKV*\n", "MKV", 0),
]


@pytest.mark.parametrize(("content", "sequence", "comments"), COMMENTS)
@pytest.mark.parametrize("strict", [False, True])
def test_comments_are_left_out_and_counted(tmp_path, content, sequence, comments, strict):
    documents, counts = read(tmp_path, content, strict=strict)
    assert [text for _, text in documents] == [sequence]
    assert counts.comments == comments
    assert (f"{comments} lines of comments left out" in counts.summary()) == bool(comments)
    assert not counts.illegal


def test_lines_are_counted_over_comments(tmp_path):
    with pytest.raises(DataError, match="line 5: '1' in record a"):
        read(tmp_path, b";x\n\n>a\n;y\nM1\n", strict=True)


def test_a_byte_order_mark_in_the_middle_is_no_residue(tmp_path):
    bom = b"\xef\xbb\xbf"
    parts = [bom + b">a\nMKV\n", bom + b">b\nMRR\n", bom + b">c\nAC\n"]
    documents, counts = read(tmp_path, b"".join(parts))
    assert documents == [("a", "MKV"), ("b", "MRR"), ("c", "AC")]
    assert counts.summary() == ""
    parts[1:1] = [bom + b";tool #c\n", bom + bom + b"# x\n"]
    documents, counts = read(tmp_path, b"".join(parts))
    assert documents == [("a", "MKV"), ("b", "MRR"), ("c", "AC")]
    assert (counts.comments, counts.illegal.total()) == (2, 0)


def test_many_comments_before_the_first_record_take_no_time(tmp_path):
    content = b" \n" + b"#\n\n" * 20_000 + b">a\n" + b"ACDEFGHIKL\n" * 500_000
    begin = time.process_time()
    chunk = Chunk(0, tmp_path / "x.fasta", "fasta", 1, content)
    documents, counts = parse_chunk(chunk, ReadOptions())
    assert time.process_time() - begin < 5  # it took minutes; 0.1 s on a calm machine
    assert counts.comments == 20_000 and len(documents[0].text) == 5_000_000


@pytest.mark.parametrize("content", [b"# only", b"# a\n;b", b" \n# a\n", b""])
def test_comments_without_a_record(tmp_path, content):
    chunk = Chunk(0, tmp_path / "x.fasta", "fasta", 1, content)
    documents, counts = parse_chunk(chunk, ReadOptions())
    assert not documents and counts.comments == content.count(b"#") + content.count(b";")


def test_lower_case_of_what_is_left_out_does_not_count(tmp_path):
    counts = read(tmp_path, b">a\n;lower case\nmkV*\n")[1]
    assert counts.lower_case == 2
