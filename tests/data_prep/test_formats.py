"""A file is what it begins with, not what it is called; pipes and folders are read too."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import zstandard

from data_prep.build import BuildOptions, build_shards
from data_prep.formats import detect_format
from data_prep.inputs import gathered
from data_prep.readers import RESIDUES, ReadCounts, ReadOptions, read_documents
from data_prep.sources import read_chunks
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import DataError
from tests.conftest import write_fasta

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    records = {f"p{i}": "".join(rng.choices(RESIDUES, k=60)) for i in range(300)}
    write_fasta(folder / "p.fasta", records)
    train_tokenizer([folder / "p.fasta"], folder / "t", 60)
    return folder


def command(made, target, *inputs):
    build = ["data", "build", *inputs, "--tokenizer", made / "t", "--context", 32]
    return list(map(str, [*build, "--validation-fraction", 0.1, "--out", target]))


def shell(line, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = f"{sys.executable} -m s2t2_dist.cli "
    return subprocess.run(
        ["bash", "-c", line.replace("s2t2 ", start)],
        capture_output=True, text=True, cwd=folder, env=environment, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_pipes_are_read(tmp_path, made):
    """Standard input and a substitution give the rows that the file gives."""
    line = " ".join(command(made, "NAME", "INPUT"))
    for name, text in (
        ("file", f"s2t2 {line.replace('INPUT', str(made / 'p.fasta'))}"),
        ("stdin", f"gzip < {made / 'p.fasta'} | s2t2 {line.replace('INPUT', '-')}"),
        ("pipe", f"s2t2 {line.replace('INPUT', '<(cat ' + str(made / 'p.fasta') + ')')}"),
    ):
        done = shell(text.replace("NAME", name), tmp_path)
        assert done.returncode == 0, done.stderr
    names = [
        artifacts.read_manifest(tmp_path / name)["sources"][0]["name"]
        for name in ("file", "stdin", "pipe")
    ]
    assert names == ["p.fasta", "stdin", "pipe"]
    splits = [
        artifacts.read_manifest(tmp_path / name)["splits"]["train"]["byte_counts"]
        for name in ("file", "stdin", "pipe")
    ]
    assert splits[0] == splits[1] == splits[2]


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_named_pipe_is_what_it_holds(tmp_path, kind):
    content, expected, _ = CONTENTS[kind]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    with gathered([pipe]) as files:
        writer.join()
        assert texts(files[0]) == expected
        kept = files[0]
    assert not kept.exists()
    message = "is a pipe, which only one of 2 ranks could read"
    with pytest.raises(DataError, match=message), gathered([pipe], 2):
        pass


def spooled(folder, content):
    """What a pipe that holds this is taken for: its documents."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    with gathered([pipe]) as files:
        writer.join()
        return texts(files[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "text": "a"\n}\n', "JSON over several lines"),
        (b'[\n  {"text": "a"}\n]\n', "JSON over several lines"),
        (b"{'text': 'a'}\n", "single quotes"),
    ],
)
def test_a_pipe_of_json_that_is_none_by_lines_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"line 1: .*{message}"):
        spooled(tmp_path, content)


@pytest.mark.parametrize("content", [b"[Chapter 1]\n", b"{{ page }}\n", b"text\n"])
def test_a_pipe_of_text_is_said_to_be_text(tmp_path, content, caplog):
    assert spooled(tmp_path, content) == [content.decode().strip()]
    assert "pipe is read as text, with a document between two blank lines" in caplog.text


def test_folders_are_walked(tmp_path, caplog):
    for name, content in (
        ("in/b.fasta", b">b\nAC\n"),
        ("in/deep/a.fa.gz", gzip.compress(b">a\nDE\n")),
        ("in/c.txt", b">c\nFG\n"),
        ("in/README.md", b"read me"),
        ("in/release.json", b'{"version": "1"}'),
        ("in/.hidden.fasta", b">h\nKL\n"),
    ):
        write(tmp_path / name, content)
    with gathered([tmp_path / "in"]) as files:
        assert [d.id for d in read_documents(files)] == ["b", "c", "a"]
    assert "3 files are read, 2 are passed over (README.md, release.json)" in caplog.text
    (tmp_path / "in" / "README.md").unlink()
    (tmp_path / "in" / "gone.fasta").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "deep")
    (tmp_path / "in" / "linked.fasta").symlink_to(write(tmp_path / "other.fasta", FASTA))
    with gathered([tmp_path / "in"]) as files:
        assert [path.name for path in files] == ["b.fasta", "c.txt", "a.fa.gz", "linked.fasta"]
    message = "4 files are read, 3 are passed over (gone.fasta, link, release.json)"
    assert message in caplog.text


def test_a_file_is_given_once(tmp_path):
    """Its documents would count twice, and as copies they are no shared ids."""
    path = write(tmp_path / "in" / "x.fasta", FASTA)
    (tmp_path / "y.fasta").symlink_to(path)
    again = tmp_path / "in" / ".." / "in" / "x.fasta"
    for other in (path, path.parent, again, tmp_path / "y.fasta"):
        message = r"x\.fasta is given twice \(also as .*\); give it once"
        message = message.replace("x", "y", 1) if other.name == "y.fasta" else message
        with pytest.raises(DataError, match=message), gathered([path, other]):
            pass
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty"
    with pytest.raises(DataError, match=r"empty holds no file named \.fasta"), gathered([empty]):
        pass


def test_a_folder_is_built_from(tmp_path, made):
    shutil.copyfile(made / "p.fasta", write(tmp_path / "in/x", b"").with_name("p.fasta"))
    assert run(command(made, tmp_path / "d", tmp_path / "in")) == 0
    assert artifacts.read_manifest(tmp_path / "d")["sources"][0]["name"] == "p.fasta"


@pytest.mark.parametrize(("letters", "said"), [("ACGT", True), ("ACGU", True), (RESIDUES, False)])
def test_dna_and_rna_given_as_protein_are_told(tmp_path, made, capsys, letters, said):
    rng = random.Random(0)
    records = {f"p{i}": "".join(rng.choices(letters, k=60)) for i in range(300)}
    source = write_fasta(tmp_path / "x.fasta", records)
    train = ["tokenizer", "train", source, "--vocab-size", 40, "--out", tmp_path / "t"]
    for arguments in (command(made, tmp_path / "d", source), list(map(str, train))):
        assert run(arguments) == 0
        assert ("is this DNA or RNA?" in capsys.readouterr().err) == said


def test_text_of_few_letters_is_no_dna(tmp_path):
    rows = "".join(json.dumps({"text": "ACGT" * 20 + str(i)}) + "\n" for i in range(200))
    source = write(tmp_path / "x.jsonl", rows.encode())
    train_tokenizer([source], tmp_path / "t", 262)
    build_shards([source], tmp_path / "t", tmp_path / "d", BuildOptions(32, 0.1))
    assert "nucleotide_share" not in artifacts.read_manifest(tmp_path / "d")
