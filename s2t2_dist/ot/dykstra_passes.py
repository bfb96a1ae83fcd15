"""The passes of Dykstra's method over this rank's rows, in torch: any device, and the reference.

Every entry of every iterate is computed again from C and the thresholds so far, tile by tile.
`native.passes.NativeDykstra` does the same for a CPU, with the same methods.

Shapes: V rows of this rank (of a tile, in the functions), U columns, n iterations.
"""

from dataclasses import dataclass

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.simplex import NewtonSearch, below, newton_step
from s2t2_dist.ot.tiles import Passes, tiles

ROW_STEPS = 3  # Newton steps of a row pass before it reports: warm searches need two or three
GATHER = 2  # columns are gathered when fewer than one in GATHER still move


@dataclass(frozen=True, eq=False)
class State:
    """What a solve of n iterations has found: thresholds and the sizes of the supports.

    Attributes:
        cost: C, this rank's rows (V, U).
        shift: each row's maximum (V,). The thresholds are those of C - shift: row constants do not
            change the plan, and float32 resolves the entries near the top better without them.
        row_threshold, col_threshold: tau (n, V) and sigma (n, U), C's dtype.
        row_count, col_count: entries above them, float64.
    """

    cost: torch.Tensor
    shift: torch.Tensor
    row_threshold: torch.Tensor
    col_threshold: torch.Tensor
    row_count: torch.Tensor
    col_count: torch.Tensor

    @classmethod
    def empty(cls, cost_VU: torch.Tensor, iterations: int) -> "State":
        """Of n iterations, before the first."""
        V, U = cost_VU.shape
        thresholds = cost_VU.new_empty(iterations, V), cost_VU.new_empty(iterations, U)
        counts = (torch.empty_like(part, dtype=torch.float64) for part in thresholds)
        return cls(cost_VU, cost_VU.new_empty(V), *thresholds, *counts)


