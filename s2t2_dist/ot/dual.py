"""The dual method: quadratic transport to its limit, through V + U potentials alone.

The plan nearest to C with row sums mu and column sums nu is P = max(C - a_i - b_j, 0), where the
potentials a and b maximise a concave function of V + U numbers. Maximising it exactly in a and in
b in turn is the nonlinear Gauss-Seidel method of Lorenz, Manns and Meyer 2021 ("Quadratically
regularized optimal transport"); each half is one threshold search per row or column, as in the
paper's SPARSEMAX (Algorithm 2). How the plan is found and how it is differentiated are separate.

Shapes: V rows of this rank, U columns; h rows of a tile; n columns that are still searched.
"""

import math
from collections.abc import Callable

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.native import library
from s2t2_dist.ot.simplex import NewtonSearch, below, newton_step
from s2t2_dist.ot.tiles import FUSED, Passes, tiles

ROW_STEPS = 3  # Newton steps of a tile's rows before Python asks whether one still moves
FEW = 8  # one column in so many is picked out of a tile; one entry in so many is kept by its index
RESIDUAL = {torch.float32: 1e-8, torch.float64: 1e-13}  # relative, where conjugate gradients stop
CG_STEPS = 2  # and their largest number, in multiples of U; U are enough without rounding


class Dual:
    """The plan that minimises |P - C|^2 / 2 with given row and column sums, and its gradient.

    One iteration solves for every row's potential, then for every column's, exactly: afterwards
    the columns hold up to rounding and the rows' error shrinks by a factor that depends on how
    the support connects rows and columns. Nothing of size V x U is kept but the cost itself, which
    must not change before `backward`.

    Every rank makes it together and calls `backward` together. Communication: one maximum of
    U + 1 numbers per iteration (and one more with a tolerance); one sum of two numbers per column
    that is still searched for each Newton step of the columns; in `backward`, one sum of four
    U-vectors and one U-vector for each step of conjugate gradients.

    Args:
        cost_VU: (V, U) float32 or float64, finite; this rank's rows, perhaps none.
        mu_V: (V,) float64, positive row sums, in the units of the cost.
        nu_U: (U,) float64, positive column sums, the same on every rank and of mu's total.
        comm: the ranks that share the rows.
        iterations: how many to take, at least 1; with a tolerance, the most to take.
        tolerance: largest relative error of a row sum at which to stop. Potentials resolve 1e-7
            (float32) or 2e-16 (float64) of the spread of C, and so the row sums cannot be closer.
        start: the `state` of a former solve with a cost nearby.
        backend: how rows are swept, as for `dykstra.Dykstra`.

    Attributes:
        iterations: how many were taken.
        converged: whether the tolerance was met; None without one.
        cg_iterations, cg_residual: of the last `backward`: steps of conjugate gradients and the
            size of what they left, relative to the sums of |dL/dP - row mean| over each column.
    """

    def __init__(
        self,
        cost_VU: torch.Tensor,
        mu_V: torch.Tensor,
        nu_U: torch.Tensor,
        comm: Comm,
        *,
        iterations: int,
        tolerance: float | None = None,
        start: tuple[torch.Tensor, torch.Tensor] | None = None,
        backend: str = "auto",
    ):
        self._cost_VU, self._mu_V1, self._nu_U = cost_VU.detach(), mu_V[:, None], nu_U
        self._native = backend in ("auto", "native") and library.can_call(self._cost_VU)
        self._comm, self._run = comm, Passes(cost_VU, FUSED.get(backend))
        self._top_V1 = cost_VU.new_empty(len(mu_V), 1)
        for rows in tiles(cost_VU):
            self._top_V1[rows] = self._cost_VU[rows].amax(1, keepdim=True)
        if start is None:
            self._row_V1 = -self._mu_V1.to(cost_VU.dtype)  # left of every root, with columns at 0
            self._col_U = cost_VU.new_zeros(len(nu_U))
        else:
            self._row_V1, self._col_U = (part.to(cost_VU).flatten() for part in start)
            self._row_V1 = self._row_V1[:, None]
        self.iterations, self.converged = 0, None
        self.cg_iterations, self.cg_residual = 0, 0.0
        self._iterate(iterations, tolerance)

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row potentials (1, V), relative to the row's largest cost, and column potentials (1, U).

        With a_i = row_i + max_j C_ij and b = column, P = max(C - a_i - b_j, 0).
        """
        return self._row_V1.T, self._col_U[None]

    def plan(self, rows: slice) -> torch.Tensor:
        """The (h, U) rows of P; entries at or below the potentials are exactly zero."""
        return self._run(_plan, *self._tile(rows))

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dL/dC over out_VU, from dL/dP; both may be one tensor. A collective.

        Implicit differentiation: on the support M, P = C - a_i - b_j with sums that stay, so
        dL/dC = M * (G - x_i - y_j), with x and y such that its row and column sums vanish. That
        is the gradient at the limit; of a plan that has not converged it is the gradient of the
        limit that has the same support. A row without support gets zeros.

        Without x, (diag(c) - M^T diag(1/r) M) y = column sums of M * (G - its row means): the
        Laplacian of a graph of the columns, two of them joined by each row that holds both. It
        has one null vector for each component of the graph, to which the right-hand side is
        orthogonal, and so are the steps of conjugate gradients from 0.
        """
        mean_V1, share_V1, sums, links = self._centre_rows(grad_VU)
        rest, size, diagonal, count = self._comm.sum_(sums)

        def laplacian(y):
            return count * y - self._comm.sum_(self._shared_sums(y, share_V1, links))

        y, self.cg_iterations, self.cg_residual = conjugate_gradients(
            laplacian, rest, diagonal, size, RESIDUAL[grad_VU.dtype]
        )
        for rows in tiles(self._cost_VU):
            unknowns = mean_V1[rows], share_V1[rows], y
            out_VU[rows] = self._run(_centred, *self._tile(rows), grad_VU[rows], *unknowns)

    def _tile(self, rows):
        return self._cost_VU[rows], self._top_V1[rows], self._row_V1[rows], self._col_U

    def _iterate(self, iterations, tolerance):
        while tolerance is not None or self.iterations < iterations:
            row_V1, top_U, sums, error = self._search_rows()
            *_, error = reduced = self._comm.max_(torch.cat((top_U, error)))
            if tolerance is not None and self.iterations:
                # The search began with the row sums of the present plan, which is then kept.
                self.converged = error.item() <= tolerance
                if self.converged or self.iterations == iterations:
                    return
            self._row_V1 = row_V1
            self._search_columns(reduced[:-1], sums)
            self.iterations += 1

    def _search_rows(self):
        """New row potentials for the columns', and, with them, what the column search starts from.

        Returns row_V1, the columns' largest entries (U,), their counts and excesses (2, U) and
        the largest relative error of a row sum under the former potentials (1,).
        """
        if self._native:
            return self._native_rows()
        row_V1 = torch.empty_like(self._row_V1)
        top_U = self._col_U.new_full(self._col_U.shape, -math.inf)
        sums = torch.zeros(2, len(top_U), dtype=torch.float64, device=top_U.device)
        error = top_U.new_zeros(1)
        for rows in tiles(self._cost_VU):
            cost, top, row, col = self._tile(rows)
            mu = self._mu_V1[rows]
            count = torch.full_like(mu, math.inf)
            row, count, off, moves = self._run(_search, cost, top, row, col, mu, count)
            error = torch.maximum(error, off)
            while moves:
                row, count, _, moves = self._run(_search, cost, top, row, col, mu, count)
            row_V1[rows] = row
            tile_top, tile_sums = self._run(_first_sums, cost, top, row, col)
            top_U = torch.maximum(top_U, tile_top)
            sums += tile_sums
        return row_V1, top_U, sums, error

    def _native_rows(self):
        (V, U), parts = self._cost_VU.shape, library.parts(len(self._cost_VU))
        row_V1 = self._row_V1.clone()
        errors = row_V1.new_zeros(parts)
        tops = row_V1.new_full((parts, U), -math.inf)
        sums = torch.zeros(parts, 2, U, dtype=torch.float64)
        arguments = (self._top_V1, row_V1, self._col_U, self._mu_V1, errors, tops, sums, parts)
        library.call("dual_rows", row_V1.dtype, self._cost_VU, V, U, *arguments)
        return row_V1, tops.amax(0), sums.sum(0), errors.amax(0, keepdim=True)

    def _search_columns(self, top_U, sums):
        """New column potentials: from the former ones, at which the first sums were taken."""
        search = NewtonSearch(top_U, self._nu_U, self._col_U)
        moving = search.update(*self._comm.sum_(sums))
        while len(moving):
            sums = self._column_sums(search.threshold, moving)
            moving = search.update(*self._comm.sum_(sums))
        self._col_U = search.threshold

    def _column_sums(self, threshold_U, moving):
        """Counts and excesses of some columns on this rank, (2, n)."""
        few = FEW * len(moving) <= len(threshold_U)
        if self._native:
            return self._native_columns(threshold_U, moving, few)
        sums = torch.zeros(2, len(moving), dtype=torch.float64, device=moving.device)
        for rows in tiles(self._cost_VU):
            cost, top, row, _ = self._tile(rows)
            if few:
                sums += _sums(cost[:, moving], top, row, threshold_U[moving])
            else:
                sums += self._run(_sums, cost, top, row, threshold_U)[:, moving]
        return sums

    def _native_columns(self, threshold_U, moving, few):
        (V, U), parts = self._cost_VU.shape, library.parts(len(self._cost_VU))
        col, columns = (threshold_U[moving], moving.int()) if few else (threshold_U, None)
        sums = torch.zeros(parts, 2, len(col), dtype=torch.float64)
        arguments = (self._top_V1, self._row_V1, col, columns, sums, parts)
        library.call("dual_columns", col.dtype, self._cost_VU, V, len(col), U, *arguments)
        return sums.sum(0) if few else sums.sum(0)[:, moving]

    def _centre_rows(self, grad_VU):
        """What the linear system is made of.

        Returns the rows' means of dL/dP on their support and one over its size (V, 1), the sums of
        `_centred_sums` (4, U), and the (2, entries) indices of the support: these where they are
        few, as they mostly are, because a step then costs a small part of a pass over C.
        """
        mean_V1, share_V1 = torch.zeros_like(self._mu_V1), torch.zeros_like(self._mu_V1)
        sums = torch.zeros(4, len(self._nu_U), dtype=torch.float64, device=grad_VU.device)
        links, room = [sums.new_zeros(2, 0, dtype=torch.int32)], grad_VU.numel() // FEW
        for rows in tiles(self._cost_VU):
            mean_V1[rows], share_V1[rows], tile_sums, on = self._run(
                _centred_sums, *self._tile(rows), grad_VU[rows]
            )
            sums += tile_sums
            if room >= 0:
                i, j = on.nonzero(as_tuple=True)
                links.append(torch.stack((i + rows.start, j)).int())
                room -= len(i)
        return mean_V1, share_V1, sums, torch.cat(links, 1) if room >= 0 else None

    def _shared_sums(self, y, share_V1, links):
        """M^T diag(1/r) M y of this rank's rows."""
        total = torch.zeros_like(y)
        if links is not None:
            i, j = links
            mean_V = torch.zeros_like(share_V1[:, 0]).index_add_(0, i, y[j]) * share_V1[:, 0]
            return total.index_add_(0, j, mean_V[i])
        for rows in tiles(self._cost_VU):
            total += self._run(_shared_sums, *self._tile(rows), share_V1[rows], y)
        return total


