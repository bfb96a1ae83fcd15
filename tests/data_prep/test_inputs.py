"""Pipes and folders are inputs; what an input may not be is said."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_prep.build import BuildOptions, build_shards
from data_prep.inputs import gathered
from data_prep.readers import RESIDUES, read_documents
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import DataError
from tests.conftest import write_fasta
from tests.data_prep.test_formats import CONTENTS, FASTA, texts, write

ROOT = Path(__file__).parents[2]


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
