"""Agreement between ranks: one rank's failure is every rank's error, and nobody waits."""

import errno
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
