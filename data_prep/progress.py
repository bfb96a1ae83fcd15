"""What the user sees of long work: a bar on a terminal, a line now and then anywhere else."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

# Seconds of silence before the first line, and between lines.
FIRST_LINE, BETWEEN_LINES = 5.0, 30.0

Item = TypeVar("Item")
OpenFile = Callable[[Path], BinaryIO]


@contextmanager
def waiting(doing: str, state: Callable[[], str] = str) -> Iterator[None]:
    """Say on stderr what is being done, after FIRST_LINE seconds and then now and then.

    Args:
        doing: such as "Training on 20,000,000 characters".
        state: what to add to it, such as " 40%".
    """
    begin, done = time.monotonic(), threading.Event()

    def speak() -> None:
        seconds = FIRST_LINE
        while not done.wait(seconds):
            spent = time.monotonic() - begin
            print(f"{doing}{state()} ({spent:.0f} s)", file=sys.stderr, flush=True)
            seconds = BETWEEN_LINES

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def reading_progress(doing: str) -> Iterator[OpenFile]:
    """Yield a function that opens files and shows how far they are read.

    They are closed at the end, whatever an error has left half read.
    """
    if sys.stderr.isatty():
        with _bar() as progress, ExitStack() as opened:
            yield lambda path: opened.enter_context(
                progress.open(path, "rb", description=f"{doing} {path.name}")
            )
        return
    now: dict[str, object] = {}

    def open_file(path: Path) -> BinaryIO:
        now.update(file=path.open("rb"), path=path, size=path.stat().st_size)
        return opened.enter_context(now["file"])

    def state() -> str:
        try:
            share = now["file"].tell() / max(now["size"], 1)
        except (KeyError, ValueError):  # no file is open
            return ""
        return f" {now['path'].name}: {share:.0%} read"

    with waiting(doing, state), ExitStack() as opened:
        yield open_file


def tracked(items: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """Yield the items and show how many of `total` have come."""
    if sys.stderr.isatty():
        with _bar() as progress:
            yield from progress.track(items, total=total, description=doing)
        return
    count = 0
    with waiting(doing, lambda: f": {count} of {total}"):
        for item in items:
            yield item
            count += 1


@contextmanager
def _bar() -> Iterator:
    from rich.console import Console  # imported here because workers never need it
    from rich.progress import Progress

    console = Console(stderr=True)
    # Results go to standard output, which rich would send where its console is.
    with Progress(
        console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        yield progress
