"""When a job stops: by a signal, before its time is up, when its launcher is gone."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest

from s2t2_dist.run import stopping
from s2t2_dist.run.stopping import StopRequest


@pytest.fixture(autouse=True)
def handlers_as_before():
    numbers = stopping.SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_asks_to_stop(number):
    stop = StopRequest(launchers=None, max_hours=None)
    assert not stop.asked()
    os.kill(os.getpid(), number)
    assert stop.asked()


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_stops_every_job_of_a_process(number):
    """Whenever it comes: in a job, or between the end of one and the start of the next."""
    outer = StopRequest(launchers=None, max_hours=None)
    first = StopRequest(launchers=None, max_hours=None, outer=outer)
    assert not first.asked()
    os.kill(os.getpid(), number)
    assert first.asked() and outer.asked()
    assert StopRequest(launchers=None, max_hours=None, outer=outer).asked()


def test_a_job_stops_while_a_step_and_a_save_still_fit(monkeypatch):
    """A limit of 100 s, steps of 10 s, saves of 8 s: after 70 s (70 + 10 + 2 * 8 < 100 < 80 + ...).

    Before any save was timed, 2% of the limit is kept for it: 80 + 10 + 2 < 100.
    """
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def stops_at(save: float | None) -> float:
        clock[0] = 0.0
        stop = StopRequest(launchers=None, max_hours=100 / stopping.SECONDS_PER_HOUR)
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
child = "import os, time; from s2t2_dist.run.stopping import Launchers, StopRequest\\n" \
    "stop = StopRequest(Launchers.now(), None); print(stop.asked(), flush=True)\\n" \
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


# A chain as DeepSpeed makes it: each level starts the next, the last is the rank.
CHAIN = """
import subprocess, sys, time
level = int(sys.argv[1])
if level:
    wrap = ["sh", "-c", '"$0" "$@" & wait'] if sys.argv[2] == "shell" and level == 2 else []
    words = [sys.executable, "-c", sys.argv[3], str(level - 1), *sys.argv[2:]]
    subprocess.run([*wrap, *words])
else:
    from s2t2_dist.run.stopping import Launchers
    launchers = Launchers.now()
    print(len(launchers.further), launchers.alive(), flush=True)
    while launchers.alive():
        time.sleep(0.01)
    print("gone", flush=True)
"""


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_the_end_of_any_launcher_is_noticed(level, number):
    """Of the parent, DeepSpeed's runner above it, and one above that; the others live on."""
    words = [sys.executable, "-c", CHAIN, "3", "none", CHAIN, stopping.PROGRAM]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as top:
        assert top.stdout.readline() == "2 True\n"
        family = [psutil.Process(top.pid), *psutil.Process(top.pid).children(recursive=True)]
        family[3 - level].send_signal(number)
        assert top.stdout.readline() == "gone\n"
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_shell_above_may_end():
    """As the one that started a job in the background."""
    words = [sys.executable, "-c", CHAIN, "2", "shell", CHAIN, stopping.PROGRAM]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as top:
        assert top.stdout.readline() == "0 True\n"
        _, shell, launcher, _ = [
            psutil.Process(top.pid),
            *psutil.Process(top.pid).children(recursive=True),
        ]
        shell.kill()
        ready, _, _ = select.select([top.stdout], [], [], 0.5)
        assert not ready, "it stopped although its launcher lives"
        launcher.kill()
        assert top.stdout.readline() == "gone\n"


def test_nohup_is_honoured():
    code = "import os, signal; from s2t2_dist.run.stopping import StopRequest\n"
    code += "stop = StopRequest(None, None); os.kill(os.getpid(), signal.SIGHUP)\n"
    code += "print(stop.asked())"
    words = ["sh", "-c", 'trap "" HUP; "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
