"""What is checked before a model is loaded, with ranks, disks and servers that really differ."""

import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from s2t2_dist.comm import Comm
from s2t2_dist.errors import PreflightError
from s2t2_dist.training import preflight
from s2t2_dist.training.preflight import Needs
from tests.jobs import launching
from tests.jobs.distributed import run_ranks

HOST = socket.gethostname()


# Ranks that differ


@pytest.mark.slow
def test_each_difference_between_nodes_is_one_line(source_model, protein_data, tmp_path):
    """Two nodes, each with a disk of its own: another package, another override, other data."""
    recipe = launching.write_recipe(tmp_path, source_model, protein_data, data={"path": "data"})
    package = tmp_path / "1" / "safetensors-9.9.9.dist-info"
    port = launching.free_port()
    nodes = []
    for rank in (0, 1):
        room = tmp_path / str(rank)
        shutil.copytree(protein_data, room / "data")
        command = [launching.ROOT / "launch" / "run_node.sh", "--nodes", "2", "--node-rank"]
        command += [str(rank), "--master-addr", "127.0.0.1", "--master-port", port, recipe]
        environment = launching.environment()
        if rank == 1:
            package.mkdir()
            (package / "METADATA").write_text("Name: safetensors\nVersion: 9.9.9\n")
            environment["PYTHONPATH"] = str(room)
            (room / "data" / "manifest.json").write_text("{}")
            command.append("seed=18")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen(command, cwd=room, env=environment, **pipes))
    (_, printed), (_, other) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [2, 2], printed + other
    found = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(found) == 3 and "Traceback" not in printed
    for line, named in zip(found, ("version safetensors: ", "seed: 17 -> 18", "data"), strict=True):
        assert line.startswith(f"error: rank 1 on {HOST}: ") and named in line
    assert "9.9.9 (rank 0 -> here); install the same on every node" in found[0]
    assert "data/manifest.json: " in found[2]
    assert "error: " not in other
    assert not (tmp_path / "run").exists()


def _see(comm, rooms: list[Path], seconds: float = 1.0) -> list[str]:
    """Each rank looks for the run directory on a disk of its own."""
    preflight.SHARED_SECONDS = seconds
    try:
        preflight.check_shared(rooms[comm.rank], comm)
    except PreflightError as error:
        return error.problems
    return []


@pytest.mark.slow
def test_a_rank_with_another_run_directory_is_named(tmp_path):
    rooms = [tmp_path / name for name in ("shared", "shared", "own")]
    for room, text in {rooms[0]: "ours", rooms[2]: "an older one"}.items():
        room.mkdir()
        (room / ".lock").write_text(text)
    named = f"rank 2 on {HOST}: {rooms[2]} is not what rank 0 sees; put it on a shared disk"
    assert run_ranks(_see, 3, tmp_path, rooms) == [[named]] * 3


def _see_late(comm, rooms: list[Path]) -> list[str]:
    """Rank 1 is shown the lock of rank 0 a while after it was written."""
    if comm.rank == 1:
        threading.Timer(0.3, (rooms[1] / ".lock").write_text, ["ours"]).start()
    return _see(comm, rooms, 30.0)


@pytest.mark.slow
def test_a_run_directory_that_shows_late_is_waited_for(tmp_path):
    rooms = [tmp_path / name for name in ("here", "there")]
    for room in rooms:
        room.mkdir()
    (rooms[0] / ".lock").write_text("ours")
    assert run_ranks(_see_late, 2, tmp_path, rooms) == [[], []]


def test_ranks_of_a_host_share_a_line():
    comm = Comm()
    comm.hosts = ["a", "b", "b", "c"]
    with pytest.raises(PreflightError) as raised:
        preflight._require_none(comm, [[], ["x", "y"], ["x"], ["x"]])
    assert raised.value.lines == ["ranks 1, 2 on b: x", "rank 1 on b: y", "rank 3 on c: x"]
    assert raised.value.collective


# Room


def test_enough_room_is_no_problem(context):
    preflight.check_room(context)
    assert not context.run_dir.parent.exists(), "the check wrote something"


def test_a_disk_too_small_for_two_checkpoints_is_named(context):
    """A real one, of 256 KiB; two checkpoints of C (400, 64) take 600 KiB."""
    disk = context.run_dir.parent
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(
            PreflightError, match=f"^rank 0 on {HOST}: {disk} has 0.0 GiB free, two"
        ):
            preflight.check_room(context)
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        preflight.check_room(context)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_little_memory_is_named(context, monkeypatch):
    monkeypatch.setattr(preflight, "needs", lambda _: Needs(memory=2**50, checkpoint=1))
    with pytest.raises(PreflightError, match=r"optimizer alone take 1048576.0 GiB"):
        preflight.check_room(context)


def test_needs_count_what_each_stage_trains(context):
    """C is (400, 64); the untied model of width 32 in 64 tokens has 24,576 weights."""
    translate, finetune = (preflight._stage_needs(context, s) for s in context.recipe.stages)
    assert translate == Needs(memory=16 * 400 * 64, checkpoint=12 * 400 * 64)
    weights = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert finetune == Needs(memory=16 * weights, checkpoint=12 * weights)