def conjugate_gradients(
    matrix: Callable[[torch.Tensor], torch.Tensor],
    rest: torch.Tensor,
    diagonal: torch.Tensor,
    size: torch.Tensor,
    tolerance: float,
) -> tuple[torch.Tensor, int, float]:
    """Solve matrix(y) = rest, semidefinite and consistent, with its diagonal as preconditioner.

    Hestenes and Stiefel 1952. Where the diagonal is 0, so are the row and y.

    Args:
        rest: the right-hand side (U,), float64.
        size: what it is measured by (U,): the sums of sizes whose difference it is, so that a
            right-hand side of rounding alone needs no step.
        tolerance: relative residual, in the norm of the preconditioner, at which to stop.

    Returns:
        y, the number of steps (at most 2 U) and the relative residual.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    scale = (size.square() * inverse).sum().item()
    y, direction, steps = torch.zeros_like(rest), inverse * rest, 0
    left = (rest * direction).sum().item()
    while left > tolerance**2 * scale and steps < CG_STEPS * len(y):
        image = matrix(direction)
        length = left / (direction * image).sum().item()
        y += length * direction
        rest = rest - length * image
        ahead = inverse * rest
        left, before = (rest * ahead).sum().item(), left
        direction = ahead + left / before * direction
        steps += 1
    return y, steps, math.sqrt(left / scale) if scale else 0.0


# Functions of one tile: cost (h, U), top (h, 1) the largest entry of each row of C, row (h, 1) and
# col (U,) the potentials. All take C - top: that leaves P as it is and float32 more digits.


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


def _plan(cost, top, row, col):
    return torch.relu((cost - top) - row - col)


def _centred_sums(cost, top, row, col, grad):
    """Row means of dL/dP on the support, one over its size in each row, (4, U) sums, the support.

    A row without support has neither, and nothing reads them. The sums, by column: of what the
    means leave, of its absolute value, the Laplacian's diagonal (exactly 0 for a column that
    shares no row) and the size of the support.
    """
    on = (cost - top) - row - col > 0
    share = 1 / on.to(cost.dtype).sum(1, keepdim=True).double()
    mean = torch.where(on, grad, 0.0).sum(1, keepdim=True, dtype=torch.float64) * share
    rest = torch.where(on, grad - mean, 0.0)
    diagonal = torch.where(on, 1 - share, 0.0).sum(0)
    size = on.to(cost.dtype).sum(0).double()
    return mean, share, torch.stack((rest.sum(0), rest.abs().sum(0), diagonal, size)), on


def _shared_sums(cost, top, row, col, share, y):
    """Column sums, on the support, of the row means of y on the support."""
    on = (cost - top) - row - col > 0
    mean = torch.where(on, y, 0.0).sum(1, keepdim=True) * share
    return torch.where(on, mean, 0.0).sum(0)


def _centred(cost, top, row, col, grad, mean, share, y):
    """dL/dC from dL/dP, its row means on the support, and the columns' unknowns."""
    on = (cost - top) - row - col > 0
    x = mean - torch.where(on, y, 0.0).sum(1, keepdim=True) * share
    return torch.where(on, grad - x - y, 0.0).to(grad.dtype)
