"""Run methods of one object over many arguments, in worker processes that end with their parent.

Each worker has a pipe of its own, so the parent notices at once when a worker dies of any signal.
(The standard library's pool shares one queue, and sometimes hangs when a process dies that was
about to read from it.)
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from s2t2_dist.errors import S2T2Error


class Workers:
    """A context manager that starts and ends the workers.

    Args:
        count: number of workers; with 1, the calling process does the work.
        job: object whose methods are run; must be picklable if `count` is above 1.
    """

    def __init__(self, count: int, job: Any):
        self._count, self._job = count, job
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's locks
        with _interrupts_ignored():  # workers inherit it: Ctrl-C is the parent's to handle
            self._start(context)
        return self

    def _start(self, context: multiprocessing.context.SpawnContext) -> None:
        for _ in range(self._count if self._count > 1 else 0):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._job, os.getpid())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is not None:
            for process in self._processes:
                process.kill()  # what it was writing has a temporary name
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def map(self, method: str, arguments: Iterable[tuple]) -> Iterator[Any]:
        """Yield `getattr(job, method)(*each)` for each of the arguments, in their order.

        At most one argument is read before a worker is free for it.

        Raises:
            S2T2Error: a worker was killed. Errors of the method are raised as they are.
        """
        if not self._pipes:
            for each in arguments:
                yield getattr(self._job, method)(*each)
            return
        try:
            yield from self._share(method, arguments)
        except (EOFError, ConnectionError):
            raise S2T2Error(self._why_ended()) from None

    def _why_ended(self) -> str:
        """What to say of a worker that ended in the middle of its work."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            codes = [each.exitcode for each in self._processes if each.exitcode is not None]
            if codes and codes[0] >= 0:
                return f"a worker process ended with exit code {codes[0]}; its error stands above"
            if codes:
                break
            time.sleep(0.01)
        return (
            "a worker process was killed (out of memory?); run the command again, with fewer "
            "--workers, to continue where it stopped"
        )

    def _share(self, method: str, arguments: Iterable[tuple]) -> Iterator[Any]:
        idle, results, following = list(self._pipes), {}, 0
        for number, each in enumerate(arguments):
            if not idle:
                self._collect(idle, results)
            idle[-1].send((number, method, each))
            idle.pop()
            while following in results:
                yield results.pop(following)
                following += 1
        while len(idle) < len(self._pipes):
            self._collect(idle, results)
        yield from (results[number] for number in sorted(results))

    def _collect(self, idle: list[Connection], results: dict[int, Any]) -> None:
        """Wait for a result, and take all that have arrived."""
        for pipe in wait([pipe for pipe in self._pipes if pipe not in idle]):
            number, result, error = pipe.recv()
            if error is not None:
                raise error
            results[number] = result
            idle.append(pipe)


def _serve(pipe: Connection, job: Any, parent: int) -> None:
    """Run the calls that arrive through the pipe, on one thread, until its other end closes."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    logging.disable(logging.WARNING)  # the parent logs the same warnings once
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            number, method, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        result, problem = None, None
        try:
            result = getattr(job, method)(*arguments)
        except Exception as error:
            problem = error
        try:
            pipe.send((number, result, problem))
        except ConnectionError:  # the parent has an error of its own, and says it
            return


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change how signals are handled
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
