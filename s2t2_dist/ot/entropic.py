"""Entropic Sinkhorn with unit temperature, the dense baseline of the paper's table.

P = exp(C + f + g), from g_{-1} = 0 and for k = 0..n-1

    f_k = log mu - logsumexp over the row of (C + g_{k-1})
    g_k = log nu - logsumexp over the column of (C + f_k)

Only the potentials are stored. Shapes: V rows of this rank, U columns.
"""

from dataclasses import dataclass

import torch

from s2t2_dist.ot.problem import Problem, Thresholds, check_iterations
from s2t2_dist.ot.tiles import tiles


@dataclass(frozen=True)
class Entropic:
    """The method `dense`: n iterations, for one rank and for many.

    Communication: a U-vector maximum and a U-vector sum per iteration.

    Args:
        iterations: n, at least 1.
    """

    iterations: int = 3

    def __post_init__(self):
        check_iterations(self.iterations)

    def solve(self, problem: Problem, start: Thresholds | None = None) -> "EntropicSolution":
        """See `Solver`. Each half step is one formula, so there is no search to start."""
        cost, n = problem.cost_VU, self.iterations
        V, U = cost.shape
        f, g = cost.new_empty(n, V, 1), cost.new_zeros(n + 1, U)
        for k in range(n):
            for rows in tiles(cost):
                row = torch.logsumexp(cost[rows] + g[k], 1)
                f[k, rows, 0] = problem.mu_V[rows].log() - row
            g[k + 1] = problem.nu_U.log() - _column_logsumexp(problem, f[k])
        return EntropicSolution(problem, f, g)


@dataclass(frozen=True, eq=False)
class EntropicSolution:
    """Potentials f (n, V, 1) and g (n + 1, U), g[k] of iteration k - 1, and what they give."""

    problem: Problem
    f: torch.Tensor
    g: torch.Tensor

    state = None
    converged = None

    @property
    def iterations(self) -> int:
        return len(self.f)

    def plan(self, rows: slice) -> torch.Tensor:
        """The plan of a block of this rank's rows, (h, U)."""
        return torch.exp_((self.problem.cost_VU[rows] + self.f[-1, rows]).add_(self.g[-1]))

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dloss/dC over out_VU, from dloss/dP; both may be one tensor.

        Each normalisation takes away its softmax times the gradient of its potential.
        Communication: one U-vector sum per iteration.
        """
        problem = self.problem
        cost, mu, nu = problem.cost_VU, problem.mu_V, problem.nu_U
        grad_f, grad_g = torch.zeros_like(mu), torch.zeros_like(nu)
        for rows in tiles(cost):
            grad = torch.mul(grad_VU[rows], self.plan(rows), out=out_VU[rows])
            grad_f[rows] = grad.sum(1)
            grad_g += grad.sum(0)
        for k in range(self.iterations - 1, -1, -1):
            by_column = (problem.comm.sum_(grad_g) / nu).to(grad_VU.dtype)
            grad_g = torch.zeros_like(nu)
            for rows in tiles(cost):
                logits = cost[rows] + self.f[k, rows]
                part = torch.exp(logits + self.g[k + 1]).mul_(by_column)
                by_row = ((grad_f[rows] - part.sum(1)) / mu[rows]).to(grad_VU.dtype)
                other = torch.exp_(logits.add_(self.g[k])).mul_(by_row[:, None])
                out_VU[rows] -= part.add_(other)
                grad_g -= other.sum(0)
            grad_f.zero_()


def _column_logsumexp(problem: Problem, f_V1: torch.Tensor) -> torch.Tensor:
    """log sum_i exp(C + f) of each column over all ranks, float64."""
    cost = problem.cost_VU
    top = cost.new_full(cost.shape[1:], -torch.inf)
    for rows in tiles(cost):
        top = torch.maximum(top, (cost[rows] + f_V1[rows]).amax(0))
    problem.comm.max_(top)
    total = torch.zeros_like(problem.nu_U)
    for rows in tiles(cost):
        total += torch.exp_((cost[rows] + f_V1[rows]).sub_(top)).sum(0)
    return problem.comm.sum_(total).log_() + top
