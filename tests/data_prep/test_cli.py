"""The console command: what it says, its exit code and what it leaves behind.

A few tests start it as a user does; the others call what its entry point calls.
"""

import gzip
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.readers import RESIDUES
from data_prep.tokenizer import train_tokenizer
from s2t2_dist.cli import run

ROOT = Path(__file__).parents[2]


def start_s2t2(*arguments, cwd=ROOT):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "s2t2_dist.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment
    )


@pytest.fixture
def s2t2(capfd):
    """The command in this process, with what it printed."""

    def call(*arguments):
        arguments = list(map(str, arguments))
        capfd.readouterr()
        code = run(arguments)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return call


def fasta_text(count=200, length=100, seed=0):
    rng = random.Random(seed)
    return "".join(f">p{i}\n{''.join(rng.choices(RESIDUES, k=length))}\n" for i in range(count))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "p.fasta").write_text(fasta_text())
    train_tokenizer([directory / "p.fasta"], directory / "t", 64)
    return directory / "t"


def assert_user_error(done, message):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_from_fasta_to_verified_shards(tmp_path, s2t2, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.fasta.gz").write_bytes(gzip.compress(fasta_text().encode()))
    train = ("tokenizer", "train", "p.fasta.gz", "--vocab-size", 64, "--out", "new/t")
    build = ("data", "build", "p.fasta.gz", "--tokenizer", "new/t", "--context", 64)
    build += ("--validation-fraction", 0.2, "--out", "new/d")
    for command, word in ((train, "new/t"), (build, "new/d")):
        first = start_s2t2(*command, cwd=tmp_path)
        assert (first.returncode, first.stdout) == (0, f"{word} written\n"), first.stderr
        again = s2t2(*command)
        assert (again.returncode, again.stdout) == (0, f"{word} is already complete\n")
    verified = s2t2("data", "verify", "new/d")
    assert verified.returncode == 0
    counts = re.findall(r"^(train|validation): .* ([\d,]+) bytes", verified.stdout, re.MULTILINE)
    assert [split for split, _ in counts] == ["train", "validation"]
    assert sum(int(count.replace(",", "")) for _, count in counts) == 200 * 100
    assert_user_error(start_s2t2(*build, "--seed", 3, cwd=tmp_path), "another seed")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["d", "t"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"MKV\nLLA\n", "is not a FASTA"),
        (gzip.compress(fasta_text().encode(), mtime=0)[:-100], "truncated or damaged gzip"),
        (b"", "is empty"),
        (b">a\n>b\n", "has no residue"),
        (b">a\nAC1D\n", "line 2: '1'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, tokenizer, s2t2, content, message):
    source = tmp_path / "input"
    source.write_bytes(content)
    target = tmp_path / "out" / "made"
    for command in (
        ("tokenizer", "train", source, "--out", target, "--strict"),
        ("data", "build", source, "--tokenizer", tokenizer, "--out", target, "--strict"),
    ):
        assert_user_error(s2t2(*command), message)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [source]


def test_what_was_left_out_is_said_once_on_stderr(tmp_path, tokenizer, s2t2):
    source = tmp_path / "x.fasta"
    source.write_text(fasta_text() + ">odd\nacD1F*\n>none\n")
    build = ("data", "build", source, "--tokenizer", tokenizer, "--validation-fraction", 0.2)
    build += ("--out",)
    done = s2t2(*build, tmp_path / "d")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'd'} written\n")
    assert done.stderr.count("\n") == 1
    for part in (
        "1 bytes that are no",
        "'1' 1",
        "x.fasta line 402",
        "1 stops",
        "1 empty",
        "2 low",
    ):
        assert part in done.stderr
    assert_user_error(s2t2(*build, tmp_path / "e", "--strict"), "line 402: '1' in record odd")


def test_vocabulary_too_large_for_the_data(tmp_path, s2t2):
    source = tmp_path / "p.fasta"
    source.write_text(">a\nACDEFGHIKLACDEFG\n")
    done = s2t2("tokenizer", "train", source, "--vocab-size", 512, "--out", tmp_path / "t")
    assert_user_error(done, "512 were asked for")
    assert list(tmp_path.iterdir()) == [source]


def test_letter_that_the_tokenizer_lacks(tmp_path, tokenizer, s2t2):
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "ACDEF"}\n{"id": "bad", "text": "ACdEF"}\n')
    done = s2t2("data", "build", source, "--tokenizer", tokenizer, "--out", tmp_path / "d")
    assert_user_error(done, "x.jsonl: document bad: the tokenizer's alphabet has no 'd'")
    assert list(tmp_path.iterdir()) == [source]


def test_missing_things(tmp_path, tokenizer, s2t2):
    absent = tmp_path / "absent"
    assert_user_error(s2t2("tokenizer", "train", absent, "--out", tmp_path / "t"), "does not exist")
    build = ("data", "build", tokenizer.parent / "p.fasta", "--out", tmp_path / "d")
    assert_user_error(s2t2(*build, "--tokenizer", absent), "absent/tokenizer.json does not exist")
    assert_user_error(s2t2("data", "verify", absent), "is missing")
    assert_user_error(s2t2("data", "verify", tokenizer), "holds 'tokenizer', not data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--unknown", "--context=x"])
def test_wrong_usage_exits_with_2(tmp_path, s2t2, option):
    done = s2t2("data", "build", "x", "--tokenizer", "t", "--out", tmp_path / "d", option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes; needs the right to mount."""
    mounted = []

    def mount(size):
        target = tmp_path / f"disk-{len(mounted)}"
        target.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not allowed here")
        mounted.append(target)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", str(target)], check=True)


# The spilled tokens, the shards and the manifest meet a full disk at different sizes.
@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "320k", "1m", "2m"])
def test_full_disk_while_building(tmp_path, tokenizer, small_disk, size):
    source = tmp_path / "big.fasta"
    source.write_text(fasta_text(count=6000, seed=1))
    disk = small_disk(size)
    build = ("data", "build", source, "--tokenizer", tokenizer, "--out", disk / "d")
    assert_user_error(start_s2t2(*build), "no space left")
    assert [path.name for path in disk.iterdir()] == [".d.partial"]
    # With more space it goes on, and leaves nothing but the result.
    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    assert start_s2t2(*build).returncode == 0
    assert [path.name for path in disk.iterdir()] == ["d"]


def test_full_disk_while_writing_a_tokenizer(tokenizer, small_disk):
    disk = small_disk("4k")
    source = tokenizer.parent / "p.fasta"
    done = start_s2t2("tokenizer", "train", source, "--vocab-size", 200, "--out", disk / "t")
    assert_user_error(done, "no space left")
    assert list(disk.iterdir()) == []


def test_help_is_quick_and_teaches(s2t2):
    command = [sys.executable, "-X", "importtime", "-m", "s2t2_dist.cli", "--help"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - start < 3
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "deepspeed", "datasets", "mlflow", "pyarrow"}
    assert "tokenizer" in done.stdout
    assert "data" in done.stdout
    for command in (("tokenizer", "train"), ("data", "build"), ("data", "verify")):
        assert f"Example: s2t2 {' '.join(command)}" in s2t2(*command, "--help").stdout.replace(
            "`", ""
        )
