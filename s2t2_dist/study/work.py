"""A process that makes one run after the other: a start costs more than a small run.

It joins a job of one rank once, as `s2t2 train` does for one run, so each run is bit for bit what
`s2t2 train` makes of its recipe. After a run that failed, the process ends, so that nothing of it
is left for the next one.
"""

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from s2t2_dist.study.config import StudyRun

if TYPE_CHECKING:
    import torch

    from s2t2_dist.run.stopping import StopRequest

DONE, FAILED, BUSY, STOPPED = "done", "failed", "busy", "stopped"
TIMEOUT = 1800.0  # seconds of a collective, of which one rank has none that waits


@dataclass(frozen=True)
class Answer:
    """What became of a run.

    Attributes:
        state: done (and measured), failed, busy (another job runs in its directory) or stopped
            (with a checkpoint written).
        told: the bits per byte, or what is wrong, in one line.
    """

    state: str
    told: str = ""


def work(connection: Connection, study_dir: Path, log: Path) -> None:
    """Run and measure each `StudyRun` that arrives, and answer it; None ends the process.

    Never returns: see `cli.main` for why the interpreter does not shut down.

    Args:
        log: file to which everything that the runs print is added.
    """
    _write_to(log)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the study's own process has ended
        _serve(connection, study_dir)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _serve(connection: Connection, study_dir: Path) -> None:
    from s2t2_dist.lm import engine
    from s2t2_dist.run.stopping import Launchers, StopRequest

    outer = StopRequest(Launchers.now(), None)
    device = engine.init_distributed(TIMEOUT)
    while (run := connection.recv()) is not None:
        print(f"\n== {run.name}", flush=True)
        try:
            answer = Answer(STOPPED) if outer.asked() else _run_one(run, study_dir, device, outer)
        except Exception as error:
            answer = _failure(error)
        connection.send(answer)
        if answer.state in (FAILED, STOPPED):
            return


def _run_one(
    run: StudyRun, study_dir: Path, device: "torch.device", outer: "StopRequest"
) -> Answer:
    from s2t2_dist.run import directory
    from s2t2_dist.study.measure import measure, read_record
    from s2t2_dist.training import start

    if run.recipe.output_dir.exists():
        directory.check_unlocked(run.recipe.output_dir)  # before anything is loaded
    if start.run_joined(run.recipe, device, outer=outer) != start.EXIT_DONE:
        return Answer(STOPPED)
    record = read_record(study_dir, run) or measure(run, study_dir, device)
    return Answer(DONE, f"{record['bits_per_byte']:.4f} bits per byte")


def _failure(error: Exception) -> Answer:
    """The answer to what a run raised; what may be a bug is printed with its traceback."""
    from s2t2_dist import artifacts
    from s2t2_dist.errors import InUseError, S2T2Error

    if isinstance(error, OSError):
        error = artifacts.disk_error(error, "running") or error
    if isinstance(error, S2T2Error):
        state, told = BUSY if isinstance(error, InUseError) else FAILED, "; ".join(error.lines)
    else:
        traceback.print_exception(error)
        state, told = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(f"error: {told}", flush=True)
    return Answer(state, told)


def _write_to(log: Path) -> None:
    """Standard output and error of this process, and of what it starts, go to a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
