"""The passes of the dual method over this rank's rows, in torch: any device, and the reference.

All take C less each row's maximum: that leaves P as it is and float32 more digits.
`native.passes.NativeDual` does the two searches for a CPU.

Shapes: V rows of this rank, U columns; h rows of a tile; n columns that are still searched.
"""

import math
from typing import NamedTuple

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.problem import Problem
from s2t2_dist.ot.simplex import NewtonSearch, below, newton_step
from s2t2_dist.ot.tiles import Passes, tiles

ROW_STEPS = 3  # Newton steps of a tile's rows before Python asks whether one still moves
FEW = 8  # one column in so many is picked out of a tile

Tile = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class RowSearch(NamedTuple):
    """What a sweep finds: the rows' potentials, and where the column search starts from.

    Attributes:
        row_V1: new row potentials.
        top_U: each column's largest entry of C - row.
        sums: counts and excesses (2, U) of the columns above the former potentials, float64.
        error: (1,) the largest relative error of a row sum under the former potentials.
    """

    row_V1: torch.Tensor
    top_U: torch.Tensor
    sums: torch.Tensor
    error: torch.Tensor


class DualPasses:
    """One sweep over the rows per call, results summed over them.

    Args:
        fused: see `Passes`.
    """

    def __init__(self, problem: Problem, fused: bool | None = None):
        self.cost_VU, self.mu_V1 = problem.cost_VU, problem.mu_V[:, None]
        self.run = Passes(self.cost_VU, fused)
        self.top_V1 = self.cost_VU.new_empty(len(self.mu_V1), 1)
        for rows in tiles(self.cost_VU):
            self.top_V1[rows] = self.cost_VU[rows].amax(1, keepdim=True)

    def tile(self, rows: slice, row_V1: torch.Tensor, col_U: torch.Tensor) -> Tile:
        """What a function of a tile starts from."""
        return self.cost_VU[rows], self.top_V1[rows], row_V1[rows], col_U

    def search_rows(self, row_V1: torch.Tensor, col_U: torch.Tensor) -> RowSearch:
        """Solve for the rows' potentials, from those of the columns; row_V1 are the guesses."""
        found_V1 = torch.empty_like(row_V1)
        top_U = torch.full_like(col_U, -math.inf)
        sums = torch.zeros(2, len(top_U), dtype=torch.float64, device=top_U.device)
        error = top_U.new_zeros(1)
        for rows in tiles(self.cost_VU):
            cost, top, row, col = self.tile(rows, row_V1, col_U)
            mu = self.mu_V1[rows]
            count = torch.full_like(mu, math.inf)
            row, count, off, moves = self.run(_search, cost, top, row, col, mu, count)
            error = torch.maximum(error, off)
            while moves:
                row, count, _, moves = self.run(_search, cost, top, row, col, mu, count)
            found_V1[rows] = row
            tile_top, tile_sums = self.run(_first_sums, cost, top, row, col)
            top_U = torch.maximum(top_U, tile_top)
            sums += tile_sums
        return RowSearch(found_V1, top_U, sums, error)

    def search_columns(
        self,
        comm: Comm,
        nu_U: torch.Tensor,
        row_V1: torch.Tensor,
        col_U: torch.Tensor,
        top_U: torch.Tensor,
        sums: torch.Tensor,
    ) -> torch.Tensor:
        """New column potentials, from the former ones. A collective.

        Args:
            top_U, sums: of all ranks, at the former potentials; see `RowSearch`.
        """
        search = NewtonSearch(top_U, nu_U, col_U)
        moving = search.update(*sums)
        while len(moving):
            sums = self.column_sums(row_V1, search.threshold, moving)
            moving = search.update(*comm.sum_(sums))
        return search.threshold

    def column_sums(
        self, row_V1: torch.Tensor, threshold_U: torch.Tensor, moving: torch.Tensor
    ) -> torch.Tensor:
        """Counts and excesses (2, n) of some columns above their thresholds."""
        few = FEW * len(moving) <= len(threshold_U)
        sums = torch.zeros(2, len(moving), dtype=torch.float64, device=moving.device)
        for rows in tiles(self.cost_VU):
            cost, top, row, _ = self.tile(rows, row_V1, threshold_U)
            if few:
                sums += _sums(cost[:, moving], top, row, threshold_U[moving])
            else:
                sums += self.run(_sums, cost, top, row, threshold_U)[:, moving]
        return sums


# Functions of one tile: cost (h, U), top (h, 1) the largest entry of each row of C, row (h, 1) and
# col (U,) the potentials.


def plan_pass(cost, top, row, col):
    """P; entries at or below the potentials are exactly zero."""
    return torch.relu((cost - top) - row - col)


def _search(cost, top, row, col, mu, count):
    """ROW_STEPS Newton steps of the rows, whose last counts are given, infinite on a first call.

    Returns row, its counts, the largest relative error of a row sum under the first `row`, and
    whether a row still moves.
    """
    z = (cost - top) - col
    largest = z.amax(1, keepdim=True)
    ceiling = below(largest)
    floor = torch.minimum((largest - mu).to(z.dtype), ceiling)
    floor = torch.where(count == math.inf, floor, row)
    for step in range(ROW_STEPS):
        before, over = count, torch.relu(z - row)
        count = over.sign().sum(1, keepdim=True).double()
        excess = over.sum(1, keepdim=True, dtype=torch.float64)
        if step == 0:
            error = ((excess - mu).abs() / mu).amax()
        row, moves = newton_step(row, floor, ceiling, before, count, excess, mu)
        floor = row
    return row, count, error, moves.any()


def _sums(cost, top, row, col):
    """How many entries of each column are above its potential, and by how much in total (2, U)."""
    over = torch.relu((cost - top) - row - col)
    return torch.stack((over.sign().sum(0).double(), over.sum(0, dtype=torch.float64)))


def _first_sums(cost, top, row, col):
    """Each column's largest entry (U,), and the same."""
    return ((cost - top) - row).amax(0), _sums(cost, top, row, col)
