"""Tiles of rows, and the fusion of what is computed on one.

A solver streams its matrices by tiles: blocks of rows small enough to stay in cache (on a GPU:
large enough to fill it) while several passes go over them.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator

import torch
from torch.utils._triton import has_triton

CPU_TILE = 1 << 17  # entries of a tile: half a MiB of float32, to stay in a core's cache
DEVICE_TILE = 1 << 24  # elsewhere: few, large kernels; it bounds the temporary memory
HUGE_PAGES = 1 << 23  # bytes of a matrix from which they pay: a huge page has 2 MiB
BACKENDS = ("auto", "native", "triton", "compile", "eager")
FUSED = {"compile": True, "eager": False}  # of backends; others leave it to `Passes`
RECOMPILE_LIMIT = 64  # a pass is compiled once per iteration number and dtype


def tiles(matrix: torch.Tensor, least: int = 1) -> Iterator[slice]:
    """The blocks of rows of a (V, U) matrix, in order; none for a matrix without rows.

    Args:
        least: rows of a block, even where they are more than a tile.
    """
    rows, columns = matrix.shape
    height = max(least, (CPU_TILE if matrix.is_cpu else DEVICE_TILE) // columns)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def new_matrix(like: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """A contiguous matrix of undefined entries with the columns of another, and its rows or `rows`.

    On Linux a large one on a CPU is asked for in huge pages: one page fault for every 4 KiB takes
    longer than a pass over the matrix.
    """
    matrix = like.new_empty(len(like) if rows is None else rows, like.shape[1])
    size = matrix.numel() * matrix.element_size()
    if matrix.is_cpu and size >= HUGE_PAGES and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-matrix.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (matrix.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Only advice: what it returns does not matter.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE
        )
    return matrix


def check_backend(backend: str) -> None:
    """Raise a ValueError unless there is such a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")


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
        if not self.fused:
            return function(*tensors)
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return _compiled(function)(*tensors)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True, fullgraph=True)
