"""`data build` as jobs: the same bytes from any number of workers and ranks, and after any kill."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.build import BuildOptions, Jobs, build_shards
from data_prep.readers import RARE_RESIDUES, RESIDUES
from data_prep.steps import Steps
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.data.shards import SPLITS, ShardReader
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error
from tests.conftest import write_fasta

ROOT = Path(__file__).parents[2]
OPTIONS = BuildOptions(context=64, validation_fraction=0.1)
PACKINGS = ("concatenate", "best-fit")
RECORDS = 6000
SMALL = {"WINDOW_TOKENS": 1 << 16, "ROWS_PER_SHARD": 2048}  # so that a small input has many of both


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    """2.5 MB, longest first as UniRef is; enough for three chunks and for workers."""
    rng = random.Random(3)
    lengths = sorted((max(1, int(rng.expovariate(1 / 400))) for _ in range(RECORDS)), reverse=True)
    text = "".join(rng.choices(RESIDUES * 30 + RARE_RESIDUES, k=1_000_000))
    records = {}
    for i, length in enumerate(lengths):
        first = rng.randrange(len(text) - length)
        records[f"UniRef50_{i}"] = text[first : first + length]
    return write_fasta(tmp_path_factory.mktemp("fasta") / "p.fasta", records)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, fasta):
    target = tmp_path_factory.mktemp("tokenizer") / "protein"
    train_tokenizer([fasta], target, 128, 200_000)
    return target


def make_small(patch):
    for name, value in SMALL.items():
        patch.setattr(f"data_prep.packing.{name}", value)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small windows and shards in this process; commands and workers do not see them."""
    make_small(monkeypatch)


def options_of(packing):
    return BuildOptions(context=64, validation_fraction=0.1, packing=packing)


def contents(directory):
    """Every file's path and bytes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, fasta, tokenizer):
    """The bytes that one process makes, by packing."""
    directory = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        for packing in PACKINGS:
            assert build_shards([fasta], tokenizer, directory / packing, options_of(packing))
    return {packing: contents(directory / packing) for packing in PACKINGS}


def test_the_reference_has_many_windows_chunks_and_shards(reference):
    for packing in PACKINGS:
        assert len([name for name in reference[packing] if name.startswith("train/")]) > 5


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_give_the_same_bytes(tmp_path, fasta, tokenizer, reference, packing, ranks):
    def step(rank, only):
        jobs = Jobs(1, rank, ranks, only)
        build_shards([fasta], tokenizer, tmp_path / "d", options_of(packing), jobs)

    with pytest.raises(S2T2Error, match=f"run that step on every rank \\(of {ranks}\\)"):
        step(1, "pack")
    for only in ("encode", "pack"):
        for rank in reversed(range(ranks)):
            step(rank, only)
            assert not (tmp_path / "d").exists()
    step(0, "seal")
    assert contents(tmp_path / "d") == reference[packing]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_rank_that_is_no_longer_needed_ends_with_the_build(
    tmp_path, fasta, tokenizer, monkeypatch
):
    """Rank 0 publishes while rank 2, which has no shard to pack, still looks for the parts."""
    monkeypatch.setattr("data_prep.packing.ROWS_PER_SHARD", 1 << 20)  # a shard for each split
    monkeypatch.setattr("data_prep.build.PATIENCE_SECONDS", 5)

    def step(rank, only=None):
        return build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS, Jobs(1, rank, 3, only))

    for rank in (0, 1):
        step(rank, "encode")
    others, looked, original = [(1, "pack"), (0, None)], [], Steps.missing_parts

    def late(self):
        looked.append(self.rank)
        if self.rank == 2 and looked.count(2) == 2:  # rank 2 has encoded, and waits for the others
            while others:
                step(*others.pop(0))
        return original(self)

    monkeypatch.setattr(Steps, "missing_parts", late)
    step(2)
    assert not others
    assert ShardReader(tmp_path / "d", "train").metadata["reading"]["documents"] == RECORDS
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("chunk", [1 << 16, 1 << 18])
def test_chunk_and_window_sizes_change_nothing(
    tmp_path, fasta, tokenizer, reference, monkeypatch, chunk
):
    monkeypatch.setattr("data_prep.sources.chunk_bytes", lambda paths: chunk)
    monkeypatch.setattr("data_prep.packing.WINDOW_TOKENS", chunk)
    build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS)
    assert contents(tmp_path / "d") == reference["concatenate"]


def build_command(fasta, tokenizer, target, *more):
    command = [sys.executable, "-m", "s2t2_dist.cli", "data", "build", fasta, "--tokenizer"]
    command += [tokenizer, "--context", 64, "--validation-fraction", 0.1, "--out", target, *more]
    return list(map(str, command))


def start(command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def end(process, seconds=120):
    """Its exit code and what it said on stderr, whose pipe is closed then."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fasta, tokenizer):
    """The bytes that the command makes with one worker."""
    target = tmp_path_factory.mktemp("whole") / "d"
    code, said = end(start(build_command(fasta, tokenizer, target, "--workers", 1)))
    assert code == 0, said
    return contents(target)


@pytest.mark.slow
def test_workers_and_concurrent_ranks_give_the_same_bytes(tmp_path, fasta, tokenizer, whole):
    processes = [start(build_command(fasta, tokenizer, tmp_path / "w", "--workers", 3))]
    for rank in range(3):
        command = build_command(fasta, tokenizer, tmp_path / "r", "--workers", 1)
        processes.append(start(command, RANK=str(rank), WORLD_SIZE="3"))
    try:
        for process in processes:
            code, said = end(process)
            assert code == 0, said
    finally:
        for process in processes:
            process.kill()
    assert contents(tmp_path / "w") == contents(tmp_path / "r") == whole


