"""Methods of one object over many arguments, in processes that end with the one that started them.

`Workers(1, job)` runs them here. Each process has a pipe of its own, so that the death of one, by
whatever signal, is seen at once by the other side. (The standard library's pool shares one queue
and hangs, now and then, when a process dies that was to read from it.)
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from s2t2_dist.errors import S2T2Error


class Workers:
    """A context manager.

    Args:
        count: processes; with 1 everything happens in this one.
        job: the object; must survive pickling where `count` is above 1.
    """

    def __init__(self, count: int, job: Any):
        self._count, self._job = count, job
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's locks
        for _ in range(self._count if self._count > 1 else 0):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._job, os.getpid())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kind is not None:
                process.kill()  # what it was writing has a temporary name
            process.join()

    def map(self, method: str, arguments: Iterable[tuple]) -> Iterator[Any]:
        """`getattr(job, method)(*each)` for each of the arguments, in their order.

        One of the arguments is taken ahead; results wait for those before them.

        Raises:
            S2T2Error: a process was killed; and whatever the method raises.
        """
        if not self._pipes:
            for each in arguments:
                yield getattr(self._job, method)(*each)
            return
        try:
            yield from self._share(method, arguments)
        except (EOFError, ConnectionError):
            raise S2T2Error(
                "a worker process was killed (out of memory?); run the command again, with fewer "
                "--workers: it goes on"
            ) from None

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
        """Wait for a result, and take all that are there."""
        for pipe in wait([pipe for pipe in self._pipes if pipe not in idle]):
            number, result, error = pipe.recv()
            if error is not None:
                raise error
            results[number] = result
            idle.append(pipe)


def _serve(pipe: Connection, job: Any, parent: int) -> None:
    """In a worker: do what comes through the pipe, on one thread, until its other end closes."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    logging.disable(logging.WARNING)  # the parent says it once
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            number, method, arguments = pipe.recv()
        except EOFError:
            return
        result, problem = None, None
        try:
            result = getattr(job, method)(*arguments)
        except Exception as error:
            problem = error
        pipe.send((number, result, problem))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
