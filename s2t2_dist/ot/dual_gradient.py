"""The gradient of the dual method's plan, by implicit differentiation of its limit.

On the support M, P = C - a_i - b_j with row and column sums that stay, so
dL/dC = M * (G - x_i - y_j), where G = dL/dP, and x and y are such that its row and column sums
vanish. That is the gradient at the limit; of a plan that has not converged it is the gradient of
the limit that has the same support. A row without support gets zeros.

Without x, (diag(c) - M^T diag(1/r) M) y = column sums of M * (G - its row means), with r and c the
sizes of the support in each row and column: the Laplacian of a graph of the columns, two of them
joined by each row that holds both. It has one null vector for each component of the graph, to
which the right-hand side is orthogonal, and so are the steps of conjugate gradients from 0.

Shapes: V rows of this rank, U columns; h rows of a tile.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.dual_passes import DualPasses
from s2t2_dist.ot.tiles import tiles

FEW = 8  # one entry in so many is kept by its index
RESIDUAL = {torch.float32: 1e-8, torch.float64: 1e-13}  # relative, where conjugate gradients stop
CG_STEPS = 2  # and their largest number, in multiples of U; U are enough without rounding

Potentials = tuple[torch.Tensor, torch.Tensor]


def write_gradient(
    passes: DualPasses,
    potentials: Potentials,
    comm: Comm,
    grad_VU: torch.Tensor,
    out_VU: torch.Tensor,
) -> tuple[int, float]:
    """Write dL/dC over out_VU, from dL/dP; both may be one tensor. A collective.

    Communication: one sum of four U-vectors and one U-vector for each step of conjugate gradients.

    Args:
        potentials: row (V, 1) and column (U,) potentials, see `DualSolution`.

    Returns:
        steps of conjugate gradients and their relative residual.
    """
    centred = _centre_rows(passes, potentials, grad_VU)
    rest, size, diagonal, count = comm.sum_(centred.sums)

    def laplacian(y):
        return count * y - comm.sum_(_sum_shared(passes, potentials, centred, y))

    y, steps, residual = conjugate_gradients(
        laplacian, rest, diagonal, size, RESIDUAL[grad_VU.dtype]
    )
    for rows in tiles(passes.cost_VU):
        tile = passes.tile(rows, *potentials)
        unknowns = centred.mean_V1[rows], centred.share_V1[rows], y
        out_VU[rows] = passes.run(_centred, *tile, grad_VU[rows], *unknowns)
    return steps, residual


class _Centred(NamedTuple):
    """What the linear system is made of.

    Attributes:
        mean_V1: the rows' means of dL/dP on their support.
        share_V1: one over the size of that support.
        sums: (4, U), see `_centred_sums`.
        links: (2, entries), the indices of the support where they are few, as they mostly are: a
            step then costs a small part of a pass over C. None where they are many.
    """

    mean_V1: torch.Tensor
    share_V1: torch.Tensor
    sums: torch.Tensor
    links: torch.Tensor | None


def _centre_rows(passes: DualPasses, potentials: Potentials, grad_VU: torch.Tensor) -> _Centred:
    mean_V1, share_V1 = torch.zeros_like(passes.mu_V1), torch.zeros_like(passes.mu_V1)
    sums = torch.zeros(4, grad_VU.shape[1], dtype=torch.float64, device=grad_VU.device)
    links, room = [sums.new_zeros(2, 0, dtype=torch.int32)], grad_VU.numel() // FEW
    for rows in tiles(passes.cost_VU):
        tile = passes.tile(rows, *potentials)
        mean_V1[rows], share_V1[rows], tile_sums, on = passes.run(
            _centred_sums, *tile, grad_VU[rows]
        )
        sums += tile_sums
        if room >= 0:
            i, j = on.nonzero(as_tuple=True)
            links.append(torch.stack((i + rows.start, j)).int())
            room -= len(i)
    return _Centred(mean_V1, share_V1, sums, torch.cat(links, 1) if room >= 0 else None)


def _sum_shared(
    passes: DualPasses, potentials: Potentials, centred: _Centred, y: torch.Tensor
) -> torch.Tensor:
    """M^T diag(1/r) M y of this rank's rows."""
    total = torch.zeros_like(y)
    if centred.links is not None:
        i, j = centred.links
        share_V = centred.share_V1[:, 0]
        mean_V = torch.zeros_like(share_V).index_add_(0, i, y[j]) * share_V
        return total.index_add_(0, j, mean_V[i])
    for rows in tiles(passes.cost_VU):
        tile = passes.tile(rows, *potentials)
        total += passes.run(_shared_sums, *tile, centred.share_V1[rows], y)
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


# Functions of one tile, as in `dual_passes`.


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
