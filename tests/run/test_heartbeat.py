"""Failure detection between real processes: killed, frozen, failing or ending before the others."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2t2_dist.comm import Comm
from s2t2_dist.run import heartbeat
from s2t2_dist.run.heartbeat import EXIT_LOST
from tests.jobs import launching as runs

HOST = socket.gethostname()
AGAIN = "; start the job again to go on from its last checkpoint"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """The folder that `heartbeat_ranks` leaves."""
    room = tmp_path_factory.mktemp("heartbeat")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.run.heartbeat_ranks", room],
        cwd=runs.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert ran.returncode == 0
    return room


def errors(jobs: Path, job: str, rank: int) -> list[str]:
    printed = (jobs / job / f"{rank}.txt").read_text()
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def codes(jobs: Path, job: str) -> list[int | None]:
    return json.loads((jobs / "codes.json").read_text())[job]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "code", "line"),
    [
        ("killed", -9, "was lost: its process ended"),
        ("frozen", None, "was lost: no heartbeat for 2 s"),
        ("failed", 1, "failed: ZeroDivisionError: x"),
        ("stopped", 1, "stopped: no room"),
    ],
)
def test_every_rank_ends_and_rank_0_says_why(job, code, line, jobs):
    assert codes(jobs, job) == [EXIT_LOST, EXIT_LOST, EXIT_LOST, code]
    found = (jobs / job / "line").read_text()
    assert found == f"rank 3 on {HOST} {line}"
    assert errors(jobs, job, 0) == [f"error: {found}{AGAIN}"]
    assert not errors(jobs, job, 1) + errors(jobs, job, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "missing"), [("hung", 3), ("rank 0 hung", 0)])
def test_who_does_not_come_to_a_collective_is_named(job, missing, jobs):
    """The others give up after the collective's timeout; the one that hangs has a beating heart."""
    assert codes(jobs, job) == [EXIT_LOST] * 4
    line = f"rank {missing} on {HOST} did not come to a collective within collective_timeout"
    assert (jobs / job / "line").read_text() == line
    assert errors(jobs, job, 0) == [f"error: {line}{AGAIN}"]


@pytest.mark.slow
def test_where_rank_0_dies_each_host_says_so_once(jobs):
    assert codes(jobs, "rank 0 killed") == [-9, EXIT_LOST, EXIT_LOST, EXIT_LOST]
    expected = f"error: rank 0 on {HOST} was lost: its process ended{AGAIN}"
    assert errors(jobs, "rank 0 killed", 1) == [expected]
    assert not errors(jobs, "rank 0 killed", 2) + errors(jobs, "rank 0 killed", 3)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["rank 0 stays", "rank 3 stays"])
def test_a_rank_that_ends_before_another_is_not_missed(job, jobs):
    assert codes(jobs, job) == [0, 0, 0, 0]
    for rank in range(4):
        assert (jobs / job / f"{rank}.txt").read_text() == "ended well\n"


@pytest.mark.slow
def test_the_recipes_timeout_holds_in_deepspeeds_collectives(source_model, protein_data, tmp_path):
    """A rank frozen in a weight stage, with heartbeats out of the way."""
    stage = {**runs.STAGE, "max_steps": 500, "save_steps": 500, "eval_steps": 500}
    recipe = runs.write_recipe(
        tmp_path,
        source_model,
        protein_data,
        stages=[{"kind": "finetune", "init": "truncate", **stage}],
        collective_timeout=20,
        heartbeat_timeout=1000,
    )
    process = runs.start(recipe, 2)
    try:
        runs.wait_for_line(tmp_path / "run", "finetune", 3, process)
        runs.ranks_of(process)[1].suspend()
        line = f"rank 1 on {HOST} did not come to a collective within collective_timeout"
        deadline = time.monotonic() + 45
        while runs.status(tmp_path / "run")["state"] == "running":
            assert time.monotonic() < deadline, runs.output(recipe)
            time.sleep(0.1)
    finally:
        runs.kill(process)
    assert runs.status(tmp_path / "run")["reason"] == line
    assert f"error: {line}{AGAIN}" in runs.output(recipe)


@pytest.mark.parametrize("failure", [None, "rank 0 failed"])
def test_the_last_message_arrives_though_lines_are_unread(failure):
    """The peer reads late, and has sent a line that is unread at the end."""
    with socket.socket() as far, socket.create_server(("127.0.0.1", 0)) as listener:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        far.connect(listener.getsockname())
        near = listener.accept()[0]
        filler = near.send(b"\n" * 100_000)  # more than arrives before the peer reads
        far.sendall(b"{}\n")
        heart = heartbeat._Monitor(Comm(), [heartbeat._Peer(0, near)], 20, print)
        heart.failure = failure
        heart.closing.set()
        heart.thread.start()
        time.sleep(0.5)
        received = b"".join(iter(lambda: far.recv(65536), b""))
    heart.thread.join()
    assert near.fileno() == -1, "left open: closed by the end of the process, it would be reset"
    last = {"lost": failure} if failure else {"done": True}
    assert json.loads(received[filler:]) == last


def test_a_stranger_on_the_port_is_turned_away():
    listener = heartbeat._listen(4)
    address = ("127.0.0.1", listener.getsockname()[1])
    callers = [socket.create_connection(address) for _ in range(3)]
    callers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    callers[1].close()
    callers[2].sendall(b"secret 7\n")
    (peer,) = heartbeat._accept(listener, "secret", 1)
    assert peer.rank == 7
    assert callers[0].recv(1) == b""
    for end in (peer.connection, *callers):
        end.close()
