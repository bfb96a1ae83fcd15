"""Tiles of rows, and the fusion of what is computed on one.

A solver streams its matrices by tiles: blocks of rows small enough to stay in cache (on a GPU:
large enough to fill it) while several passes go over them.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch.utils._triton import has_triton

CPU_TILE = 1 << 17  # entries of a tile: half a MiB of float32, to stay in a core's cache
DEVICE_TILE = 1 << 26  # elsewhere: few, large kernels; it bounds the temporary memory
RECOMPILE_LIMIT = 64  # a pass is compiled once per iteration number and dtype


def tiles(matrix: torch.Tensor, least: int = 1) -> Iterator[slice]:
    """The blocks of rows of a (V, U) matrix, in order; none for a matrix without rows.

    Args:
        least: rows of a block, even where they are more than a tile.
    """
    rows, columns = matrix.shape
    height = max(least, (CPU_TILE if matrix.is_cpu else DEVICE_TILE) // columns)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


class Passes:
    """Runs functions of a tile's tensors, fused by `torch.compile` or as they are written.

    Both give the same numbers up to the order of sums. A function must be a module's own and free
    of side effects.

    Args:
        matrix: what is streamed.
        fused: by default where Triton makes the kernels. On a CPU `torch.compile` works too, but
            takes minutes to compile and its kernels are about as slow as memory-bound code.
    """

    def __init__(self, matrix: torch.Tensor, fused: bool | None = None):
        self.fused = not matrix.is_cpu and has_triton() if fused is None else fused

    def __call__(self, function: Callable, *tensors: object):
        return (_compiled(function) if self.fused else function)(*tensors)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True, fullgraph=True, recompile_limit=RECOMPILE_LIMIT)
