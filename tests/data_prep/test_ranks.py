"""Ranks that wait for one another: none waits for one that is not there, or does not say so."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep import ranks
from data_prep.build import BuildOptions, Jobs, build_shards
from data_prep.ranks import OtherRankError, Ranks, exclusive
from data_prep.readers import RESIDUES, ReadOptions
from data_prep.steps import Steps
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error
from tests.conftest import write_fasta

ROOT = Path(__file__).parents[2]
OPTIONS = BuildOptions(context=32, validation_fraction=0.1)
STRICT = BuildOptions(context=32, validation_fraction=0.1, read=ReadOptions(strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    records = {f"p{i}": "".join(rng.choices(RESIDUES, k=60)) for i in range(300)}
    write_fasta(folder / "p.fasta", records)
    write_fasta(folder / "dirty.fasta", {**records, "bad": "MKV1"})
    train_tokenizer([folder / "p.fasta"], folder / "t", 60)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Short waits."""
    for name, seconds in {"BEAT": 0.1, "LOOK": 0.0, "SILENCE": 0.7, "BELIEF": 0.4}.items():
        monkeypatch.setattr(ranks, name, seconds)
    monkeypatch.setattr("data_prep.progress.FIRST_LINE", 0.2)
    monkeypatch.setattr("data_prep.progress.BETWEEN_LINES", 0.2)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def build(made, target, jobs, options=OPTIONS, source="p.fasta"):
    return build_shards([made / source], made / "t", target, options, jobs)


