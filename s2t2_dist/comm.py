"""Collectives behind one small interface. The only module that imports `torch.distributed`.

The solvers and the trainer call a `Comm`. With one process its collectives do nothing, so one rank
and many ranks run the same code.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from s2t2_dist.artifacts import disk_error
from s2t2_dist.errors import S2T2Error

# Seconds that ranks wait for each other at the start. A node whose launch failed never joins.
START_TIMEOUT = 300.0
# Bytes over all ranks. Up to here the number of rounds bounds gloo's sums, not the bandwidth.
MOST_GATHERED = 1 << 20

# What every launcher sets for a rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ANNOUNCE_SECONDS = 5.0  # of waiting, after which a line says for what

T = TypeVar("T")


class Comm:
    """A group of ranks and its collectives. This class is a group of one rank.

    With one rank every collective is the identity. `GroupComm` has the same methods for many.
    """

    rank = 0
    size = 1

    def __init__(self):
        self.hosts = [socket.gethostname()]

    def name(self, rank: int) -> str:
        """A rank's name in messages: `rank 3 on node2`."""
        return f"rank {rank} on {self.hosts[rank]}"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns its argument."""
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over ranks, in place; returns its argument."""
        return tensor

    def barrier(self) -> None:
        """Return when every rank has arrived."""

    def gather_objects(self, value: object) -> list:
        """Every rank's value, in rank order, on every rank (small picklable values)."""
        return [value]

    def broadcast_object(self, value: object) -> object:
        """Rank 0's value on every rank."""
        return value


class GroupComm(Comm):
    """A `torch.distributed` process group (gloo or NCCL). Every rank must make it.

    Args:
        timeout: make a new group over all ranks, whose collectives wait so many seconds. Its calls
            do not interleave with those of other groups (NCCL orders calls per group). Default:
            the group that `join` made.
    """

    def __init__(self, timeout: float | None = None):
        self.group = dist.group.WORLD if timeout is None else new_group(timeout)
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self.hosts = self.gather_objects(socket.gethostname())
        self._on_gloo = dist.get_backend(self.group) == "gloo"

    def gathers(self, tensor: torch.Tensor) -> bool:
        """Whether `sum_` gathers, which takes half as many rounds as gloo's ring all-reduce."""
        return self._on_gloo and tensor.nbytes * self.size <= MOST_GATHERED

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.gathers(tensor):
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor, group=self.group)
            return torch.sum(torch.stack(parts), 0, out=tensor)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def gather_objects(self, value: object) -> list:
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: object) -> object:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def is_launched() -> bool:
    """Whether a launcher started this process as a rank of a job.

    Raises:
        S2T2Error: it looks like it, but a variable is missing or is not what it must be.
    """
    found = {name: os.environ.get(name, "").strip() for name in RANK_VARIABLES}
    if "RANK" not in os.environ:
        return False
    lacking = [name for name, value in found.items() if not value]
    if lacking:
        raise S2T2Error(
            f"{', '.join(lacking)}: empty or not set, although RANK is there; a launcher sets all "
            f"of {', '.join(RANK_VARIABLES)}; unset RANK for a job of one process"
        )
    numbers = {}
    for name in RANK_VARIABLES:
        if name != "MASTER_ADDR":
            if not found[name].isdecimal():
                raise S2T2Error(f"{name} is {found[name]!r}, expected a whole number; correct it")
            numbers[name] = int(found[name])
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise S2T2Error(
            f"RANK is {numbers['RANK']}, but WORLD_SIZE {numbers['WORLD_SIZE']}: ranks count from "
            "0; is one of them left from another job?"
        )
    if not 0 < numbers["MASTER_PORT"] < 1 << 16:
        raise S2T2Error(f"MASTER_PORT is {numbers['MASTER_PORT']}, expected one from 1 to 65535")
    return True


