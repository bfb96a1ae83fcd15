"""Collectives behind one small interface. The only module that imports `torch.distributed`.

The solvers and the trainer call a `Comm`; with one process it does nothing, so there is one code
path for one rank and for many.
"""

import torch
import torch.distributed as dist


class LocalComm:
    """A group of one rank: every collective is the identity."""

    rank = 0
    size = 1

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


class GroupComm(LocalComm):
    """A `torch.distributed` process group (gloo or NCCL).

    Args:
        own_group: make a new group over all ranks, so that these collectives do not interleave
            with another user's (NCCL orders calls per group). Every rank must make it.
    """

    def __init__(self, own_group: bool = False):
        self.group = dist.new_group() if own_group else dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
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


def world_comm(own_group: bool = False) -> LocalComm:
    """The `Comm` over every rank of the job; a `LocalComm` where no group was initialised."""
    return GroupComm(own_group) if dist.is_initialized() else LocalComm()


def destroy() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