class ColumnSearches:
    """Passes that are asked for sums, step by step, by a search that runs on the host."""

    state: State

    def search_columns(
        self,
        k: int,
        comm: Comm,
        nu_U: torch.Tensor,
        guess_U: torch.Tensor,
        floor_U: torch.Tensor,
        sums: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Thresholds and counts of W_k's columns. A collective.

        Args:
            guess_U, floor_U: see `NewtonSearch`.
            sums: (2, U), counts and excesses of all ranks at the guess.
        """
        search = NewtonSearch(None, nu_U, guess_U, floor_U)
        moving = search.update(*sums)
        while len(moving):
            sums = self.column_sums(k, search.threshold, moving)
            moving = search.update(*comm.sum_(sums))
        return search.threshold, search.count


class DykstraPasses(ColumnSearches):
    """One sweep over the rows per call, results summed over them.

    Args:
        state: shared with the caller, who fills in what is known.
        fused: see `Passes`.
    """

    def __init__(self, state: State, fused: bool | None = None):
        self.state = state
        self.run = Passes(state.cost, fused)

    def search(self, k: int, mu_V: torch.Tensor, col_guess_U: torch.Tensor) -> torch.Tensor:
        """Find row_threshold[k], which holds the guesses to start from, and shift where k is 0.

        Returns, for each column of W_k, (3, U): the count and the excess of its entries above the
        guess, and the sum of all of them.
        """
        cost = self.state.cost
        sums = torch.zeros(3, len(col_guess_U), dtype=torch.float64, device=cost.device)
        for rows in tiles(cost):
            if k == 0:
                self.state.shift[rows] = cost[rows].amax(1)
            self._search_rows(k, rows, mu_V[rows])
            sums += self._column_pass(k, rows, col_guess_U)
        return sums

    def column_sums(self, k: int, threshold_U: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Counts and excesses (2, len(moving)) of some of W_k's columns above their thresholds."""
        gather = moving if GATHER * len(moving) < len(threshold_U) else None
        total = torch.zeros(2, len(moving), dtype=torch.float64, device=threshold_U.device)
        for rows in tiles(self.state.cost):
            sums = self._column_pass(k, rows, threshold_U, gather)[:2]
            total += sums if gather is not None else sums[:, moving]
        return total

    def plan(self, rows: slice) -> torch.Tensor:
        """A block of rows of the plan."""
        return self.run(_plan_pass, *self._tile(rows, len(self.state.row_threshold)))

    def backward(
        self,
        grad_VU: torch.Tensor,
        out_VU: torch.Tensor,
        col_mean: torch.Tensor,
        row_mean: torch.Tensor,
        known: int,
    ) -> torch.Tensor:
        """Undo the last iterations, whose first `known` means over columns (n, U) are known.

        grad_VU is dloss/dP. Makes `row_mean[known - 1]` of (n, V). Returns the sums (U,) whose
        means come next; where all are known, it writes dloss/dC over out_VU, which may be grad_VU,
        instead. Until then a pass may keep what it likes in an out_VU of its own.
        """
        iterations = len(self.state.row_threshold)
        sums = torch.zeros_like(self.state.col_count[0])
        for rows in tiles(self.state.cost):
            means = tuple(col_mean[:known]), tuple(row_mean[: max(known - 1, 0), rows])
            count = self.state.row_count[iterations - known, rows] if known else None
            tile = self._tile(rows, iterations)
            mean, answer = self.run(_back_pass, *tile, grad_VU[rows], *means, count)
            if known:
                row_mean[known - 1, rows] = mean
            if known < iterations:
                sums += answer
            else:
                out_VU[rows] = answer
        return sums

    def _search_rows(self, k, rows, mu):
        """Those of a tile. The first Newton step may go down, the ones after it only go up."""
        threshold = self.state.row_threshold[k, rows]
        floor = torch.full_like(threshold, -torch.inf)
        count = torch.full_like(mu, torch.inf)
        moves = True
        while moves:
            tile = self._tile(rows, k)
            threshold, count, moves = self.run(_row_pass, *tile, mu, threshold, floor, count)
            floor = threshold.clone()
        self.state.row_threshold[k, rows], self.state.row_count[k, rows] = threshold, count

    def _column_pass(self, k, rows, threshold, columns=None):
        cost, shift, row_thresholds, col_thresholds = self._tile(rows, k + 1, k)
        if columns is not None:
            cost, threshold = cost[:, columns], threshold[columns]
            col_thresholds = tuple(part[columns] for part in col_thresholds)
        return self.run(_column_pass, cost, shift, row_thresholds, col_thresholds, threshold)

    def _tile(self, rows, row_steps, col_steps=None):
        """What a pass over a tile starts from: C, its rows' shifts, the thresholds so far."""
        state = self.state
        col_steps = row_steps if col_steps is None else col_steps
        row_thresholds = tuple(state.row_threshold[:row_steps, rows])
        col_thresholds = tuple(state.col_threshold[:col_steps])
        return state.cost[rows], state.shift[rows], row_thresholds, col_thresholds


# Functions of one tile. cost (V, U), shift (V,), row_thresholds and col_thresholds tuples of (V,)
# and (U,): a pass is compiled once for each number of them.


def _iterates(cost, shift, row_thresholds, col_thresholds):
    """(Z_0, Z_1, ...) and (W_0, W_1, ...), as far as the thresholds given determine them."""
    zs, ws = [cost - shift[:, None]], []
    for k, row_threshold in enumerate(row_thresholds):
        tau = row_threshold[:, None]
        y = torch.relu(zs[k] - tau)
        ws.append(y + torch.minimum(ws[k - 1], col_thresholds[k - 1]) if k else y)
        if k < len(col_thresholds):
            zs.append(torch.relu(ws[k] - col_thresholds[k]) + torch.minimum(zs[k], tau))
    return zs, ws


def _row_pass(cost, shift, row_thresholds, col_thresholds, mu, threshold, floor, count):
    """ROW_STEPS Newton steps for the next row threshold: (threshold, count, whether any moves)."""
    z = _iterates(cost, shift, row_thresholds, col_thresholds)[0][-1]
    top = z.amax(1)
    ceiling = below(top)
    floor = torch.maximum(floor, torch.minimum((top - mu).to(top.dtype), ceiling))
    threshold = torch.clamp(threshold, floor, ceiling)
    for _ in range(ROW_STEPS):
        before = count
        count, excess = _count_and_excess(z, threshold[:, None], 1)
        threshold, moves = newton_step(threshold, floor, ceiling, before, count, excess, mu)
        floor = threshold
    return threshold, count, moves.any()


def _column_pass(cost, shift, row_thresholds, col_thresholds, threshold):
    """Of W_k's columns, k = len(col_thresholds): count, excess and sum (3, U)."""
    w = _iterates(cost, shift, row_thresholds, col_thresholds)[1][-1]
    return torch.stack((*_count_and_excess(w, threshold, 0), w.sum(0).double()))


def _plan_pass(cost, shift, row_thresholds, col_thresholds):
    w = _iterates(cost, shift, row_thresholds, col_thresholds)[1][-1]
    return torch.relu(w - col_thresholds[-1])


def _back_pass(cost, shift, row_thresholds, col_thresholds, grad, col_means, row_means, row_counts):
    """Undo the iterations whose column means are known; row_means lacks the last one's.

    Returns that mean (V,), or None where no column mean is known, and what comes next: the sums
    (U,) of gX - gQ over the column supports, or the gradient where nothing is left to undo.
    """
    zs, ws = _iterates(cost, shift, row_thresholds, col_thresholds)
    n = len(row_thresholds)
    gx, gq, row_mean = grad, torch.zeros_like(grad), None
    for done, col_mean in enumerate(col_means):
        k = n - 1 - done
        gw = torch.where(ws[k] > col_thresholds[k], gx - gq - col_mean, 0) + gq
        gp = gx if done else torch.zeros_like(gx)
        on_row = zs[k] > row_thresholds[k][:, None]
        gy = torch.where(on_row, gw - gp, 0)
        if done < len(row_means):
            row_mean = row_means[done]
        else:
            row_mean = (gy.sum(1).double() / row_counts).to(gy.dtype)
        gx, gq = torch.where(on_row, gy - row_mean[:, None], 0) + gp, gw
    if len(col_means) == n:
        return row_mean, gx
    k = n - 1 - len(col_means)
    return row_mean, torch.where(ws[k] > col_thresholds[k], gx - gq, 0).sum(0).double()


def _count_and_excess(z, threshold, dim):
    """float64: of the entries above their threshold, the number and the sum of z - threshold.

    A tile's sums are made in z's dtype, by torch's pairwise summation; those of tiles in float64.
    """
    excess = torch.relu(z - threshold)
    return excess.sign().sum(dim).double(), excess.sum(dim).double()
