"""Inputs are known by what they hold: hashed once, and again after every kind of change."""

import os
import shutil
from pathlib import Path

import pytest

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm
from s2t2_dist.errors import ArtifactError, S2T2Error
from s2t2_dist.run import identity
from s2t2_dist.run.identity import Input
from tests.jobs.distributed import run_ranks


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in ("a", "b", "c"):
        (made / name).write_text(name * 100)
    return made


def found(folder: Path, known: dict | None = None, comm: Comm | None = None) -> dict:
    files = {path.name: path for path in folder.iterdir()}
    inputs = {"model": Input(str(folder), folder, files)}
    return identity.identify(inputs, known or {}, comm or Comm())


def hashed(monkeypatch, folder: Path, known: dict) -> tuple[dict, list[str]]:
    """What is found, and the names of the files that were read for it."""
    read = []
    real = artifacts.sha256_file
    monkeypatch.setattr(artifacts, "sha256_file", lambda p: read.append(p.name) or real(p))
    result = found(folder, known)
    monkeypatch.undo()
    return result, read


def test_a_second_look_reads_nothing(folder, monkeypatch):
    first, read = hashed(monkeypatch, folder, {})
    assert sorted(read) == ["a", "b", "c"]
    assert first["model"]["files"]["a"]["sha256"] == artifacts.sha256_file(folder / "a")
    assert hashed(monkeypatch, folder, first) == (first, [])


def _same_times(path: Path, text: str) -> None:
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(path: Path, text: str) -> None:
    before = path.stat()
    new = path.with_name("new")
    new.write_text(text)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


@pytest.mark.parametrize("change", [Path.write_text, _same_times, _replaced])
def test_other_bytes_of_the_same_size_are_seen(change, folder, monkeypatch):
    first = found(folder)
    change(folder / "b", "x" * 100)
    second, read = hashed(monkeypatch, folder, first)
    assert read == ["b"]
    (line,) = identity.differences(first, second)
    assert line.startswith("model, b: ")


def test_a_file_more_or_less_is_seen(folder):
    first = found(folder)
    (folder / "d").write_text("d")
    (folder / "a").unlink()
    lines = identity.differences(first, found(folder, first))
    assert [line.split(":")[0] for line in lines] == ["model, a", "model, d"]
    assert lines[0].endswith("-> none") and ": none -> " in lines[1]


def test_a_folder_may_move_and_be_copied(folder, tmp_path):
    first = found(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "moved")
    assert identity.differences(first, found(tmp_path / "moved", first)) == []
    assert identity.differences(first, found(copy, first)) == []


def test_a_file_that_is_being_written_is_refused(folder, monkeypatch):
    real = artifacts.sha256_file

    def read(path: Path) -> str:
        value = real(path)
        with path.open("a") as f:
            f.write("more")
        return value

    monkeypatch.setattr(artifacts, "sha256_file", read)
    with pytest.raises(S2T2Error, match="was written while it was read"):
        found(folder)


def test_what_is_recorded_is_read_again(folder, tmp_path):
    identity.write(tmp_path, found(folder))
    assert identity.read(tmp_path)["inputs"] == identity.known(tmp_path) == found(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "7",
        "null",
        "",
        "\0\xff",
        '{"format": 2}',
        '{"format": 3, "inputs": {}}',
        '{"format": 2, "output_dir": "x", "inputs": [1]}',
        '{"format": 2, "output_dir": "x", "inputs": {"data": 1}}',
        '{"format": 2, "output_dir": "x", "inputs": {"data": {"files": {"a": 1}}}}',
    ],
)
def test_a_damaged_record_is_one_line_and_no_cache(text, tmp_path):
    (tmp_path / "inputs.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"inputs\.json"):
        identity.read(tmp_path)
    assert identity.known(tmp_path) == {}


def _rank(comm: Comm, folder: Path, log: Path) -> dict:
    real = artifacts.sha256_file
    artifacts.sha256_file = lambda p: (log / f"{comm.rank}-{p.name}").touch() or real(p)
    return found(folder, {}, comm)


@pytest.mark.slow
def test_ranks_share_the_hashing(folder, tmp_path):
    one, two = run_ranks(_rank, 2, tmp_path, folder, tmp_path)
    assert one == two == found(folder)
    read = sorted(path.name for path in tmp_path.iterdir() if path.name[:2] in ("0-", "1-"))
    assert read == ["0-a", "0-c", "1-b"]


def _other_files(comm: Comm, folder: Path, name: str) -> str:
    """Rank 1 sees a folder of its own, with a file more or a larger one."""
    if comm.rank == 1:
        folder = shutil.copytree(folder, folder.with_name("own"))
        with (folder / name).open("a") as f:
            f.write("more")
    try:
        found(folder, {}, comm)
    except S2T2Error as error:
        assert error.collective
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "new"])
def test_ranks_that_see_other_files_are_refused(folder, tmp_path, name):
    one, two = run_ranks(_other_files, 2, tmp_path, folder, name)
    assert one == two and f", {name} is missing or of another size" in one
