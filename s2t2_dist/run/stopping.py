"""When a job should save and stop: a signal, a dead launcher, or the time limit."""

import os
import signal
import time

SECONDS_PER_HOUR = 3600.0
# Share of the time limit reserved for the first checkpoint, whose duration is not yet known.
FIRST_SAVE_SHARE = 0.02


class StopRequest:
    """Whether this rank was asked to stop.

    SIGTERM, SIGUSR1 and SIGINT ask for it; a second SIGINT ends the process at once. The death of
    this rank's launcher asks for it too: otherwise the orphaned job would keep the run directory
    locked.

    Args:
        launcher: process id of the launcher that started this rank; None without a launcher.
        max_hours: time limit of the job, counted from now; None for no limit.
    """

    def __init__(self, launcher: int | None, max_hours: float | None):
        self._asked = False
        self._launcher = launcher
        self._began = self._last = time.monotonic()
        self._limit = max_hours * SECONDS_PER_HOUR if max_hours else None
        self._longest_step = 0.0
        self._longest_save: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Whether to stop now. Call it once per step: it measures the longest step."""
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last)
        self._last = now
        if self._launcher is not None and os.getppid() != self._launcher:
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
