"""Agreement between ranks: one rank's failure is every rank's error, and nobody waits."""

import errno
import re
import socket

import pytest
from safetensors import SafetensorError

from s2t2_dist import comm
from s2t2_dist.comm import Comm, agree
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from tests.jobs.distributed import run_ranks
from tests.jobs.launching import free_port


def fail(error: Exception):
    raise error


def _outcome(comm, failing: list[int]) -> tuple:
    try:
        step = (lambda: fail(ConfigError("no data"))) if comm.rank in failing else (lambda: 7)
        return "result", agree(comm, step, "reading"), None
    except S2T2Error as error:
        return type(error), str(error), error.collective


def _outcomes(comm) -> list[tuple]:
    return [_outcome(comm, failing) for failing in ([], [1], [0, 1])]


def test_where_one_rank_fails_all_raise_the_same(tmp_path):
    zero, one = run_ranks(_outcomes, 2, tmp_path)
    assert zero == one
    nobody, second, both = zero
    assert nobody == ("result", 7, None)
    assert second == (ConfigError, f"rank 1 on {socket.gethostname()}: no data", True)
    assert both == (ConfigError, "no data", True)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ArtifactError("x was altered"), ArtifactError, "^x was altered$"),
        (OSError(errno.ENOSPC, "full"), S2T2Error, "no space left while writing x"),
        (OSError(errno.EIO, "broken"), S2T2Error, "writing x: .*broken"),
        (SafetensorError("bad header"), S2T2Error, "writing x: bad header"),
    ],
)
def test_what_the_disk_does_is_one_of_our_errors(error, kind, text):
    with pytest.raises(kind, match=text) as raised:
        agree(Comm(), lambda: fail(error), "writing x")
    assert raised.value.collective


def test_a_bug_stays_a_bug():
    with pytest.raises(ZeroDivisionError):
        agree(Comm(), lambda: 1 / 0, "dividing")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_one_clear_line(rank, monkeypatch):
    """Neither rank 0 nor another one waits for ever for a node whose launch failed."""
    port = free_port()
    monkeypatch.setattr(comm, "START_TIMEOUT", 1)
    job = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in job.items():
        monkeypatch.setenv(key, str(value))
    named = f"rank {rank} on {socket.gethostname()} found no other ranks at 127.0.0.1:{port} "
    with pytest.raises(S2T2Error, match=named):
        comm.join("gloo", 1)


RANK_0 = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets a rank's variables; None unsets one."""

    def set_all(**changes: str | None) -> None:
        for name, value in (RANK_0 | changes).items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR: empty or not set"),
        ({"MASTER_ADDR": None, "WORLD_SIZE": None}, "WORLD_SIZE, MASTER_ADDR: empty or not set"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK: empty or not set"),
        ({"RANK": ""}, "RANK: empty or not set"),
        ({"RANK": " "}, "RANK: empty or not set"),
        ({"RANK": "one"}, "RANK is 'one', expected a whole number"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "RANK is 0, but WORLD_SIZE 0"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0, expected one from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
    ],
)
def test_a_wrong_environment_is_named(changes, named, environment):
    environment(**changes)
    with pytest.raises(S2T2Error, match=re.escape(named)):
        comm.is_launched()


def test_a_rank_and_a_process_alone(environment):
    environment()
    assert comm.is_launched()
    environment(RANK=None)
    assert not comm.is_launched()


@pytest.mark.slow
def test_a_rank_that_waits_says_for_whom(environment, monkeypatch, capsys):
    """As after a WORLD_SIZE that is left from another job."""
    monkeypatch.setattr(comm, "ANNOUNCE_SECONDS", 0.2)
    monkeypatch.setattr(comm, "START_TIMEOUT", 1.0)
    port = free_port()
    environment(MASTER_PORT=port)
    with pytest.raises(S2T2Error, match=r"rank 0 on .* found no other ranks"):
        comm.join("gloo", 10)
    told = capsys.readouterr().err.splitlines()
    expected = f"rank 0 on {socket.gethostname()} waits for the other 1 ranks (WORLD_SIZE) at "
    assert [line for line in told if line.startswith("rank")] == [
        f"{expected}127.0.0.1:{port}, for up to 1 s"
    ]


def test_what_is_quick_is_not_announced(capsys):
    with comm.announced(lambda: "late"):
        pass
    assert capsys.readouterr().err == ""
