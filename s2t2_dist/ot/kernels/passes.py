"""Sweeps over the rows by Triton, float32: the passes of both methods and the sums over a plan.

`DykstraPasses`, `DualPasses` and `sums` say what each does.
"""

import torch
import triton

from s2t2_dist.comm import Comm
from s2t2_dist.ot.dual_passes import DualPasses, RowSearch
from s2t2_dist.ot.dykstra_passes import ColumnSearches, State
from s2t2_dist.ot.kernels import common, dual, dykstra, plan
from s2t2_dist.ot.kernels.library import Flags
from s2t2_dist.ot.problem import Problem
from s2t2_dist.ot.simplex import below
from s2t2_dist.ot.tiles import new_matrix

MOST_COLUMNS = 8192  # of a row in registers; longer ones are read once per Newton step
TILE = 1024  # entries, unless a row has more: small ones, so that some load while others search
MOST_ROWS = 8  # of a tile, whose searches wait for each other
PER_THREAD = 8  # entries of a tile, for up to 16 warps
ROWS_PER_PART = 64  # whose column sums are made in float32, with a row's search
TALL_PART, TALL_ROWS, WIDE = 256, 16, 128  # the same of a pass by columns; its tiles
LANES = 1024  # columns of a program of their Newton step


class RowGrid:
    """How kernels that own rows cut a (V, U) matrix."""

    def __init__(self, V: int, U: int):
        block = min(max(triton.next_power_of_2(U), 16), MOST_COLUMNS)
        rows = max(1, min(MOST_ROWS, TILE // block))
        part = min(ROWS_PER_PART, triton.cdiv(V, rows) * rows)
        self.parts, self.chunks = triton.cdiv(V, part), triton.cdiv(U, block)
        self.shape = {"PART": part, "R": rows, "BLOCK": block, "CHUNKS": self.chunks}
        self.shape["num_warps"] = max(1, min(16, rows * block // (32 * PER_THREAD)))


class ColumnGrid:
    """How kernels that own rows and columns do."""

    def __init__(self, V: int, U: int):
        block = min(max(triton.next_power_of_2(U), 16), WIDE)
        part = min(TALL_PART, triton.cdiv(V, TALL_ROWS) * TALL_ROWS)
        self.parts = triton.cdiv(V, part)
        self.grid = (self.parts, triton.cdiv(U, block))
        self.shape = {"PART": part, "R": TALL_ROWS, "BLOCK": block, "num_warps": 4}


class ColumnSearch:
    """`simplex.NewtonSearch` of all columns, on the device: the host only sends kernels.

    Args:
        ceiling: what no threshold may pass; None where that is not known, as for `NewtonSearch`.
    """

    def __init__(
        self,
        nu: torch.Tensor,
        guess: torch.Tensor,
        floor: torch.Tensor,
        ceiling: torch.Tensor | None = None,
    ):
        self.nu, self.ceiling = nu, ceiling
        self.threshold, self.floor, self.good = guess.clone(), floor.clone(), floor.clone()
        self.count = torch.full_like(nu, torch.inf)
        self.moving = torch.ones_like(nu, dtype=torch.int32)
        self.blocks = triton.cdiv(len(nu), LANES)
        self.flags = Flags(self.moving.new_zeros(self.blocks))

    def update(self, sums: torch.Tensor) -> bool:
        """One step from the sums (2 or more, U) of all columns; whether the search has ended."""
        ceiling = self.nu if self.ceiling is None else self.ceiling
        state = self.threshold, self.floor, self.good, self.count, self.moving, self.flags.flags
        options = {"TOP": self.ceiling is not None, "BLOCK": LANES}
        common.column_newton[(self.blocks,)](
            sums, self.nu, ceiling, *state, len(self.nu), **options
        )
        return self.flags.down()


class TritonDykstra(ColumnSearches):
    """One sweep over the rows per call, for at most MOST_ITERATIONS iterations."""

    def __init__(self, state: State):
        self.state = state
        self.matrix = state.cost.contiguous()
        self.rows, self.columns = RowGrid(*self.matrix.shape), ColumnGrid(*self.matrix.shape)
        self.lanes = state.shift, state.row_threshold, state.col_threshold

    def search(self, k: int, mu_V: torch.Tensor, col_guess_U: torch.Tensor) -> torch.Tensor:
        (V, U), fused = self.matrix.shape, self.rows.chunks == 1
        partial = self._partial(self.rows.parts if fused else 0, 3)
        means = mu_V.contiguous(), self.state.row_count[k], col_guess_U.contiguous()
        dykstra.search[(self.rows.parts,)](
            self.matrix, *self.lanes, *means, partial, V, U, k, **self.rows.shape
        )
        if fused:
            return partial.sum(0, dtype=torch.float64)
        every = torch.ones(U, dtype=torch.int32, device=partial.device)
        return self._column_sums(k, col_guess_U.contiguous(), every, self._partial(None, 3))

    def search_columns(
        self,
        k: int,
        comm: Comm,
        nu_U: torch.Tensor,
        guess: torch.Tensor,
        floor: torch.Tensor,
        sums: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ColumnSearches`."""
        search, partial = ColumnSearch(nu_U.contiguous(), guess, floor), self._partial(None, 2)
        while not search.update(sums):
            sums = comm.sum_(self._column_sums(k, search.threshold, search.moving, partial))
        return search.threshold, search.count

    def plan(self, rows: slice) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        first, last, _ = rows.indices(V)
        out = new_matrix(self.matrix, last - first)
        height, width = self.columns.shape["R"], self.columns.shape["BLOCK"]
        grid = triton.cdiv(last - first, height), triton.cdiv(U, width)
        tile = {"R": height, "BLOCK": width}
        if len(out):
            dykstra.plan[grid](
                self.matrix, *self.lanes, out, first, len(out), V, U, len(s.row_threshold), **tile
            )
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
        n, fused = len(s.row_threshold), self.rows.chunks == 1
        matrices = self.matrix, *self.lanes, grad_VU, out_VU, col_mean, row_mean
        if known:
            partial = self._partial(self.rows.parts if fused else 0, 1)
            count = s.row_count[n - known]
            dykstra.back_rows[(self.rows.parts,)](
                *matrices, count, partial, V, U, n, known, **self.rows.shape
            )
        if not (known and fused):
            partial = self._partial(None, 1)
            dykstra.back_columns[self.columns.grid](
                *matrices, partial, V, U, n, known, **self.columns.shape
            )
        return partial[:, 0].sum(0, dtype=torch.float64)

    def _column_sums(self, k, threshold, moving, partial):
        """Where no column of a program moves, partial stays as it is; nothing reads its sums."""
        dykstra.column_sums[self.columns.grid](
            self.matrix, *self.lanes, threshold, moving, partial, *self.matrix.shape, k,
            partial.shape[1] == 3, **self.columns.shape,
        )  # fmt: skip
        return partial.sum(0, dtype=torch.float64)

    def _partial(self, parts: int | None, sums: int) -> torch.Tensor:
        """Zeros (parts, sums, U); by default of a pass by columns."""
        parts = self.columns.parts if parts is None else parts
        return self.matrix.new_zeros(parts, sums, self.matrix.shape[1])


class TritonDual(DualPasses):
    """The searches by Triton; the plan and the gradient are torch's."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.matrix, (V, U) = self.cost_VU.contiguous(), self.cost_VU.shape
        self.rows, self.columns = RowGrid(V, U), ColumnGrid(V, U)

    def search_rows(self, row_V1: torch.Tensor, col_U: torch.Tensor) -> RowSearch:
        (V, U), fused = self.matrix.shape, self.rows.chunks == 1
        row_V1, col_U = row_V1.clone(), col_U.contiguous()
        errors = col_U.new_zeros(self.rows.parts)
        parts = self.rows.parts if fused else self.columns.parts
        tops = col_U.new_full((parts, U), -torch.inf)
        partial = col_U.new_zeros(parts, 2, U)
        dual.search_rows[(self.rows.parts,)](
            self.matrix, self.top_V1, row_V1, col_U, self.mu_V1.contiguous(), errors, tops, partial,
            V, U, **self.rows.shape,
        )  # fmt: skip
        if not fused:
            every = torch.ones(U, dtype=torch.int32, device=col_U.device)
            self._column_sums(row_V1, col_U, every, tops, partial)
        sums = partial.sum(0, dtype=torch.float64)
        return RowSearch(row_V1, tops.amax(0), sums, errors.amax(0, keepdim=True))

    def search_columns(
        self,
        comm: Comm,
        nu_U: torch.Tensor,
        row_V1: torch.Tensor,
        col_U: torch.Tensor,
        top_U: torch.Tensor,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        ceiling = below(top_U)
        floor = torch.minimum((top_U - nu_U).to(top_U.dtype), ceiling)
        search = ColumnSearch(nu_U.contiguous(), col_U, floor, ceiling)
        tops, partial = top_U, top_U.new_zeros(self.columns.parts, 2, len(top_U))
        while not search.update(sums):
            self._column_sums(row_V1, search.threshold, search.moving, tops, partial, False)
            sums = comm.sum_(partial.sum(0, dtype=torch.float64))
        return search.threshold

    def _column_sums(self, row_V1, threshold, moving, tops, partial, with_tops=True):
        dual.column_sums[self.columns.grid](
            self.matrix, self.top_V1, row_V1, threshold, moving, tops, partial, *self.matrix.shape,
            with_tops, **self.columns.shape,
        )  # fmt: skip


def tile_sums(plan_hU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `sums.tile_sums`."""
    h, U = plan_hU.shape
    grid = ColumnGrid(h, U)
    parts, blocks = grid.grid
    rows, columns = plan_hU.new_empty(blocks, h), plan_hU.new_empty(parts, U)
    support = plan_hU.new_empty(parts, blocks)
    plan.plan_sums[grid.grid](plan_hU, rows, columns, support, h, U, **grid.shape)
    double = {"dtype": torch.float64}
    return rows.sum(0, **double), columns.sum(0, **double), support.sum(**double)[None]


def log_sum(plan_hU: torch.Tensor, mass: float) -> torch.Tensor:
    """The sum of p log p, p = P / mass, of the entries that are positive."""
    grid = ColumnGrid(*plan_hU.shape)
    logs = plan_hU.new_empty(grid.grid)
    plan.plan_logs[grid.grid](plan_hU, logs, float(mass), *plan_hU.shape, **grid.shape)
    return logs.sum(dtype=torch.float64)
