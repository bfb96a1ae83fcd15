"""When a job stops: by a signal, before its time is up, when its launcher is gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from s2t2_dist.run import stopping
from s2t2_dist.run.stopping import StopRequest


@pytest.fixture(autouse=True)
def handlers_as_before():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    stop = StopRequest(launcher=None, max_hours=None)
    assert not stop.asked()
    os.kill(os.getpid(), number)
    assert stop.asked()


def test_a_job_stops_while_a_step_and_a_save_still_fit(monkeypatch):
    """A limit of 100 s, steps of 10 s, saves of 8 s: after 70 s (70 + 10 + 2 * 8 < 100 < 80 + ...).

    Before any save was timed, 2% of the limit is kept for it: 80 + 10 + 2 < 100.
    """
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def stops_at(save: float | None) -> float:
        clock[0] = 0.0
        stop = StopRequest(launcher=None, max_hours=100 / stopping.SECONDS_PER_HOUR)
        if save is not None:
            stop.saved(save)
        while True:
            clock[0] += 10
            if stop.asked():
                return clock[0]

    assert stops_at(8.0) == 80
    assert stops_at(None) == 90


ORPHAN = """
import subprocess, sys
child = "import os, time; from s2t2_dist.run.stopping import StopRequest\\n" \
    "stop = StopRequest(os.getppid(), None); print(stop.asked(), flush=True)\\n" \
    "while not stop.asked(): time.sleep(0.01)\\n" \
    "print('stops', flush=True)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
print(process.stdout.readline(), end="", flush=True)
subprocess.Popen(["cat"], stdin=process.stdout)  # takes the rest to our standard output
"""


def test_a_launched_rank_stops_when_its_launcher_is_gone():
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["False", "stops"], done.stderr
