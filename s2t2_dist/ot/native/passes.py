"""The passes of sparse Sinkhorn in native.cpp: `passes.TorchPasses` says what each one does."""

import torch

from s2t2_dist.ot.native import library
from s2t2_dist.ot.passes import State
from s2t2_dist.ot.tiles import new_matrix

MOST_ITERATIONS = 4  # MOST of native.cpp
GATHER = 8  # columns are picked out of the rows when fewer than one in GATHER still move
LANES = 16  # and filled up to a multiple of it: single entries at the end of a row are slow


class NativePasses:
    """One sweep over the rows per call, for at most MOST_ITERATIONS iterations."""

    def __init__(self, state: State):
        self.state = state
        self.matrix = state.cost.contiguous()
        self.parts = library.parts(len(self.matrix))

    def search(self, k: int, mu_V: torch.Tensor, col_guess_U: torch.Tensor) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.parts, 3, U, dtype=torch.float64)
        self._call(
            "search", self.matrix, V, U, s.shift, s.tau, s.sigma, k, mu_V, s.row_count[k],
            col_guess_U.contiguous(), sums, self.parts,
        )  # fmt: skip
        return sums.sum(0)

    def column_sums(self, k: int, threshold_U: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        few, sigma, columns = GATHER * len(moving) < U, s.sigma, None
        if few:
            columns = torch.nn.functional.pad(moving, (0, -len(moving) % LANES))
            threshold_U, sigma = threshold_U[columns], sigma[:, columns].contiguous()
            columns = columns.int()
        sums = torch.zeros(self.parts, 2, len(threshold_U), dtype=torch.float64)
        self._call(
            "column_sums", self.matrix, V, len(threshold_U), U, s.shift, s.tau, sigma, columns, k,
            threshold_U, sums, self.parts,
        )  # fmt: skip
        return sums.sum(0)[:, : len(moving)] if few else sums.sum(0)[:, moving]

    def plan(self, rows: slice) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        first, last, _ = rows.indices(V)
        out = new_matrix(self.matrix, last - first)
        self._call(
            "plan", self.matrix, V, U, s.shift, s.tau, s.sigma, len(s.tau), first, last - first,
            out, library.parts(last - first, library.FEW_ROWS),
        )  # fmt: skip
        return out

    def backward(
        self,
        grad_VU: torch.Tensor,
        out_VU: torch.Tensor,
        col_mean: torch.Tensor,
        row_mean: torch.Tensor,
        known: int,
    ) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.parts, U, dtype=torch.float64)
        self._call(
            "backward", self.matrix, V, U, s.shift, s.tau, s.sigma, len(s.tau), known, grad_VU,
            out_VU, col_mean, row_mean, s.row_count, sums, self.parts,
        )  # fmt: skip
        return sums.sum(0)

    def _call(self, name, *arguments):
        library.call(name, self.matrix.dtype, *arguments)