@contextlib.contextmanager
def announced(line: Callable[[], str | None]) -> Iterator[None]:
    """Print a line on standard error if the block takes longer than ANNOUNCE_SECONDS.

    Args:
        line: who waits for what; None for no line. Called when it is due.
    """

    def announce() -> None:
        if text := line():
            print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(ANNOUNCE_SECONDS, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join(backend: str, timeout: float) -> None:
    """Meet the other ranks of the job and form its process group.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which every launcher sets.

    Args:
        timeout: seconds that a collective may wait for the slowest rank.

    Raises:
        S2T2Error: the port is taken, rank 0 cannot be reached, or some ranks did not join.
    """
    rank = int(os.environ["RANK"])
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def waiting() -> str | None:
        others = int(os.environ["WORLD_SIZE"]) - 1
        what = f"the other {others} ranks (WORLD_SIZE)" if rank == 0 else "rank 0"
        if rank == 0 or os.environ.get("LOCAL_RANK") == "0":
            me = f"rank {rank} on {socket.gethostname()}"
            return f"{me} waits for {what} at {where}, for up to {START_TIMEOUT:.0f} s"
        return None

    try:
        start = timedelta(seconds=START_TIMEOUT)
        with announced(waiting):
            store, _, size = next(dist.rendezvous("env://", timeout=start))
    except dist.DistError as error:
        reason = " ".join(str(error).split())
        raise S2T2Error(
            f"rank {rank} on {socket.gethostname()} found no other ranks at {where} ({reason}); "
            "check the output of the other nodes, and whether an earlier run still holds the port"
        ) from None
    _choose_interface()
    wait = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


def _choose_interface() -> None:
    """Make gloo use the interface that leads to rank 0, unless the user chose one.

    By default gloo takes the address of this host's name, which many systems set to 127.0.1.1.
    """
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and mine in [known.address for known in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def world_comm(timeout: float | None = None) -> Comm:
    """The `Comm` over every rank of the job; a group of one if `join` was not called.

    Args:
        timeout: see `GroupComm`. A job of one rank waits for nobody: it makes no group, of which a
            process with several jobs would gather threads and files.
    """
    if not dist.is_initialized():
        return Comm()
    return GroupComm(timeout if dist.get_world_size() > 1 else None)


def new_group(timeout: float, ranks: Iterable[int] | None = None) -> dist.ProcessGroup:
    """A group of these ranks (default: all) whose collectives wait `timeout` seconds."""
    ranks = None if ranks is None else list(ranks)
    return dist.new_group(ranks, timeout=timedelta(seconds=timeout))


def cut_short(error: BaseException) -> str | None:
    """Why a collective failed for lack of a rank, read from gloo's message; None for other errors.

    "timeout": this rank gave up waiting. "closed": another rank closed its connections, as a rank
    does when it ends or gives up.
    """
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if "timed out waiting" in text:
        return "timeout"
    return "closed" if "by peer" in text or "pair closure" in text else None


def agree(comm: Comm, step: Callable[[], T], doing: str) -> T:
    """Run a step that may fail on some ranks only, and return this rank's result. A collective.

    The step must reach all of its collectives even if it fails. Best, it has none.

    Args:
        doing: what the step does, for messages about the disk: "saving X".

    Raises:
        S2T2Error: the same error on every rank, if the step raised an S2T2Error, an OSError or a
            SafetensorError on any rank. Names the first rank that failed, unless all did.
    """
    result, problem = None, None
    try:
        result = step()
    except S2T2Error as error:
        problem = error
    except OSError as error:
        problem = disk_error(error, doing) or S2T2Error(f"{doing}: {error}")
    except SafetensorError as error:
        problem = S2T2Error(f"{doing}: {error}")
    problems = comm.gather_objects(problem)
    failed = [rank for rank, found in enumerate(problems) if found is not None]
    if failed:
        first = problems[failed[0]]
        where = "" if len(failed) == comm.size else f"{comm.name(failed[0])}: "
        shared = type(first)(f"{where}{first}")
        shared.collective = True
        raise shared from problem
    return result


def destroy() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
