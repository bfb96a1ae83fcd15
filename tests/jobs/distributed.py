"""Run a function on several gloo ranks of this machine, for tests of what is distributed."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from s2t2_dist.comm import world_comm
from tests.jobs import forked


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout: float = 120,
    fresh: bool = False,
) -> list:
    """`function(comm, *args)` on every rank of a new process group; the results in rank order.

    `function` must be importable (a module's top level) and its results picklable. The first
    exception of a rank is raised here with its traceback; ranks that do not end in time are
    terminated and a TimeoutError is raised.

    Args:
        fresh: no forks: interpreters that read their environment themselves, as glibc does.
    """
    room = tmp_path / f"ranks-{world_size}-{time.monotonic_ns()}"
    room.mkdir(parents=True)
    forked.context()  # preloads
    context = mp.start_processes(
        _rank_main,
        args=(world_size, room, timeout, function, args),
        nprocs=world_size,
        join=False,
        start_method="spawn" if fresh else forked.METHOD,
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} on {world_size} ranks: over {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    # Our own files, written a moment ago: unpickling them is safe.
    return [torch.load(room / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(
    rank: int, world_size: int, room: Path, timeout: float, function: Callable, args: tuple
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{room / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(function(world_comm(), *args), room / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
