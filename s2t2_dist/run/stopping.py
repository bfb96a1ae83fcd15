"""When a job should save and stop: a signal, a dead launcher, or the time limit."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SECONDS_PER_HOUR = 3600.0
# Share of the time limit reserved for the first checkpoint, whose duration is not yet known.
FIRST_SAVE_SHARE = 0.02
PROGRAM = "s2t2_dist.train"  # in the command line of every launcher of this program
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Launchers:
    """The processes that started this one, from its parent up: DeepSpeed starts a rank by two.

    A launcher is a Python process with this program's name among its arguments. The parent counts
    as one whatever it is. A shell further up does not: it may end and leave its job alone.

    Attributes:
        parent: of this process.
        further: each launcher but the highest, and its parent when it was looked at.
    """

    parent: int
    further: tuple[tuple[psutil.Process, int], ...] = ()

    @classmethod
    def now(cls) -> "Launchers":
        """Those of this process. Call it early: one may die while this program starts."""
        parent = os.getppid()
        further = []
        try:
            process = psutil.Process(parent)
            while _is_launcher(process) and (above := process.parent()) and _is_launcher(above):
                further.append((process, above.pid))
                process = above
        except psutil.Error:  # it has just ended, or belongs to another user
            pass
        return cls(parent, tuple(further))

    def alive(self) -> bool:
        """Whether none of them has ended: a process whose parent ends gets another one."""
        if os.getppid() != self.parent:
            return False
        try:
            return all(process.ppid() == above for process, above in self.further)
        except psutil.Error:
            return False


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and "python" in Path(words[0]).name and PROGRAM in words


class StopRequest:
    """Whether this rank was asked to stop.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP ask for it; a second SIGINT ends the process at once, and
    SIGHUP does nothing under `nohup`. The death of one of this rank's launchers asks for it too:
    otherwise the orphaned job would keep the run directory locked.

    Args:
        launchers: of this rank; None without a launcher.
        max_hours: time limit of the job, counted from now; None for no limit.
        outer: of a process with several jobs, one after the other: it handles the signals for all.
    """

    def __init__(
        self,
        launchers: Launchers | None,
        max_hours: float | None,
        outer: "StopRequest | None" = None,
    ):
        self._asked = False
        self._outer = outer
        self._launchers = launchers
        self._began = self._last = time.monotonic()
        self._limit = max_hours * SECONDS_PER_HOUR if max_hours else None
        self._longest_step = 0.0
        self._longest_save: float | None = None
        for number in SIGNALS if outer is None else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Whether to stop now. Call it once per step: it measures the longest step."""
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last)
        self._last = now
        if self._launchers is not None and not self._launchers.alive():
            return True
        if self._outer is not None and self._outer.asked():
            return True
        return self._asked or (self._limit is not None and self._time_is_up(now))

    def saved(self, seconds: float) -> None:
        """Record how long a checkpoint took."""
        self._longest_save = max(self._longest_save or 0.0, seconds)
        self._last = time.monotonic()

    def _time_is_up(self, now: float) -> bool:
        """Whether another step, then a save that takes twice the longest, would pass the limit."""
        save = self._limit * FIRST_SAVE_SHARE
        if self._longest_save is not None:
            save = 2 * self._longest_save
        return now - self._began + self._longest_step + save > self._limit

    def _handle(self, number: int, _: object) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
