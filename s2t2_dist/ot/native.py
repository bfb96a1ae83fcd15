"""native.cpp, compiled once per machine and called through ctypes: the passes on a CPU.

It takes a second to compile, and five to ten times less time per pass than torch, which cannot
keep a row's iterates in cache. Where there is no C++ compiler, `passes.TorchPasses` does the work.
"""

import ctypes
import functools
from pathlib import Path

import torch

from s2t2_dist.compiled import load_compiled
from s2t2_dist.ot.passes import State

SOURCE = Path(__file__).with_name("native.cpp")
MASKED = 4  # iterations whose supports, 2 bits each, fit in a byte
SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}


class NativePasses:
    """One sweep over the rows per call; `TorchPasses` says what each one does."""

    def __init__(self, state: State):
        self.state = state
        self.matrix = state.cost.contiguous()
        self.masks = None  # during a backward: the supports, a byte per entry
        self.threads = max(1, min(torch.get_num_threads(), len(self.matrix)))

    def search(self, k: int, mu_V: torch.Tensor, col_guess_U: torch.Tensor) -> torch.Tensor:
        s, U = self.state, len(col_guess_U)
        sums = torch.zeros(self.threads, 3, U, dtype=torch.float64)
        self._call(
            "search", self.matrix, *self.matrix.shape, s.shift, s.tau, s.sigma, k, mu_V,
            s.row_count[k], col_guess_U.contiguous(), sums, self.threads,
        )  # fmt: skip
        return sums.sum(0)

    def column_sums(self, k: int, threshold_U: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.threads, 2, len(moving), dtype=torch.float64)
        everything = len(moving) == U
        columns = None if everything else moving
        sigma = s.sigma if everything else s.sigma[:, moving].contiguous()
        self._call(
            "column_sums", self.matrix, V, len(moving), U, s.shift, s.tau, sigma, columns, k,
            threshold_U[moving], sums, self.threads,
        )  # fmt: skip
        return sums.sum(0)

    def plan(self, rows: slice) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        first, last, _ = rows.indices(V)
        out = self.matrix.new_empty(last - first, U)
        self._call(
            "plan", self.matrix, V, U, s.shift, s.tau, s.sigma, len(s.tau), first, last - first,
            out, self.threads,
        )  # fmt: skip
        return out

    def backward(
        self, grad_VU: torch.Tensor, col_mean: torch.Tensor, row_mean: torch.Tensor, known: int
    ) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.threads, U, dtype=torch.float64)
        if known == 0 and len(s.tau) <= MASKED:
            self.masks = torch.empty(V, U, dtype=torch.uint8)
        self._call(
            "backward", self.matrix, V, U, s.shift, s.tau, s.sigma, len(s.tau), known, grad_VU,
            col_mean, row_mean, s.row_count, self.masks, sums, self.threads,
        )  # fmt: skip
        if known == len(s.tau):
            self.masks = None
        return sums.sum(0)

    def _call(self, name, *arguments):
        function = getattr(_library(), f"{name}_{SUFFIXES[self.matrix.dtype]}")
        function(*map(_as_c, arguments))


def has_native() -> bool:
    """Whether the passes could be compiled here; says why not in the log, once."""
    return _library() is not None


def _as_c(argument: object):
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous(), argument.shape
        return ctypes.c_void_p(argument.data_ptr())
    return None if argument is None else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled passes."""
    return load_compiled(
        SOURCE, "the solver's passes could not be compiled, and torch's slower ones are used"
    )
