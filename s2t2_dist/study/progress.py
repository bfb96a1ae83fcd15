"""How far a study is: a bar on a terminal, else a line every minute, with the time left."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from s2t2_dist.study.config import StudyRun
from s2t2_dist.study.schedule import steps_done
from s2t2_dist.study.work import BUSY, FAILED, Answer

LINE_SECONDS = 60.0


class StudyProgress:
    """Shows the steps of all runs together.

    Args:
        runs: of the study.
        todo: those that this command makes; the steps that they have already do not count for the
            speed.
    """

    def __init__(self, runs: list[StudyRun], todo: list[StudyRun]):
        self.total = sum(run.steps for run in runs)
        self.runs, self.ended = len(runs), len(runs) - len(todo)
        self.past = self.total - sum(run.steps for run in todo)
        self.first = self.past + sum(map(steps_done, todo))
        self.began = self.told_at = time.monotonic()
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=max(1, self.total), left="")

    def __enter__(self) -> "StudyProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def told(self, run: StudyRun, answer: Answer) -> None:
        """A line for a run that ended, or that another job has."""
        if answer.state != BUSY:
            self.ended += 1
            self.past += run.steps
        wrong = " (the others go on)" if answer.state == FAILED else ""
        text = f": {answer.told}" if answer.told else ""
        self._print(f"{run.name} {answer.state}{text}{wrong}")

    def shown(self, active: list[StudyRun]) -> None:
        """Bring the bar up to date; called several times a second."""
        now = time.monotonic()
        if self.bar.disable and now - self.told_at < LINE_SECONDS:
            return
        self.told_at = now
        done = self.past + sum(map(steps_done, active))
        runs = f"{self.ended} of {self.runs} runs, {done:,} of {self.total:,} steps"
        left = time_left(now - self.began, done - self.first, self.total - done)
        if self.bar.disable:
            names = ", ".join(run.name for run in active)
            self._print(runs + (left and f", {left}") + (names and f"; now {names}"))
        else:
            self.bar.update(self.task, completed=done, description=runs, left=left)

    def _print(self, line: str) -> None:
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.console.print(line, markup=False, highlight=False)


def time_left(seconds: float, done: int, left: int) -> str:
    """`1:02:33 left`, at the speed so far; empty before the first step."""
    if done <= 0:
        return ""
    whole = int(seconds / done * left)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} left"
