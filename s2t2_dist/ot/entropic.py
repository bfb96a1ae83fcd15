"""Entropic Sinkhorn with unit temperature, the dense baseline of the paper's table.

P = exp(C + f + g), from g_{-1} = 0 and for k = 0..n-1

    f_k = log mu - logsumexp over the row of (C + g_{k-1})
    g_k = log nu - logsumexp over the column of (C + f_k)

Only the potentials are stored. Shapes: V rows of this rank, U columns.
"""

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.tiles import tiles


class Entropic:
    """A solve of n iterations. One class for one rank and for many.

    Communication: a U-vector maximum and a U-vector sum per iteration; in `backward`, one
    U-vector sum per iteration and one more.

    Args:
        cost_VU, mu_V, nu_U, comm, iterations: as for `dykstra.Dykstra`.
    """

    state = None  # each half step is one formula: nothing to start a search from

    def __init__(
        self,
        cost_VU: torch.Tensor,
        mu_V: torch.Tensor,
        nu_U: torch.Tensor,
        comm: Comm,
        *,
        iterations: int,
    ):
        V, U = cost_VU.shape
        self.cost, self.mu, self.nu, self.comm = cost_VU, mu_V, nu_U, comm
        self.f = cost_VU.new_empty(iterations, V, 1)
        self.g = cost_VU.new_zeros(iterations + 1, U)  # g[k] belongs to iteration k - 1
        for k in range(iterations):
            for rows in tiles(cost_VU):
                row = torch.logsumexp(cost_VU[rows] + self.g[k], 1)
                self.f[k, rows, 0] = mu_V[rows].log() - row
            self.g[k + 1] = nu_U.log() - self._column_logsumexp(self.f[k])

    def plan(self, rows: slice) -> torch.Tensor:
        """The plan of a block of this rank's rows, (h, U)."""
        return torch.exp_((self.cost[rows] + self.f[-1, rows]).add_(self.g[-1]))

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dloss/dC over out_VU, from dloss/dP; both may be one tensor.

        Each normalisation takes away its softmax times the gradient of its potential.
        """
        grad_f = torch.zeros_like(self.mu)
        grad_g = torch.zeros_like(self.nu)
        for rows in tiles(self.cost):
            grad = torch.mul(grad_VU[rows], self.plan(rows), out=out_VU[rows])
            grad_f[rows] = grad.sum(1)
            grad_g += grad.sum(0)
        for k in range(len(self.f) - 1, -1, -1):
            by_column = (self.comm.sum_(grad_g) / self.nu).to(grad_VU.dtype)
            grad_g = torch.zeros_like(self.nu)
            for rows in tiles(self.cost):
                logits = self.cost[rows] + self.f[k, rows]
                part = torch.exp(logits + self.g[k + 1]).mul_(by_column)
                by_row = ((grad_f[rows] - part.sum(1)) / self.mu[rows]).to(grad_VU.dtype)
                other = torch.exp_(logits.add_(self.g[k])).mul_(by_row[:, None])
                out_VU[rows] -= part.add_(other)
                grad_g -= other.sum(0)
            grad_f.zero_()

    def _column_logsumexp(self, f):
        """log sum_i exp(C + f) of each column over all ranks, float64."""
        top = torch.full_like(self.g[0], -torch.inf)
        for rows in tiles(self.cost):
            top = torch.maximum(top, (self.cost[rows] + f[rows]).amax(0))
        self.comm.max_(top)
        total = torch.zeros_like(self.nu)
        for rows in tiles(self.cost):
            total += torch.exp_((self.cost[rows] + f[rows]).sub_(top)).sum(0)
        return self.comm.sum_(total).log_() + top
