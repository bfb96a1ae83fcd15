"""The passes of the sparse solvers in native.cpp, for a CPU: the same as those in torch.

`DykstraPasses` and `DualPasses` say what each method does.
"""

import math

import torch

from s2t2_dist.ot.dual_passes import DualPasses, RowSearch
from s2t2_dist.ot.dykstra_passes import ColumnSearches, State
from s2t2_dist.ot.native import library
from s2t2_dist.ot.tiles import new_matrix

MOST_ITERATIONS = 4  # of Dykstra: MOST of native.cpp
GATHER = 8  # columns are picked out of the rows when fewer than one in GATHER still move
LANES = 16  # and filled up to a multiple of it: single entries at the end of a row are slow


class NativeDykstra(ColumnSearches):
    """One sweep over the rows per call, for at most MOST_ITERATIONS iterations."""

    def __init__(self, state: State):
        self.state = state
        self.matrix = state.cost.contiguous()
        self.parts = library.parts(len(self.matrix))

    def search(self, k: int, mu_V: torch.Tensor, col_guess_U: torch.Tensor) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.parts, 3, U, dtype=torch.float64)
        lanes = s.shift, s.row_threshold, s.col_threshold
        counts = mu_V, s.row_count[k], col_guess_U.contiguous()
        self._call("search", V, U, *lanes, k, *counts, sums, self.parts)
        return sums.sum(0)

    def column_sums(self, k: int, threshold_U: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        few, col_threshold, columns = GATHER * len(moving) < U, s.col_threshold, None
        if few:
            columns = torch.nn.functional.pad(moving, (0, -len(moving) % LANES))
            threshold_U = threshold_U[columns]
            col_threshold = col_threshold[:, columns].contiguous()
            columns = columns.int()
        sums = torch.zeros(self.parts, 2, len(threshold_U), dtype=torch.float64)
        lanes = s.shift, s.row_threshold, col_threshold, columns
        self._call("column_sums", V, len(threshold_U), U, *lanes, k, threshold_U, sums, self.parts)
        return sums.sum(0)[:, : len(moving)] if few else sums.sum(0)[:, moving]

    def plan(self, rows: slice) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        first, last, _ = rows.indices(V)
        out = new_matrix(self.matrix, last - first)
        lanes = s.shift, s.row_threshold, s.col_threshold
        parts = library.parts(last - first, library.FEW_ROWS)
        self._call("plan", V, U, *lanes, len(s.row_threshold), first, last - first, out, parts)
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
        lanes = s.shift, s.row_threshold, s.col_threshold
        means = grad_VU, out_VU, col_mean, row_mean, s.row_count
        self._call("backward", V, U, *lanes, len(s.row_threshold), known, *means, sums, self.parts)
        return sums.sum(0)

    def _call(self, name, *arguments):
        library.call(name, self.matrix.dtype, self.matrix, *arguments)


class NativeDual(DualPasses):
    """The searches in C++; the gradient is torch's."""

    def search_rows(self, row_V1: torch.Tensor, col_U: torch.Tensor) -> RowSearch:
        (V, U), parts = self.cost_VU.shape, library.parts(len(self.cost_VU))
        row_V1 = row_V1.clone()
        errors = row_V1.new_zeros(parts)
        tops = row_V1.new_full((parts, U), -math.inf)
        sums = torch.zeros(parts, 2, U, dtype=torch.float64)
        self._call("rows", V, U, self.top_V1, row_V1, col_U, self.mu_V1, errors, tops, sums, parts)
        return RowSearch(row_V1, tops.amax(0), sums.sum(0), errors.amax(0, keepdim=True))

    def column_sums(
        self, row_V1: torch.Tensor, threshold_U: torch.Tensor, moving: torch.Tensor
    ) -> torch.Tensor:
        (V, U), parts = self.cost_VU.shape, library.parts(len(self.cost_VU))
        few = GATHER * len(moving) <= U
        col, columns = (threshold_U[moving], moving.int()) if few else (threshold_U, None)
        sums = torch.zeros(parts, 2, len(col), dtype=torch.float64)
        self._call("columns", V, len(col), U, self.top_V1, row_V1, col, columns, sums, parts)
        return sums.sum(0) if few else sums.sum(0)[:, moving]

    def _call(self, name, *arguments):
        library.call(f"dual_{name}", self.cost_VU.dtype, self.cost_VU, *arguments)