@pytest.mark.slow
def test_a_lone_rank_says_whom_it_waits_for_and_gives_up(
    tmp_path, made, quick, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    begin = time.monotonic()
    cure = r"if it is to work alone \(WORLD_SIZE=3 is set\), give --ranks 1 --rank 0"
    with pytest.raises(S2T2Error, match=rf"rank 1 gave up waiting for rank 0 of 3.*{cure}"):
        build(made, tmp_path / "d", Jobs(1, 1, 3))  # rank 0 counts the chunks
    assert time.monotonic() - begin < 20
    said = capsys.readouterr().err
    assert "Rank 1 waits for rank 0 of 3; no sign of rank 0 yet; if it is to work alone" in said
    # The command that was meant takes what is there, and leaves nothing else.
    assert build(made, tmp_path / "d", Jobs())
    assert left(tmp_path) == ["d"]


def together(made, target, size, options=OPTIONS, source="p.fasta"):
    """Start ranks as processes; returns their codes and what they said."""
    command = [sys.executable, "-m", "s2t2_dist.cli", "data", "build", made / source]
    command += ["--tokenizer", made / "t", "--context", 32, "--validation-fraction", 0.1]
    command += ["--out", target, *["--strict"] * options.read.strict]
    processes = []
    for rank in range(size):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(size)}
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                env=environment,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    said = [process.communicate(timeout=100)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_a_refusal_of_one_rank_ends_the_others_and_a_corrected_command_takes_over(tmp_path, made):
    begin = time.monotonic()
    codes, said = together(made, tmp_path / "d", 3, STRICT, "dirty.fasta")
    assert codes == [2, 2, 2]
    assert time.monotonic() - begin < 60
    assert "dirty.fasta line 602: '1' in record bad" in said[0]
    for text in said[1:]:
        assert "rank 0 of 3 has ended: " in text and "line 602" in text
        assert "Traceback" not in text
    codes, said = together(made, tmp_path / "d", 3, OPTIONS, "dirty.fasta")
    assert codes == [0, 0, 0], said
    assert ShardReader(tmp_path / "d", "train").metadata["reading"]["illegal"] == {"'1'": 1}
    assert left(tmp_path) == ["d"]


@pytest.mark.parametrize("jobs", [Jobs(), Jobs(1, 0, 2, "encode")])
def test_a_corrected_command_takes_over_the_folder_of_a_failed_build(tmp_path, made, quick, jobs):
    with pytest.raises(DataError, match="line 602: '1'"):
        build(made, tmp_path / "d", Jobs(1, 0, 2), STRICT, "dirty.fasta")
    assert (tmp_path / ".d.partial" / "failed").exists()
    build(made, tmp_path / "d", jobs)
    request = artifacts.read_json(tmp_path / ".d.partial" / "request.json") if jobs.only else None
    assert request is None or request["strict"] is False
    assert not list(tmp_path.glob(".d.partial-old*"))


@pytest.mark.slow
def test_another_rank_waits_until_rank_0_has_taken_over(tmp_path, made, quick, monkeypatch):
    monkeypatch.setattr("data_prep.requests.TAKE_OVER_SECONDS", 1.0)
    with pytest.raises(DataError, match="line 602"):
        build(made, tmp_path / "d", Jobs(1, 0, 2), STRICT, "dirty.fasta")
    with pytest.raises(ArtifactError, match="unfinished build with another sources, strict"):
        build(made, tmp_path / "d", Jobs(1, 1, 2, "encode"))
    first = threading.Timer(0.3, lambda: build(made, tmp_path / "d", Jobs(1, 0, 2, "encode")))
    first.start()
    build(made, tmp_path / "d", Jobs(1, 1, 2, "encode"))
    first.join()


def test_an_unfinished_build_that_did_not_fail_is_not_taken_over(tmp_path, made):
    build(made, tmp_path / "d", Jobs(1, 0, 2, "encode"))
    with pytest.raises(ArtifactError, match="unfinished build with another strict"):
        build(made, tmp_path / "d", Jobs(), STRICT)
    # The same request goes on, after which nobody may take it for a failed one.
    (tmp_path / ".d.partial" / "failed").touch()
    build(made, tmp_path / "d", Jobs(1, 0, 2, "encode"))
    with pytest.raises(ArtifactError, match="unfinished build with another strict"):
        build(made, tmp_path / "d", Jobs(), STRICT)


def test_a_rank_whose_folder_was_taken_over_writes_nothing_into_the_new_one(
    tmp_path, made, monkeypatch
):
    original = Steps.encode

    def replaced(self, chunk):
        self.partial.rename(tmp_path / "old")
        self.partial.mkdir()
        original(self, chunk)

    monkeypatch.setattr(Steps, "encode", replaced)
    with pytest.raises(S2T2Error, match="was removed or replaced by another build"):
        build(made, tmp_path / "d", Jobs(1, 0, 2, "encode"))
    assert not list((tmp_path / ".d.partial").rglob("part-*"))


@pytest.mark.slow
def test_ranks_see_each_other(tmp_path, quick):
    target = tmp_path / "d"
    one, two = Ranks(target, 0, 3), Ranks(target, 1, 3)
    with one, two:
        time.sleep(1)  # longer than SILENCE: the beat is a sign
        one.require([1])
        assert "no sign of rank 2 yet" in one.describe([1, 2])
        with pytest.raises(OtherRankError, match="gave up waiting for rank 2 of 3"):
            one.require([1, 2])
            time.sleep(1)
            one.require([1, 2])
    assert json.loads((tmp_path / ".d.ranks" / "1.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_the_failure_of_an_earlier_attempt_is_not_believed_at_once(tmp_path, quick):
    target = tmp_path / "d"
    with pytest.raises(DataError), Ranks(target, 1, 2):
        raise DataError("a bad line")
    time.sleep(0.05)
    with Ranks(target, 0, 2) as rank:
        rank.require([1])
        with Ranks(target, 1, 2):  # it starts anew
            time.sleep(0.6)
            rank.require([1])
    with pytest.raises(DataError), Ranks(target, 1, 2):
        raise DataError("a bad line")
    with Ranks(target, 0, 2) as rank:
        rank.require([1])
        time.sleep(0.6)
        with pytest.raises(OtherRankError, match="rank 1 of 2 has ended: a bad line"):
            rank.require([1])


def test_only_one_process_is_a_rank(tmp_path):
    with exclusive(tmp_path / "d"), exclusive(tmp_path / "d", 1):
        message = rf"is being made by process {os.getpid()} on "
        with pytest.raises(S2T2Error, match=message), exclusive(tmp_path / "d"):
            pass
        assert left(tmp_path) == [".d.lock-0", ".d.lock-1"]
    assert left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "tokenizer"])
def test_two_commands_at_once(tmp_path, made, what):
    """One makes the result; the others say so or find it made. Ten tries."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for attempt in range(10 if what == "data" else 3):
        target = tmp_path / str(attempt) / "d"
        command = ["tokenizer", "train", made / "p.fasta", "--vocab-size", 60]
        if what == "data":
            command = ["data", "build", made / "p.fasta", "--tokenizer", made / "t"]
            command += ["--context", 32, "--validation-fraction", 0.1]
        command = [sys.executable, "-m", "s2t2_dist.cli", *command, "--out", target]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [
            subprocess.Popen(list(map(str, command)), env=environment, **pipes) for _ in range(3)
        ]
        done = [(*process.communicate(timeout=100), process.returncode) for process in processes]
        assert sum("d written" in out for out, _, _ in done) == 1, done
        for out, said, code in done:
            assert "Traceback" not in said
            assert code == (2 if "is being made by process" in said else 0), (out, said)
        artifacts.verify(target)
        assert left(target.parent) == ["d"]


def test_a_file_system_without_hard_links(tmp_path, made, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("data_prep.requests.CLAIM_SECONDS", 0.5)
    for rank in range(2):
        build(made, tmp_path / "d", Jobs(1, rank, 2, "encode"))
    with pytest.raises(ArtifactError, match="another strict"):
        build(made, tmp_path / "d", Jobs(1, 1, 2, "encode"), STRICT)
    # The first process was killed between its claim and its rename.
    (tmp_path / ".e.partial").mkdir()
    (tmp_path / ".e.partial" / "request.json.claim").touch()
    assert build(made, tmp_path / "e", Jobs())
    assert build(made, tmp_path / "f", Jobs())
    assert left(tmp_path / "f") == left(tmp_path / "e")


def test_a_file_system_without_locks(tmp_path, made, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ranks.fcntl, "flock", refuse)
    assert build(made, tmp_path / "d", Jobs())
    assert left(tmp_path) == ["d"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_ctrl_c_is_one_line_and_the_command_goes_on(tmp_path, made, workers):
    rng = random.Random(0)
    text = "".join(rng.choices(RESIDUES, k=200_000))
    spans = (rng.randrange(199_000) for _ in range(40_000))
    records = {f"p{i}": text[first : first + 600] for i, first in enumerate(spans)}
    source = write_fasta(tmp_path / "p.fasta", records)
    command = [sys.executable, "-m", "s2t2_dist.cli", "data", "build", source, "--workers", workers]
    command += ["--tokenizer", made / "t", "--out", tmp_path / "d"]
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob(".d.partial/work/part-*.arrow")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    lines = [line for line in said.splitlines() if not line.startswith("Encoding p.fasta: ")]
    assert lines == ["stopped by Ctrl-C; the same command goes on where it stopped"]
    assert left(tmp_path) == [".d.partial", "p.fasta"]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0
    assert left(tmp_path) == ["d", "p.fasta"]
