"""Mistakes that were tracebacks or false messages: one line that names the fault and the cure."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.build import BuildOptions, build_shards
from data_prep.cli_options import own_cores
from data_prep.workers import Workers
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def s2t2(capfd):
    """The command in this process: its exit code, and the one line that it says on stderr."""

    def call(*arguments):
        capfd.readouterr()
        code = run(list(map(str, arguments)))
        said = capfd.readouterr().err
        assert code == 0 or said.count("\n") == 1, said
        return code, said

    return call


@pytest.fixture
def build(protein_fasta, protein_tokenizer):
    """Arguments of a build into a target."""

    def command(target, *more):
        start = ["data", "build", protein_fasta, "--tokenizer", protein_tokenizer]
        return [*start, "--validation-fraction", 0.2, "--context", 32, "--out", target, *more]

    return command


def test_a_target_below_a_file(tmp_path, s2t2, build, protein_fasta):
    (tmp_path / "file").write_text("x")
    train = ["tokenizer", "train", protein_fasta, "--vocab-size", 64, "--out"]
    for target in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        for command in (build(target), build(target, "--rank", 0, "--ranks", 2), [*train, target]):
            code, said = s2t2(*command)
            assert code == 2 and "a folder above it is a file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_target_that_is_something_else(tmp_path, s2t2, build, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    code, said = s2t2(*build(tmp_path / "file"))
    assert code == 2 and "file is a file, not a folder" in said
    code, said = s2t2(*build(tmp_path / "folder"))
    assert code == 2 and "exists and holds no result of s2t2" in said
    code, said = s2t2(*build("."))
    assert code == 2 and "exists and holds no result of s2t2" in said
    code, said = s2t2("data", "verify", tmp_path / "file")
    assert code == 2 and "file is a file, not a folder" in said and "missing" not in said
    long = build(tmp_path / ("x" * 252))
    assert s2t2(*long, "--rank", 0, "--ranks", 2, "--only", "encode")[0] == 0
    assert s2t2(*long)[0] == 0
    assert {len(path.name) for path in tmp_path.iterdir()} == {4, 6, 252}
    code, said = s2t2(*build(tmp_path / ("x" * 300)))
    assert code == 2 and "File name too long" in said


@pytest.mark.parametrize("size", ["0", "", "-1", "two"])
def test_a_launcher_that_says_no_number_of_ranks(monkeypatch, size):
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = own_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
    assert own_cores() == alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    assert own_cores() == 1


@pytest.mark.parametrize("context", [1, 0, -5, (1 << 20) + 1, 10**12, 10**30])
def test_an_absurd_context(tmp_path, s2t2, build, context):
    code, said = s2t2(*build(tmp_path / "d", "--context", context))
    assert code == 2 and f"a context of {context} is too" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1 << 21, 10**12, 10**30])
def test_an_absurd_vocabulary(tmp_path, s2t2, protein_fasta, size):
    command = ["tokenizer", "train", protein_fasta, "--out", tmp_path / "t", "--vocab-size", size]
    code, said = s2t2(*command)
    assert code == 2 and "is too large; ask for at most 1,048,576" in said


@pytest.mark.parametrize("fraction", [0, 1, 7, "nan"])
def test_an_absurd_fraction(s2t2, protein_fasta, fraction):
    command = ["data", "ids", protein_fasta, "--split", "train"]
    code, said = s2t2(*command, "--validation-fraction", fraction)
    assert code == 2 and "is not between 0 and 1" in said


def test_a_folder_with_complete_and_without_its_manifest(tmp_path, s2t2, protein_data):
    folder = tmp_path / "d"
    shutil.copytree(protein_data, folder)
    (folder / "manifest.json").unlink()
    code, said = s2t2("data", "verify", folder)
    assert code == 2 and "manifest.json is missing beside COMPLETE" in said
    (folder / "manifest.json").mkdir()
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        artifacts.read_manifest(folder)
    (folder / "manifest.json").rmdir()
    (folder / "manifest.json").write_text("[" * 100_000)
    (folder / "COMPLETE").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="was changed after it was sealed"):
        artifacts.read_manifest(folder)
    artifacts.write_text(folder / "COMPLETE", artifacts.sha256_file(folder / "manifest.json"))
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        artifacts.read_manifest(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_deeply_nested_tokenizer(tmp_path, protein_fasta, protein_tokenizer, name):
    shutil.copytree(protein_tokenizer, tmp_path / "t")
    (tmp_path / "t" / name).write_text("[" * 100_000)
    with pytest.raises(DataError, match=rf"{name}.*copy the tokenizer again"):
        build_shards([protein_fasta], tmp_path / "t", tmp_path / "d", BuildOptions(32, 0.2))


@pytest.mark.parametrize("config", ['{"eos_token": 7}', '{"eos_token": {"text": "x"}}', "[]", "{}"])
def test_an_end_token_that_is_none(tmp_path, protein_fasta, protein_tokenizer, config):
    shutil.copytree(protein_tokenizer, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        build_shards([protein_fasta], tmp_path / "t", tmp_path / "d", BuildOptions(32, 0.2))


def test_world_size_without_a_rank(tmp_path, s2t2, build, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, said = s2t2(*build(tmp_path / "d"))
    assert code == 2 and "WORLD_SIZE=8 is set and RANK is not; give --ranks 1" in said
    assert s2t2(*build(tmp_path / "d", "--ranks", 1))[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert s2t2(*build(tmp_path / "e"))[0] == 0


class Job:
    """Work that goes wrong."""

    def fail(self, message):
        raise DataError(message)

    def leave(self, code):
        os._exit(code)

    def large(self, size):
        return b"x" * size


@pytest.mark.slow
def test_the_error_of_a_worker_stands_alone(capfd):
    """Other workers have results that nobody takes any more."""
    with pytest.raises(DataError, match=r"^bad line$"), Workers(3, Job()) as workers:
        list(workers.map("fail", [("bad line",)] * 9))
    with pytest.raises(S2T2Error, match="ended with exit code 7"), Workers(2, Job()) as workers:
        list(workers.map("leave", [(7,)] * 4))
    with pytest.raises(ZeroDivisionError), Workers(3, Job()) as workers:
        for _ in workers.map("large", [(50_000_000,)] * 9):
            1 / 0  # noqa: B018
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_files_without_permission(tmp_path, protein_fasta, protein_tokenizer):
    """As another user, if this one may read everything."""
    names = {"p.fasta": protein_fasta, "tokenizer.json": protein_tokenizer / "tokenizer.json"}
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to be another user")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for forbidden, verb in (
        ("p.fasta", "not readable"),
        ("tokenizer.json", "not allowed to read"),
    ):
        folder = tmp_path / forbidden
        folder.mkdir()
        for name, source in names.items():
            shutil.copyfile(source, folder / name)
            (folder / name).chmod(0o000 if name == forbidden else 0o644)
        config = (protein_tokenizer / "tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(config)
        folder.chmod(0o777)
        for above in folder.parents:
            if above.stat().st_uid == os.geteuid() and above.name:
                above.chmod(above.stat().st_mode | 0o055)
        command = [sys.executable, "-m", "s2t2_dist.cli", "data", "build", folder / "p.fasta"]
        command += ["--tokenizer", folder, "--out", folder / "d", "--validation-fraction", 0.2]
        done = subprocess.run(
            [*(user if os.geteuid() == 0 else []), *map(str, command)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 1:
            pytest.skip(f"the other user cannot run Python here: {done.stderr[-200:]}")
        assert verb in " ".join(re.sub("[│\n]", " ", done.stderr).split()), done.stderr
        assert done.returncode == 2
        assert "write" not in done.stderr


def test_release_json_beside_a_field_input(tmp_path, s2t2, build, protein_fasta):
    (tmp_path / "p.fasta").write_bytes(protein_fasta.read_bytes())
    (tmp_path / "release.json").write_text(json.dumps({"version": "1.2.0", "assets": []}))
    command = build(tmp_path / "d")
    command[2] = tmp_path / "p.fasta"
    assert s2t2(*command)[0] == 0
