"""native.cpp, compiled once per machine and called through ctypes.

It takes some seconds to compile, and five to ten times less time per pass than torch, which cannot
keep an entry's iterates in registers. Without a C++ compiler torch does the work.
"""

import ctypes
import functools
from pathlib import Path

import torch

from s2t2_dist.compiled import load_compiled

SOURCE = Path(__file__).with_name("native.cpp")
MOST_PARTS, PART_ROWS = 32, 64  # more parts share the work more evenly, and add up more sums
FEW_ROWS = 8  # of a part without sums
REALS = {torch.float32: "float", torch.float64: "double"}  # compiled when first asked for


def can_call(*tensors: torch.Tensor) -> bool:
    """Whether native.cpp is there for such tensors: contiguous, of one float dtype, on a CPU.

    Says in the log, once, why it could not be compiled.
    """
    dtype = tensors[0].dtype
    fit = all(t.is_cpu and t.is_contiguous() and t.dtype == dtype for t in tensors)
    return fit and dtype in REALS and _library(dtype) is not None


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | None) -> None:
    """Call a function of native.cpp, on as many threads as torch's; tensors must be contiguous."""
    library = _library(dtype)
    library.s2t2_set_threads(ctypes.c_int64(torch.get_num_threads()))
    getattr(library, f"s2t2_{name}")(*map(_as_c, arguments))


def parts(rows: int, least: int = PART_ROWS) -> int:
    """Into how many parts of at least so many rows a pass is cut.

    It depends on nothing else: each part has its own column sums, where a pass makes any, so that
    they are the same with any number of threads.
    """
    return max(1, min(MOST_PARTS, rows // least))


def _as_c(argument: object):
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous(), argument.shape
        return ctypes.c_void_p(argument.data_ptr())
    return None if argument is None else ctypes.c_int64(argument)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    return load_compiled(
        SOURCE,
        "the solver's passes could not be compiled, and torch's slower ones are used",
        f"-DREAL={REALS[dtype]}",
        "-fopenmp",  # torch's own threads: others would wait until those stop spinning
    )
