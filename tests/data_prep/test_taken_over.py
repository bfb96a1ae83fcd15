"""A corrected command after a refusal: it is believed, takes the folder over, and owns it."""

import shutil
from pathlib import Path

import pytest

from data_prep import ranks, requests
from data_prep.build import BuildOptions, Jobs, build_shards
from data_prep.ranks import OtherRankError, Ranks
from data_prep.steps import Steps
from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error

FIRST, SECOND = {"context": 32}, {"context": 64}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.1, "LOOK": 0.0, "BELIEF": 0.0}.items():
        monkeypatch.setattr(ranks, name, seconds)


def refuse(target, rank, size, error=DataError):
    with pytest.raises(error), Ranks(target, rank, size):
        raise error("a bad line")


@pytest.mark.parametrize("only", ["encode", "pack"])
def test_an_old_failure_does_not_end_ranks_that_run_at_different_times(
    tmp_path, protein_fasta, protein_tokenizer, only
):
    def step(rank, only):
        options = BuildOptions(32, 0.2)
        jobs = Jobs(1, rank, 2, only)
        build_shards([protein_fasta], protein_tokenizer, tmp_path / "d", options, jobs)

    if only == "pack":
        step(0, "encode"), step(1, "encode")
    refuse(tmp_path / "d", 1, 2)
    step(0, only)
    with Ranks(tmp_path / "d", 0, 2, together=False) as rank:
        rank.require([])
        refuse(tmp_path / "d", 1, 2)  # this one is of now
        with pytest.raises(OtherRankError, match="rank 1 of 2 has ended: a bad line"):
            rank.require([])


@pytest.mark.parametrize("error", [DataError, S2T2Error])
def test_a_rank_that_refused_before_it_had_a_folder(
    tmp_path, protein_fasta, protein_tokenizer, error
):
    """The other marks the folder; not after a full disk or a kill, where the work is kept."""

    def build(context):
        jobs = Jobs(1, 0, 2)
        options = BuildOptions(context, 0.2)
        return build_shards([protein_fasta], protein_tokenizer, tmp_path / "d", options, jobs)

    refuse(tmp_path / "d", 1, 2, error)
    with pytest.raises(OtherRankError, match="a bad line"):
        build(32)
    assert (tmp_path / ".d.partial" / "failed").exists() == (error is DataError)
    with pytest.raises(OtherRankError if error is DataError else ArtifactError):
        build(64)  # which finds the same failure again, but in a folder of its own
    stated = artifacts.read_json(tmp_path / ".d.partial" / "request.json")
    assert stated["context"] == (64 if error is DataError else 32)


def test_a_folder_with_the_same_inode_may_be_another_build(tmp_path, monkeypatch):
    """A file system gives a new folder the number of one that was just removed."""
    partial = requests.open_partial(tmp_path / "d", FIRST, 1)
    first = partial.stat()
    steps = Steps(tmp_path, None, FIRST, (), partial, 1)
    steps._require_folder()
    requests.mark_failed(partial)
    requests.open_partial(tmp_path / "d", SECOND, 0)
    monkeypatch.setattr(Path, "stat", lambda path, **_: first)
    with pytest.raises(S2T2Error, match="was removed or replaced by another build"):
        steps._require_folder()


def test_a_folder_that_goes_away_while_its_request_is_read(tmp_path, monkeypatch):
    requests.open_partial(tmp_path / "d", FIRST, 0)
    read, gone = artifacts.read_json, []

    def read_late(path):
        if not gone:
            gone.append(path)
            shutil.rmtree(tmp_path / ".d.partial")
        return read(path)

    monkeypatch.setattr(artifacts, "read_json", read_late)
    partial = requests.open_partial(tmp_path / "d", SECOND, 1)
    assert gone and read(partial / "request.json") == SECOND
    (partial / "request.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        requests.open_partial(tmp_path / "d", SECOND, 1)
