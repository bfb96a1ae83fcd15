"""The baseline without constraints, of the paper's table: P is the parameter itself."""

from dataclasses import dataclass

import torch

from s2t2_dist.ot.problem import Problem, Thresholds


@dataclass(frozen=True)
class Plain:
    """The method `plain`: P = C. Its marginals are whatever they are."""

    def solve(self, problem: Problem, start: Thresholds | None = None) -> "PlainSolution":
        """See `Solver`; there is nothing to solve and no collective."""
        return PlainSolution(problem.cost_VU)


@dataclass(frozen=True, eq=False)
class PlainSolution:
    """C, which is P."""

    cost_VU: torch.Tensor

    state = None
    iterations = 0
    converged = None

    def plan(self, rows: slice) -> torch.Tensor:
        """The plan of a block of this rank's rows, (h, U): a view of C."""
        return self.cost_VU[rows]

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """dloss/dC is dloss/dP."""
        if out_VU is not grad_VU:
            out_VU.copy_(grad_VU)
