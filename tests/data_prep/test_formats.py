"""A file is what it begins with, not what it is called."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pytest
import zstandard

from data_prep.formats import detect_format
from data_prep.readers import ReadCounts, ReadOptions, read_documents
from data_prep.sources import read_chunks
from s2t2_dist.errors import DataError

FASTA = b">a one\nMKVLAAGIV\nMRR\n>b\nACDEF\n"
JSON = b'{"id": "a", "text": "one\\u00e9"}\n{"id": "b", "text": "two"}\n'
TEXT = "one\ntwo\n\nthr\u00e9e\n".encode()
BOM = b"\xef\xbb\xbf"


def texts(path, **options):
    return [document.text for document in read_documents([path], ReadOptions(**options))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def long_zstd(data):
    """As `zstd --ultra --long=31`: the frame asks for a window of 2 GB."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = bytearray(stream.compress(data) + stream.flush())
    frame[5] = (31 - 10) << 3  # RFC 8878, 3.1.1.1.2: the window descriptor
    return bytes(frame)


def pzstd(data):
    """As pzstd: each frame after a skippable one that holds its size."""
    frames = []
    for part in (data[:9], data[9:]):
        frame = zstandard.compress(part)
        frames.append(b"\x50\x2a\x4d\x18\x04\0\0\0" + len(frame).to_bytes(4, "little") + frame)
    return b"".join(frames)


def members(compress):
    return lambda data: compress(data[:11]) + compress(data[11:])


COMPRESSIONS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "pzstd": pzstd,
    "zstd --long=31": long_zstd,
    "xz": lzma.compress,
    "xz parts": members(lzma.compress),
    "xz padded": members(lambda data: lzma.compress(data) + b"\0" * 8),
    "bzip2": bz2.compress,
    "bzip2 parts": members(bz2.compress),
}
ENCODINGS = {
    "UTF-8": lambda text: text,
    "BOM": lambda text: BOM + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-16 BE": lambda text: b"\xfe\xff" + text.decode().encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.decode().encode("utf-16-le"),
    "UTF-32": lambda text: text.decode().encode("utf-32"),
}
CONTENTS = {
    "fasta": (FASTA, ["MKVLAAGIVMRR", "ACDEF"], ["x.fasta", "x", "x.txt", "x.jsonl", "x.dat"]),
    "jsonl": (JSON, ["one\u00e9", "two"], ["x.jsonl", "x.json", "x", "x.txt", "x.ndjson", "x.log"]),
    "text": (TEXT, ["one\ntwo", "thr\u00e9e"], ["x.txt", "x.TXT"]),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressions_under_any_name(tmp_path, kind, compression):
    content, expected, names = CONTENTS[kind]
    packed = COMPRESSIONS[compression](content)
    for name in names:
        for suffix in ("", ".gz", ".xz", ".bz2", ".zst"):
            path = write(tmp_path / (name + suffix), packed)
            assert texts(path) == expected, path.name


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(tmp_path, kind, encoding):
    content, expected, names = CONTENTS[kind]
    path = write(tmp_path / names[0], ENCODINGS[encoding](content))
    counts = ReadCounts()
    found = [document.text for document in read_documents([path], counts=counts)]
    assert found == expected
    assert counts.summary() == ""
    packed = write(tmp_path / (names[0] + ".gz"), gzip.compress(ENCODINGS[encoding](content)))
    assert texts(packed) == expected


@pytest.mark.parametrize("size", [1, 3, 7])
def test_text_of_two_bytes_is_cut_anywhere(tmp_path, size):
    path = write(tmp_path / "x.txt", TEXT.decode().encode("utf-16"))
    assert b"".join(chunk.data for chunk in read_chunks([path], size)) == TEXT


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "plain"])
def test_damage_is_named_by_its_kind(tmp_path, compression):
    packed = COMPRESSIONS[compression](FASTA * 50)
    kind = compression.split()[0].replace("pz", "z")
    for content in (packed[:-13], packed + b"garbage", packed[: len(packed) // 2]):
        path = write(tmp_path / "x.fasta", content)
        with pytest.raises(DataError, match=f"x.fasta is a truncated or damaged {kind} file"):
            list(read_documents([path]))


def test_damaged_utf16(tmp_path):
    path = write(tmp_path / "x.txt", TEXT.decode().encode("utf-16")[:-1])
    with pytest.raises(DataError, match="truncated or damaged UTF-16-LE text"):
        texts(path)


@pytest.mark.parametrize(
    "content",
    [
        b"> quoted from a letter\nMKV\n\nnext",
        b">quoted\nan answer in words\n",
        b">one line\n",
        b"{ not json\n\nnext",
        b"[1, 2]\n",
        b"#!/bin/sh\n>a\nmkdir x\n",
        b">hello\nworld\n",
        b">quoted\nthanks\n\nbody text here\n",
        b">one\nYes\n>two\nNo\n\nAnd so on\n",
        b">link\nhttps://example.com/a-long-address/of-something\n",
    ],
)
def test_text_that_looks_like_another_format_stays_text(tmp_path, content, caplog):
    path = write(tmp_path / "x.txt", content)
    assert detect_format(path) == "text"
    told = "begins with '>' and is read as text" in caplog.text
    assert told == content.lstrip(b"#!/bin/sh\n").startswith(b">")


@pytest.mark.parametrize(
    "content",
    [
        b">a\nMKTaaLLsvMKLV\n>b\nMKTLLmmm\n",  # soft-masked
        b">a\n" + b"mktaallsv" * 6 + b"\nac\n",
        b">P1;X\nsome title\nMKTLL*\n>P1;Y\na second title\nMKV\n*\n",
        b"> a\nMKTLL\n> b\nACDEFG\n",
        b">a\nMKTLLMKTLL ACDEFGHIKL\nACD\n>b\nACDEFG\n",
        b">a\n  1 mktllmktll acdefghikl acdefghikl 30\n" * 2,
        b">a\rMKTLL\r>b\rACDEFG\r",
        b"# c\r>a\rMKTLL\r",
        b">a\r\nMKTLL\r\n",
        b">a\nM\n>b\n\n>c\nMK1-\n",  # short, empty, dirty
        b"".join(b">%d\nMKVLAAGIV\n" % i for i in range(20)) + b">x\nSequence unavailable\n",
    ],
)
def test_a_fasta_named_txt_is_a_fasta(tmp_path, content, caplog):
    assert detect_format(write(tmp_path / "x.txt", content)) == "fasta"
    assert caplog.text == ""


def archive(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("x.fasta", FASTA)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            entry = tarfile.TarInfo("x.fasta")
            entry.size = len(FASTA)
            file.addfile(entry, io.BytesIO(FASTA))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.zip", archive("zip"), "is a zip archive; unpack it"),
        ("x.tar.gz", archive("tar"), "is a tar archive; unpack it"),
        ("x.fasta", JSON, "is not a FASTA: it starts with"),
        ("x.csv", b"id,text\na,MKV\n", "is not a FASTA: it starts with 'id,text"),
        ("x", b"\x89PNG\r\n", "is not a FASTA"),
        ("x.json", b'[\n{"text": "a"}\n]\n', r"x.json line 1: .*JSON over several lines.*jq -c"),
        ("x.jsonl", b'[{"text": "a"}]\n', r"x.jsonl line 1: .*found a list.*jq -c '.\[\]'"),
    ],
)
def test_what_cannot_be_read_is_told_as_it_is(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / name, content))
