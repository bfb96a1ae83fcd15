"""Jobs and ranks as forks of one process that has imported everything: they start in no time.

Importing torch, DeepSpeed and transformers takes longer than most tests do. Where the launcher is
what a test is about, `launching.start(..., launcher=True)` starts it as a user does.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 20
METHOD = "forkserver"
PRELOADED = [
    "s2t2_dist.training.start",
    "transformers.models.olmo.modeling_olmo",
    "tests.jobs.distributed",
]


def context() -> multiprocessing.context.BaseContext:
    """What makes processes, each a fork of a server that starts at the first one."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context(METHOD)


@dataclass(frozen=True)
class Start:
    """How a job is started.

    Attributes:
        arguments: of `s2t2 train`.
        ranks: 0 for a single process that no launcher started.
        port: where the ranks meet.
        output: the file that its output is added to.
    """

    arguments: list[str]
    ranks: int
    port: str
    environment: dict[str, str]
    folder: Path
    output: Path


class Job:
    """`s2t2 train` in a session of its own: what a launcher starts, in the place of a `Popen`."""

    def __init__(self, start: Start):
        self.args = [*start.arguments, "--master_port", start.port]
        self._process = context().Process(target=_run_job, args=(start,))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run_job(start: Start) -> None:
    os.setsid()
    os.chdir(start.folder)
    with start.output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(start.environment)
    if not start.ranks:
        _train(start.arguments)
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": start.port, "WORLD_SIZE": str(start.ranks)}
    fork = multiprocessing.get_context("fork")
    processes = []
    for rank in range(start.ranks):
        os.environ.update({**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        arguments = [f"--local_rank={rank}", *start.arguments]
        processes.append(fork.Process(target=_train, args=(arguments,)))
        processes[-1].start()
    os._exit(_wait(processes))


def _train(arguments: list[str]) -> None:
    """Never returns, as the program does not."""
    import torch  # not for the process that starts the jobs

    from s2t2_dist import cli

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # read before the fork
    sys.argv = ["s2t2", "train", *arguments]
    cli.main()


def _wait(processes: list[multiprocessing.Process]) -> int:
    """The first exit code that is not 0, once all have ended; 0 if none."""
    while None in (codes := [process.exitcode for process in processes]):
        time.sleep(0.02)
        if any(codes):
            _end(processes)
    return next((abs(code) for code in codes if code), 0)


def _end(processes: list[multiprocessing.Process]) -> None:
    """One rank failed: the others have a moment to notice, as with DeepSpeed's launcher."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        process.kill()