def is_killed(command, is_time):
    """Start the command and SIGKILL it when it is time; False if it was done before."""
    with start(command) as process:
        while process.poll() is None:
            if is_time():
                process.kill()
                return True
            time.sleep(0.002)
    return False


def assert_finishes(command, target, whole):
    """Run again, it leaves the result and nothing else."""
    code, said = end(start(command))
    assert code == 0, said
    assert contents(target) == whole
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_build_goes_on(tmp_path, fasta, tokenizer, whole, workers):
    """Killed as soon as a file of each step is there; after the first there is all the work."""
    command = build_command(fasta, tokenizer, tmp_path / "d", "--workers", workers)
    partial = tmp_path / ".d.partial"
    assert is_killed(command, (partial / "request.json").exists)
    is_killed(command, lambda: any(partial.glob("work/part-*.arrow")))
    is_killed(command, (partial / "work" / "parts.json").exists)
    assert_finishes(command, tmp_path / "d", whole)


@pytest.mark.soak
def test_killed_at_30_random_moments(tmp_path, fasta, tokenizer, whole):
    begin = time.monotonic()
    assert_finishes(build_command(fasta, tokenizer, tmp_path / "0" / "d"), tmp_path / "0/d", whole)
    longest = time.monotonic() - begin
    rng, kills, builds = random.Random(7), 0, 0
    while kills < 30:
        builds += 1
        target = tmp_path / str(builds) / "d"
        command = build_command(fasta, tokenizer, target, "--workers", 1 + builds % 2)
        for _ in range(5):
            moment = time.monotonic() + rng.uniform(0.1, longest)
            if not is_killed(command, lambda moment=moment: time.monotonic() > moment):
                longest *= 0.9  # it was measured on a busier machine
                break
            kills += 1
        assert_finishes(command, target, whole)


@pytest.mark.parametrize("place", ["parts", "plan", "pack", "seal", "publish"])
def test_killed_between_any_two_files(tmp_path, fasta, tokenizer, reference, monkeypatch, place):
    """The same at exact places: an exception that no handler sees stands for the kill."""

    class KilledError(BaseException):
        pass

    names = {"parts": "encode", "plan": "check_counts", "pack": "pack"}
    name = names.get(place, place)
    original, calls = getattr(Steps, name), []

    def killed(self, *arguments):
        calls.append(1)
        if place == "publish":  # what it removes first is gone
            (self.partial / "request.json").unlink()
        if len(calls) == (3 if place in ("parts", "pack") else 1):
            raise KilledError
        return original(self, *arguments)

    monkeypatch.setattr(Steps, name, killed)
    with pytest.raises(KilledError):
        build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == [".d.partial"]
    with pytest.raises(ArtifactError, match="unfinished build with another seed"):
        build_shards([fasta], tokenizer, tmp_path / "d", BuildOptions(64, 0.1, seed=4))
    monkeypatch.setattr(Steps, name, original)
    assert build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS)
    assert contents(tmp_path / "d") == reference["concatenate"]


@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_the_build_goes_on(tmp_path, fasta, tokenizer, whole):
    command = build_command(fasta, tokenizer, tmp_path / "d", "--workers", 2)
    process = start(command)
    killed = False
    while process.poll() is None and not killed:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)
                    killed = True
        time.sleep(0.01)
    code, said = end(process, 30)
    assert code == 2 and "a worker process was killed" in said
    assert end(start(command))[0] == 0
    assert contents(tmp_path / "d") == whole


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path, fasta, tokenizer):
    with start(build_command(fasta, tokenizer, tmp_path / "d", "--workers", 2)) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(found := children.read_text().split()) < 3:  # two workers and a resource tracker
            time.sleep(0.02)
        time.sleep(0.5)
        process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in found):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_what_a_kill_leaves_beside_the_result_goes(tmp_path, fasta, tokenizer, reference):
    partial = tmp_path / ".d.partial"
    partial.mkdir()
    for name in ("request.json.node-17", ".request.json.tmp-17", ".manifest.json.tmp-17"):
        (partial / name).touch()
    build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS)
    assert contents(tmp_path / "d") == reference["concatenate"]


def test_wrong_ranks():
    with pytest.raises(DataError, match="rank 2 is not one of 2"):
        Jobs(rank=2, ranks=2)


def test_dropped_ids(tmp_path, fasta, tokenizer, reference):
    drop = tmp_path / "hits.m8"
    drop.write_text("".join(f"UniRef50_{i}\tother 0.9\n" for i in [*range(50, 150), 50, 99999]))
    options = BuildOptions(context=64, validation_fraction=0.1, drop_ids=drop)
    build_shards([fasta], tokenizer, tmp_path / "d", options)
    manifest = artifacts.read_manifest(tmp_path / "d")
    held = {split: manifest["splits"][split]["bytes"] for split in SPLITS}
    assert manifest["dropped"]["documents"] == 100
    total = sum(held.values()) + manifest["dropped"]["characters"]
    assert total == manifest["reading"]["characters"]
    assert sum(manifest["splits"][split]["documents"] for split in SPLITS) == RECORDS - 100
    assert manifest["dropped_ids"]["name"] == "hits.m8"
    assert ShardReader(tmp_path / "d", "train").metadata["reading"]["documents"] == RECORDS
