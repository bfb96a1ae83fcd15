"""Methods of one object over many arguments, in processes that end with the one that started them.

`Workers(1, job)` runs them here. Results come in the order of the arguments, and only so many
arguments are taken ahead, so that memory holds what the workers hold.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from s2t2_dist.errors import S2T2Error

# Arguments in flight beyond one for each worker.
AHEAD = 2

_job: Any = None


class Workers:
    """A context manager.

    Args:
        count: processes; with 1 everything happens in this one.
        job: the object; must survive pickling where `count` is above 1.
    """

    def __init__(self, count: int, job: Any):
        self._count, self._job = count, job
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._count > 1:
            context = multiprocessing.get_context(
                "spawn"
            )  # a fork would copy the tokenizer's locks
            arguments = (self._job, os.getpid())
            self._pool = ProcessPoolExecutor(self._count, context, _start, arguments)
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=kind is not None)

    def map(self, method: str, arguments: Iterable[tuple]) -> Iterator[Any]:
        """`getattr(job, method)(*each)` for each of the arguments, in their order.

        Raises:
            S2T2Error: a process was killed; and whatever the method raises.
        """
        if self._pool is None:
            for each in arguments:
                yield getattr(self._job, method)(*each)
            return
        waiting = deque()
        try:
            for each in arguments:
                waiting.append(self._pool.submit(_run, method, each))
                if len(waiting) >= self._count + AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise S2T2Error(
                "a worker process was killed (out of memory?); run the command again: it goes on, "
                "and takes fewer --workers"
            ) from None


def _start(job: Any, parent: int) -> None:
    """In a new worker: take the job, one thread for each worker, and end with the parent."""
    global _job
    _job = job
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _run(method: str, arguments: tuple) -> Any:
    return getattr(_job, method)(*arguments)
